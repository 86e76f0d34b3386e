"""What every host with every operator must pass."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from steradian.build import load_potential, save_potential
from steradian.graph import Edges
from steradian.operators.base import EdgeGate
from steradian.polynomials import use_backend
from tests import cases, tolerances

HOSTS = list(cases.HOSTS)
OPERATORS = list(cases.OPERATORS)


def assert_turns(potential, structure, matrix, energy_tol, forces_tol):
    before = potential(cases.graph(structure))
    after = potential(cases.graph(cases.moved(structure, matrix)))
    assert before.forces.norm(dim=1).min() > tolerances.SIGNAL * forces_tol, "forces too small to compare"
    turned = before.forces @ torch.as_tensor(matrix, dtype=before.forces.dtype).T
    assert torch.allclose(after.energy, before.energy, rtol=0, atol=energy_tol)
    assert torch.allclose(after.forces, turned, rtol=0, atol=forces_tol)


def rotation_tolerance(potential, dtype):
    """Rounding for exact operators; what an operator declares where it uses a sphere rule."""
    bounds = [layer.gate.rotation_bound for layer in potential.host.layers if layer.gate is not None]
    declared = max(bounds, default=0.0)
    return max(tolerances.ENERGY[dtype], declared), max(tolerances.FORCES[dtype], declared)


@pytest.mark.parametrize("improper", [False, True], ids=["rotation", "reflection"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("operator", cases.INVARIANT)
@pytest.mark.parametrize("host", HOSTS)
def test_energy_stays_and_forces_turn(host, operator, dtype, improper):
    potential = cases.potential(host, operator, dtype)
    matrix = cases.random_orthogonal(seed=5, improper=improper)
    assert_turns(potential, cases.ethanol(), matrix, *rotation_tolerance(potential, dtype))


class LeaksDirection(EdgeGate):
    """A broken operator: its gate depends on the x component of the edge."""

    def forward(self, features, edges: Edges):
        return 1.0 + 0.1 * edges.vectors[:, 0]


def test_the_symmetry_test_notices_a_broken_operator():
    broken = cases.potential(make_gate=lambda spec: LeaksDirection())
    matrix = cases.random_orthogonal(seed=5, improper=False)
    with pytest.raises(AssertionError):
        assert_turns(broken, cases.ethanol(), matrix, 1e-10, 1e-10)


def test_an_operator_that_breaks_only_reflections_is_noticed():
    class Chiral(EdgeGate):
        def forward(self, features, edges):
            # a pseudoscalar of the edge and the first two edges of the system
            triple = torch.linalg.det(
                torch.stack([edges.vectors, *edges.vectors[:2, None].expand(2, *edges.vectors.shape)], 1)
            )
            return 1.0 + 0.01 * triple

    broken = cases.potential(make_gate=lambda spec: Chiral())
    with pytest.raises(AssertionError):
        assert_turns(broken, cases.ethanol(), cases.random_orthogonal(5, improper=True), 1e-10, 1e-10)


@pytest.mark.parametrize("operator", ["mara", "mara-node"])
def test_the_published_frame_is_declared_as_tied_to_the_laboratory(operator):
    potential = cases.potential("mace", operator)
    assert {layer.gate.rotation for layer in potential.host.layers} == {"lab_frame"}
    matrix = cases.random_orthogonal(seed=5, improper=False)
    before = potential(cases.graph(cases.ethanol()))
    after = potential(cases.graph(cases.moved(cases.ethanol(), matrix)))
    assert abs(float(after.energy - before.energy)) > 1e-8, "the published form is not invariant; this says it is"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_translation(host, operator):
    potential = cases.potential(host, operator)
    before = potential(cases.graph(cases.ethanol()))
    after = potential(cases.graph(cases.moved(cases.ethanol(), shift=np.array([3.0, -20.0, 0.7]))))
    assert torch.allclose(after.energy, before.energy, rtol=0, atol=tolerances.ENERGY[torch.float64])
    assert torch.allclose(after.forces, before.forces, rtol=0, atol=tolerances.FORCES[torch.float64])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_permutation(host, operator):
    potential = cases.potential(host, operator)
    structure = cases.ethanol()
    order = np.random.default_rng(0).permutation(len(structure.numbers))
    shuffled = dataclasses.replace(structure, numbers=structure.numbers[order], positions=structure.positions[order])
    before, after = potential(cases.graph(structure)), potential(cases.graph(shuffled))
    assert torch.allclose(after.energy, before.energy, rtol=0, atol=tolerances.ENERGY[torch.float64])
    assert torch.allclose(after.forces, before.forces[order], rtol=0, atol=tolerances.FORCES[torch.float64])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_batch_equals_its_singles(host, operator):
    potential = cases.potential(host, operator)
    structures = [cases.ethanol(), cases.crystal(), cases.ethanol(seed=4)]
    together = potential(cases.batch(*structures), stress=True)
    alone = [potential(cases.graph(structure), stress=True) for structure in structures]
    assert torch.allclose(together.energy, torch.cat([p.energy for p in alone]), rtol=0, atol=1e-10)
    assert torch.allclose(together.forces, torch.cat([p.forces for p in alone]), rtol=0, atol=1e-10)
    assert torch.allclose(together.stress, torch.cat([p.stress for p in alone]), rtol=0, atol=1e-10)
    assert together.stress[1].abs().max() > 1e-6
    assert together.stress[0].abs().max() == 0


def energy_along(potential, distances):
    """Energy and slope of a molecule as one hydrogen is pulled away from the rest."""
    energies, slopes = [], []
    for distance in distances:
        structure = cases.ethanol()
        positions = np.concatenate([structure.positions, structure.positions[2:3] + np.array([[-distance, 0, 0]])])
        far = dataclasses.replace(structure, positions=positions, numbers=np.append(structure.numbers, 1))
        prediction = potential(cases.graph(far))
        energies.append(float(prediction.interaction_energy))
        slopes.append(float(prediction.forces[-1, 0]))
    return np.array(energies), np.array(slopes)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_value_and_slope_are_continuous_at_the_cutoff(host, operator):
    potential = cases.potential(host, operator)
    step = 1e-5
    distances = cases.CUTOFF + step * np.array([-3.0, -1.0, 1.0, 3.0])  # from the oxygen; a hydrogen stays in reach
    energies, slopes = energy_along(potential, distances)
    # the atom moves along -x, so the energy must change by the mean force times the way
    assert abs(energies[2] - energies[1] - 2 * step * slopes[1:3].mean()) < 1e-11
    # what the other neighbour does to the slope is a third over a third of the way; a kink is the same over both
    assert abs(slopes[2] - slopes[1] - (slopes[3] - slopes[0]) / 3) < 1e-8
    inside, _ = energy_along(potential, [cases.CUTOFF - 1.0, cases.CUTOFF + 1.0])
    assert abs(inside[1] - inside[0]) > 1e-5, "the pulled atom does not matter, so nothing was tested"


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_one_isolated_atom(host, operator):
    potential = cases.potential(host, operator)
    atom = dataclasses.replace(cases.ethanol(), numbers=np.array([6]), positions=np.zeros((1, 3)))
    prediction = potential(cases.graph(atom), stress=True)
    assert torch.isfinite(prediction.energy).all()
    assert prediction.forces.abs().max() == 0
    reference = cases.STATISTICS.atom_references[6]
    assert torch.allclose(prediction.energy, prediction.interaction_energy + reference, rtol=0, atol=1e-9)
    assert torch.allclose(prediction.atom_energies, prediction.energy, rtol=0, atol=1e-9)
    together = potential(cases.batch(atom, cases.ethanol()))
    assert torch.allclose(together.energy[0], prediction.energy[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("operator", OPERATORS)
def test_two_atoms_along_every_grid_direction(operator):
    """The distance field has a kink where a neighbour lies on a grid direction: derivatives must stay finite."""
    potential = cases.potential("mace", operator).train()
    directions = np.concatenate([np.eye(3), -np.eye(3)])
    layer = potential.host.layers[0]
    for filled in (layer.gate, getattr(layer.mixer, "attention", None)):
        if getattr(filled, "grid", None) is not None:
            directions = np.concatenate([directions, filled.grid.points.detach().cpu().double().numpy()])
    structures = [
        dataclasses.replace(cases.ethanol(), numbers=np.array([6, 1]), positions=np.stack([np.zeros(3), 1.1 * d]))
        for d in directions
    ]
    prediction = potential(cases.batch(*structures))
    assert torch.isfinite(prediction.energy).all()
    assert torch.isfinite(prediction.forces).all()
    prediction.forces.square().sum().backward()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("structure", ["ethanol", "crystal"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_forces_are_minus_the_central_difference(host, operator, structure):
    potential = cases.potential(host, operator)
    made = getattr(cases, structure)()
    forces = potential(cases.graph(made)).forces
    assert forces.abs().max() > tolerances.SIGNAL * tolerances.FINITE_DIFFERENCE
    step = 1e-4
    for atom, axis in [(0, 0), (2, 1), (4, 2)]:
        energies = []
        for sign in (1, -1):
            positions = made.positions.copy()
            positions[atom, axis] += sign * step
            moved = dataclasses.replace(made, positions=positions)
            energies.append(float(potential(cases.graph(moved), forces=False).interaction_energy))
        numerical = -(energies[0] - energies[1]) / (2 * step)
        assert abs(numerical - float(forces[atom, axis])) < tolerances.FINITE_DIFFERENCE


def assert_stress(potential, made, stress):
    """Two components of the stress ``[3, 3]`` against central differences of the energy in the strain."""
    volume = abs(np.linalg.det(made.cell))
    step = 1e-5
    for i, j in [(0, 0), (1, 2)]:
        strain = np.zeros((3, 3))
        strain[i, j] += 0.5
        strain[j, i] += 0.5
        energies = []
        for sign in (1, -1):
            deformation = np.eye(3) + sign * step * strain
            strained = dataclasses.replace(made, positions=made.positions @ deformation, cell=made.cell @ deformation)
            energies.append(float(potential(cases.graph(strained), forces=False).interaction_energy))
        numerical = (energies[0] - energies[1]) / (2 * step) / volume
        assert abs(numerical - stress[i, j]) < 1e-7


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_stress_is_the_central_difference_in_strain(host, operator):
    potential = cases.potential(host, operator)
    made = cases.crystal()
    stress = potential(cases.graph(made), stress=True).stress[0].numpy()
    assert_stress(potential, made, stress)
    assert np.abs(stress).max() > 1e-5


@pytest.mark.parametrize("operator", ["none", "efa"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_left_handed_cell_is_the_same_crystal(host, operator):
    """Two lattice vectors change places: the same crystal, with a determinant of the other sign."""
    potential = cases.potential(host, operator)
    made = cases.crystal()
    swapped = dataclasses.replace(made, cell=made.cell[[1, 0, 2]])
    assert np.linalg.det(made.cell) > 0 > np.linalg.det(swapped.cell)
    right, left = (potential(cases.graph(structure), stress=True) for structure in (made, swapped))
    assert torch.allclose(left.energy, right.energy, rtol=0, atol=tolerances.ENERGY[torch.float64])
    assert torch.allclose(left.forces, right.forces, rtol=0, atol=tolerances.FORCES[torch.float64])
    assert right.stress.abs().max() > 1e-5
    assert torch.allclose(left.stress, right.stress, rtol=0, atol=tolerances.STRESS)
    assert_stress(potential, swapped, left.stress[0].numpy())


@pytest.mark.parametrize("operator", ["none", "efa"])
@pytest.mark.parametrize("host", HOSTS)
def test_images_of_an_atom_and_of_a_cell_are_the_same_crystal(host, operator):
    """An atom moved by lattice vectors changes nothing; two cells side by side have twice the energy."""
    potential = cases.potential(host, operator)
    made = cases.crystal()
    alone = potential(cases.graph(made), stress=True)
    positions = made.positions.copy()
    positions[2] += made.cell[0] - 2 * made.cell[2]
    shifted = potential(cases.graph(dataclasses.replace(made, positions=positions)), stress=True)
    doubled = dataclasses.replace(
        made,
        numbers=np.tile(made.numbers, 2),
        positions=np.concatenate([made.positions, made.positions + made.cell[1]]),
        cell=made.cell * np.array([[1.0], [2.0], [1.0]]),
    )
    twice = potential(cases.graph(doubled), stress=True)
    energy, forces = tolerances.ENERGY[torch.float64], tolerances.FORCES[torch.float64]
    assert alone.forces.abs().max() > tolerances.SIGNAL * forces
    assert torch.allclose(shifted.energy, alone.energy, rtol=0, atol=energy)
    assert torch.allclose(shifted.forces, alone.forces, rtol=0, atol=forces)
    assert torch.allclose(twice.energy, 2 * alone.energy, rtol=0, atol=10 * energy)
    assert torch.allclose(twice.forces, alone.forces.repeat(2, 1), rtol=0, atol=10 * forces)
    for other in (shifted, twice):
        assert torch.allclose(other.stress, alone.stress, rtol=0, atol=tolerances.STRESS)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_second_derivatives(host, operator):
    """Training on forces needs d(forces)/d(positions): the double backward against differences of forces."""
    potential = cases.potential(host, operator)
    graph = cases.graph(cases.ethanol())
    species = potential.species(graph.prepared())
    start = graph.positions.clone().requires_grad_(True)

    def energy(positions):
        vectors = positions[graph.senders] - positions[graph.receivers]
        return potential.host(graph, species, positions, vectors).atom_energies.sum()

    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(start.shape, generator=generator, dtype=start.dtype)
    (gradient,) = torch.autograd.grad(energy(start), start, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), start)
    step = 1e-5
    shifted = []
    for sign in (1, -1):
        at = (start.detach() + sign * step * direction).requires_grad_(True)
        shifted.append(torch.autograd.grad(energy(at), at)[0])
    numerical = (shifted[0] - shifted[1]) / (2 * step)
    assert product.abs().max() > 1e-3
    assert torch.allclose(product, numerical, rtol=1e-5, atol=1e-6 * float(product.abs().max()))


@pytest.mark.parametrize("form", ["published", "channel", "channel by node"])
@pytest.mark.parametrize("host", HOSTS)
def test_an_empty_slot_and_a_neutral_gate_leave_the_host_as_it_is(host, form):
    bare = cases.potential(host)
    forms = {
        "published": cases.MARAConfig(form="published", frame="lab", gate="neutral", hidden_dim=8),
        "channel": cases.MARAConfig(hidden_dim=8),
        "channel by node": cases.CHANNELS_ALL,
    }
    config = bare.config.model_copy(update={"edge_gate": forms[form]})
    gated = cases.build_potential(config, cases.statistics(host), seed=3).eval()
    own = {name: value for name, value in gated.state_dict().items() if ".gate." not in name}
    assert own.keys() == bare.state_dict().keys(), "an empty slot owns no parameters"
    assert all(torch.equal(value, bare.state_dict()[name]) for name, value in own.items())
    graph = cases.graph(cases.ethanol())
    a, b = bare(graph), gated(graph)
    assert torch.equal(a.energy, b.energy)
    if form == "published":
        assert torch.equal(a.forces, b.forces)
    else:  # a kernel with one more factor, which is 1, adds up its derivatives in another order
        assert torch.allclose(a.forces, b.forces, rtol=0, atol=1e-14 * max(1.0, float(a.forces.abs().max())))
    assert len(b.gates) == len(gated.host.layers)
    assert torch.equal(b.gates[0], torch.ones_like(b.gates[0]))


@pytest.mark.parametrize("host", HOSTS)
def test_a_mixer_adds_nothing_before_training(host):
    bare = cases.potential(host)
    mixer = cases.EFA.model_copy(update={"zero_init": True})
    config = bare.config.model_copy(update={"global_mixer": mixer})
    mixed = cases.build_potential(config, cases.statistics(host), seed=3).eval()
    own = {name: value for name, value in mixed.state_dict().items() if ".mixer." not in name}
    assert own.keys() == bare.state_dict().keys()
    assert all(torch.equal(value, bare.state_dict()[name]) for name, value in own.items())
    graph = cases.graph(cases.ethanol())
    assert torch.equal(bare(graph).energy, mixed(graph).energy)
    assert torch.equal(bare(graph).forces, mixed(graph).forces)


@pytest.mark.parametrize("operator", cases.GLOBAL)
@pytest.mark.parametrize("host", HOSTS)
def test_a_global_mixer_reaches_beyond_the_cutoff(host, operator):
    """An atom that has no neighbours left still feels the others, and its own pull is felt."""
    potential = cases.potential(host, operator)
    for name, parameter in potential.named_parameters():
        if ".mixer." in name and name.endswith("bias"):
            # some hosts give an atom without neighbours the features zero; biases are all it has then
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    structure = cases.ethanol()
    atom = structure.positions[2:3] + np.array([[-8.0, 0.0, 0.0]])
    far = dataclasses.replace(
        structure, positions=np.concatenate([structure.positions, atom]), numbers=np.append(structure.numbers, 1)
    )
    assert potential(cases.graph(far)).forces[-1].abs().max() > 1e-7
    assert cases.potential(host)(cases.graph(far)).forces[-1].abs().max() == 0


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_save_and_load(host, operator, tmp_path):
    potential = cases.potential(host, operator, torch.float32)
    path = tmp_path / "model.safetensors"
    save_potential(path, potential)
    loaded = load_potential(path)
    graph = cases.graph(cases.ethanol())
    a, b = potential(graph), loaded(graph)
    assert torch.equal(a.energy, b.energy)
    assert torch.equal(a.forces, b.forces)
    assert loaded.elements == potential.elements


@pytest.mark.parametrize("operator", OPERATORS)
def test_far_from_the_origin_float32_loses_nothing(operator):
    potential = cases.potential("mace", operator, torch.float32)
    near = potential(cases.graph(cases.ethanol()))
    far = potential(cases.graph(cases.moved(cases.ethanol(), shift=np.array([1e4, -2e4, 3e4]))))
    assert torch.allclose(far.forces, near.forces, rtol=0, atol=tolerances.FORCES[torch.float32])
    assert torch.allclose(far.energy, near.energy, rtol=0, atol=tolerances.ENERGY[torch.float32])


@pytest.mark.parametrize("operator", OPERATORS)
def test_gates_are_reported_and_do_something(operator):
    prediction = cases.potential("mace", operator)(cases.graph(cases.ethanol()))
    if operator not in cases.GATED:
        assert prediction.gates == ()
        return
    assert len(prediction.gates) == 2
    edges = cases.graph(cases.ethanol()).num_edges
    heads = {"mara-channel": 4, "mara-channel-all": 2}.get(operator)
    for alpha, num_paths in zip(prediction.gates, (3, 7)):
        assert alpha.shape == ((edges, num_paths, heads) if heads else (edges,))
        assert torch.isfinite(alpha).all()
        assert (alpha > 0).all() or cases.OPERATORS[operator]["edge_gate"].activation == "linear"
        assert (alpha.std(0) > 0).all()


def test_an_unknown_element_is_named():
    gold = dataclasses.replace(cases.ethanol(), numbers=np.array([79] + [1] * 8))
    with pytest.raises(ValueError, match="does not know Au; it was trained on H, C, O"):
        cases.potential()(cases.graph(gold))


@pytest.mark.parametrize("structure", [cases.ethanol(), cases.crystal()], ids=["molecule", "crystal"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_every_backend_equals_the_reference(host, operator, structure):
    potential = cases.potential(host, operator)
    results = {}
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            results[backend] = potential(cases.graph(structure), stress=True)
    assert results["reference"].forces.abs().max() > tolerances.SIGNAL * tolerances.FORCES[torch.float64]
    for quantity in ("energy", "atom_energies", "forces", "stress"):
        ours, truth = (getattr(results[backend], quantity) for backend in ("cpu", "reference"))
        # relative to the largest number: sums in another order
        assert torch.allclose(ours, truth, rtol=0, atol=1e-12 * max(1.0, float(truth.abs().max())))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_training_gradients_of_every_backend_equal_the_reference(host, operator):
    gradients = {}
    for backend in ("reference", "cpu"):
        potential = cases.potential(host, operator).train()
        with use_backend(backend):
            prediction = potential(cases.batch(cases.ethanol(0), cases.ethanol(1)))
            (prediction.interaction_energy.sum() + prediction.forces.square().sum()).backward()
        gradients[backend] = {name: value.grad for name, value in potential.named_parameters()}
    for name, truth in gradients["reference"].items():
        if truth is None:
            assert gradients["cpu"][name] is None
            continue
        scale = max(1e-6, float(truth.abs().max()))
        assert (gradients["cpu"][name] - truth).abs().max() < 1e-9 * scale, name


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("host", HOSTS)
def test_prepared_for_inference_stays_the_same_model(host, operator):
    potential = cases.potential(host, operator)
    before = potential(cases.graph(cases.ethanol()))
    prepared = potential.for_inference(num_intervals=2048)
    after = prepared(cases.graph(cases.ethanol()))
    # cubic interpolation: slopes err by 16 / (3 sqrt(3)) = 3.1 over the interval times the error of values
    error = (potential.radial_table_error or 0.0) * 3.1 * 2048 / cases.CUTOFF
    bound = max(1e-9, error)
    assert torch.allclose(after.forces, before.forces, rtol=0, atol=bound * float(before.forces.abs().max()))
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    again = prepared.train().eval()(cases.graph(cases.ethanol()))
    assert torch.equal(again.forces, before.forces)
    assert all(parameter.requires_grad for parameter in prepared.parameters())
