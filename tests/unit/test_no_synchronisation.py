"""Inside a step nothing asks the device for a number, and no constant is made: a GPU could not record such a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steradian.config import LossConfig
from steradian.execution.batches import Buckets, DeviceData, Sizes, pad_graph
from steradian.graph import Graph
from steradian.graph.neighbors import make_graph
from steradian.polynomials import use_backend
from steradian.training.optimisation import Loss
from tests import cases

#: Operators whose result or shape depends on values, so that a GPU has to be waited for.
WAITING = (
    "_local_scalar_dense",
    "is_nonzero",
    "item",
    "equal",
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
    "_linalg_check_errors",
)
#: Numbers of Python or numpy that become a tensor: a copy from the host, which a recorded step cannot make.
COPYING = ("lift_fresh", "lift_fresh_copy")


class NoQuestions(TorchDispatchMode):
    """Fails where a GPU would be waited for."""

    def __init__(self, allowed: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.forbidden = {*WAITING, *COPYING} - set(allowed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.forbidden:
            raise AssertionError(f"{name} inside a step")
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise AssertionError("a mask as an index inside a step")
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[None]:
    with use_backend("reference"), NoQuestions():
        yield


def fresh(graph: Graph) -> Graph:
    """The same graph in new tensors, for which nothing has been kept."""
    return graph.mapped(lambda value: value.clone())


def prepared(host: str, operator: str, periodic: bool) -> tuple[Any, Graph]:
    potential = cases.potential(host, operator)
    structures = [cases.ethanol(0), cases.crystal(), cases.ethanol(2)] if periodic else [cases.ethanol(0)] * 2
    graph = cases.batch(*structures)
    graph = replace(
        graph,
        energy=torch.zeros(graph.num_systems, dtype=torch.float64),
        forces=torch.zeros_like(graph.positions),
        stress=torch.zeros_like(graph.cell),
    )
    sizes = Buckets().choose(Sizes.of(graph))
    return potential, pad_graph(graph, sizes, number=6, cutoff=potential.cutoff)


COMBINATIONS = [
    *((host, "none") for host in cases.HOSTS),
    *((host, operator) for host in ("mace", "nequip") for operator in cases.OPERATORS if operator != "none"),
    *((host, operator) for host in ("visnet", "o3mpnn") for operator in ("mara", "efa", "both")),
    *((host, operator) for host in ("visnet", "o3mpnn") for operator in ("mara-channel", "mara-channel-all")),
]


@pytest.mark.parametrize(("host", "operator"), COMBINATIONS)
def test_energy_forces_and_stress(host: str, operator: str) -> None:
    potential, graph = prepared(host, operator, periodic="efa" not in operator and operator != "both")
    with use_backend("reference"):
        potential(graph, stress=True)  # tables of constants are made on first use
    graph = fresh(graph)
    with watched():
        prediction = potential(graph, stress=True)
    assert torch.isfinite(prediction.forces).all()


@pytest.mark.parametrize(("host", "operator"), COMBINATIONS)
def test_training_step(host: str, operator: str) -> None:
    potential, graph = prepared(host, operator, periodic=False)
    loss = Loss(LossConfig())
    parameters = list(potential.train().parameters())

    def step() -> Any:
        return torch.autograd.grad(loss(potential(graph), graph).total, parameters, allow_unused=True)

    with use_backend("reference"):
        step()
    graph = fresh(graph)
    with watched():
        gradients = step()
    assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("host", ["mace", "nequip", "visnet"])
def test_inference_with_frozen_weights_and_tables(host: str) -> None:
    potential, graph = prepared(host, "none", periodic=True)
    potential.for_inference()
    with use_backend("reference"):
        potential(graph)
    graph = fresh(graph)
    with watched():
        potential(graph)


def test_composition_saves_the_product_with_all_elements() -> None:
    """Where the atoms of each element are counted beforehand, maps per element run element by element."""
    potential, graph = prepared("mace", "none", periodic=True)
    counts = tuple((number, int((graph.numbers == number).sum())) for number in (1, 6, 8))
    with use_backend("reference"):
        expected = potential(graph)
    graph.topology.composition = counts
    with use_backend("reference"):
        potential(fresh(graph))
    graph = fresh(graph)
    with watched():
        found = potential(graph)
    assert torch.allclose(found.forces, expected.forces, rtol=1e-10, atol=1e-12)


def test_gathering_a_batch_from_the_device() -> None:
    graphs = [
        make_graph(structure, cases.CUTOFF) for structure in (cases.ethanol(0), cases.crystal(), cases.ethanol(1))
    ]
    data = DeviceData(graphs, "cpu", number=6, cutoff=cases.CUTOFF)
    sizes = Buckets().choose(data.sizes([2, 0]))
    frames, layout = data.indices([2, 0], sizes), data.layout([2, 0], sizes)
    with watched():
        graph = data.batch(frames, sizes, layout)
    assert graph.topology.pairs is not None
    assert int(graph.real.sum()) == 2


def test_the_watch_itself_can_fail() -> None:
    values = torch.ones(3)
    for question in (
        lambda: bool(values.any()),
        lambda: values[values > 0],
        lambda: values.nonzero(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.bincount(values.long()),
    ):
        with pytest.raises(AssertionError, match="inside a step"), NoQuestions():
            question()
