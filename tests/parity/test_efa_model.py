"""The O(3) network with weights of the published implementation: energies, forces, gradients, training steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from steradian.graph import Graph
from steradian.interfaces.efa_jax import model_state, potential_from_reference

RELATIVE = 1e-10  # the tolerance the reference numbers are good for in float64
PRETRAINED = [
    "cluster16_efa_T2", "cluster16_mp_T2", "cluster16_mp_T3", "cluster32_mp_T2", "cluster32_mp_T3", "cluster32_mp_T4",
    "cumulene_efa_T3", "sn2_efa_rcut5", "sn2_mp_rcut10",
]  # fmt: skip


def read(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("hp"))), arrays


def below(arrays, prefix):
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def potential_of(hyper, arrays, dtype=torch.float64, prefix="params/"):
    numbers = sorted({int(number) for number in arrays["in/atomic_numbers"]})
    parameters = {name: value.astype(np.float64) for name, value in below(arrays, prefix).items()}
    return potential_from_reference(hyper, parameters, dict.fromkeys(numbers, 0.0), dtype)


def graph_of(arrays, dtype=torch.float64):
    """The batch as it is, padding included; edges run from the receiver (dst) to the sender (src)."""
    order = np.argsort(arrays["in/dst_idx"], kind="stable")
    count = len(arrays["in/graph_mask"])
    dipoles = arrays.get("in/atomic_dipoles")
    return Graph(
        positions=torch.from_numpy(arrays["in/positions"]).to(dtype),
        numbers=torch.from_numpy(arrays["in/atomic_numbers"].astype(np.int64)),
        system=torch.from_numpy(arrays["in/batch_segments"].astype(np.int64)),
        senders=torch.from_numpy(arrays["in/src_idx"][order].astype(np.int64)),
        receivers=torch.from_numpy(arrays["in/dst_idx"][order].astype(np.int64)),
        shifts=torch.zeros(len(order), 3, dtype=torch.int64),
        cell=torch.zeros(count, 3, 3, dtype=dtype),
        pbc=torch.zeros(count, 3, dtype=torch.bool),
        num_systems=count,
        dipoles=None if dipoles is None else torch.from_numpy(dipoles).to(dtype),
    )


def assert_same(ours, theirs, relative=RELATIVE):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= relative * max(1.0, np.abs(theirs).max())


def real_energies(prediction, arrays):
    """Energies of systems that are not padding; the reference gives zero for those."""
    return np.where(arrays["in/graph_mask"], prediction.energy.detach().numpy(), 0.0)


@pytest.mark.parametrize("number", range(1, 8))
def test_random_weights(efa_fixtures, number):
    hyper, arrays = read(efa_fixtures, f"model_{number:02d}")
    potential, graph = potential_of(hyper, arrays), graph_of(arrays)
    prediction = potential(graph)
    assert_same(real_energies(prediction, arrays), arrays["out/energy"])
    assert np.abs(arrays["out/forces"]).max() > 1e-3
    assert_same(prediction.forces.numpy(), arrays["out/forces"])

    mask = torch.from_numpy(arrays["in/graph_mask"])
    (potential(graph, forces=False).energy * mask).sum()
    potential.train()
    (potential(graph).energy * mask).sum().backward()
    expected = model_state(below(arrays, "grad_energy_sum/"), potential.host, potential.elements)
    for name, parameter in potential.host.named_parameters():
        assert_same(parameter.grad.numpy(), expected[name].numpy())


@pytest.mark.parametrize("name", PRETRAINED)
def test_released_checkpoints(efa_fixtures, name):
    hyper, arrays = read(efa_fixtures, f"pretrained_{name}")
    prediction = potential_of(hyper, arrays)(graph_of(arrays))
    # 1e-9 is what is promised; the numbers are good for 1e-10
    assert_same(prediction.energy.numpy(), arrays["out/energy"])
    assert_same(prediction.forces.numpy(), arrays["out/forces"])


@pytest.mark.parametrize("name", PRETRAINED)
def test_released_checkpoints_in_float32(efa_fixtures, name):
    hyper, arrays = read(efa_fixtures, f"pretrained_{name}")
    prediction = potential_of(hyper, arrays, torch.float32)(graph_of(arrays))
    assert_same(prediction.energy.numpy(), arrays["out/energy"], 1e-5)
    assert_same(prediction.forces.numpy(), arrays["out/forces"], 1e-5)


def loss_of(potential, graph, arrays):
    """Squared errors: energies over labelled systems; forces over components and atoms, then over systems."""
    prediction = potential(graph)
    mask = torch.from_numpy(arrays["in/graph_mask"])
    energies = torch.from_numpy(arrays["label/energy"])
    labelled = mask & ~energies.isnan()
    energy = (prediction.energy - energies)[labelled].square().mean()
    squares = (prediction.forces - torch.from_numpy(arrays["label/forces"])).square().mean(1)
    sums = torch.zeros(graph.num_systems, dtype=squares.dtype).index_add(0, graph.system, squares)
    forces = (sums / graph.atoms_per_system.clamp(min=1))[mask].mean()
    return energy, forces


@pytest.mark.parametrize("number", [1, 2])
def test_training_steps(efa_fixtures, number):
    """Loss, its gradient (which needs second derivatives), and some steps of Adam."""
    hyper, arrays = read(efa_fixtures, f"train_{number:02d}")
    potential, graph = potential_of(hyper, arrays).train(), graph_of(arrays)
    training = json.loads(str(arrays["train"]))
    weights = training["energy_weight"], training["forces_weight"]
    energy, forces = loss_of(potential, graph, arrays)
    assert_same(energy.detach().numpy(), arrays["out/energy_mse"])
    assert_same(forces.detach().numpy(), arrays["out/forces_mse"])
    loss = weights[0] * energy + weights[1] * forces
    assert_same(loss.detach().numpy(), arrays["out/loss"])
    loss.backward()
    expected = model_state(below(arrays, "grad/"), potential.host, potential.elements)
    for name, parameter in potential.host.named_parameters():
        assert_same(parameter.grad.numpy(), expected[name].numpy())
    potential.zero_grad()

    schedule = training["schedule"]
    optimizer = torch.optim.Adam(potential.parameters(), lr=schedule["init_value"], betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step in range(training["steps"]):
        rate = schedule["init_value"] * schedule["decay_rate"] ** (step / schedule["transition_steps"])
        optimizer.param_groups[0]["lr"] = rate
        energy, forces = loss_of(potential, graph, arrays)
        losses.append(weights[0] * energy + weights[1] * forces)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    # the reference evaluates its learning rate in float32
    assert_same(torch.stack(losses).detach().numpy(), arrays["out/losses"], 1e-8)
    expected = model_state(below(arrays, "params_after/"), potential.host, potential.elements)
    for name, parameter in potential.host.named_parameters():
        assert_same(parameter.detach().numpy(), expected[name].numpy(), 1e-8)
