"""How large messages, energies and forces are at the start, against the number of neighbours and ``message_scale``.

Hosts with random weights, 5 to 60 neighbours per atom, in four ways:

* ``independent``: atoms anywhere but within 0.8 Å of each other, cutoff 5 Å, the density varies. Neighbours know next
  to nothing of each other, and their distances have the same distribution at every density: the case that a rule can
  be derived for.
* ``cutoff``: a disordered solid of 0.1 atoms per Å^3 (that of organic matter); the cutoff varies.
* ``density``: the same at other densities; the cutoff is 5 Å.
* ``crystal``: a rattled face-centred crystal of 0.1 atoms per Å^3; the cutoff varies, 10 to 60 neighbours.

Sizes are root mean squares over atoms, channels and seeds; the exponent p of ``size ~ neighbours^p`` is a least-squares
fit, 0 where a rule makes the size independent of the number of neighbours. Energies are those of atoms less that of the
isolated atom. "Over basis" is what a division by the root of ``sum_j |b(r_ij)|^2`` (b the radial basis times envelope,
mean over atoms) would give.

    OMP_NUM_THREADS=1 python benchmarks/activations.py
    python benchmarks/activations.py --table          the tables of the documentation, from the JSON
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from ase.build import bulk
from settings import RESULTS, machine, write

from steradian.build import build_potential
from steradian.config import parse_config
from steradian.data.statistics import DatasetStatistics
from steradian.evaluation.activations import Activation, activations, random_structures
from steradian.graph import Edges, batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.hosts.base import message_divisor
from steradian.potential import Potential

NEIGHBORS = (5, 10, 20, 40, 60)
CUTOFF = 5.0
ELEMENTS = (1, 6, 8)
MACE = {"kind": "mace", "num_channels": 32, "l_max": 2, "hidden_l": 1}
HOSTS: dict[str, dict[str, Any]] = {
    **{f"MACE, correlation {order}": {**MACE, "correlation": order} for order in (1, 2, 3)},
    "NequIP": {"kind": "nequip", "num_channels": 32, "l_max": 2, "num_layers": 3},
    "ViSNet": {"kind": "visnet", "num_channels": 64, "num_layers": 3},
    "O3MPNN": {"kind": "o3mpnn", "num_channels": 32, "num_layers": 2, "zero_init": False},
}
SCALES = ("mean", "root")
KINDS = ("independent", "cutoff", "density", "crystal")
DENSITY = 0.1  # [atoms per Å^3]
CORE = 0.8  # [Å]


def cutoff_of(kind: str, neighbors: float) -> float:
    return (3 * neighbors / (4 * np.pi * DENSITY)) ** (1 / 3) if kind in ("cutoff", "crystal") else CUTOFF


def model(host: dict[str, Any], scale: str, cutoff: float, neighbors: float, seed: int) -> Potential | None:
    """The host with random weights, or None if it has no such setting."""
    section = {**host, "message_scale": scale, "cutoff_A": cutoff}
    try:
        config = parse_config({"model": {"host": section, "precision": "float64"}}).model
    except ValueError as error:
        if "message_scale" in str(error):
            return None
        raise
    statistics = DatasetStatistics(
        elements=ELEMENTS, atom_references=dict.fromkeys(ELEMENTS, 0.0), avg_num_neighbors=neighbors, energy_shift=0.0,
        force_rms=1.0, energy_std=1.0, num_frames=1, reference_report="made up",
    )  # fmt: skip
    return build_potential(config, statistics, seed=seed).eval()


def crystal(seed: int) -> Structure:
    """A face-centred crystal of the three elements in disorder, rattled by 3 % of the distance of neighbours."""
    random = np.random.default_rng(seed)
    edge = (4 / DENSITY) ** (1 / 3)
    atoms = bulk("Al", "fcc", a=edge, cubic=True).repeat(3)
    return Structure(
        numbers=random.permutation(np.resize(np.array(ELEMENTS), len(atoms))),
        positions=atoms.positions + random.normal(scale=0.03 * edge / 2**0.5, size=(len(atoms), 3)),
        cell=np.asarray(atoms.cell),
        pbc=np.full(3, True),
    )


def structures(kind: str, neighbors: float, seed: int, like: Potential) -> list[Structure]:
    """Structures whose atoms have about so many neighbours."""
    if kind == "crystal":
        return [crystal(seed)]
    apart = CORE if kind == "independent" else None
    return random_structures(like, count=2, num_atoms=64, neighbors=neighbors, seed=seed, apart=apart)


def environment(potential: Potential, chosen: list[Structure]) -> dict[str, float]:
    """Mean squares of the atoms' energies less those of isolated atoms, and of the forces."""
    graph = batch_graphs([make_graph(structure, potential.cutoff) for structure in chosen])
    found = potential(graph)
    alone = batch_graphs(
        [make_graph(Structure(np.array([number]), np.zeros((1, 3))), potential.cutoff) for number in ELEMENTS]
    )
    energies = potential(alone, forces=False).atom_energies
    of_atom = energies[torch.searchsorted(torch.tensor(ELEMENTS), graph.numbers)]
    return {
        "energy": float((found.atom_energies - of_atom).square().mean()),
        "forces": float(found.forces.square().mean()),
    }


