"""Operators attached to live models of other packages. Runs in an environment that has one of them (see remake.sh):

    PYTHONPATH=src INTERPRETER -m pytest tests/parity/check_attach.py

Models are small, with random weights, in float64. Not collected in steradian's own environment.
"""

from __future__ import annotations

import copy
import importlib.util
import os

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 loads its constants with torch.load

import frozen
import numpy as np
import pytest
import torch

from steradian.build import build_potential, load_potential, save_potential
from steradian.config import EFAConfig, MARAConfig
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.interfaces.attach import AttachError, attach, detach, load_attached, save_attached
from steradian.interfaces.convert import convert_file
from steradian.interfaces.foreign_export import export
from steradian.operators.mara.gate import MARA

torch.set_default_dtype(torch.float64)
FRAME = frozen.structures()["molecule"]
TYPES = {1: 0, 6: 1, 7: 2, 8: 3}
CUTOFF = 4.5
NEUTRAL = MARAConfig(form="published", frame="lab", hidden_dim=8)
LIVELY = MARAConfig(form="published", frame="lab", hidden_dim=8, num_heads=2, gate="published")


EFA = EFAConfig(num_points=50, max_length_A=8.0, num_features_qk=4, zero_init=False)
OPERATORS = {"mara": LIVELY, "node": LIVELY.model_copy(update={"where": "node"}), "efa": EFA, "both": [LIVELY, EFA]}


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ------------------------------------------------------------------------ models, and how each is called and converted


def mace_model(block, first="RealAgnosticInteractionBlock", hidden="6x0e + 6x1o"):
    from e3nn import o3
    from mace import modules

    torch.manual_seed(1)
    hyper = {
        "r_max": CUTOFF, "num_bessel": 6, "num_polynomial_cutoff": 5, "max_ell": 2, "num_interactions": 2,
        "avg_num_neighbors": 6.0, "atomic_numbers": [1, 6, 7, 8], "correlation": 2, "radial_MLP": [8],
        "radial_type": "bessel",
    }  # fmt: skip
    model = modules.ScaleShiftMACE(
        **hyper,
        interaction_cls=getattr(modules, block) if isinstance(block, str) else block,
        interaction_cls_first=getattr(modules, first),
        hidden_irreps=o3.Irreps(hidden),
        MLP_irreps=o3.Irreps("4x0e"),
        gate=torch.nn.functional.silu,
        num_elements=4,
        atomic_energies=np.zeros(4),
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    hyper |= {"interaction_cls": block, "interaction_cls_first": first, "hidden_irreps": hidden, "MLP_irreps": "4x0e"}
    return model, hyper | {"gate": "silu"}


def mace_call(model, positions, training=False):
    from mace.data import AtomicData, Configuration
    from mace.tools import AtomicNumberTable, torch_geometric

    item = Configuration(
        atomic_numbers=FRAME["numbers"], positions=np.array(positions), properties={}, property_weights={},
        pbc=(False,) * 3, head="Default",
    )  # fmt: skip
    data = AtomicData.from_config(item, z_table=AtomicNumberTable([1, 6, 7, 8]), cutoff=CUTOFF, heads=["Default"])
    batch = next(iter(torch_geometric.dataloader.DataLoader([data], batch_size=1))).to_dict()
    out = model(batch, training=training, compute_force=True)
    return out["interaction_energy"].sum(), out["forces"]


def mace_converted(state, hyper):
    from steradian.interfaces.mace_torch import config_and_weights_from_mace_torch

    return config_and_weights_from_mace_torch(state, hyper)


def nequip_model(**changes):
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import global_state_initialized, set_global_state

    if not global_state_initialized():
        set_global_state()
    hyper = {
        "type_names": ["H", "C", "N", "O"], "r_max": CUTOFF, "num_layers": 3, "l_max": 2, "parity": True,
        "num_features": 6, "radial_mlp_depth": 1, "radial_mlp_width": 8, "avg_num_neighbors": 6.0,
        "per_type_energy_scales": 1.0, "per_type_energy_shifts": 0.0,
    } | changes  # fmt: skip
    return NequIPGNNModel(seed=1, model_dtype="float64", **hyper), hyper


def nequip_call(model, positions, training=False):
    from nequip.data import compute_neighborlist_, from_dict

    data = {
        "pos": torch.tensor(np.array(positions)),
        "atom_types": torch.tensor([TYPES[int(number)] for number in FRAME["numbers"]]),
        "pbc": torch.zeros(3, dtype=torch.bool),
    }
    out = model.train(training)(compute_neighborlist_(from_dict(data), r_max=CUTOFF))
    return out["total_energy"].sum(), out["forces"]


def nequip_converted(state, hyper):
    from steradian.interfaces.nequip import config_and_weights_from_nequip

    return config_and_weights_from_nequip(state, hyper)


def pyg_model(**changes):
    from make_pyg_visnet import all_neighbors
    from torch_geometric.nn.models import visnet

    visnet.radius_graph = all_neighbors
    torch.manual_seed(1)
    hyper = {
        "lmax": 2,
        "num_heads": 2,
        "num_layers": 3,
        "hidden_channels": 8,
        "num_rbf": 8,
        "cutoff": CUTOFF,
        "max_z": 10,
    }
    hyper |= changes
    model = visnet.ViSNet(**hyper, derivative=True)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.2)
    return model, hyper


