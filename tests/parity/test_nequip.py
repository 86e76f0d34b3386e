"""Our NequIP with weights of nequip 0.19.1 against frozen numbers of that package (``make parity`` remakes them)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steradian.build import build_potential, load_potential, save_potential
from steradian.hosts.nequip import layer_degrees
from steradian.interfaces.foreign import ForeignModelError
from steradian.interfaces.nequip import config_and_weights_from_nequip
from steradian.polynomials import use_backend
from tests.parity.frozen_models import DATA, RELATIVE, graph_of, read, relative

NAMES = sorted({path.stem.removeprefix("nequip_") for path in DATA.glob("nequip_*.npz")} - {"wigner_3j"})


def model(name):
    hyper, state, structures, results = read("nequip", name)
    with np.load(DATA / "nequip_wigner_3j.npz") as file:
        state |= {f"model.func.shared._w3j_{key}": file[key] for key in file.files}
    return hyper, state, structures, results


def imported(hyper, state):
    config, statistics, weights = config_and_weights_from_nequip(state, hyper)
    potential = build_potential(config, statistics, seed=1)
    potential.host.load_state_dict(weights)
    return potential.eval()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_energies_forces_and_stress(name, backend):
    hyper, state, structures, results = model(name)
    potential = imported(hyper, state)
    for frame, expected in results.items():
        graph = graph_of(structures[frame], potential.cutoff)
        assert graph.num_edges == expected["num_edges"]
        periodic = bool(graph.pbc.any())
        with use_backend(backend):
            found = potential(graph, stress=periodic)
        assert relative(found.energy, expected["energy"]) < RELATIVE
        assert relative(found.atom_energies, expected["atom_energies"]) < RELATIVE
        # on their own scale: the reference energies, a thousand times larger, hide nothing
        shifts = hyper["per_type_energy_shifts"] or dict.fromkeys(hyper["type_names"], 0.0)
        symbols = {1: "H", 6: "C", 7: "N", 8: "O"}
        references = np.array([shifts[symbols[number]] for number in structures[frame]["numbers"]])
        interaction = expected["atom_energies"] - references
        assert relative(found.atom_energies.numpy() - references, interaction) < RELATIVE
        assert relative(found.forces, expected["forces"]) < RELATIVE
        if periodic:
            volume = abs(np.linalg.det(structures[frame]["cell"]))
            assert relative(found.stress[0] * volume, expected["virial"]) < RELATIVE


def test_the_frozen_models_cover_what_is_promised():
    settings, frames, irreps = [], [], set()
    for name in NAMES:
        hyper, state, structures, _ = model(name)
        settings.append(hyper)
        frames += structures.values()
        for degrees_in, degrees_out in layer_degrees(config_and_weights_from_nequip(state, hyper)[0].host):
            irreps |= {*degrees_in, *degrees_out}
    assert len(settings) >= 6
    assert {entry["l_max"] for entry in settings} == {0, 1, 2, 3}
    assert {entry["parity"] for entry in settings} == {True, False}
    assert irreps == {(degree, parity) for degree in range(4) for parity in (1, -1)}
    assert {tuple(frame["pbc"]) for frame in frames} == {(0, 0, 0), (1, 1, 0), (1, 1, 1)}
    published = model("published")[0]
    paper = {"r_max": 5.0, "num_bessels": 8, "polynomial_cutoff_p": 6, "num_layers": 3, "l_max": 1, "parity": True}
    paper |= {"num_features": 32, "radial_mlp_depth": 2, "radial_mlp_width": 64}
    assert {key: published[key] for key in paper} == paper


@pytest.mark.parametrize("name", ["degree_three", "every_parity"])
def test_a_wrong_sign_of_any_single_path_is_noticed(name):
    hyper, state, structures, results = model(name)
    potential = imported(hyper, state)
    graph, expected = graph_of(structures["molecule"], potential.cutoff), results["molecule"]["forces"]
    count = 0
    for index, layer in enumerate(potential.host.layers):
        last, channels = layer.radial_network.weights[-1], layer.radial_network.num_channels
        for path in range(layer.product.num_paths):
            degree, parity = layer.product.table.degrees_out[layer.product.table.paths[path][2]]
            if index == hyper["num_layers"] - 2 and parity != (-1) ** degree:
                continue  # the last layer has only even scalars, which these irreps do not reach
            columns = slice(path * channels, (path + 1) * channels)
            with torch.no_grad():
                last[:, columns] *= -1
            assert relative(potential(graph).forces, expected) > 1e-6, f"path {path} may have either sign"
            with torch.no_grad():
                last[:, columns] *= -1
            count += 1
    assert relative(potential(graph).forces, expected) < RELATIVE
    assert count > 10


def test_phases_of_another_version_are_read_from_the_state_dict():
    hyper, state, structures, results = model("degree_two")
    expected = results["molecule"]["forces"]
    graph = graph_of(structures["molecule"], hyper["r_max"])
    symbol = "model.func.shared._w3j_1_1_2"
    wrong = imported(hyper, state | {symbol: -state[symbol]})
    assert relative(wrong(graph).forces, expected) > 1e-6
    with pytest.raises(ForeignModelError, match="differs by more than a sign"):
        imported(hyper, state | {symbol: state[symbol] + 0.01})


def test_an_imported_model_is_saved_and_read_like_any_other(tmp_path):
    hyper, state, structures, results = model("per_type")
    save_potential(tmp_path / "model.safetensors", imported(hyper, state))
    potential = load_potential(tmp_path / "model.safetensors")
    found = potential(graph_of(structures["slab"], potential.cutoff))
    assert relative(found.forces, results["slab"]["forces"]) < RELATIVE
    assert relative(found.energy, results["slab"]["energy"]) < RELATIVE
    learned = {name for name, _ in potential.host.named_parameters()}
    assert {"scale", "shift"} <= learned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair_potential": {"_target_": "ZBL"}}, "pair_potential=.* has no counterpart"),
        ({"per_edge_type_cutoff": {"H": 2.0}}, "per_edge_type_cutoff=.* has no counterpart"),
        ({"num_features": [8, 4]}, "same number of features"),
        ({"avg_num_neighbors": {"H": 1.0, "C": 2.0}}, "by type has no counterpart"),
        ({"avg_num_neighbors": None}, "lack avg_num_neighbors"),
        ({"type_names": ["H", "C", "N", "Ow"]}, "element symbols here, not Ow"),
        ({"r_max": 5.5}, "'r_max' is 5 in the state dict and 5.5"),
        ({"num_layers": 4}, "layer2_convnet.*|missing"),
        ({"l_max": 2}, "entries; the hyperparameters ask for"),
        ({"parity": False}, "entries|parts without counterpart"),
        ({"readout_mlp_hidden_layers_depth": 1, "readout_mlp_nonlinearity": "mish"}, "known: silu"),
    ],
)
def test_what_cannot_be_converted_is_named(change, message):
    hyper, state, _, _ = model("published")
    with pytest.raises(ForeignModelError, match=message):
        config_and_weights_from_nequip(state, hyper | change)


def test_missing_and_unknown_entries_are_named():
    hyper, state, _, _ = model("published")
    key = "model.func.layer1_convnet.conv.linear_1.weight"
    with pytest.raises(ForeignModelError, match=r"linear_1.weight' is missing"):
        config_and_weights_from_nequip({name: value for name, value in state.items() if name != key}, hyper)
    with pytest.raises(ForeignModelError, match="is this the whole state dict of a nequip model"):
        config_and_weights_from_nequip({}, hyper)
    with pytest.raises(ForeignModelError, match=r"without counterpart here: pair_potential.x"):
        config_and_weights_from_nequip(state | {"model.func.pair_potential.x": np.ones(1)}, hyper)
    without = {name: value for name, value in state.items() if "_w3j_" not in name}
    with pytest.raises(ForeignModelError, match=r"_w3j_.* is missing"):
        config_and_weights_from_nequip(without, hyper)
