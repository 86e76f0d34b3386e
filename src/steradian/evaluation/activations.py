"""How large the numbers in a host are, layer by layer: what a ``message_scale`` does at the start, and what training
made of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from steradian.build import build_potential
from steradian.equivariant.irreps import Degrees, natural_degrees
from steradian.evaluation.tables import Table, format_number
from steradian.graph import batch_graphs
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.hosts.mace import MACELayer
from steradian.hosts.nequip import NequIP, NequIPLayer, layer_degrees
from steradian.hosts.o3mpnn import O3Layer
from steradian.operators.base import Operator
from steradian.potential import Potential

__all__ = ["Activation", "activation_table", "activations", "random_structures", "with_random_weights"]

#: Atoms of a random structure are no nearer than this times the edge of the cube that each has to itself.
APART = 0.7


@dataclass(frozen=True)
class Activation:
    """The size of one kind of number.

    Attributes:
        layer: index of the layer; None for the whole host.
        quantity: ``scalars in``, ``messages 1o``, ``features out 0e`` ... or ``atom energies``.
        rms: root mean square over atoms, components and channels; [eV] for energies, else dimensionless.
        spread: root mean square of the standard deviations over atoms: what is not the same for all of them.
    """

    layer: int | None
    quantity: str
    rms: float
    spread: float


def activations(potential: Potential, structures: Sequence[Structure]) -> list[Activation]:
    """Sizes of scalars that enter a layer, messages after their division, features that leave it, and energies.

    Messages are sums over neighbours after whatever divides them (and before the product of MACE); those of ViSNet are
    the scalar ones. Features of a degree are taken together over components and channels.

    Args:
        potential: is left as it is.
        structures: evaluated in one batch.

    Raises:
        ValueError: no structures or no atoms.
    """
    if not any(len(structure.numbers) for structure in structures):
        raise ValueError("activations need at least one structure with atoms")
    graph = batch_graphs([make_graph(structure, potential.cutoff) for structure in structures]).to(potential.device)
    layers: Any = potential.host.get_submodule("layers")
    found: list[Activation] = []

    def energies(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        found.append(_size(None, "atom energies", output.atom_energies))

    was_training = potential.training
    with ExitStack() as stack:
        for index, layer in enumerate(layers.children()):
            for handle in _watched(potential.host, index, layer, found):
                stack.callback(handle.remove)
        stack.callback(potential.host.register_forward_hook(energies).remove)
        stack.callback(nn.Module.train, potential, was_training)
        potential.eval()(graph, forces=False)
    return found


def _watched(host: nn.Module, index: int, layer: Any, found: list[Activation]) -> list[Any]:
    """Hooks that write down the sizes of one layer, in the order in which they come up."""
    place, takes_input, degrees, counts = _messages_of(layer)
    degrees_out = _degrees_out(host, index, layer)

    def entering(_: nn.Module, given: tuple[Any, ...]) -> None:
        found.append(_size(index, "scalars in", given[0][:, 0]))

    def messages(_: nn.Module, given: tuple[Any, ...], output: Any = None) -> None:
        found.extend(_by_degree(index, "messages", given[0] if takes_input else output, degrees, counts))

    def leaving(_: nn.Module, given: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        features = output[0]
        if len(output) == 3:  # ViSNet's layers give what is added to the features
            features = features + nn.functional.pad(given[0], (0, 0, 0, features.shape[1] - given[0].shape[1]))
        found.extend(_by_degree(index, "features out", features, degrees_out))

    return [
        layer.register_forward_pre_hook(entering),
        place.register_forward_pre_hook(messages) if takes_input else place.register_forward_hook(messages),
        layer.register_forward_hook(leaving),
    ]


def _messages_of(layer: Any) -> tuple[nn.Module, bool, Degrees, tuple[int, ...] | None]:
    """Which module takes (True) or gives the divided messages of a layer, their irreps, and the rows per component."""
    if isinstance(layer, MACELayer):
        taker = layer.contraction if layer.residual else layer.skip
        return taker, True, layer.linear_message.degrees_out, None
    if isinstance(layer, NequIPLayer):  # divides before it multiplies
        return layer.product, False, layer.product.table.degrees_out, layer.product.table.counts
    if isinstance(layer, O3Layer):
        return layer.message, False, layer.degrees_message, None
    return layer.update, True, natural_degrees(0), None


def _degrees_out(host: nn.Module, index: int, layer: Any) -> Degrees:
    if isinstance(layer, MACELayer):
        return layer.linear_out.degrees
    if isinstance(host, NequIP):
        return layer_degrees(host.config)[index][1]
    return layer.degrees_out if isinstance(layer, O3Layer) else natural_degrees(layer.l_max)


def _by_degree(
    layer: int, name: str, values: Tensor, degrees: Degrees, counts: tuple[int, ...] | None = None
) -> list[Activation]:
    values = values.unsqueeze(1) if values.dim() == 2 else values
    sizes = [(2 * degree + 1) * count for (degree, _), count in zip(degrees, counts or (1,) * len(degrees))]
    return [
        _size(layer, f"{name} {degree}{'e' if parity > 0 else 'o'}", block)
        for (degree, parity), block in zip(degrees, values.split(sizes, dim=1))
    ]


def _size(layer: int | None, quantity: str, values: Tensor) -> Activation:
    values = values.detach().double()
    spread = values.var(dim=0, unbiased=False).mean().sqrt()
    return Activation(layer, quantity, float(values.square().mean().sqrt()), float(spread))


def with_random_weights(potential: Potential, seed: int = 0) -> Potential:
    """The model as it was before training, up to its random numbers: the same configuration and statistics."""
    fresh = build_potential(potential.config, potential.statistics, seed=seed)
    return fresh.to(potential.device).eval()


def random_structures(
    potential: Potential,
    count: int = 2,
    num_atoms: int = 64,
    neighbors: float | None = None,
    seed: int = 0,
    apart: float | None = None,
) -> list[Structure]:
    """Disordered structures of the model's elements, in equal parts, with so many neighbours per atom on average.

    They are periodic, unless an operator of the model refuses that.

    Args:
        potential: its elements, cutoff and average number of neighbours count.
        count: structures.
        num_atoms: of each.
        neighbors: per atom; None for that of the training set.
        seed: of the positions.
        apart: distance [Å] that no two atoms go below; None for 0.7 times the edge of the cube that each has to itself.
    """
    random = np.random.default_rng(seed)
    wanted = potential.statistics.avg_num_neighbors if neighbors is None else neighbors
    periodic = all(module.supports_pbc for module in potential.modules() if isinstance(module, Operator))
    volume = 4 / 3 * np.pi * potential.cutoff**3 / wanted  # per atom
    numbers = np.resize(np.array(potential.elements), num_atoms)
    edge = (num_atoms * volume) ** (1 / 3)
    distance = APART * volume ** (1 / 3) if apart is None else apart
    return [
        Structure(
            numbers=numbers,
            positions=_apart(random, num_atoms, edge, distance),
            cell=np.eye(3) * edge if periodic else np.zeros((3, 3)),
            pbc=np.full(3, periodic),
        )
        for _ in range(count)
    ]


def _apart(random: np.random.Generator, num_atoms: int, edge: float, distance: float) -> np.ndarray:
    """Positions ``[N, 3]`` in a periodic cube, one after the other, none nearer to another than the distance."""
    placed = np.zeros((0, 3))
    while len(placed) < num_atoms:
        point = random.uniform(0, edge, 3)
        away = np.abs(placed - point)
        away = np.minimum(away, edge - away)
        if (np.linalg.norm(away, axis=1) >= distance).all():
            placed = np.vstack([placed, point])
    return placed


def activation_table(start: list[Activation], trained: list[Activation], title: str) -> Table:
    """Sizes with random weights beside those of the model as it is."""
    rows, last = [], -1
    for before, after in zip(start, trained, strict=True):
        label = "" if before.layer == last else "all" if before.layer is None else str(before.layer + 1)
        last = -1 if before.layer is None else before.layer
        values = (before.rms, before.spread, after.rms, after.spread)
        unit = " [eV]" if before.layer is None else ""
        rows.append([label, before.quantity + unit, *(format_number(value) for value in values)])
    heads = ["layer", "", "at the start: rms", "spread over atoms", "as trained: rms", "spread over atoms"]
    note = "messages: sums over neighbours after their division (model.host.message_scale)"
    return Table(title, heads, rows, num_labels=2, note=note)
