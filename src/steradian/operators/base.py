"""The two slots of a host layer, and what may fill them.

A host layer offers an :class:`EdgeGate` (an invariant weight for every edge, which scales the radial weights) and a
:class:`GlobalMixer` (an equivariant update from all atoms of a system). It does not know who fills them. An empty slot
owns no parameters and leaves the host unchanged to the last bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from steradian.equivariant.sphere import SphereGrid
from steradian.graph import Edges
from steradian.graph.share import Share
from steradian.graph.topology import Topology

__all__ = [
    "AttentionMaps",
    "BareEdges",
    "EdgeGate",
    "EdgesOfGate",
    "GateFactory",
    "GlobalMixer",
    "MixerFactory",
    "Operator",
    "SlotSpec",
    "declares",
    "empty_slot",
    "in_layer",
    "no_operator",
    "rotation_of",
]

Rotation = Literal["exact", "quadrature", "lab_frame"]


@dataclass(frozen=True)
class SlotSpec:
    """What a host layer promises to the operator in one of its slots; fixed when the host is built.

    Attributes:
        host: name of the host, for messages.
        layer: index of the layer, from 0.
        num_layers: how many layers the host has.
        degrees: ``(degree, parity)`` of each irrep of the node features ``[N, D, C]`` that the slot sees, in order,
            parity +1 (even) or -1 (odd); ``((0, 1), (1, -1))`` is ``0e + 1o``. The first one is always ``(0, 1)``.
        num_channels: C.
        cutoff: [Å].
        num_radial: R, the width of ``edges.radial``.
        degrees_out: irreps of the layer's local update, to which a mixer's update must be reduced; None where the host
            adds an update of any irreps.
        channels_out: channels of the local update, if not C.
        scalars_only: the layer uses nothing but scalars of what a mixer attends to.
        avg_num_neighbors: edges per atom of the training set.
        l_max: highest degree of ``edges.harmonics``.
        num_weights: P, the weights of a message per channel (its coupling paths), which a gate may scale one by one.
        unit_weights: the host's weights have unit variance (and are scaled where they are used); a mixer's should too.
    """

    host: str
    layer: int
    num_layers: int
    degrees: tuple[tuple[int, int], ...]
    num_channels: int
    cutoff: float
    num_radial: int = 8
    degrees_out: tuple[tuple[int, int], ...] | None = None
    channels_out: int | None = None
    scalars_only: bool = False
    unit_weights: bool = True
    avg_num_neighbors: float = 1.0
    l_max: int = 2
    num_weights: int = 1

    @property
    def dim(self) -> int:
        """D, the number of components of the node features."""
        return sum(2 * degree + 1 for degree, _ in self.degrees)


class EdgesOfGate(Protocol):
    """What a gate reads of a layer's edges: :class:`steradian.graph.Edges` has it all, :class:`BareEdges` the least.

    Optional parts are None where they are not known; an operator that needs one says so by name.
    """

    @property
    def senders(self) -> Tensor:
        """``[E]`` index j of the neighbour."""

    @property
    def receivers(self) -> Tensor:
        """``[E]`` index i of the centre."""

    @property
    def vectors(self) -> Tensor:
        """``[E, 3]`` from receiver to sender [Å]."""

    @property
    def envelope(self) -> Tensor | None:
        """``[E]`` smooth cutoff."""

    @property
    def radial(self) -> Tensor | None:
        """``[E, R]`` radial basis times envelope."""

    @property
    def harmonics(self) -> Tensor | None:
        """``[E, (l_max + 1)^2]`` real spherical harmonics of the direction."""

    @property
    def topology(self) -> Topology | None:
        """What is prepared for these edges, which then are listed in order of their receivers."""

    @property
    def share(self) -> Share | None:
        """Where the atoms are one process's part of a system, the atoms that it answers for."""


class BareEdges(NamedTuple):
    """Edges of anybody's model, in any order."""

    senders: Tensor
    receivers: Tensor
    vectors: Tensor
    envelope: Tensor | None = None
    radial: Tensor | None = None
    harmonics: Tensor | None = None
    topology: Topology | None = None
    share: Share | None = None


class AttentionMaps(NamedTuple):
    """What a gate looked at on its sphere of K points, with H heads.

    Attributes:
        alpha: ``[E]`` of all edges.
        attention: ``[e, H, K, K]`` of the chosen ones: point k asks, l answers, rows sum to one.
        profile: ``[e, K]`` how much point l is attended to, mean over asking points and heads; sums to one. Divided by
            ``grid.weights / 4 pi`` it is a density that is 1 where all directions count alike.
        chosen: ``[e]`` indices of edges.
        grid: the sphere.
    """

    alpha: Tensor
    attention: Tensor
    profile: Tensor
    chosen: Tensor
    grid: SphereGrid


