"""Pictures of attention: one scale, ranges, atoms apart, maxima named; looked at by eye once, kept by numbers here."""

import dataclasses

import numpy as np
import pytest
from matplotlib.colors import Normalize

from steradian.equivariant.sphere import lebedev
from steradian.evaluation.attention import AttentionResult, LayerAttention, attention_of
from steradian.evaluation.attention_pictures import (
    _apart,
    _covered,
    _view,
    distance_picture,
    molecule_picture,
    sphere_picture,
)
from steradian.graph.structures import Structure
from tests import cases

POINTS = lebedev(26).points.numpy()
# a chain seen from the side, and a second oxygen exactly behind the first
POSITIONS = np.array([[0.0, 0, 0], [1.2, 0, 0], [2.4, 0.1, 0], [1.2, 1.1, 0], [1.2, 1.1, 0.4]])


SPREAD = 2.0 * np.array([[0.0, 0, 0], [1.2, 0, 0], [2.4, 0.1, 0], [1.2, 1.1, 0], [1.2, -1.1, 0.4]])


def result(*alphas, peak=None, positions=POSITIONS):
    """All messages of five atoms; every direction is attended to alike but ``peak``, three times as much."""
    receivers, senders = np.nonzero(~np.eye(len(positions), dtype=bool))
    profile = np.ones((len(senders), len(POINTS)))
    if peak is not None:
        profile[:, peak] = 3.0
    layers = []
    for layer, (low, high) in enumerate(alphas):
        layers.append(LayerAttention(layer, np.linspace(low, high, len(senders))[:, None], profile, POINTS))
    structure = Structure(numbers=np.array([6, 6, 1, 8, 8]), positions=positions)
    return AttentionResult(structure, senders, receivers, positions[senders] - positions[receivers], tuple(layers))


def per_channel(*ranges, along_edges=0.0, num_channels=4):
    """Gates of a model without a sphere: channels from low to high, a little different from message to message."""
    plain = result(*ranges)
    count = len(plain.senders)
    layers = [
        LayerAttention(
            layer, np.linspace(low, high, num_channels) * (1 + along_edges * np.linspace(-0.5, 0.5, count))[:, None]
        )
        for layer, (low, high) in enumerate(ranges)
    ]
    return dataclasses.replace(plain, layers=tuple(layers))


def panels(figure):
    return [axes for axes in figure.axes if axes.get_title()]


def test_one_scale_and_ranges_in_the_titles():
    figure = molecule_picture(result((0.5, 0.6), (0.7, 1.4)))
    first, second = panels(figure)
    assert first.get_title() == "layer 1: α from 0.50 to 0.60"
    assert second.get_title() == "layer 2: α from 0.70 to 1.40"
    norms = [axes.collections[0].norm for axes in (first, second)]
    for norm in norms:
        assert isinstance(norm, Normalize)
        assert (norm.vmin, norm.vmax) == pytest.approx((0.5, 1.5))  # neutral at 1
    assert "less than 1 %" not in figure._supxlabel.get_text()
    limits = [axes.get_ylim() for axes in panels(distance_picture(result((0.5, 0.6), (0.7, 1.4))))]
    assert limits[0] == limits[1]
    assert limits[0] == pytest.approx((0.45, 1.55))


def test_a_gate_that_does_nothing_is_said_to():
    for picture in (molecule_picture, distance_picture, lambda given: sphere_picture(given, 1)):
        said = picture(result((0.9995, 1.0005), (0.998, 1.001)))._supxlabel.get_text()
        assert "α varies by less than 1 %: the gate weighs all messages alike" in said
    one = molecule_picture(result((0.9995, 1.0005), (0.5, 0.9)))
    assert "α varies by less than 1 % in layer 1: the gate" in one._supxlabel.get_text()
    norm = panels(molecule_picture(result((0.9995, 1.0005))))[0].collections[0].norm
    assert (norm.vmin, norm.vmax) == pytest.approx((0.99, 1.01))  # rounding is not painted in full colours


def test_atoms_that_cover_each_other_are_moved_apart():
    radii = np.full(len(POSITIONS), 0.3)
    flat = POSITIONS[:, :2]
    first, second = np.triu_indices(len(flat), 1)
    apart = _apart(flat, radii)
    assert np.linalg.norm(apart[first] - apart[second], axis=1).min() > 0.6
    assert np.abs(apart - flat).max() < 0.6  # and no further than needed
    behind = _apart(np.zeros((3, 2)), radii[:3])
    first, second = np.triu_indices(3, 1)
    assert np.linalg.norm(behind[first] - behind[second], axis=1).min() > 0.6
    assert "moved apart" in molecule_picture(result((0.5, 0.6)))._supxlabel.get_text()
    assert "moved apart" not in molecule_picture(result((0.5, 0.6), positions=SPREAD))._supxlabel.get_text()
    # what does not overlap stays where it is
    assert np.array_equal(_apart(3 * POSITIONS[:4, :2], radii[:4]), 3 * POSITIONS[:4, :2])


