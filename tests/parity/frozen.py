"""What the makers of frozen numbers and the parity tests share; needs numpy only, so it runs in every environment."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np


def structures() -> dict[str, dict]:
    """Frames without symmetry: positions [Å], numbers, cell [Å] (rows) and periodicity."""
    random = np.random.default_rng(20)

    def frame(numbers, box, cell=None, pbc=(False, False, False), closest=0.8):
        positions = np.zeros((0, 3))
        while len(positions) < len(numbers):
            trial = random.uniform(0, 1, 3) @ np.asarray(box, dtype=float)
            if all(np.linalg.norm(trial - other) > closest for other in positions):
                positions = np.vstack([positions, trial])
        # multiples of 2^-20 Å: short, and exact in every precision used here
        return {
            "positions": np.round(positions * 2**20) / 2**20,
            "numbers": np.array(numbers),
            "cell": np.zeros((3, 3)) if cell is None else np.array(cell, dtype=float),
            "pbc": np.array(pbc),
        }

    triclinic = [[5.5, 0.25, -0.5], [1.25, 5.0, 0.75], [-0.75, 1.5, 6.0]]
    slab = [[5.25, 0.5, 0.0], [-1.0, 5.75, 0.25], [0.5, -0.25, 12.0]]
    frames = {
        "molecule": frame([6, 1, 8, 7, 1, 6, 1, 1], np.diag([4.0, 3.5, 3.0])),
        "water": frame([8, 1, 1, 8, 1, 1], np.diag([3.5, 3.5, 3.0])),
        "triclinic": frame([7, 8, 1, 6, 1], triclinic, triclinic, (True, True, True), closest=1.5),
        "slab": frame([8, 1, 6, 1, 7], np.diag([4.5, 4.5, 3.0]), slab, (True, True, False), closest=1.2),
        "isolated": frame([7, 1, 6, 8], np.diag([3.0, 2.5, 2.0])),
    }
    frames["isolated"]["positions"][2] += 64.0  # an atom without neighbours
    return frames


def weight(model: str, entry: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Numbers of variance ``scale**2`` for one entry of a state dict, the same in every environment.

    Large models are not stored: who has the name and the shape of an entry has its numbers. ``RandomState`` never
    changes its stream.
    """
    random = np.random.RandomState(zlib.crc32(f"{model}/{entry}".encode()))
    return random.randint(-443, 444, size=shape) * (scale / 256.0)


def compare(made: dict[str, np.ndarray], frozen: dict[str, np.ndarray], name: str) -> float:
    """Largest difference, relative to the largest entry of each array.

    Raises:
        SystemExit: entries missing or different.
    """
    if set(made) != set(frozen):
        raise SystemExit(f"{name}: entries differ: {sorted(set(made) ^ set(frozen))}")
    worst = 0.0
    for key, value in made.items():
        if value.dtype.kind not in "fiub":
            if str(value) != str(frozen[key]):
                raise SystemExit(f"{name}: {key} differs")
            continue
        if value.shape != frozen[key].shape:
            raise SystemExit(f"{name}: {key} has shape {value.shape}, frozen is {frozen[key].shape}")
        new, old = value.astype(np.float64), frozen[key].astype(np.float64)
        worst = max(worst, float(np.abs(new - old).max(initial=0) / max(np.abs(old).max(initial=0), 1e-300)))
    if not worst < 1e-10:
        raise SystemExit(f"{name}: the numbers differ from the frozen ones by {worst:.2g} (relative)")
    return worst


def write_or_check(description: str | None, prefix: str, make: Callable[[], dict[str, dict[str, np.ndarray]]]) -> None:
    """The command line of a maker: ``FOLDER`` writes the files, ``FOLDER --check`` compares with them.

    Args:
        description: for ``--help``.
        prefix: of the files' names.
        make: content of every file by name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the frozen files and write nothing")
    arguments = parser.parse_args()
    for name, content in make().items():
        path = arguments.folder / f"{prefix}_{name}.npz"
        if arguments.check:
            with np.load(path) as frozen:
                worst = compare(content, dict(frozen), name)
            print(f"{path.name}: equal to the frozen numbers, worst relative difference {worst:.1e}")
        else:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **content)
            print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
