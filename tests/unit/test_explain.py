"""Pictures of attention: one scale, ranges, atoms apart, maxima named; looked at by eye once, kept by numbers here."""

import numpy as np
import pytest
from matplotlib.colors import Normalize

from steradian.equivariant.sphere import lebedev
from steradian.evaluation.attention import (
    AttentionResult,
    LayerAttention,
    _apart,
    _plane,
    distance_picture,
    molecule_picture,
    sphere_picture,
)
from steradian.graph.structures import Structure

POINTS = lebedev(26).points.numpy()
# a chain seen from the side, and a second oxygen exactly behind the first
POSITIONS = np.array([[0.0, 0, 0], [1.2, 0, 0], [2.4, 0.1, 0], [1.2, 1.1, 0], [1.2, 1.1, 0.4]])


def result(*alphas, peak=None):
    """All messages of five atoms; every direction is attended to alike but ``peak``, three times as much."""
    receivers, senders = np.nonzero(~np.eye(len(POSITIONS), dtype=bool))
    profile = np.ones((len(senders), len(POINTS)))
    if peak is not None:
        profile[:, peak] = 3.0
    layers = []
    for layer, (low, high) in enumerate(alphas):
        layers.append(LayerAttention(layer, np.linspace(low, high, len(senders)), profile, POINTS))
    structure = Structure(numbers=np.array([6, 6, 1, 8, 8]), positions=POSITIONS)
    return AttentionResult(structure, senders, receivers, POSITIONS[senders] - POSITIONS[receivers], tuple(layers))


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
    flat = _plane(POSITIONS)
    first, second = np.triu_indices(len(flat), 1)
    assert np.linalg.norm(flat[first] - flat[second], axis=1).min() < 0.5
    apart = _apart(flat, radii)
    assert np.linalg.norm(apart[first] - apart[second], axis=1).min() > 0.6
    assert np.abs(apart - flat).max() < 0.6  # and no further than needed
    behind = _apart(np.zeros((3, 2)), radii[:3])
    first, second = np.triu_indices(3, 1)
    assert np.linalg.norm(behind[first] - behind[second], axis=1).min() > 0.6
    assert "moved apart" in molecule_picture(result((0.5, 0.6)))._supxlabel.get_text()
    # what does not overlap stays where it is
    assert np.array_equal(_apart(3 * POSITIONS[:4, :2], radii[:4]), 3 * POSITIONS[:4, :2])


def test_maxima_are_named_by_their_neighbour():
    along_x = int(np.argmax(POINTS @ [1.0, 0, 0]))
    (axes,) = panels(sphere_picture(result((0.5, 0.6), peak=along_x), 1))
    assert axes.get_xlabel() == "★1 3, 5° from H2"
    opposite = int(np.argmax(POINTS @ [0, -1.0, 0]))
    (axes,) = panels(sphere_picture(result((0.5, 0.6), peak=opposite), 1))
    assert axes.get_xlabel() == "★1 3, 90° from C0"
    (axes,) = panels(sphere_picture(result((0.5, 0.6)), 1))
    assert axes.get_xlabel() == "all directions are attended to alike, within 1 %"
    with pytest.raises(ValueError, match="there is no atom 7; the structure has atoms 0 to 4"):
        sphere_picture(result((0.5, 0.6)), 7)