def test_maxima_are_named_by_their_neighbour():
    along_x = int(np.argmax(POINTS @ [1.0, 0, 0]))
    (axes,) = panels(sphere_picture(result((0.5, 0.6), peak=along_x), 1))
    assert axes.get_xlabel() == "★1 3, 5° from H2"
    assert axes.get_title() == "layer 1, around C1: 1 to 3\nα of its messages from 0.521 to 0.537"
    opposite = int(np.argmax(POINTS @ [0, -1.0, 0]))
    (axes,) = panels(sphere_picture(result((0.5, 0.6), peak=opposite), 1))
    assert axes.get_xlabel() == "★1 3, 90° from C0"
    (axes,) = panels(sphere_picture(result((0.5, 0.6)), 1))
    assert axes.get_xlabel() == "all directions are attended to alike, within 1 %"
    with pytest.raises(ValueError, match="there is no atom 7; the structure has atoms 0 to 4"):
        sphere_picture(result((0.5, 0.6)), 7)


def test_the_view_is_that_of_least_overlap():
    """Two rings, one above the other: seen from above half of the atoms would be covered."""
    angles = np.arange(8) * np.pi / 4
    ring = 2.4 * np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
    both = np.concatenate([ring, ring + np.array([0.0, 0.0, 0.9])])
    radii = np.full(16, 0.3)
    above = _covered(both[:, :2], radii)
    assert above >= 8.0  # eight pairs exactly behind each other
    seen = _view(both, radii)
    assert _covered(seen, radii) < 0.5 * above
    flat = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [2, 2.5, 0]])
    distances = np.linalg.norm(flat[:, None] - flat, axis=-1)
    kept = _view(flat, radii[:4])
    assert np.allclose(np.linalg.norm(kept[:, None] - kept, axis=-1), distances)  # a flat molecule lies in the plane
    assert _view(flat[:1], radii[:1]).shape == (1, 2)


def test_gates_per_channel_show_mean_and_spread():
    given = per_channel((0.5, 1.1), (0.9, 1.9), along_edges=0.1)
    for picture in (molecule_picture, distance_picture):
        titles = [axes.get_title() for axes in panels(picture(given))]
        assert titles[0] == "layer 1: mean α from 0.76 to 0.84\nsingle channels from 0.47 to 1.16"
        assert titles[1].startswith("layer 2: mean α from 1.33 to 1.47")
        assert titles[2].startswith("layer 1: spread over channels\nfrom 0.2")
        assert len(titles) == 4
    norms = [axes.collections[0].norm for axes in panels(molecule_picture(given))]
    assert (norms[0].vmin, norms[0].vmax) == (norms[1].vmin, norms[1].vmax)
    assert (norms[2].vmin, norms[2].vmax) == (norms[3].vmin, norms[3].vmax)
    assert norms[2].vmin == 0.0
    assert norms[2].vmax == pytest.approx(given.layers[1].spread.max())
    (low,) = panels(molecule_picture(per_channel((-0.004, 1.1))))[:1]
    assert low.get_title().endswith("single channels from 0.00 to 1.10")  # not -0.00
    assert panels(distance_picture(per_channel((-0.5, 1.1))))[0].get_title().endswith("from −0.50 to 1.10")
    with pytest.raises(ValueError, match="attend on no sphere"):
        sphere_picture(given, 1)


def test_channels_that_differ_but_weigh_all_messages_alike_are_said_to():
    said = molecule_picture(per_channel((0.5, 1.1)))._supxlabel.get_text()
    assert "α varies by less than 1 %: the gate weighs all messages alike" in said
    # means that agree are not enough: half of the channels rise with the edge, half of them fall
    plain = per_channel((1.0, 1.0))
    count = len(plain.senders)
    rise = np.linspace(-0.2, 0.2, count)[:, None] * np.array([1, -1, 1, -1])
    given = dataclasses.replace(plain, layers=(LayerAttention(0, 1 + rise),))
    assert np.ptp(given.layers[0].alpha) < 1e-12
    assert "less than 1 %" not in molecule_picture(given)._supxlabel.get_text()


@pytest.mark.parametrize("operator", ["mara", "mara-channel", "mara-channel-all"])
def test_numbers_of_models(operator, tmp_path):
    model, structure = cases.potential(operator=operator), cases.ethanol()
    found = attention_of(model, structure)
    prediction = model(cases.graph(structure))
    heads = {"mara": 1, "mara-channel": 4, "mara-channel-all": 2}[operator]
    assert found.per_channel == (heads > 1)
    assert found.has_sphere == (operator != "mara-channel")
    for entry, alpha in zip(found.layers, prediction.gates):
        assert alpha.dim() == (1 if heads == 1 else 3)
        assert heads == 1 or alpha.shape[2] == heads
        assert np.allclose(entry.channels, alpha.numpy().reshape(len(alpha), -1), atol=1e-12)
        assert np.allclose(entry.alpha, entry.channels.mean(1))
        assert np.ptp(entry.alpha) > 1e-3
    found.save(tmp_path / "attention.npz")
    with np.load(tmp_path / "attention.npz") as file:
        assert np.array_equal(file["channels_1"], found.layers[1].channels)
        assert ("profile_0" in file) == found.has_sphere
