"""Precision by role: policies, casts, what stays exact, and that every role really changes its own products."""

import pytest
import torch
from torch import nn

from steradian import polynomials as kernels
from steradian.build import load_potential, save_potential
from steradian.config import (
    ConfigError,
    EFAConfig,
    MARAConfig,
    PrecisionConfig,
    parse_config,
)
from steradian.polynomials import use_backend
from steradian.precision import POLICIES, WithRole, cast, policy_of
from tests.unit.precision_cases import HOSTS, graph, potential

#: Roles that a host does not have, for want of such a product.
ABSENT = {"o3mpnn": {"messages", "accumulate", "tables", "contraction", "paths", "harmonics"},
          "nequip": {"contraction"},
          "visnet": {"messages", "accumulate", "tables", "contraction", "paths", "radial", "harmonics", "readout",
                     "geometry"}}  # fmt: skip


def forces_error(model, reference) -> float:
    difference = (model(graph()).forces.double() - reference).abs().max()
    return float(difference / reference.abs().max())


# ---------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("role", ["geometry", "harmonics", "tables", "accumulate", "energy", "forces"])
def test_wide_roles_refuse_formats_of_16_bits(role):
    with pytest.raises(ValueError, match=f"{role} needs at least float32"):
        PrecisionConfig(roles={role: "bfloat16"})
    PrecisionConfig(roles={role: "float64"})


def test_mistakes_in_the_configuration_are_told_in_a_line_each():
    for section, message in (
        ("mixt", r"model\.precision: unknown preset; choose float64, float32, mixed, half, tf32 \(got 'mixt'\)"),
        ({"preset": "mixed", "roles": {"nodes": "bfloat16"}}, "nodes"),
        ({"layers": {0: {"energy": "float32"}}}, "energy belongs to no layer"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            parse_config({"model": {"precision": section}})
        assert "1 mistake" in str(caught.value)


def test_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"names \[7\]; the host's layers are 0\.\.1"):
        potential(precision=PrecisionConfig(layers={7: {"node": "bfloat16"}}))


def test_policies_name_every_role():
    mixed = policy_of("mixed")
    assert (mixed.radial, mixed.paths) == (torch.bfloat16, torch.bfloat16)
    assert (mixed.geometry, mixed.harmonics, mixed.tables, mixed.accumulate) == (torch.float32,) * 4
    assert mixed.energy == torch.float64
    assert POLICIES["half"].uses_float16
    assert not mixed.uses_float16
    single = policy_of(PrecisionConfig(preset="mixed", layers={1: {"radial": "float32"}}))
    assert single.dtype("radial", 0) == torch.bfloat16
    assert single.dtype("radial", 1) == torch.float32


# ------------------------------------------------------------------------------------------------ what the roles change


@pytest.mark.parametrize("host", list(HOSTS))
def test_every_role_has_an_effect_and_a_small_one(host):
    reference = potential(host, "float64")(graph()).forces
    for role, low, bound in [
        ("geometry", "float32", 3e-5),
        ("harmonics", "float32", 3e-6),
        ("tables", "float32", 3e-6),
        ("accumulate", "float32", 1e-5),
        ("forces", "float32", 1e-6),
        *((role, "bfloat16", 0.2) for role in ("radial", "messages", "paths", "contraction", "node", "readout")),
    ]:
        if role in ABSENT.get(host, ()):
            continue
        error = forces_error(potential(host, PrecisionConfig(preset="float64", roles={role: low})), reference)
        # no effect would mean that no module asks for the role
        assert 0 < error < bound, (host, role, error)


@pytest.mark.parametrize(
    ("host", "operator"),
    [
        ("o3mpnn", {"global_mixer": EFAConfig(zero_init=False), "host_changes": {"zero_init": False}}),
        ("mace", {"edge_gate": MARAConfig(form="published", frame="lab", gate="published", hidden_dim=8)}),
        ("mace", {"edge_gate": MARAConfig(form="published", gate="published", hidden_dim=8)}),
    ],
    ids=["efa", "mara", "intrinsic mara"],
)
def test_operators_in_the_slots_have_the_role_attention(host, operator):
    reference = potential(host, "float64", **operator)
    low = potential(host, PrecisionConfig(preset="float64", roles={"attention": "bfloat16"}), **operator)
    named = {name: module.low for name, module in low.host.named_modules() if isinstance(module, WithRole)}
    inside = {name for name in named if {"mixer", "gate"} & set(name.split("."))}
    assert inside
    assert all((named[name] == torch.bfloat16) == (name in inside) for name in named)
    assert 0 < forces_error(low, reference(graph()).forces) < 0.2


def test_layers_have_roles_of_their_own():
    model = potential(precision=PrecisionConfig(preset="mixed", layers={0: {"radial": "float32", "node": "bfloat16"}}))
    first, second = model.host.layers
    assert first.radial_network.low is None
    assert first.linear_up.low == torch.bfloat16
    assert second.radial_network.low == torch.bfloat16
    assert second.linear_up.low is None


@pytest.mark.parametrize("host", list(HOSTS))
@pytest.mark.parametrize("preset", list(POLICIES))
def test_presets_predict_and_train(host, preset):
    model = potential(host, preset)
    reference = potential(host, "float64")(graph()).forces
    bound = {"float64": 0.0, "float32": 1e-4, "tf32": 1e-4, "mixed": 0.1, "half": 0.05}[preset]
    assert forces_error(model, reference) <= bound
    prediction = model.train()(graph())
    assert prediction.energy.dtype == torch.float64
    assert prediction.forces.dtype == (torch.float64 if preset == "float64" else torch.float32)
    (prediction.interaction_energy.sum() + prediction.forces.square().sum()).backward()
    plain = potential(host, "float64").train()
    exact = plain(graph())
    (exact.interaction_energy.sum() + exact.forces.square().sum()).backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters()):
        assert one.dtype == POLICIES[preset].weights  # master weights, and their gradients
        if other.grad is None:
            continue
        assert one.grad.dtype == one.dtype
        scale = other.grad.abs().max() + 1e-2 * max(
            p.grad.abs().max() for p in plain.parameters() if p.grad is not None
        )
        assert float((one.grad.double() - other.grad).abs().max() / scale) <= max(4 * bound, 1e-3), name