def pyg_call(model, positions, training=False):
    numbers = torch.tensor(FRAME["numbers"])
    energy, forces = model(numbers, torch.tensor(np.array(positions)), torch.zeros_like(numbers))
    return energy.sum(), forces


def pyg_converted(state, hyper):
    from steradian.interfaces.pyg_visnet import config_and_weights_from_pyg_visnet

    return config_and_weights_from_pyg_visnet(state, hyper, (1, 6, 7, 8))


CASES = {}
if has("mace"):
    from mace.modules import interaction_classes

    for name in interaction_classes:
        CASES[name] = (lambda name=name: mace_model(name), mace_call, mace_converted)
if has("nequip"):
    CASES["parity"] = (nequip_model, nequip_call, nequip_converted)
    CASES["natural"] = (lambda: nequip_model(parity=False), nequip_call, nequip_converted)
    CASES["unequal"] = (lambda: nequip_model(num_features=[6, 4, 2]), nequip_call, None)
if has("torch_geometric"):
    CASES["visnet"] = (pyg_model, pyg_call, pyg_converted)
    CASES["vertex"] = (lambda: pyg_model(vertex=True, lmax=1), pyg_call, pyg_converted)
NOT_CONVERTIBLE = ("RealAgnosticAttResidualInteractionBlock", "RealAgnosticResidualNonLinearInteractionBlock")
CONVERTIBLE = [name for name, case in CASES.items() if case[2] and name not in NOT_CONVERTIBLE]


@pytest.fixture(params=list(CASES))
def case(request):
    build, call, _ = CASES[request.param]
    return build()[0], call


def equal(left, right):
    return torch.equal(left[0].detach(), right[0].detach()) and torch.equal(left[1].detach(), right[1].detach())


def changed(left, right):
    return bool((left[1].detach() - right[1].detach()).abs().max() > 1e-6)