class Operator(nn.Module, ABC):
    """What fills a slot, and the facts it declares about itself.

    Whoever builds, attaches, records or draws a model asks for these facts, not for the kind of operator.

    ``rotation`` says how exactly the operator turns with the atoms:

    * ``exact``: to rounding;
    * ``quadrature``: up to the error of a sphere rule, which falls as the rule is refined;
    * ``lab_frame``: tied to the laboratory axes (the published form of MARA); measured, never bounded.
    """

    rotation: Rotation = "exact"
    rotation_bound: float = 0.0
    """Largest change under a rotation or reflection that a ``quadrature`` operator promises (0 if exact)."""
    supports_pbc: bool = True
    needs_system_sizes: bool = False
    """The work is arranged by the atoms of every system, so a recorded step holds for one list of sizes."""
    is_global: bool = False
    """An atom is told of others than its neighbours: the energy depends on positions and cell besides edge vectors."""
    asks_for_the_lattice: bool = False
    """In a crystal the work follows from the shape of the cell (sums over the reciprocal lattice): not recorded."""
    num_features: int | None = None
    """Channels that the operator was built for; None where it takes any."""

    def summary(self) -> str:
        """One line for ``steradian inspect``."""
        return f"{type(self).__name__}; rotation: {self.rotation}"


class EdgeGate(Operator):
    """Weights every message of a layer by invariant numbers alpha before the sum over neighbours.

    alpha is one number per message, one per head (channel c belongs to head c modulo H), or one per weight of the
    message (a coupling path) and head. Where a message is multiplied by it is the host's business; no tensor of paths
    and channels is formed.
    """

    further_reach = 0
    """Cutoffs by which alpha of a message sees farther than the message's two atoms and the receiver's neighbours do:
    1 where it depends on the neighbours of the sender, as a gate of atoms does."""
    grid: SphereGrid | None = None
    """The sphere that the gate attends on; None where there is none to show."""

    @abstractmethod
    def forward(self, features: Tensor, edges: EdgesOfGate) -> Tensor:
        """alpha of every edge, ``[E]``, ``[E, H]`` or ``[E, P, H]``, from node features ``[N, D, C]``.

        The first component of the features are the invariants, ``features[:, 0]``.
        """

    def attention_maps(self, features: Tensor, edges: EdgesOfGate, chosen: Tensor | None = None) -> AttentionMaps:
        """What the gate looked at on its sphere, for pictures.

        Args:
            features, edges: as in :meth:`forward`.
            chosen: indices of the edges e to return maps of; None for all, which takes E * H * K * K numbers.

        Raises:
            ValueError: the gate has no sphere.
        """
        raise ValueError(f"{type(self).__name__} attends on no sphere, so there are no directions to show")


class GlobalMixer(Operator):
    """Adds an equivariant update from all atoms of a system to a layer's local update."""

    supports_pbc = False
    is_global = True
    needs_system_sizes = True
    asks_for_the_lattice = True

    @abstractmethod
    def global_update(self, features: Tensor, local_update: Tensor, positions: Tensor, edges: Edges) -> Tensor:
        """What to add to the local update.

        Args:
            features: ``[N, D, C]`` that the layer started from.
            local_update: ``[N, D', C]`` made of the neighbours.
            positions: ``[N, 3]`` [Å], differentiable.
            edges: of the layer.
        """

    def forward(self, features: Tensor, local_update: Tensor, positions: Tensor, edges: Edges) -> Tensor:
        """The update ``[N, D', C]`` to use in place of ``local_update``."""
        return local_update + self.global_update(features, local_update, positions, edges)


def declares(model: nn.Module, fact: str) -> bool:
    """Whether any module of a model declares a fact, such as ``needs_system_sizes``."""
    return any(getattr(module, fact, False) for module in model.modules())


def rotation_of(model: nn.Module) -> Rotation:
    """What the least exact operator of a model declares of rotations; ``exact`` where there is no operator."""
    found = {module.rotation for module in model.modules() if isinstance(module, Operator)}
    return next((kind for kind in ("lab_frame", "quadrature") if kind in found), "exact")


GateFactory = Callable[[SlotSpec], EdgeGate | None]
MixerFactory = Callable[[SlotSpec], GlobalMixer | None]


def empty_slot(spec: SlotSpec) -> None:
    """The factory of an empty slot."""
    return


def no_operator(config: object) -> Callable[[SlotSpec], None]:
    """The factory of empty slots, for a configuration section that asks for none."""
    return empty_slot


def in_layer(layers: list[int] | None, spec: SlotSpec, section: str) -> bool:
    """Whether a section's ``layers`` (None for all) name the layer of a slot.

    Raises:
        ValueError: they name a layer that the model does not have.
    """
    outside = [layer for layer in layers or () if not 0 <= layer < spec.num_layers]
    if outside:
        raise ValueError(f"{section}.layers lists {outside}; the host's layers are 0..{spec.num_layers - 1}")
    return layers is None or spec.layer in layers
