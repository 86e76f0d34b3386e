"""INT8 radial networks and readouts: close to float32, forces follow the energy, refused where they are not."""

from __future__ import annotations

import copy

import pytest
import torch

from steradian.build import build_potential, load_potential, save_potential
from steradian.config import ModelConfig, O3MPNNConfig, PrecisionConfig
from steradian.execution.int8 import QuantizationError, quantized
from steradian.precision import Int8Product, int8_weights
from tests.unit.precision_cases import STATISTICS, graph, potential


@pytest.mark.parametrize("dynamic", [False, True])
def test_products_are_those_of_the_rounded_weights(dynamic):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(24, 32, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, 32)
    whole, scales = int8_weights(weight)
    assert whole.dtype == torch.int8
    assert ((whole * scales - weight).abs() <= 0.5001 * scales).all()  # to nearest
    leaf = x.clone().requires_grad_()
    out = Int8Product.apply(leaf, whole, scales, dynamic)
    exact = x @ (whole * scales)
    rounding = float(((out - exact) / scales).abs().max() / (exact / scales).abs().max())
    assert rounding < (0.02 if dynamic else 1e-12)
    assert (rounding > 1e-4) == dynamic
    cotangent = torch.randn(40, 32, generator=generator, dtype=torch.float64)
    (back,) = torch.autograd.grad(out, leaf, cotangent)
    truth = cotangent @ (whole * scales).T
    assert float((back - truth).abs().max() / truth.abs().max()) < (0.02 if dynamic else 1e-12)


def error(model, reference):
    found = model(graph()).forces.double()
    return float((found - reference).abs().mean())


@pytest.mark.parametrize("host", ["mace", "nequip"])
@pytest.mark.parametrize("role", ["radial", "readout"])
def test_each_role_has_an_effect_and_dynamic_a_larger_one(host, role):
    model = potential(host)
    reference = potential(host, "float64")(graph()).forces
    scale = float(reference.abs().mean())
    plain = error(model, reference) / scale
    weights, dynamic = (
        error(quantized(model, [graph()], {role: kind}, force_bound=1e9), reference) / scale
        for kind in ("weights", "dynamic")
    )
    # a linear readout has the same derivative whatever it multiplies
    assert plain < 1e-5 < 1e-4 < weights <= dynamic < 0.3
    assert model.config.precision == "float32"
    assert error(model, reference) / scale == plain


def test_int8_weights_keep_forces_the_derivative_of_the_energy():
    model = potential("mace", PrecisionConfig(preset="float64", int8={"radial": "weights", "readout": "weights"}))
    start = graph()
    forces = model(start).forces
    moved = []
    for sign in (1, -1):
        other = copy.deepcopy(start)
        other.positions[0, 0] += sign * 1e-5
        moved.append(model(other, forces=False).interaction_energy[0])
    assert float((moved[1] - moved[0]) / 2e-5) == pytest.approx(float(forces[0, 0]), rel=1e-6)


def test_refused_beyond_the_bound():
    model = potential("mace")
    with pytest.raises(QuantizationError, match=r"int8 in radial \(dynamic\) changes forces by .* meV/Å") as caught:
        quantized(model, [graph()], {"radial": "dynamic"}, force_bound=1e-6)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="structures with forces, or a force_bound"):
        quantized(model, [graph()], {"radial": "weights"})
    labelled = graph()
    labelled = type(labelled)(**{**vars(labelled), "forces": model(labelled).forces.double()})
    with pytest.raises(QuantizationError, match=r"more than 0\.1;"):  # without an error of its own: 0.1 meV/Å
        quantized(model, [labelled], {"radial": "dynamic"})


def test_stored_with_the_model_and_not_trained(tmp_path):
    model = quantized(potential("mace"), [graph()], {"readout": "weights"}, force_bound=1e9)
    save_potential(tmp_path / "model.safetensors", model)
    again = load_potential(tmp_path / "model.safetensors")
    assert torch.equal(again(graph()).forces, model(graph()).forces)
    with pytest.raises(ValueError, match="int8 is for inference"):
        again.train()(graph())


def test_hosts_without_such_products_refuse():
    config = ModelConfig(host=O3MPNNConfig(num_channels=8), precision=PrecisionConfig(int8={"radial": "weights"}))
    with pytest.raises(ValueError, match="this host has no radial that can be int8"):
        build_potential(config, STATISTICS, seed=0)