def basis_norm(potential: Potential, chosen: list[Structure]) -> float:
    """Mean over atoms of ``sum_j |b(r_ij)|^2``, b the radial basis times envelope."""
    seen: list[Edges] = []

    def look(_: Any, given: tuple[Any, ...]) -> None:
        seen.extend(each for each in given if isinstance(each, Edges))

    (first, *_) = potential.host.get_submodule("layers").children()
    handle = first.register_forward_pre_hook(look)
    potential(batch_graphs([make_graph(structure, potential.cutoff) for structure in chosen]), forces=False)
    handle.remove()
    return float(seen[0].radial.square().sum() / seen[0].num_atoms)


def groups(found: list[Activation]) -> dict[str, float]:
    """Squares of the sizes of messages, by name."""
    last = max(entry.layer for entry in found if entry.layer is not None)
    squares: dict[str, list[float]] = {}
    for entry in found:
        if not entry.quantity.startswith("messages") or entry.layer not in (0, last):
            continue
        where = "first" if entry.layer == 0 else "last"
        scalars = entry.quantity == "messages 0e"
        squares.setdefault(f"{where} scalars" if scalars else f"{where} l > 0", []).append(entry.rms**2)
        if scalars:
            squares.setdefault(f"{where} scalars, spread", []).append(entry.spread**2)
    return {name: float(np.mean(values)) for name, values in squares.items()}


def sizes(host: dict[str, Any], scale: str, kind: str, num_seeds: int) -> dict[str, Any] | None:
    """Root mean squares of every group, one number per density, and exponents."""
    if model(host, scale, CUTOFF, 10.0, 0) is None:
        return None
    rows, counts = [], []
    for neighbors in NEIGHBORS[1:] if kind == "crystal" else NEIGHBORS:
        cutoff, squares, edges, norms = cutoff_of(kind, neighbors), [], [], []
        for seed in range(num_seeds):
            like = model(host, scale, cutoff, neighbors, seed)
            assert like is not None
            chosen = structures(kind, neighbors, seed, like)
            graphs = [make_graph(structure, cutoff) for structure in chosen]
            edges.append(sum(graph.num_edges for graph in graphs) / sum(graph.num_atoms for graph in graphs))
            potential = model(host, scale, cutoff, edges[-1], seed)
            assert potential is not None
            norms.append(basis_norm(potential, chosen))
            squares.append(groups(activations(potential, chosen)) | environment(potential, chosen))
        rows.append({name: np.mean([square[name] for square in squares]) ** 0.5 for name in squares[0]})
        if "first l > 0" in rows[-1]:  # had it been divided by the root of what the basis sums up to
            divisor = message_divisor(scale, float(np.mean(edges)))
            rows[-1]["first l > 0 over basis"] = rows[-1]["first l > 0"] * divisor / np.mean(norms) ** 0.5
        counts.append(np.mean(edges))
    log = np.log(counts)
    exponents = {name: float(np.polyfit(log, np.log([row[name] for row in rows]), 1)[0]) for name in rows[0]}
    return {
        "neighbors": [round(float(count), 2) for count in counts],
        "rms": {name: [float(f"{row[name]:.4g}") for row in rows] for name in rows[0]},
        "exponent": {name: round(value, 2) for name, value in exponents.items()},
    }


def table(content: dict[str, Any], kind: str) -> str:
    """Exponents as Markdown, and the sizes at some 20 neighbours."""
    names = ["first scalars", "first l > 0", "last scalars", "last l > 0", "energy", "forces", "first l > 0 over basis"]
    heads = [*names, "first l > 0 at 20 neighbours"]
    lines = [f"| {kind}: host, scale | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for row in content["rows"]:
        if row["structures"] == kind:
            values = [row["exponent"].get(name) for name in names]
            cells = ["–" if value is None else f"{value:+.2f}".replace("-", "−") for value in values]
            place = int(np.argmin(np.abs(np.array(row["neighbors"]) - 20)))
            size = row["rms"].get("first l > 0")
            cells.append("–" if size is None else f"{size[place]:.2g}")
            lines.append(f"| {row['host']}, {row['scale']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="only print the table of the results at hand")
    arguments = parser.parse_args()
    if arguments.table:
        content = json.loads((RESULTS / "activations.json").read_text(encoding="utf-8"))
        print("\n\n".join(table(content, kind) for kind in KINDS))
        return
    rows = []
    for name, host in HOSTS.items():
        for scale in SCALES:
            for kind in KINDS:
                found = sizes(host, scale, kind, arguments.seeds)
                if found is not None:
                    rows.append({"host": name, "scale": scale, "structures": kind, **found})
                    print(name, scale, kind, found["exponent"], flush=True)
    content = {"machine": machine(), "seeds": arguments.seeds, "hosts": HOSTS, "rows": rows}
    write("activations", content)
    print("\n\n".join(table(content, kind) for kind in KINDS))


if __name__ == "__main__":
    main()
