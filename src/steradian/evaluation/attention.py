"""What a model with MARA attends to, as numbers; :mod:`.attention_pictures` draws them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import covalent_radii
from torch import Tensor

from steradian.checkpoint import write_atomically
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.operators.base import EdgeGate
from steradian.potential import Potential

__all__ = ["AttentionResult", "LayerAttention", "attention_of", "bonds_of", "central_atom"]

BOND = 1.25  # two atoms are drawn as bonded within this multiple of the sum of their covalent radii


@dataclass(frozen=True)
class LayerAttention:
    """One gated layer.

    Attributes:
        layer: index of the host's layer.
        channels: ``[E, H]`` weight of every message: one for all channels, or one per group of channels.
        profile: ``[E, K]`` attention that each grid direction receives, relative to equal attention (1 everywhere), or
            None where the gate attends on no sphere.
        points: ``[K, 3]`` grid directions, or None.
    """

    layer: int
    channels: np.ndarray
    profile: np.ndarray | None = None
    points: np.ndarray | None = None

    @property
    def alpha(self) -> np.ndarray:
        """``[E]`` mean over the channels."""
        return self.channels.mean(1)

    @property
    def spread(self) -> np.ndarray:
        """``[E]`` standard deviation over the channels."""
        return self.channels.std(1)


@dataclass(frozen=True)
class AttentionResult:
    """Attention of a potential on one structure; edges run from receiver to sender as everywhere.

    Attributes:
        structure: what was looked at.
        senders, receivers: ``[E]``.
        vectors: ``[E, 3]`` [Å].
        layers: the gated layers.
    """

    structure: Structure
    senders: np.ndarray
    receivers: np.ndarray
    vectors: np.ndarray
    layers: tuple[LayerAttention, ...]

    @property
    def lengths(self) -> np.ndarray:
        """``[E]`` [Å]."""
        return np.linalg.norm(self.vectors, axis=1)

    @property
    def per_channel(self) -> bool:
        """Whether channels have gates of their own in any layer."""
        return any(entry.channels.shape[1] > 1 for entry in self.layers)

    @property
    def has_sphere(self) -> bool:
        """Whether any gate attends on a sphere."""
        return any(entry.profile is not None for entry in self.layers)

    def save(self, path: Path) -> None:
        """Write all numbers to an npz file; ``alpha_L`` of layer L is the mean over ``channels_L``."""
        arrays: dict[str, Any] = {
            "numbers": self.structure.numbers,
            "positions": self.structure.positions,
            "senders": self.senders,
            "receivers": self.receivers,
            "vectors": self.vectors,
        }
        for entry in self.layers:
            arrays[f"alpha_{entry.layer}"] = entry.alpha
            arrays[f"channels_{entry.layer}"] = entry.channels
            if entry.profile is not None:
                arrays[f"profile_{entry.layer}"] = entry.profile
                arrays[f"points_{entry.layer}"] = entry.points
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        write_atomically(path, stream.getvalue())


def central_atom(structure: Structure) -> int:
    """The atom with most bonds; the first of the heaviest among equals."""
    bonds = bonds_of(structure)
    counts = np.bincount(bonds.reshape(-1), minlength=len(structure.numbers))
    return int(np.lexsort((-structure.numbers, -counts))[0])


def bonds_of(structure: Structure) -> np.ndarray:
    """``[B, 2]`` pairs of atoms that are drawn as bonded."""
    radii = covalent_radii[structure.numbers]
    difference = structure.positions[:, None] - structure.positions
    near = np.linalg.norm(difference, axis=-1) < BOND * (radii[:, None] + radii)
    first, second = np.nonzero(np.triu(near, 1))
    return np.stack([first, second], 1)


def attention_of(potential: Potential, structure: Structure) -> AttentionResult:
    """Alpha of every message and, where gates attend on a sphere, the attention there, layer by layer.

    Raises:
        ValueError: the model has no attention, or the structure has no two atoms within the cutoff.
    """
    layers_of_host: Any = potential.host.get_submodule("layers")
    gates: list[EdgeGate | None] = [layer.gate for layer in layers_of_host.children()]
    gated = {index: gate for index, gate in enumerate(gates) if gate is not None}
    if not gated:
        raise ValueError("the model has no attention to show; train one with --set model.edge_gate.kind=mara")
    graph = make_graph(structure, potential.cutoff)
    if graph.num_edges == 0:
        raise ValueError(f"no two atoms are within the cutoff of {potential.cutoff} Å, so there are no messages")
    seen: dict[int, tuple[Any, Any]] = {}
    handles = [
        gate.register_forward_pre_hook(lambda module, given, index=index: seen.__setitem__(index, given))
        for index, gate in gated.items()
    ]
    try:
        potential.eval()(graph, forces=False)
    finally:
        for handle in handles:
            handle.remove()
    layers = []
    vectors = np.zeros((0, 3))
    for index, gate in gated.items():
        features, edges = seen[index]
        layers.append(_of_layer(index, gate, features.detach(), edges))
        vectors = _numbers(edges.vectors)
    return AttentionResult(structure, graph.senders.numpy(), graph.receivers.numpy(), vectors, tuple(layers))


def _of_layer(index: int, gate: EdgeGate, features: Tensor, edges: Any) -> LayerAttention:
    if gate.grid is None:
        alpha = _numbers(gate(features, edges))
        return LayerAttention(index, alpha.reshape(len(alpha), -1))
    maps = gate.attention_maps(features, edges)
    alpha = _numbers(maps.alpha)
    equal_share = _numbers(maps.grid.weights) / (4 * np.pi)
    profile = _numbers(maps.profile) / equal_share
    return LayerAttention(index, alpha.reshape(len(alpha), -1), profile, _numbers(maps.grid.points))


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
