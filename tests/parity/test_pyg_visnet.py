"""Our ViSNet with weights of torch_geometric 2.8.1 against frozen numbers of it (``make parity`` remakes them)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steradian.build import build_potential, load_potential, save_potential
from steradian.interfaces.foreign import ForeignModelError
from steradian.interfaces.pyg_visnet import config_and_weights_from_pyg_visnet
from steradian.polynomials import use_backend
from tests.parity.frozen_models import DATA, RELATIVE, graph_of, read, relative

NAMES = sorted(path.stem.removeprefix("pyg_visnet_") for path in DATA.glob("pyg_visnet_*.npz"))
REFERENCES = {1: -13.5, 6: -1029.25, 7: -1484.5, 8: -2042.0}


def model(name):
    hyper, state, structures, results = read("pyg_visnet", name)
    return hyper, state, structures, results


def imported(hyper, state, elements=(1, 6, 7, 8)):
    config, statistics, weights = config_and_weights_from_pyg_visnet(state, hyper, elements)
    potential = build_potential(config, statistics, seed=1)
    potential.host.load_state_dict(weights)
    return potential.eval()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_energies_and_forces(name, backend):
    hyper, state, structures, results = model(name)
    potential = imported(hyper, state)
    for frame, expected in results.items():
        graph = graph_of(structures[frame], potential.cutoff)
        assert graph.num_edges == expected["num_edges"]
        with use_backend(backend):
            found = potential(graph)
        assert relative(found.energy, expected["energy"]) < RELATIVE
        # on their own scale: the reference energies, a thousand times larger, hide nothing
        references = potential.atom_references[potential.species(graph.prepared()).index].numpy()
        interaction = expected["atom_energies"] - references
        assert relative(found.atom_energies.numpy() - references, interaction) < RELATIVE
        assert relative(found.forces, expected["forces"]) < RELATIVE


def test_the_frozen_models_cover_what_is_promised():
    settings = [model(name)[0] for name in NAMES]
    assert len(settings) >= 6
    assert {(entry["lmax"], entry.get("vertex", False)) for entry in settings} == {
        (degree, vertex) for degree in (1, 2) for vertex in (False, True)
    }
    assert {entry.get("vecnorm_type") for entry in settings} == {None, "max_min"}
    assert {entry["num_heads"] for entry in settings} == {1, 4, 8}
    assert {entry["num_layers"] for entry in settings} == {1, 2, 3, 4, 5}
    assert any(entry.get("std", 1.0) != 1.0 for entry in settings)
    published = model("published")[0]
    paper = {"hidden_channels": 256, "num_layers": 5, "lmax": 2, "num_rbf": 32, "cutoff": 5.0, "num_heads": 8}
    assert {key: published[key] for key in paper} == paper


@pytest.mark.parametrize("name", ["vertex", "vectors_vertex", "trainable", "two_layers"])
def test_every_weight_that_is_kept_has_an_effect(name):
    hyper, state, structures, results = model(name)
    potential = imported(hyper, state).train()
    graph = graph_of(structures["molecule"], potential.cutoff)
    potential(graph).forces.square().sum().backward()
    for key, parameter in potential.host.named_parameters():
        # a constant added to every atom's energy makes no force
        assert key == "readout.last_out.bias" or parameter.grad.abs().max() > 1e-8, key
    assert relative(potential.eval()(graph).forces, results["molecule"]["forces"]) < RELATIVE


@pytest.mark.parametrize("name", ["vertex", "two_layers"])
def test_weights_left_out_have_no_effect(name):
    """Entries of the published model that the import drops."""
    hyper, state, structures, results = model(name)
    dropped = [key for key in state if "vis_mp_layers.0.vec_proj" in key or "output_network.1.vec2_proj" in key]
    assert len(dropped) == 2
    changed = imported(hyper, state | {key: 2 * state[key] for key in dropped})
    graph = graph_of(structures["molecule"], changed.cutoff)
    assert relative(changed(graph).forces, results["molecule"]["forces"]) < RELATIVE


def test_all_elements_of_the_embedding_by_default():
    hyper, state, structures, results = model("references")
    potential = imported(hyper, state, None)
    assert potential.elements == tuple(range(1, 20))
    found = potential(graph_of(structures["molecule"], potential.cutoff))
    assert relative(found.forces, results["molecule"]["forces"]) < RELATIVE
    assert {number: potential.statistics.atom_references[number] for number in REFERENCES} == REFERENCES


def test_an_imported_model_is_saved_and_read_like_any_other(tmp_path):
    hyper, state, structures, results = model("references")
    save_potential(tmp_path / "model.safetensors", imported(hyper, state))
    potential = load_potential(tmp_path / "model.safetensors")
    found = potential(graph_of(structures["water"], potential.cutoff))
    assert relative(found.forces, results["water"]["forces"]) < RELATIVE
    assert relative(found.energy, results["water"]["energy"]) < RELATIVE


def energy_beyond_and_within(potential, step):
    """Energies of two oxygen atoms just outside and just inside the cutoff."""
    energies = []
    for sign in (1, -1):
        frame = {
            "numbers": np.array([8, 8]),
            "positions": np.array([[0.0, 0.0, 0.0], [0.0, 0.0, potential.cutoff + sign * step]]),
            "cell": np.zeros((3, 3)),
            "pbc": np.zeros(3, dtype=bool),
        }
        energies.append(float(potential(graph_of(frame, potential.cutoff), forces=False).interaction_energy))
    return energies


def test_the_published_model_jumps_at_the_cutoff_and_the_smooth_one_does_not():
    hyper, state, _, _ = model("vertex")
    published = imported(hyper, state)
    beyond, within = energy_beyond_and_within(published, 1e-9)
    assert abs(beyond - within) > 1e-3
    config, statistics, weights = config_and_weights_from_pyg_visnet(state, hyper, (1, 6, 7, 8))
    config = config.model_copy(update={"host": config.host.model_copy(update={"smooth": True})})
    smooth = build_potential(config, statistics, seed=1)
    smooth.host.load_state_dict(weights)
    beyond, within = energy_beyond_and_within(smooth.eval(), 1e-9)
    assert abs(beyond - within) < 1e-12
    # the biases of the weights of vector messages are all that jumps
    biases = [key for key in weights if key.endswith("vector_weights.bias")]
    assert len(biases) == hyper["num_layers"]
    with torch.no_grad():
        for key in biases:
            published.host.get_parameter(key).zero_()
    beyond, within = energy_beyond_and_within(published, 1e-9)
    assert abs(beyond - within) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce_op": "mean"}, "reduce_op=mean has no counterpart"),
        ({"vecnorm_type": "other"}, "vecnorm_type=other cannot be converted"),
        ({"hidden_channels": 32}, "entries; the hyperparameters ask for"),
        ({"num_layers": 3}, "entries|without counterpart|missing"),
        ({"num_layers": 5}, "is missing"),
        ({"vertex": False}, "entries|without counterpart"),
    ],
)
def test_what_cannot_be_converted_is_named(change, message):
    hyper, state, _, _ = model("vertex")
    with pytest.raises(ForeignModelError, match=message):
        config_and_weights_from_pyg_visnet(state, hyper | change, (1, 6, 7, 8))


def test_missing_and_unknown_entries_are_named():
    hyper, state, _, _ = model("rescaled")
    with pytest.raises(ForeignModelError, match="whole state dict of a ViSNet"):
        config_and_weights_from_pyg_visnet({"mean": np.zeros(())}, hyper)
    with pytest.raises(ForeignModelError, match="added once per structure"):
        config_and_weights_from_pyg_visnet(state | {"mean": np.array(1.5)}, hyper)
    with pytest.raises(ForeignModelError, match="without counterpart here: extra"):
        config_and_weights_from_pyg_visnet(state | {"extra": np.ones(1)}, hyper)
    with pytest.raises(ForeignModelError, match="trainable_vecnorm=True"):
        config_and_weights_from_pyg_visnet(state, hyper | {"trainable_vecnorm": False})
    with pytest.raises(ForeignModelError, match="elements must be between 1 and 19"):
        config_and_weights_from_pyg_visnet(state, hyper, (1, 92))
