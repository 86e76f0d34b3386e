"""How a model of another package is read and changed: what a package must say, and conversions of layouts."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steradian.graph.topology import OnTopology, Topology
from steradian.operators.base import SlotSpec

__all__ = [
    "MOLECULES_ONLY",
    "AttachError",
    "ForeignAtoms",
    "ForeignEdges",
    "Given",
    "MixingSlot",
    "Package",
    "Seen",
    "Slot",
    "Watcher",
    "channels_last",
    "degrees_of",
    "entries_of",
    "flat",
    "found",
    "known_class",
    "last_linear",
    "leaving",
    "widths_out",
]


class AttachError(ValueError):
    """A model that operators cannot be attached to; the message says why."""


@dataclass(frozen=True)
class Slot:
    """A layer, the module whose output its messages are linear in, and what an operator may count on.

    ``last``, where there is one, is the linear map that ends ``weights``: gating its input is gating its output, which
    is many times as wide.
    """

    layer: nn.Module
    weights: nn.Module
    spec: SlotSpec
    last: nn.Module | None = None


@dataclass(frozen=True)
class MixingSlot:
    """Where a layer begins and ends: what an operator between all atoms starts from, and what it adds to."""

    begin: nn.Module
    end: nn.Module
    spec: SlotSpec


Given = Mapping[str, Any]
"""Arguments of a layer by name."""


@dataclass
class Seen:
    """What hooks on the whole model have seen in the present call, and facts that hold for all calls."""

    values: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def forget(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook behind the whole model: tensors with a history would keep it alive, and cannot be copied."""
        self.values = {}


class Watcher:
    """Keeps what a module is given, or gives, in the present call (a class, so models with hooks copy and pickle).

    Args:
        seen: where to.
        arguments: names of the module's arguments in order, to be kept under these names.
    """

    def __init__(self, seen: Seen, *arguments: str) -> None:
        self.seen, self.arguments = seen, arguments

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook in front of the module."""
        given = dict(zip(self.arguments, args)) | kwargs
        self.seen.values |= {name: given[name] for name in self.arguments if name in given}

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook behind the module: keeps what it gives, under the first name."""
        self.seen.values[self.arguments[0]] = output


@dataclass(frozen=True)
class ForeignEdges:
    """What an operator sees of edges; see :class:`steradian.graph.Edges`."""

    senders: Tensor
    receivers: Tensor
    vectors: Tensor
    lengths: Tensor
    radial: Tensor
    envelope: Tensor
    num_atoms: int
    harmonics: None = None
    topology: None = None


@dataclass(frozen=True)
class ForeignAtoms(OnTopology):
    """What an operator between all atoms sees of a batch of molecules; see :class:`steradian.graph.Edges`.

    Attributes:
        positions: ``[N, 3]`` [Å].
        topology: of the atoms alone, without edges.
    """

    positions: Tensor
    topology: Topology
    cell: None = None
    pbc: None = None
    share: None = None

    @staticmethod
    def of(positions: Tensor, system: Tensor, num_systems: int) -> ForeignAtoms:
        """Atoms ``[N, 3]`` of systems ``[N]``."""
        none = system.new_zeros(0)
        return ForeignAtoms(positions, Topology(none, none, len(system), system=system, num_systems=num_systems))


class Package(ABC):
    """How one package's models are read."""

    name: str

    @abstractmethod
    def serves(self, model: nn.Module) -> bool:
        """Whether a model is of this package.

        Raises:
            AttachError: it is, but in a form that cannot be served.
        """

    @abstractmethod
    def slots(self, model: nn.Module) -> list[Slot]:
        """The layers in order, as gates see them."""

    @abstractmethod
    def mixing_slots(self, model: nn.Module) -> list[MixingSlot]:
        """The layers in order, as operators between all atoms see them."""

    def watch(self, model: nn.Module, seen: Seen) -> list[RemovableHandle]:
        """Hooks for what the layers are not given."""
        return []

    @abstractmethod
    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """A layer's arguments by name.

        Raises:
            AttachError: a call that cannot be served.
        """

    @abstractmethod
    def features(self, layer: nn.Module, given: Given, spec: SlotSpec) -> Tensor:
        """Node features ``[N, D, C]``, from a layer's arguments."""

    @abstractmethod
    def edges(self, given: Given, spec: SlotSpec, seen: Seen) -> ForeignEdges:
        """The edges, from a layer's arguments."""

    @abstractmethod
    def atoms(self, given: Given, seen: Seen) -> ForeignAtoms:
        """All atoms, strained where the model strains them.

        Raises:
            AttachError: a periodic system.
        """

    @abstractmethod
    def update(self, output: Any, end: nn.Module, spec: SlotSpec) -> Tensor:
        """The local update ``[N, D', C]`` in what a layer returns."""

    @abstractmethod
    def added(self, output: Any, addition: Tensor, end: nn.Module, spec: SlotSpec) -> Any:
        """What a layer returns, with ``[N, D', C]`` added to the local update."""

    def on_all_rows(self, alpha: Tensor, given: Given) -> Tensor:
        """alpha for every row of the weights, where there are more rows than edges."""
        return alpha


