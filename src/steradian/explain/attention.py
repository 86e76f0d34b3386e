"""What a model with MARA attends to: numbers first, pictures in :mod:`steradian.explain.pictures`."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from steradian.checkpoint import write_atomically
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.operators.base import EdgeGate
from steradian.potential import Potential

__all__ = ["AttentionResult", "LayerAttention", "attention_of"]


@dataclass(frozen=True)
class LayerAttention:
    """One gated layer.

    Attributes:
        layer: index of the host's layer.
        alpha: ``[E]`` weight of every message.
        profile: ``[E, K]`` attention that each grid direction receives, relative to equal attention (1 everywhere).
        points: ``[K, 3]`` grid directions.
    """

    layer: int
    alpha: np.ndarray
    profile: np.ndarray
    points: np.ndarray


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

    def save(self, path: Path) -> None:
        """Write all numbers to an npz file."""
        arrays: dict[str, Any] = {
            "numbers": self.structure.numbers,
            "positions": self.structure.positions,
            "senders": self.senders,
            "receivers": self.receivers,
            "vectors": self.vectors,
        }
        for entry in self.layers:
            arrays[f"alpha_{entry.layer}"] = entry.alpha
            arrays[f"profile_{entry.layer}"] = entry.profile
            arrays[f"points_{entry.layer}"] = entry.points
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        write_atomically(path, stream.getvalue())


def attention_of(potential: Potential, structure: Structure) -> AttentionResult:
    """Alpha of every message and the attention on the sphere, layer by layer.

    Raises:
        ValueError: the model has no attention, or the structure has no two atoms within the cutoff.
    """
    layers_of_host: Any = potential.host.get_submodule("layers")
    gates: list[EdgeGate | None] = [layer.gate for layer in layers_of_host.children()]
    gated = {index: gate for index, gate in enumerate(gates) if gate is not None and gate.grid is not None}
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
        maps = gate.attention_maps(features.detach(), edges)
        equal_share = _numbers(maps.grid.weights) / (4 * np.pi)
        profile = _numbers(maps.profile) / equal_share
        layers.append(LayerAttention(index, _numbers(maps.alpha), profile, _numbers(maps.grid.points)))
        vectors = _numbers(edges.vectors)
    return AttentionResult(structure, graph.senders.numpy(), graph.receivers.numpy(), vectors, tuple(layers))


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