def test_a_neutral_gate_changes_no_bit_and_detaching_restores_the_model(case):
    model, call = case
    before, names = call(model, FRAME["positions"]), list(model.state_dict())
    attachment = attach(model, [NEUTRAL, EFA.model_copy(update={"zero_init": True})])
    assert len(attachment.layers) == len(attachment.mixers) > 0
    assert equal(call(model, FRAME["positions"]), before)
    assert all(torch.equal(alpha, torch.ones_like(alpha)) for alpha in attachment.gates)
    with torch.no_grad():
        for layer in attachment.layers:
            layer.operator.W_gate.fill_(2.0)
    assert changed(call(model, FRAME["positions"]), before)
    detach(model)
    assert equal(call(model, FRAME["positions"]), before)
    assert list(model.state_dict()) == names
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_forces_are_minus_the_central_difference(case, operator):
    model, call = case
    attach(model, OPERATORS[operator])
    _, forces = call(model, FRAME["positions"])
    step = 1e-4
    for atom, axis in ((0, 0), (3, 2)):
        energies = []
        for sign in (1, -1):
            positions = FRAME["positions"].copy()
            positions[atom, axis] += sign * step
            energies.append(float(call(model, positions)[0].detach()))
        numerical = -(energies[0] - energies[1]) / (2 * step)
        assert abs(numerical - float(forces[atom, axis])) < 1e-6 * max(1.0, abs(numerical))


@pytest.mark.parametrize("kernel", ["exp", "polynomial"])
def test_the_intrinsic_frame_keeps_the_model_invariant(case, kernel):
    model, call = case
    bare = call(model, FRAME["positions"])
    grid = {"kind": "lebedev", "num_points": 110}
    attach(model, MARAConfig(form="published", kernel=kernel, grid=grid, hidden_dim=8, gate="published"))
    energy, forces = call(model, FRAME["positions"])
    matrix = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(4)))[0].numpy()
    turned_energy, turned = call(model, FRAME["positions"] @ matrix.T)
    assert changed((energy, forces), bare)
    bound = 1e-9 if kernel == "polynomial" else 1e-6
    assert abs(float(turned_energy.detach() - energy.detach())) < bound
    assert np.abs(turned.detach().numpy() - forces.detach().numpy() @ matrix.T).max() < bound


def test_parameters_train_with_the_models_own(case):
    model, call = case
    own = {id(parameter) for parameter in model.parameters()}
    attachment = attach(model, [NEUTRAL, EFA.model_copy(update={"zero_init": True})])
    new = [parameter for parameter in model.parameters() if id(parameter) not in own]
    assert {id(parameter) for parameter in attachment.parameters()} == {id(parameter) for parameter in new}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    start = [parameter.detach().clone() for parameter in new]
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        energy, forces = call(model.train(), FRAME["positions"], training=True)
        loss = (energy - 1.0) ** 2 + forces.square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = [float((now.detach() - then).abs().max()) for now, then in zip(new, start)]
    assert max(moved) > 1e-3


def test_saved_and_loaded_beside_the_model(case, tmp_path):
    model, call = case
    attach(model, [LIVELY, EFA], layers=[1])
    expected = call(model, FRAME["positions"])
    save_attached(tmp_path / "gates.safetensors", model)
    detach(model)
    assert changed(call(model, FRAME["positions"]), expected)
    attachment = load_attached(tmp_path / "gates.safetensors", model)
    assert [layer.spec.layer for layer in (*attachment.layers, *attachment.mixers)] == [1, 1]
    assert equal(call(model, FRAME["positions"]), expected)