def test_nothing_global_changes():
    before = (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32)
    potential(precision="tf32")(graph())
    potential(precision="mixed")(graph())
    assert (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32) == before


@pytest.mark.parametrize("preset", ["float32", "mixed"])
def test_positions_far_from_the_origin_lose_nothing(preset):
    """Integer multiples of 2^-20 Å moved by a power of two: exact in float64, so the prediction has the same bits."""
    model = potential(precision=preset)
    near = graph()
    near.positions.copy_(torch.round(near.positions * 2**20) / 2**20)
    far = graph(offset=0.0)
    far.positions.copy_(near.positions + 2.0**17)
    one, other = model(near), model(far)
    assert torch.equal(one.forces, other.forces)
    assert torch.equal(one.energy, other.energy)
    lost = (near.positions + 2.0**17).float() - 2.0**17 - near.positions.float()
    assert lost.abs().max() > 1e-3  # what float32 alone would make of these positions


# -------------------------------------------------------------------------------------------------- storing and loading


def test_the_policy_is_stored_and_can_be_overridden(tmp_path):
    mixed = PrecisionConfig(preset="mixed", layers={1: {"radial": "float32"}})
    model = potential(precision=mixed)
    save_potential(tmp_path / "model.safetensors", model)
    again = load_potential(tmp_path / "model.safetensors")
    assert again.config.precision == mixed
    assert torch.equal(again(graph()).forces, model(graph()).forces)
    exact = load_potential(tmp_path / "model.safetensors", precision="float64")
    assert exact.dtype == torch.float64
    assert exact.config.precision == "float64"
    plain = load_potential(tmp_path / "model.safetensors", precision="float32")
    assert torch.equal(plain(graph()).forces, potential()(graph()).forces)
    with pytest.raises(ValueError, match="precision 'quarter' is not known"):
        load_potential(tmp_path / "model.safetensors", precision="quarter")
    with pytest.raises(ValueError, match="not both"):
        load_potential(tmp_path / "model.safetensors", precision="mixed", dtype=torch.float64)


def test_a_cast_of_the_whole_network_resets_the_roles():
    model = potential(precision="mixed").double()
    assert model.config.precision == "float64"
    assert torch.equal(model(graph()).forces, potential()(graph()).forces) is False
    assert torch.equal(model.forward(graph()).forces, potential().double()(graph()).forces)
    assert all(module.low is None for module in model.host.modules() if isinstance(module, WithRole))


# --------------------------------------------------------------------------------------------- kernels read 16 bits


