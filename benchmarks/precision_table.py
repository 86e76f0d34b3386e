"""Every role and preset of precision on MACE, MACE-MARA, NequIP and the EFA network, for 3BPA and periodic water.

    python benchmarks/precision_table.py --runs runs/precision [--data ../shared/data] [--epochs 4] [--main FOLDER]

Small models (32 channels, two layers) are trained for ``--epochs`` epochs (0: random weights; the JSON says which) and
measured by the same code as ``steradian precision``. ``--main`` adds a trained model with the 128 channels of
``cpu_mace.py`` on 3BPA. Cases that stand in ``benchmarks/results/precision_table.json`` already are not done again, so
the script can be interrupted; ``--again`` starts over.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from settings import RESULTS, ROOT, machine, write

SMALL = {"num_channels": 32, "num_layers": 2, "cutoff_A": 4.0}
MACE = {
    "kind": "mace", "hidden_l": 1, "l_max": 2, "correlation": 3, "radial_mlp": [64, 64], "message_scale": "mean",
    **SMALL,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "MACE": {"host": MACE},
    "MACE-MARA": {"host": MACE, "edge_gate": {"kind": "mara", "form": "published", "frame": "lab"}},
    "NequIP": {"host": {"kind": "nequip", "l_max": 2, "radial_mlp": [64, 64], **SMALL}},
    "EFA network": {"host": {"kind": "o3mpnn", "l_max": 2, **SMALL}, "global_mixer": {"kind": "efa"}},
}
#: Structures that are measured and at once, frames that are trained on.
SETS = {"3bpa": (6, 3, 200), "water": (2, 1, 40)}


def model_section(label: str, name: str) -> dict[str, Any]:
    """Water is periodic, which Euclidean attention must be told."""
    section = MODELS[label]
    if name == "water" and "global_mixer" in section:
        section = {**section, "global_mixer": {**section["global_mixer"], "periodic": True}}
    return section


def structures(name: str, data: Path, test: bool) -> list[Any]:
    from steradian.config import KeysConfig, UnitsConfig
    from steradian.data.files import read_structures

    if name == "water":
        return read_structures(data / ("water/data_3" if test else "water/data_0"), KeysConfig(), UnitsConfig())
    path = data / ("3bpa/test_300K.npz" if test else "3bpa/train_300K.xyz")
    return read_structures(path, KeysConfig(), UnitsConfig(), ignore_cell=True)


def train(label: str, name: str, arguments: argparse.Namespace) -> Path:
    """The folder of a short training run."""
    from steradian.config import load_config, parse_config
    from steradian.training.run import fit

    run = f"table_{name}_{label.replace(' ', '_').lower()}"
    folder = arguments.runs.resolve() / run
    data = arguments.data.resolve()
    file = data / ("water/data_0" if name == "water" else "3bpa/train_300K.xyz")
    content = {
        "name": run,
        "output": str(folder.parent),
        "model": model_section(label, name),
        "data": {
            "train": str(file),
            "split": {"train": SETS[name][2], "validation": 5},
            "batch": {"graphs": 1 if name == "water" else 5},
            "ignore_cell": name != "water",
        },
        "training": {"max_epochs": arguments.epochs, "schedule": {"kind": "cosine"}, "threads": 1},
    }
    started = (folder / "last.ckpt").exists()
    config = load_config(folder / "config.yaml") if started else parse_config(content)
    if not started or not (folder / "model.safetensors").exists():
        fit(config, resume=folder if started else None, overwrite=folder.exists() and not started)
    return folder


def random_potential(label: str, name: str, frames: list[Any]) -> Any:
    from steradian.build import build_potential
    from steradian.config import ModelConfig
    from steradian.data.statistics import compute_statistics

    config = ModelConfig.model_validate(model_section(label, name))
    if config.host.kind == "o3mpnn":  # as published it starts from zero
        config.host.zero_init = False
    statistics, _ = compute_statistics(frames[:20], config.host.cutoff_A)
    return build_potential(config, statistics, seed=0)


def measure(label: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from steradian.build import load_potential
    from steradian.studies.precision import StudySettings, precision_study

    count, batch, _ = SETS[name]
    if label == "main":
        potential, epochs = load_potential(arguments.main), "trained beforehand"
    elif arguments.epochs:
        potential, epochs = load_potential(train(label, name, arguments)), arguments.epochs
    else:
        potential, epochs = random_potential(label, name, structures(name, arguments.data, False)), 0
    settings = StudySettings(max_structures=count, batch=batch, md_steps=arguments.md_steps, repeats=5)
    study = precision_study(potential, structures(name, arguments.data, True), settings)
    print(f"{label}, {name} ({epochs} epochs)\n{study.table().text()}\n{study.summary()}\n", flush=True)
    return {"epochs": epochs, **study.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"))
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--main", type=Path, help="folder of a trained model with 128 channels, for 3BPA")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--md-steps", type=int, default=200)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / "precision_table.json"
    results: dict[str, Any] = {}
    if path.exists() and not arguments.again:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
    cases = [("main", "3bpa")] if arguments.main else []
    cases += [(label, name) for name in arguments.sets for label in arguments.models]
    for label, name in cases:
        if label not in results.get(name, {}):
            results.setdefault(name, {})[label] = measure(label, name, arguments)
            write("precision_table", {"settings": machine(), "results": results})
    print(path)


if __name__ == "__main__":
    main()
