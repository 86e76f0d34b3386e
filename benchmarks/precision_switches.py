"""What the experimental switches do: progressive correlation, element tables, int8, formats of single layers.

    python benchmarks/precision_switches.py train --runs runs/precision [--data ../shared/data]
    python benchmarks/precision_switches.py report --runs runs/precision

``train`` trains the small MACE of ``precision_training.py`` on 3BPA once with every switch, from the same seed and the
same batches; the plain run of that benchmark, ``3bpa_float32_0``, is what they are compared with (it is trained here
where it is missing). Interrupted, it goes on where it stopped. ``report`` adds what needs no training, on the plain
model: roles in int8, and bfloat16 in one layer alone. Writes ``benchmarks/results/precision_switches.json`` and
``.png``.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch
from precision_training import configuration, errors, files
from settings import RESULTS, ROOT, machine, write

PLAIN = "3bpa_float32_0"
#: Changes of the configuration, section by section.
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "3bpa_progressive_0": {"training": {"progressive_correlation": [8, 16]}},
    "3bpa_tables_rank2_0": {"model": {"element_tables": {"rank": 2}}},
    "3bpa_tables_bits8_0": {"model": {"element_tables": {"bits": 8}}},
    "3bpa_tables_rank2_bits4_0": {"model": {"element_tables": {"rank": 2, "bits": 4}}},
}
INT8 = [{"readout": "weights"}, {"readout": "dynamic"}, {"radial": "weights"}, {"radial": "dynamic"}]
LAYERS: dict[str, dict[str, Any]] = {
    "mixed": {"preset": "mixed"},
    "mixed in layer 0 alone": {"preset": "mixed", "layers": {1: {"radial": "float32", "paths": "float32"}}},
    "mixed in layer 1 alone": {"preset": "mixed", "layers": {0: {"radial": "float32", "paths": "float32"}}},
}


def train(arguments: argparse.Namespace) -> None:
    from steradian.config import load_config, parse_config
    from steradian.training.run import fit

    for name, changes in {PLAIN: {}, **SWITCHES}.items():
        content = configuration("3bpa", "float32", arguments.data.resolve(), arguments.runs.resolve(), 0)
        content["name"] = name
        for section, values in changes.items():
            content[section] |= values
        folder = Path(content["output"]) / name
        started = (folder / "last.ckpt").exists()
        config = load_config(folder / "config.yaml") if started else parse_config(content)
        result = fit(config, resume=folder if started else None, overwrite=folder.exists() and not started)
        print(name, result.reason, result.epochs, "epochs", flush=True)
        if result.reason == "interrupted":
            sys.exit(130)


def trained(arguments: argparse.Namespace) -> dict[str, Any]:
    """Test errors and size of every run."""
    from steradian.build import load_potential

    results: dict[str, Any] = {}
    for name in (PLAIN, *SWITCHES):
        run = arguments.runs / name
        if not (run / "model.safetensors").exists():
            continue
        with open(run / "metrics.csv", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        results[name] = {
            "epochs": len(rows),
            "parameters": load_potential(run).num_parameters,
            "test": errors(run, "3bpa", arguments.data, "float32"),
            "validation_forces_mae": [float(row["validation/forces_mae"]) for row in rows],
        }
        print(name, results[name]["parameters"], results[name]["test"], flush=True)
    return results


def batches(arguments: argparse.Namespace, cutoff: float, count: int = 40) -> list[Any]:
    from steradian.config import KeysConfig, UnitsConfig
    from steradian.data.files import read_structures
    from steradian.graph import batch_graphs
    from steradian.graph.neighbors import make_graph

    _, test, units = files("3bpa", arguments.data)
    frames = read_structures(test, KeysConfig(), UnitsConfig(**units), ignore_cell=True)[:count]
    graphs = [make_graph(frame, cutoff) for frame in frames]
    return [batch_graphs(graphs[start : start + 5]) for start in range(0, count, 5)]


def untrained(arguments: argparse.Namespace) -> dict[str, Any]:
    """Change of forces by int8 and by layers of bfloat16, against the same weights in float64; refusals."""
    from steradian.build import load_potential
    from steradian.config import PrecisionConfig
    from steradian.execution.int8 import QuantizationError, quantized

    run = arguments.runs / PLAIN
    exact = load_potential(run, precision="float64")
    graphs = batches(arguments, exact.cutoff)
    truth = torch.cat([exact(graph).forces for graph in graphs])
    labels = torch.cat([graph.forces for graph in graphs])
    own = float((truth - labels).abs().mean())

    def measured(model: Any) -> dict[str, float]:
        model.for_inference(radial_table=False)
        forces = torch.cat([model(graph).forces.double() for graph in graphs])
        started = time.perf_counter()
        for graph in graphs:
            model(graph)
        return {
            "force_change_meV_A": 1e3 * float((forces - truth).abs().mean()),
            "force_mae_meV_A": 1e3 * float((forces - labels).abs().mean()),
            "ms_per_batch_of_5_on_a_shared_machine": 1e3 * (time.perf_counter() - started) / len(graphs),
        }

    results: dict[str, Any] = {"own_force_error_meV_A": 1e3 * own, "float32": measured(load_potential(run))}
    for roles in INT8:
        name = "int8 " + ", ".join(f"{role} ({kind})" for role, kind in roles.items())
        results[name] = measured(quantized(load_potential(run), graphs, roles, force_bound=float("inf")))
        try:
            quantized(load_potential(run), graphs, roles)
            results[name]["refused"] = False
        except QuantizationError as error:
            results[name]["refused"] = str(error)
    for name, precision in LAYERS.items():
        results[name] = measured(load_potential(run, precision=PrecisionConfig(**precision)))
    for name, result in results.items():
        print(name, result, flush=True)
    return results


def picture(runs: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.4))
    for name, run in runs.items():
        values = [1000 * value for value in run["validation_forces_mae"]]
        label = name.removeprefix("3bpa_").removesuffix("_0").replace("_", " ")
        axis.semilogy(range(1, len(values) + 1), values, label=label, linewidth=1)
    axis.set(xlabel="epoch", ylabel="force MAE, validation [meV/Å]", title="3BPA, MACE with 32 channels")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "precision_switches.png", dpi=110)


def report(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    runs = trained(arguments)
    picture(runs)
    print(write("precision_switches", {"settings": machine(), "trained": runs, "inference": untrained(arguments)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["train", "report"])
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"))
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    arguments = parser.parse_args()
    {"train": train, "report": report}[arguments.action](arguments)


if __name__ == "__main__":
    main()
