"""The size of systems that a rule of directions resolves: measured, warned of, and shown."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from steradian.build import build_potential, save_potential
from steradian.cli.inspect import describe
from steradian.config import EFAConfig, MACEConfig, ModelConfig, O3MPNNConfig
from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.sphere import lebedev
from steradian.evaluation.rotations import rotation_audit
from steradian.graph.structures import Structure
from steradian.operators.efa.operator import EuclideanFastAttention, Systems
from steradian.operators.efa.rules import RESOLVED, plane_wave_error, resolved_phase
from tests.systems import made_up

#: points and the largest phase over pi that the paper's code considers resolved
TABLE = {50: 1, 86: 2, 110: 2.5, 146: 3, 194: 4, 230: 4.5, 266: 5, 302: 5.5, 434: 7.5, 590: 9}


@pytest.mark.parametrize("num_points", TABLE)
def test_the_papers_table_is_resolved_and_a_quarter_more_is_worse(num_points):
    grid, phase = lebedev(num_points), TABLE[num_points] * math.pi
    assert plane_wave_error(grid, phase) < RESOLVED
    assert plane_wave_error(grid, 1.25 * phase) > 5 * plane_wave_error(grid, phase)
    assert phase < resolved_phase(num_points) < 1.4 * phase


def test_small_phases_are_exact_and_more_points_resolve_more():
    assert plane_wave_error(lebedev(50), 0.3) < 1e-14
    found = [resolved_phase(num_points) for num_points in TABLE]
    assert found == sorted(found)
    assert resolved_phase(86, 1e-8) < resolved_phase(86)


def line_of_atoms(length, num_atoms=12, seed=0):
    positions = np.random.default_rng(seed).normal(scale=0.6, size=(num_atoms, 3))
    positions[:, 1] += np.linspace(0, length, num_atoms)
    return torch.from_numpy(positions)


def test_a_system_that_is_too_large_is_warned_of_once():
    attention = EuclideanFastAttention(EFAConfig(max_length_A=10.0), natural_degrees(0), 4).double()
    x, systems = torch.ones(12, 1, 4, dtype=torch.float64), Systems((12,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(x, line_of_atoms(9.0), systems)
        # two systems of 9 Å are not one of 18 Å
        positions = torch.cat([line_of_atoms(9.0), line_of_atoms(9.0) + 9.0])
        attention(x.repeat(2, 1, 1), positions, Systems((12, 12)))
    with pytest.warns(UserWarning, match="about 2[0-9] Å across, but 50 directions resolve.*only to 14 Å"):
        attention(x, line_of_atoms(24.0), systems)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(x, line_of_atoms(24.0), systems)


STATISTICS = made_up({1: -13.6, 6: -1029.5}, avg_num_neighbors=4.0)


def test_inspect_and_the_audit_show_the_limits(tmp_path):
    mixer = EFAConfig(max_length_A=8.0, num_features_qk=8, zero_init=False)
    host = MACEConfig(
        num_channels=8, hidden_l=1, l_max=1, correlation=2, radial_mlp=[8], cutoff_A=3.0, message_scale="mean"
    )
    potential = build_potential(ModelConfig(host=host, global_mixer=mixer, precision="float64"), STATISTICS, seed=1)
    save_potential(tmp_path / "model.safetensors", potential)
    rows = dict(describe(tmp_path, potential))
    assert rows["global mixer, layer 0"] == (
        "EFA on the local update; 4 frequencies up to 0.393/Å; Lebedev 50 resolves systems up to 11 Å "
        "(error of a plane wave 2e-05)"
    )
    small, large = (Structure(np.full(12, 6), line_of_atoms(length).numpy()) for length in (5.0, 30.0))
    potential.eval()
    within = rotation_audit(potential, [small], num_rotations=3)
    with pytest.warns(UserWarning, match="Å across"):
        beyond = rotation_audit(potential, [large], num_rotations=3)
    errors = [max(found.force_max for found in audit.figures) for audit in (within, beyond)]
    assert errors[0] < 1e-6
    assert errors[1] > 100 * errors[0]


def test_inspect_describes_the_o3_network(tmp_path):
    potential = build_potential(ModelConfig(host=O3MPNNConfig(num_channels=8)), STATISTICS, seed=1)
    save_potential(tmp_path / "model.safetensors", potential)
    rows = dict(describe(tmp_path, potential))
    assert rows["radial basis"] == "32 Bernstein polynomials, smooth cutoff"
    assert rows["options"] == "switch"