def known_class(module: str, name: str) -> type | None:
    return getattr(sys.modules.get(module), name, None)


def found(model: nn.Module, module: str, name: str) -> list[nn.Module]:
    """Submodules of a class, in the order of registration."""
    known = known_class(module, name)
    return [] if known is None else [part for part in model.modules() if isinstance(part, known)]


def entries_of(irreps: Any) -> list[tuple[int, int, int]]:
    """Multiplicity, degree and parity of e3nn's irreps, whatever their class."""
    return [(int(mul), int(irrep.l), int(irrep.p)) for mul, irrep in irreps]


def last_linear(network: nn.Module, num_inputs: int) -> nn.Module | None:
    """The map that a network of ``num_inputs`` inputs ends with, where a trial shows that it is linear; else None."""
    leaves = [part for part in network.modules() if not len(list(part.children()))]
    weight = next(network.parameters(), None)
    if len(leaves) < 2 or weight is None or getattr(leaves[-1], "bias", None) is not None:
        return None
    last, seen = leaves[-1], []
    trial = torch.linspace(-1.0, 1.0, 3 * num_inputs, dtype=weight.dtype, device=weight.device).view(3, num_inputs)
    handle = last.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    try:
        with torch.no_grad():
            end = network(trial)
            ((args, output),) = seen
            # factors of two are exact
            linear = torch.equal(end, output) and torch.equal(last(-2.0 * args[0]), -2.0 * output)
    except (RuntimeError, ValueError):  # other inputs than these, or a map that is used more than once
        return None
    finally:
        handle.remove()
    return last if linear else None


def degrees_of(irreps: Any) -> tuple[tuple[tuple[int, int], ...], int]:
    """Irreps and channels of a slot: all of them where they are equally wide, otherwise the scalars alone.

    Raises:
        AttachError: the features do not begin with even scalars.
    """
    entries = entries_of(irreps)
    if not entries or entries[0][1:] != (0, 1):
        raise AttachError(f"features {irreps} do not begin with even scalars, which an operator needs")
    channels = entries[0][0]
    equal = all(mul == channels for mul, _, _ in entries)
    return (tuple(entry[1:] for entry in entries) if equal else ((0, 1),)), channels


def channels_last(features: Tensor, spec: SlotSpec, channels_first: bool = True) -> Tensor:
    """``[N, D, C]`` from features in e3nn's order, channel by channel (or component by component) in each irrep."""
    parts, start = [], 0
    for degree, _ in spec.degrees:
        size = (2 * degree + 1) * spec.num_channels
        block = features[:, start : start + size]
        shape = (-1, spec.num_channels, 2 * degree + 1) if channels_first else (-1, 2 * degree + 1, spec.num_channels)
        block = block.reshape(shape)
        parts.append(block.transpose(1, 2) if channels_first else block)
        start += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def widths_out(irreps: Any, spec: SlotSpec) -> SlotSpec:
    """The slot of an operator between all atoms: with the irreps that leave the layer."""
    degrees, channels = degrees_of(irreps)
    return replace(spec, degrees_out=degrees, channels_out=channels)


def leaving(spec: SlotSpec) -> SlotSpec:
    """The layout of what leaves a layer, for :func:`channels_last` and :func:`flat`."""
    assert spec.degrees_out is not None
    return replace(spec, degrees=spec.degrees_out, num_channels=spec.channels_out or spec.num_channels)


def flat(features: Tensor, width: int, spec: SlotSpec, channels_first: bool = True) -> Tensor:
    """``[N, D, C]`` in e3nn's order, filled up with zeros to the whole width: the inverse of :func:`channels_last`."""
    sizes = [2 * degree + 1 for degree, _ in spec.degrees]
    parts = [
        (part.transpose(1, 2) if channels_first else part).reshape(len(features), -1)
        for part in features.split(sizes, dim=1)
    ]
    flat = torch.cat(parts, dim=1)
    return nn.functional.pad(flat, (0, width - flat.shape[1]))


MOLECULES_ONLY = "an operator between all atoms is attached to molecules only; convert the model for periodic systems"
