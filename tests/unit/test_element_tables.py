"""Tables of the elements of low rank and in few bits: fewer numbers, same start, trained, stored."""

from __future__ import annotations

import pytest
import torch

from steradian.build import build_potential, load_potential, save_potential
from steradian.config import MACEConfig, ModelConfig, NequIPConfig
from steradian.data.statistics import DatasetStatistics
from steradian.hosts.mace import LowRank, RoundedRows
from tests.unit.precision_cases import STATISTICS, graph

MANY = DatasetStatistics(tuple(range(1, 21)), dict.fromkeys(range(1, 21), 0.0), avg_num_neighbors=5.0)
HOST = MACEConfig(num_channels=8, cutoff_A=4.0, radial_mlp=[8])


def model(tables, statistics=MANY):
    return build_potential(ModelConfig(host=HOST, element_tables=tables), statistics, seed=0)


def test_low_rank_is_the_best_approximation():
    table = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low = LowRank(4)
    found = low(*low.right_inverse(table))
    sizes = torch.linalg.svdvals(table.flatten(1))
    assert float((found - table).norm()) == pytest.approx(float(sizes[4:].norm()))
    whole = LowRank(12)
    assert torch.allclose(whole(*whole.right_inverse(table)), table)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_rows_have_so_many_levels_and_pass_gradients(bits):
    table = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 6).unsqueeze(1)
    leaf = table.clone().requires_grad_()
    rounded = RoundedRows(bits)(leaf)
    levels = torch.round(rounded.detach() / rounded.abs().amax(1, True) * 127)
    assert all(len(row.unique()) <= 2**bits for row in levels)
    step = table.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((rounded - table).abs() <= 0.501 * step).all()
    assert (rounded - table).abs().max() > 0
    rounded.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(table))


def test_fewer_parameters_and_the_same_size_of_weights():
    free, low = model({}), model({"rank": 4})
    assert low.num_parameters < 0.5 * free.num_parameters
    for name in ("skip", "contraction"):
        one, other = (getattr(each.host.layers[0], name).weight for each in (free, low))
        assert one.shape == other.shape
        assert torch.linalg.matrix_rank(other.flatten(1).double(), rtol=1e-5) == 4
        assert float(one.square().mean()) == pytest.approx(float(other.square().mean()), rel=1e-4)


@pytest.mark.parametrize("tables", [{"rank": 4}, {"bits": 8}, {"rank": 4, "bits": 6}])
def test_they_train_and_are_stored(tables, tmp_path):
    trained = model(tables).train()
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    target = 0.1 * torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(8):
        loss = (trained(graph()).forces - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    save_potential(tmp_path / "model.safetensors", trained)
    again = load_potential(tmp_path / "model.safetensors")
    assert torch.equal(again(graph()).forces, trained.eval()(graph()).forces)
    assert torch.equal(again.for_inference(radial_table=False)(graph()).forces, trained(graph()).forces)
    for precision in ("mixed", "float64"):
        assert load_potential(tmp_path / "model.safetensors", precision=precision)(graph()).forces.isfinite().all()


def test_bits_change_forces_little_and_fewer_bits_more():
    free = model({}).eval()(graph()).forces
    errors = [float((model({"bits": bits}).eval()(graph()).forces - free).norm() / free.norm()) for bits in (8, 4)]
    assert 0 < 4 * errors[0] < errors[1] < 0.5
    assert errors[0] < 0.03


@pytest.mark.parametrize(
    ("host", "tables", "statistics", "message"),
    [
        (HOST, {"rank": 2}, STATISTICS, r"rank \(2\) must be below the number of elements \(2\)"),
        (NequIPConfig(num_channels=8, radial_mlp=[8]), {"rank": 4}, MANY, "belongs to the host 'mace'"),
    ],
)
def test_what_cannot_be_is_refused(host, tables, statistics, message):
    with pytest.raises(ValueError, match=message):
        build_potential(ModelConfig(host=host, element_tables=tables), statistics, seed=0)
