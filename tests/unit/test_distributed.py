"""One system on several processes equals one process: energies, forces, stress; with and without attention."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from steradian.build import build_potential, save_potential
from steradian.config import EFAConfig, MACEConfig, MARAConfig, ModelConfig, NequIPConfig, O3MPNNConfig, ViSNetConfig
from steradian.config.operators import TensorIntegrationConfig
from steradian.execution.distributed import predict_distributed, slab
from steradian.graph.neighbors import make_graph
from steradian.graph.structures import Structure
from tests.systems import made_up

CUTOFF = 2.5
EFA = EFAConfig(max_length_A=40.0, num_features_qk=4, periodic=True, shell_width_per_A=0.8, zero_init=False)
TENSORS = EFA.model_copy(update={"tensor_integration": TensorIntegrationConfig(max_degree_sph=1)})
MODELS = {
    "mace": ModelConfig(
        host=MACEConfig(num_channels=4, hidden_l=1, l_max=1, correlation=2, cutoff_A=CUTOFF, radial_mlp=[8]),
        edge_gate=MARAConfig(
            form="published", frame="intrinsic", grid={"kind": "lebedev", "num_points": 50}, hidden_dim=8
        ),
        global_mixer=EFA,
        precision="float64",
    ),
    "nequip": ModelConfig(
        host=NequIPConfig(num_layers=3, num_channels=4, cutoff_A=CUTOFF, radial_mlp=[8]), precision="float64"
    ),
    "visnet": ModelConfig(
        host=ViSNetConfig(num_layers=2, num_channels=8, num_heads=2, l_max=1, cutoff_A=CUTOFF, radial={"num": 8}),
        global_mixer=EFA,
        precision="float64",
    ),
    "o3mpnn": ModelConfig(
        host=O3MPNNConfig(num_channels=4, l_max=1, num_radial=8, cutoff_A=CUTOFF, zero_init=False),
        global_mixer=TENSORS,
        precision="float64",
    ),
}
STATISTICS = made_up({1: -13.6, 6: -1029.5}, avg_num_neighbors=4.0, energy_shift=0.1)
WORKER = """
import sys
import numpy as np, torch, torch.distributed as dist
from steradian.build import load_potential
from steradian.graph.structures import Structure
from steradian.execution.distributed import predict_distributed
folder, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting_{size}", rank=rank, world_size=size)
with np.load(f"{folder}/structures.npz") as file:
    arrays = dict(file)
results = {}
for model in sys.argv[4:]:
    potential = load_potential(f"{folder}/{model}.safetensors")
    for name in ("molecule", "crystal"):
        structure = Structure(*(arrays[f"{name}/{key}"] for key in ("numbers", "positions")),
                              cell=arrays[f"{name}/cell"], pbc=arrays[f"{name}/pbc"])
        found = predict_distributed(potential, structure, stress=True)
        for key in ("energy", "atom_energies", "interaction_energy", "forces", "stress"):
            results[f"{model}/{name}/{key}"] = getattr(found, key).numpy()
np.savez(f"{folder}/found_{rank}_of_{size}.npz", **results)
dist.destroy_process_group()
"""


def structures():
    """A long molecule, and a crystal that is longer than a slab and its surroundings."""
    generator = np.random.default_rng(0)
    chain = np.stack([1.1 * np.arange(40), *generator.normal(scale=0.8, size=(2, 40))], axis=1)
    chain[:, 0] += generator.normal(scale=0.2, size=40)
    order = generator.permutation(40)
    numbers = generator.choice([1, 6], size=40)
    cell = np.array([[3.1, 0.0, 0.0], [0.4, 38.0, 0.0], [0.0, 0.6, 3.5]])
    inside = (np.stack([generator.uniform(size=40), np.arange(40) / 40, generator.uniform(size=40)], 1) - 3) @ cell
    return {
        "molecule": Structure(numbers=numbers, positions=chain[order] + 50.0),
        "crystal": Structure(numbers=numbers, positions=inside[order], cell=cell, pbc=np.array([True] * 3)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed")
    for name, config in MODELS.items():
        save_potential(path / f"{name}.safetensors", build_potential(config, STATISTICS, seed=2))
    arrays = {}
    for name, structure in structures().items():
        for key in ("numbers", "positions", "cell", "pbc"):
            arrays[f"{name}/{key}"] = getattr(structure, key)
    np.savez(path / "structures.npz", **arrays)
    return path


@pytest.mark.parametrize(("size", "models"), [(2, list(MODELS)), (4, ["mace"])], ids=["two", "four"])
def test_processes_together_equal_one(folder, size, models):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(rank), str(size), *models],
            env={**os.environ, "OMP_NUM_THREADS": "1", "STERADIAN_BACKEND": "reference"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=300)
            assert worker.returncode == 0, errors[-3000:]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
    results = [dict(np.load(folder / f"found_{rank}_of_{size}.npz")) for rank in range(size)]
    for model in models:
        config = MODELS[model]
        potential = build_potential(config, STATISTICS, seed=2).eval()
        for name, structure in structures().items():
            truth = potential(make_graph(structure, CUTOFF), stress=True)
            assert truth.forces.abs().max() > 1e-3
            for key in ("energy", "atom_energies", "interaction_energy", "forces", "stress"):
                for found in results:
                    difference = np.abs(found[f"{model}/{name}/{key}"] - getattr(truth, key).numpy()).max()
                    assert difference < 1e-10, (model, name, key)


@pytest.mark.parametrize("name", ["molecule", "crystal"])
def test_slabs_share_the_atoms_evenly_and_see_their_neighbours(name):
    structure, reach = structures()[name], 5.0
    owned = []
    for part in range(3):
        chosen, own = slab(structure, part, 3, reach)
        assert 13 <= own.sum() <= 14
        assert len(chosen) < 40, "a slab need not see the whole system"
        owned += chosen[own].tolist()
        graph = make_graph(structure, reach)
        mine = torch.isin(graph.receivers, torch.as_tensor(chosen[own]))
        assert set(graph.senders[mine].tolist()) <= set(chosen.tolist())
    assert sorted(owned) == list(range(40))


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="40 atoms cannot be spread over 41 processes"):
        slab(structures()["molecule"], 0, 41, 5.0)
    potential = build_potential(MODELS["nequip"], STATISTICS, seed=0).train()
    with pytest.raises(ValueError, match=r"potential.eval\(\)"):
        predict_distributed(potential, structures()["molecule"])
