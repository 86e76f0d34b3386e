"""Our MACE with weights of mace-torch 0.3.16 against frozen numbers of that package (``make parity`` remakes them)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from steradian.build import build_potential, load_potential, save_potential
from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from steradian.interfaces.mace_torch import (
    ForeignModelError,
    config_and_weights_from_mace_torch,
    path_signs,
)

DATA = Path(__file__).parent / "data"
TABLES = {"couplings", "wigner_3j"}
NAMES = sorted({path.stem.removeprefix("mace_torch_") for path in DATA.glob("mace_torch_*.npz")} - TABLES)
RELATIVE = 1e-9
LABELS = {"energy", "atom_energies", "forces", "virial", "num_edges"}


def read(name):
    """Hyper-parameters, whole state dict, structures, and the frozen results of each structure and head."""
    with np.load(DATA / f"mace_torch_{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    hyper = json.loads(str(arrays.pop("hyperparameters")))
    state = {key.removeprefix("weights/"): arrays.pop(key) for key in list(arrays) if key.startswith("weights/")}
    state = {key: value.astype(np.float64) if value.dtype == np.float16 else value for key, value in state.items()}
    state |= coupling_tables(hyper, state)
    structures, results = {}, {}
    for key, value in arrays.items():
        frame, *head, label = key.split("/")
        if label in LABELS:
            results.setdefault((frame, head[0] if head else None), {})[label] = value
        else:
            structures.setdefault(frame, {})[label] = value
    return hyper, state, structures, results


def coupling_tables(hyper, state):
    """The U matrices of a model, out of the file where each stands once."""
    tables = {}
    with np.load(DATA / "mace_torch_couplings.npz") as file:
        for key in state:
            if not (
                match := re.fullmatch(r"(products\.(\d+)\.symmetric_contractions\.contractions\.(\d+))\..*max", key)
            ):
                continue
            top = hyper["correlation"]
            top = top if isinstance(top, int) else top[int(match[2])]
            for order in range(1, top + 1):
                entry = f"{hyper['max_ell']}/{top}/{match[3]}/{order}"
                table = np.zeros(file[f"{entry}/shape"])
                table.reshape(-1)[np.cumsum(file[f"{entry}/steps"])] = file[f"{entry}/levels"][file[f"{entry}/codes"]]
                tables[f"{match[1]}.U_matrix_{order}"] = table
    return tables


def imported(hyper, state, head=None):
    config, statistics, weights = config_and_weights_from_mace_torch(state, hyper, head)
    potential = build_potential(config, statistics, seed=1)
    potential.host.load_state_dict(weights)
    return potential.eval()


def graph_of(frame, cutoff):
    return make_graph(Structure(frame["numbers"], frame["positions"], cell=frame["cell"], pbc=frame["pbc"]), cutoff)


def relative(ours, theirs):
    """Largest difference over the largest entry, which must be large enough to mean something."""
    largest = np.abs(theirs).max()
    assert largest > 1e-2, "nothing to compare"
    return np.abs(np.asarray(ours) - theirs).max() / largest


@pytest.mark.parametrize("name", NAMES)
def test_energies_forces_and_stress(name):
    hyper, state, structures, results = read(name)
    for (frame, head), expected in results.items():
        potential = imported(hyper, state, head)
        graph = graph_of(structures[frame], potential.cutoff)
        assert graph.num_edges == expected["num_edges"]
        periodic = bool(graph.pbc.any())
        found = potential(graph, stress=periodic)
        assert relative(found.energy, expected["energy"]) < RELATIVE
        assert relative(found.atom_energies, expected["atom_energies"]) < RELATIVE
        # on their own scale: the reference energies, a thousand times larger, hide nothing
        references = potential.atom_references[potential.species(graph.prepared()).index].numpy()
        interaction = expected["atom_energies"] - references
        assert relative(found.atom_energies.numpy() - references, interaction) < RELATIVE
        if "forces" not in expected:  # torch takes its Chebyshev polynomials for constants: no forces to compare
            assert hyper["radial_type"] == "chebyshev"
            continue
        assert relative(found.forces, expected["forces"]) < RELATIVE
        if periodic:
            volume = abs(np.linalg.det(structures[frame]["cell"]))
            assert relative(found.stress[0] * volume, expected["virial"]) < RELATIVE


def test_the_frozen_models_cover_what_is_promised():
    settings, frames = [], []
    for name in NAMES:
        hyper, _, structures, _ = read(name)
        settings.append(hyper)
        frames += structures.values()
    assert len(settings) >= 10
    assert {entry["hidden_irreps"].count("+") for entry in settings} >= {0, 1, 2, 3}
    assert {entry["correlation"] for entry in settings if isinstance(entry["correlation"], int)} == {1, 2, 3, 4}
    assert any(isinstance(entry["correlation"], list) for entry in settings)
    blocks = {(entry["interaction_cls_first"], entry["interaction_cls"]) for entry in settings}
    assert len(blocks) == 6
    assert {entry.get("distance_transform", "None") for entry in settings} == {"None", "Agnesi", "Soft"}
    assert {entry.get("pair_repulsion", False) for entry in settings} == {False, True}
    assert {entry["radial_type"] for entry in settings} == {"bessel", "gaussian", "chebyshev"}
    assert {entry["max_ell"] for entry in settings} == {1, 2, 3, 4}
    assert {entry["num_interactions"] for entry in settings} == {1, 2, 3}
    assert {entry["num_polynomial_cutoff"] for entry in settings} == {5, 6}
    assert {entry["model"] for entry in settings} == {"MACE", "ScaleShiftMACE"}
    assert {tuple(frame["pbc"]) for frame in frames} == {(0, 0, 0), (1, 1, 0), (1, 1, 1)}


def product_and_paths(l_max):
    degrees_in = natural_degrees(3)
    polynomial, table = channelwise_polynomial(degrees_in, l_max, natural_degrees(l_max))
    return polynomial, degrees_in, table.paths, table.degrees_out


def test_every_coupling_equals_the_published_one_up_to_the_sign_found():
    with np.load(DATA / "mace_torch_wigner_3j.npz") as file:
        symbols = {f"layer.conv_tp._w3j_{key}": file[key] for key in file.files}
    polynomial, degrees_in, paths, degrees_out = product_and_paths(4)
    assert len(paths) > 30
    signs = path_signs(symbols, "layer", polynomial, degrees_in, paths, degrees_out)
    assert set(signs) == {-1.0, 1.0}
    for index_in, degree_y, block in paths:
        # e3nn's symbols for a degree 0 are positive: what the import takes for granted
        degrees = (degrees_in[index_in][0], degree_y, degrees_out[block][0])
        if 0 in degrees:
            symbol = symbols["layer.conv_tp._w3j_{}_{}_{}".format(*degrees)]
            assert np.allclose(symbol.reshape(max(symbol.shape), -1), np.eye(max(symbol.shape)) * symbol.max())
            assert symbol.max() > 0
    for key in symbols:
        changed = path_signs(symbols | {key: -symbols[key]}, "layer", polynomial, degrees_in, paths, degrees_out)
        assert np.sum(changed != signs) == (0 if 0 in map(int, key.split("_")[-3:]) or not used(key, paths) else 1)


def used(key, paths):
    first, second, third = (int(degree) for degree in key.split("_")[-3:])
    return (first, second, third) in paths  # natural degrees: index and degree are the same


@pytest.mark.parametrize("name", ["published_block", "every_path"])
def test_a_wrong_sign_of_any_single_path_is_noticed(name):
    hyper, state, structures, results = read(name)
    potential = imported(hyper, state)
    graph, expected = graph_of(structures["molecule"], potential.cutoff), results["molecule", None]["forces"]
    assert relative(potential(graph).forces, expected) < RELATIVE
    count = 0
    for layer in potential.host.layers:
        last, channels = layer.radial_network.weights[-1], layer.radial_network.num_channels
        for path in range(layer.product.num_paths):
            columns = slice(path * channels, (path + 1) * channels)
            with torch.no_grad():
                last[:, columns] *= -1
            assert relative(potential(graph).forces, expected) > 1e-6, f"path {path} may have either sign"
            with torch.no_grad():
                last[:, columns] *= -1
            count += 1
    assert count > 10


def test_phases_of_another_version_are_read_from_the_state_dict():
    """Newer versions of e3nn give some symbols the other sign; the same function then has the other sign of weights."""
    hyper, state, structures, results = read("published_block")
    expected = results["molecule", None]["forces"]
    # the second layer lists its paths by output degree: 0 0 0, 1 1 0, 0 1 1, 1 0 1, 1 2 1 (number 4), ...
    symbol = next(key for key in state if key.endswith("_w3j_1_2_1"))
    last = "interactions.1.conv_tp_weights.layer3.weight"
    turned = state[last].copy()
    turned[:, 4 * 6 : 5 * 6] *= -1
    graph = graph_of(structures["molecule"], hyper["r_max"])
    other = imported(hyper, state | {symbol: -state[symbol], last: turned})
    assert relative(other(graph).forces, expected) < RELATIVE
    wrong = imported(hyper, state | {symbol: -state[symbol]})
    assert relative(wrong(graph).forces, expected) > 1e-6


def test_an_imported_model_is_saved_and_read_like_any_other(tmp_path):
    hyper, state, structures, results = read("foundation_style")
    save_potential(tmp_path / "model.safetensors", imported(hyper, state))
    potential = load_potential(tmp_path / "model.safetensors")
    found = potential(graph_of(structures["triclinic"], potential.cutoff))
    assert relative(found.forces, results["triclinic", None]["forces"]) < RELATIVE
    assert relative(found.energy, results["triclinic", None]["energy"]) < RELATIVE


def test_elements_in_any_order():
    hyper, state, structures, results = read("foundation_style")
    turned = {**state, "atomic_numbers": state["atomic_numbers"][::-1]}
    energies = "atomic_energies_fn.atomic_energies"
    turned[energies] = np.ascontiguousarray(state[energies][..., ::-1])
    for key, value in state.items():
        if "node_embedding" in key:
            turned[key] = value.reshape(4, -1)[::-1].reshape(-1)
        elif "skip_tp.weight" in key:
            turned[key] = value.reshape(-1, 4, 4, 4)[:, :, ::-1].reshape(-1)
        elif re.search(r"contractions\.\d\.weights", key) and value.ndim == 3:
            turned[key] = value[::-1]
    potential = imported(hyper, turned)
    found = potential(graph_of(structures["molecule"], potential.cutoff))
    assert relative(found.forces, results["molecule", None]["forces"]) < RELATIVE
    assert relative(found.atom_energies, results["molecule", None]["atom_energies"]) < RELATIVE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interaction_cls": "RealAgnosticAttResidualInteractionBlock"}, "AttResidualInteractionBlock cannot be"),
        ({"interaction_cls": "RealAgnosticDensityResidualInteractionBlock"}, "density_fn.layer0.weight' is missing"),
        ({"pair_repulsion": True}, "'pair_repulsion_fn.p' is missing"),
        ({"distance_transform": "Agnesi"}, "'radial_embedding.distance_transform.a' is missing"),
        ({"distance_transform": "Other"}, "distance_transform Other cannot be converted; known: None, Agnesi, Soft"),
        ({"apply_cutoff": False}, "apply_cutoff=False has no counterpart"),
        ({"hidden_irreps": "4x0e + 2x1o"}, "hidden_irreps '4x0e . 2x1o' cannot be converted"),
        ({"hidden_irreps": "4x0e + 4x1e"}, "hidden_irreps"),
        ({"gate": "tanh"}, "gate tanh"),
        ({"MLP_irreps": "4x0e + 4x1o"}, "MLP_irreps"),
        ({"MLP_irreps": "5x0e"}, "linear_1.weight' has 24 entries"),
        ({"r_max": 5.0}, "'r_max' is 4.5 in the state dict and 5 in the hyperparameters"),
        ({"num_polynomial_cutoff": 5}, "cutoff_fn.p' is 6"),
        ({"heads": ["a", "b"]}, "several heads, choose one: a, b"),
        ({"max_ell": 2}, "does not fit|entries"),
    ],
)
def test_what_cannot_be_converted_is_named(change, message):
    hyper, state, _, _ = read("foundation_style")
    with pytest.raises(ForeignModelError, match=message):
        config_and_weights_from_mace_torch(state, hyper | change)


def test_missing_changed_and_unknown_entries_are_named():
    hyper, state, _, _ = read("foundation_style")

    def refused(state, message, hyper=hyper):
        with pytest.raises(ForeignModelError, match=message):
            config_and_weights_from_mace_torch(state, hyper)

    without = {key: value for key, value in state.items() if key != "interactions.0.linear_up.weight"}
    refused(without, "linear_up.weight' is missing")
    refused({key: value for key, value in state.items() if "_w3j_" not in key}, "_w3j_.* is missing")
    refused(state | {"pair_repulsion_fn.c": np.ones(4)}, "without counterpart here: pair_repulsion_fn.c")
    refused(state, "lack avg_num_neighbors", {k: v for k, v in hyper.items() if k != "avg_num_neighbors"})
    table = "products.0.symmetric_contractions.contractions.0.U_matrix_2"
    refused(state | {table: state[table] + 0.01}, "order 2 are not combinations of ours")
    symbol = next(key for key in state if "_w3j_" in key)
    refused(state | {symbol: state[symbol] + 0.01}, "differs by more than a sign")