def _product_inputs(channels: int):
    from steradian.equivariant.irreps import natural_degrees
    from steradian.equivariant.tensor_product import channelwise_polynomial

    polynomial, table = channelwise_polynomial(natural_degrees(1), 2, natural_degrees(2))
    generator = torch.Generator().manual_seed(0)
    rows, atoms = 23, 7
    features = torch.randn(atoms, 4, channels, generator=generator)
    harmonics = torch.randn(rows, 9, generator=generator)
    weights = torch.randn(rows, len(table.paths), channels, generator=generator)
    senders, receivers = (torch.randint(atoms, (rows,), generator=generator) for _ in range(2))
    return polynomial, features, harmonics, weights, senders, receivers, atoms


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stack", [128 * 1024, 0])
@pytest.mark.parametrize("channels", [16, 24])
def test_kernels_read_and_write_bfloat16_as_pytorch_would(channels, stack, shared, monkeypatch):
    """Same numbers as casting by hand; gradients and second derivatives in bfloat16 are the rounded ones."""
    monkeypatch.setattr("steradian.polynomials.cpu.MOST_STACK", stack)
    polynomial, features, harmonics, weights, senders, receivers, atoms = _product_inputs(channels)
    generator = torch.Generator().manual_seed(1)
    of_edge = torch.randint(len(weights), (len(weights),), generator=generator) if shared else None
    # a result that is rounded the other way must not change the gradients: they are those of a linear function
    direction = torch.randn(atoms, polynomial.output.dim, channels, generator=generator).bfloat16().float()

    def run(backend: str, by_hand: bool):
        leaves = [
            features.bfloat16().requires_grad_(),
            harmonics.clone().requires_grad_(),
            weights.bfloat16().requires_grad_(),
        ]
        given = [cast(value, torch.float32) if by_hand else value for value in leaves]
        with use_backend(backend):
            out = kernels.evaluate(
                polynomial,
                given,
                gathers=[senders, None, of_edge],
                scatter=receivers,
                num_rows=atoms,
                dtype=None if by_hand else torch.bfloat16,
            )
            out = out.to(torch.bfloat16)
            first = torch.autograd.grad((out.float() * direction).sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(value.float().square().sum() for value in first), leaves)
        return [out, *first, *second]

    for ours, truth in zip(run("cpu", False), run("cpu", True)):
        assert ours.dtype == truth.dtype
        step = 2.0**-7 if ours.dtype == torch.bfloat16 else 1e-5
        scale = truth.float().abs().max()
        assert float((ours.float() - truth.float()).abs().max() / scale) < 2 * step
    for ours, truth in zip(run("cpu", False)[:4], run("reference", True)[:4]):
        step = 2.0**-7 if ours.dtype == torch.bfloat16 else 1e-5
        assert float((ours.float() - truth.float()).abs().max() / truth.float().abs().max()) < step


def test_weights_that_two_edges_share_are_read_as_they_are(monkeypatch):
    """Widening them first would cost more than bfloat16 brings."""
    from steradian.polynomials import cpu as apply

    polynomial, features, harmonics, weights, senders, receivers, atoms = _product_inputs(16)
    seen = []
    whole = apply.evaluate_cpu
    monkeypatch.setattr(
        apply, "evaluate_cpu", lambda table, given, *rest: seen.append(given) or whole(table, given, *rest)
    )
    of_edge = torch.arange(len(weights))
    given = [features, harmonics, weights.bfloat16()]
    with use_backend("cpu"):
        kernels.evaluate(polynomial, given, gathers=[senders, None, of_edge], scatter=receivers, num_rows=atoms)
    assert [value.dtype for value in seen[0]] == [torch.float32, torch.float32, torch.bfloat16]


def test_scalars_are_mixed_in_the_format_of_the_weights():
    from steradian.equivariant.irreps import natural_degrees
    from steradian.equivariant.linear import PathLinear
    from steradian.equivariant.tensor_product import channelwise_polynomial

    degrees = natural_degrees(1)
    table = channelwise_polynomial(degrees, 1, degrees)[1]
    mixing = PathLinear(table, 16, degrees, divisor=3.0)
    messages = torch.randn(5, table.dim, 16)
    exact = mixing(messages)
    mixing.low = torch.bfloat16
    rounded = mixing(messages)
    assert torch.equal(rounded[:, :1], exact[:, :1])
    assert 1e-4 < float((rounded[:, 1:] - exact[:, 1:]).abs().max() / exact.abs().max()) < 1e-2
    whole = PathLinear(table, 16, degrees)
    whole.load_state_dict(mixing.state_dict())
    torch.testing.assert_close(whole(messages) / 3.0, exact)


def test_rounding_to_bfloat16_is_that_of_pytorch():
    """A product with one: what the machine code writes are PyTorch's bits, ties, infinities and NaN included."""
    import numpy as np

    from steradian.polynomials.cpu import run_program
    from steradian.polynomials.polynomial import Operand, Polynomial, Terms
    from steradian.polynomials.program import program_of

    zero = np.zeros((1, 1), dtype=np.int64)
    same = Polynomial((Operand("x", 1),), Operand("y", 1), (Terms((0,), zero, zero[0], np.ones(1)),))
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    ties = torch.arange(256, dtype=torch.int32) * 65536 + 32768 + 1065353216
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.4e38, 1e-45])
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    values = torch.where(values.isnan(), float("nan"), values)
    values = torch.cat([values, values.new_zeros(-len(values) % 16)]).view(1, 1, -1)
    program = program_of(same, (None,), None)
    (out,) = run_program(program, (), 1, [values], values.shape[2], (torch.bfloat16,))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.isnan(), values.isnan())
    known = ~values.isnan()
    assert torch.equal(out[known].view(torch.int16), values.bfloat16()[known].view(torch.int16))
    assert nn.functional is not None
