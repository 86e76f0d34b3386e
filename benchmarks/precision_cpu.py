"""`mixed` against `float32` on the main case of ``cpu_mace.py``: time of energy + forces, and the error it costs.

    python benchmarks/precision_cpu.py MODEL [--data ../shared/data] [--repeats 21] [--frames 30]

MODEL is a trained MACE of 128 channels, L = 1, l_max = 3, correlation 3 (the error needs trained weights; the time does
not depend on them). The first five frames of 3BPA, one thread, presets in turn; once with the radial networks and once
with their tables, which the ASE calculator uses. Ratios are medians of ratios of neighbours in time. Errors are means
over the components of the forces of the test frames, against the same weights in float64.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from settings import ROOT, interleaved, machine, median_ms, median_ratio, write

from steradian.build import load_potential
from steradian.config import KeysConfig, PrecisionConfig, UnitsConfig
from steradian.data.files import read_structures
from steradian.graph import batch_graphs
from steradian.graph.neighbors import make_graph

CASES: dict[str, str | PrecisionConfig] = {
    "float32": "float32",
    "mixed": "mixed",
    "radial in bfloat16": PrecisionConfig(roles={"radial": "bfloat16"}),
    "mixed, node in bfloat16 too": PrecisionConfig(preset="mixed", roles={"node": "bfloat16"}),
}


def graphs(path: Path, count: int, cutoff: float, batch: int = 5) -> list[Any]:
    frames = read_structures(path, KeysConfig(), UnitsConfig(), ignore_cell=True)[:count]
    made = [make_graph(frame, cutoff) for frame in frames]
    return [batch_graphs(made[start : start + batch]) for start in range(0, len(made), batch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--frames", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def load(precision: str | PrecisionConfig, table: bool = False) -> Any:
        return load_potential(arguments.model, precision=precision).for_inference(radial_table=table)

    cutoff = load("float32").cutoff
    (timed,) = graphs(arguments.data / "3bpa/train_300K.xyz", 5, cutoff)
    results: dict[str, Any] = {"edges": timed.num_edges}
    for label, table in (("energy + forces", False), ("energy + forces, radial table", True)):
        models = {name: load(precision, table) for name, precision in CASES.items()}
        times = interleaved({name: lambda m=model: m(timed) for name, model in models.items()}, arguments.repeats, 3)
        results[label] = {
            name: {
                "median_ms": median_ms(values),
                "fastest_ms": round(1e3 * min(values), 3),
                "times_faster_than_float32": median_ratio(times["float32"], values),
            }
            for name, values in times.items()
        }
    test = graphs(arguments.data / "3bpa/test_300K.npz", arguments.frames, cutoff)
    exact_model = load("float64")
    exact = torch.cat([exact_model(graph).forces for graph in test])
    own = float((exact - torch.cat([graph.forces for graph in test])).abs().mean())
    results["own_force_error_meV_A"] = round(1e3 * own, 3)
    results["bound_meV_A"] = round(0.1 + 50 * own, 3)
    for name, precision in CASES.items():
        for label, table in (("force_change_meV_A", False), ("force_change_with_table_meV_A", True)):
            model = load(precision, table)
            found = torch.cat([model(graph).forces.double() for graph in test])
            results.setdefault(label, {})[name] = round(1e3 * float((found - exact).abs().mean()), 5)
    for key, value in results.items():
        print(key, value)
    print(write("precision_cpu", {"settings": machine(), "results": results}))


if __name__ == "__main__":
    main()