def test_copies_are_independent(case):
    model, call = case
    attach(model, [LIVELY, EFA])
    expected = call(model, FRAME["positions"])
    twin = copy.deepcopy(model)
    assert equal(call(twin, FRAME["positions"]), expected)
    with torch.no_grad():
        for layer in twin.steradian.layers:
            layer.operator.W_gate.mul_(3.0)
    assert changed(call(twin, FRAME["positions"]), expected)
    detach(twin)
    assert equal(call(model, FRAME["positions"]), expected)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_attached_equals_the_operators_of_our_own_host(name):
    """The foreign model with operators and our host with its weights and the same operators give the same numbers."""
    build, call, converted = CASES[name]
    model, hyper = build()
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    config, statistics, weights = converted(state, hyper)
    attachment = attach(model, [LIVELY, EFA])
    energy, forces = call(model, FRAME["positions"])
    config = config.model_copy(update={"edge_gate": LIVELY, "global_mixer": EFA})
    potential = build_potential(config, statistics, seed=0)
    for index, layer in enumerate(attachment.layers):
        weights |= {f"layers.{index}.gate.{key}": value for key, value in layer.operator.state_dict().items()}
    for index, layer in enumerate(attachment.mixers):
        weights |= {f"layers.{index}.mixer.{key}": value for key, value in layer.operator.state_dict().items()}
    potential.host.load_state_dict(weights)
    structure = Structure(FRAME["numbers"], FRAME["positions"])
    ours = potential.eval()(make_graph(structure, CUTOFF))
    assert len(ours.gates) == len(attachment.gates)
    assert np.abs(ours.forces.numpy() - forces.detach().numpy()).max() < 1e-9 * float(forces.detach().abs().max())
    assert abs(float(ours.interaction_energy) - float(energy.detach())) < 1e-9 * max(1.0, abs(float(energy.detach())))


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_exported_and_converted(name, precision, tmp_path):
    """What the exporter reads off a live model is all that a conversion needs; the self-test is the proof."""
    model, _ = CASES[name][0]()
    model = model.to(getattr(torch, precision))
    export(model, str(tmp_path / "foreign.npz"))
    potential = convert_file(tmp_path / "foreign.npz")
    assert potential.config.precision == precision
    assert len(potential.self_test.structures) == 2
    save_potential(tmp_path / "model.safetensors", potential)
    assert load_potential(tmp_path / "model.safetensors").self_test is not None
    torch.save(model, tmp_path / "foreign.model")
    again = convert_file(tmp_path / "foreign.model", trust=True)
    assert again.config == potential.config


@pytest.mark.skipif(not has("mace"), reason="needs mace-torch")
def test_a_foundation_style_model_converts(tmp_path):
    """89 elements, 128x0e + 128x1o, density blocks, Agnesi transform, ZBL repulsion: energies, forces and stress."""
    from e3nn import o3
    from mace import modules
    from mace.data import AtomicData, Configuration
    from mace.tools import AtomicNumberTable, torch_geometric

    torch.manual_seed(2)
    elements = list(range(1, 90))
    model = modules.ScaleShiftMACE(
        r_max=5.0, num_bessel=10, num_polynomial_cutoff=5, max_ell=3, num_interactions=2, correlation=3,
        interaction_cls_first=modules.RealAgnosticDensityInteractionBlock,
        interaction_cls=modules.RealAgnosticDensityResidualInteractionBlock,
        hidden_irreps=o3.Irreps("128x0e + 128x1o"), MLP_irreps=o3.Irreps("16x0e"), radial_MLP=[64, 64, 64],
        gate=torch.nn.functional.silu, avg_num_neighbors=30.0, atomic_numbers=elements, num_elements=89,
        atomic_energies=np.linspace(-1.0, -9.0, 89), atomic_inter_scale=0.8, atomic_inter_shift=0.1,
        distance_transform="Agnesi", pair_repulsion=True,
    )  # fmt: skip
    export(model, str(tmp_path / "foreign.npz"))
    potential = convert_file(tmp_path / "foreign.npz")
    assert potential.elements == tuple(elements)
    assert len(potential.self_test.structures) == 2
    frame = frozen.structures()["triclinic"]
    numbers = np.array([26, 8, 89, 3, 17])
    structure = Structure(numbers, frame["positions"], cell=frame["cell"], pbc=frame["pbc"])
    found = potential(make_graph(structure, 5.0), stress=True)
    item = Configuration(
        atomic_numbers=numbers, positions=frame["positions"], properties={}, property_weights={}, pbc=(True,) * 3,
        cell=frame["cell"], head="Default",
    )  # fmt: skip
    data = AtomicData.from_config(item, z_table=AtomicNumberTable(elements), cutoff=5.0, heads=["Default"])
    batch = next(iter(torch_geometric.dataloader.DataLoader([data], batch_size=1))).to_dict()
    out = model(batch, compute_force=True, compute_stress=True)
    for ours, theirs in (
        (found.interaction_energy, out["interaction_energy"]),
        (found.forces, out["forces"]),
        (found.stress, out["stress"]),
    ):
        assert float(theirs.detach().abs().max()) > 1e-3, "nothing to compare"
        assert float((ours - theirs.detach()).abs().max()) < 1e-9 * float(theirs.detach().abs().max())


def test_one_gate_is_copied_into_every_layer_it_fits(case):
    model, call = case
    before = call(model, FRAME["positions"])
    width = 8 if "ViSNet" in type(model).__name__ else 6
    attachment = attach(model, MARA(width, hidden_dim=8, gate="published"))
    first, second = attachment.layers[0].operator, attachment.layers[1].operator
    assert first is not second
    assert torch.equal(first.W_h, second.W_h)
    assert changed(call(model, FRAME["positions"]), before)
    detach(model)
    with pytest.raises(AttachError, match="the gate expects 5 features per atom, but layer 0 has"):
        attach(model, MARA(5))


def test_what_cannot_be_served_is_refused_with_the_reason(case):
    model, _ = case
    with pytest.raises(AttachError, match=r"layers \[7\] do not exist"):
        attach(model, LIVELY, layers=[7])
    with pytest.raises(AttachError, match="cannot attach str"):
        attach(model, "mara")
    with pytest.raises(AttachError, match="no operators of steradian"):
        detach(model)
    attach(model, LIVELY)
    with pytest.raises(AttachError, match="has operators already"):
        attach(model, LIVELY)
    with pytest.raises(AttachError, match=r"Linear cannot be served"):
        attach(torch.nn.Linear(2, 2), LIVELY)
    with pytest.raises(AttachError, match="TorchScript"):
        attach(torch.jit.script(torch.nn.Linear(2, 2)), LIVELY)
    with pytest.raises(AttachError, match="wrapped by"):
        attach(torch.compile(torch.nn.Linear(2, 2)), LIVELY)


@pytest.mark.parametrize("name", [name for name in CASES if not has("torch_geometric")])
def test_between_all_atoms_of_a_periodic_system_is_refused(name):
    build, _, _ = CASES[name]
    model = build()[0]
    attach(model, EFA)
    if has("mace"):
        from mace.data import AtomicData, Configuration
        from mace.tools import AtomicNumberTable, torch_geometric

        item = Configuration(
            atomic_numbers=FRAME["numbers"], positions=FRAME["positions"], properties={}, property_weights={},
            pbc=(True,) * 3, cell=4.0 * np.eye(3), head="Default",
        )  # fmt: skip
        data = AtomicData.from_config(item, z_table=AtomicNumberTable([1, 6, 7, 8]), cutoff=CUTOFF, heads=["Default"])
        batch = next(iter(torch_geometric.dataloader.DataLoader([data], batch_size=1))).to_dict()
    else:
        from nequip.data import compute_neighborlist_, from_dict

        types = torch.tensor([TYPES[int(number)] for number in FRAME["numbers"]])
        data = {"pos": torch.tensor(FRAME["positions"]), "atom_types": types, "cell": 4.0 * torch.eye(3)}
        batch = compute_neighborlist_(from_dict(data | {"pbc": torch.ones(3, dtype=torch.bool)}), r_max=CUTOFF)
    with pytest.raises(AttachError, match="attached to molecules only"):
        model(batch)


@pytest.mark.skipif(not has("nequip"), reason="needs nequip")
def test_a_model_that_nequip_compiles_is_refused():
    model, _ = nequip_model(compile_mode="compile")
    with pytest.raises(AttachError, match="compile_mode='compile'"):
        attach(model, LIVELY)
