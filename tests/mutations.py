"""Break the numerical code on purpose, one place at a time, and see whether a test notices. Run by hand:

    python tests/mutations.py --jobs 2        all of them, some twenty seconds each on one core
    python tests/mutations.py --only NAME     those whose name contains NAME
    python tests/mutations.py --list

Every mutation is one exact text of the package and what takes its place, applied to a copy. The tests named beside it
run until the first failure. A line says which test failed, ``SURVIVES`` (the tests have a hole: write one), or
``NOT FOUND`` (the text stands nowhere, or more than once: the code has moved, mend the table). The exit status is 0 only
if every mutation is noticed.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Imported once, before the runs fork: half of a run's time otherwise. Nothing that imports Triton or steradian.
WARM = ("torch", "numpy", "scipy.integrate", "ase.io", "pydantic", "rich.console", "safetensors.torch", "typer", "yaml")


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        name: what it breaks.
        old, new: text that stands exactly once in the package, and its replacement.
        tests: arguments for pytest: the tests that ought to notice.
        code: machine code is generated from the text, so code that was kept from other runs must not serve.
    """

    name: str
    old: str
    new: str
    tests: str
    code: bool = False


CONTRACT = "tests/contract/test_contract.py -k "
UNIT = "tests/unit/"
PARITY = "tests/parity/"

MUTATIONS = [
    # ------------------------------------------------------------------------------------------- energies and forces
    Mutation("volume-sign", ".sum(1).abs()\n    periodic = volume > 0", ".sum(1)\n    periodic = volume > 0", CONTRACT + "left_handed"),
    Mutation("force-sign", "forces=-gradients.pop(0)", "forces=gradients.pop(0)", CONTRACT + "'central_difference and mace-none'"),
    Mutation("strain-not-symmetric", "0.5 * (strain + strain.transpose(1, 2))", "strain", CONTRACT + "'strain and mace-mara'"),
    Mutation("cell-not-strained", "cell = cell + cell @ symmetric", "cell = cell + 0 * cell @ symmetric", CONTRACT + "'strain and mace-none'"),
    Mutation("references-subtracted", "energy=interaction + reference,", "energy=interaction - reference,", CONTRACT + "'isolated and none'"),
    Mutation("cell-transposed", '"ei,eij->ej", topology.shifts', '"ei,eji->ej", topology.shifts', CONTRACT + "'images and mace'"),
    Mutation("images-subtracted", 'vectors = vectors + torch.einsum("ei,eij->ej", topology', 'vectors = vectors - torch.einsum("ei,eij->ej", topology', CONTRACT + "'images and mace'"),
    # -------------------------------------------------------------------------------------------------------- graphs
    Mutation("edges-sorted-by-sender", "key = pairs[:, 0] * num_atoms + pairs[:, 1]", "key = pairs[:, 1] * num_atoms + pairs[:, 0]", UNIT + "test_neighbors.py"),
    Mutation("skin-forgotten", "structure.pbc, cutoff + skin)", "structure.pbc, cutoff)", UNIT + "test_neighbors.py " + UNIT + "test_neighbors_device.py tests/physics/test_device_md.py"),
    Mutation("batch-offset", 'senders=joined("senders", atom_offsets)', 'senders=joined("senders")', CONTRACT + "'batch_equals and mace-none'"),
    Mutation("voigt-order", "[[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]", "[[xx, yz, xz], [yz, yy, xy], [xz, xy, zz]]", UNIT + "test_data_read.py"),
    # -------------------------------------------------------------------------------------------------------- radial
    Mutation("polynomial-envelope", "p * (p + 2) - 0.5 * p * (p + 1) * x", "p * (p + 2) - 0.5 * p * (p - 1) * x", UNIT + "test_equivariant.py " + PARITY + "test_mace_torch.py"),
    Mutation("smooth-envelope", "rest = (1.0 - x) * (1.0 + x)", "rest = 1.0 - x", PARITY + "test_efa_model.py " + UNIT + "test_equivariant.py"),
    Mutation("cosine-envelope", "0.5 * (1.0 + torch.cos(lengths * (math.pi / cutoff)))", "0.5 * (1.0 + torch.cos(lengths * (0.99 * math.pi / cutoff)))", PARITY + "test_pyg_visnet.py"),
    Mutation("bessel-prefactor", "math.sqrt(2.0 / self.cutoff) * self.positions", "math.sqrt(1.0 / self.cutoff) * self.positions", PARITY + "test_mace_torch.py"),
    Mutation("gaussian-width", "torch.exp(-0.5 / spacing**2", "torch.exp(-1.0 / spacing**2", UNIT + "test_equivariant.py"),
    Mutation("chebyshev-recurrence", "2.0 * x * values[-1] - values[-2]", "2.0 * x * values[-1] + values[-2]", UNIT + "test_equivariant.py"),
    Mutation("bernstein-slope", "(gradient[..., 1:] - gradient[..., :-1]) * lower", "(gradient[..., :-1] - gradient[..., 1:]) * lower", CONTRACT + "'central_difference and o3mpnn-none'"),
    Mutation("table-cubic-term", "slope_low + slope_high - 2 * rise", "slope_low - slope_high - 2 * rise", UNIT + "test_equivariant.py"),
    Mutation("table-first-slope", "(-25, 48, -36, 16, -3)", "(-25, 48, -36, 16, -2)", UNIT + "test_equivariant.py"),
    Mutation("rotation-average-vectors", "strained, vectors, cell = _turned(strained, turns), _turned(vectors, turns), _turned(cell, turns)", "strained, vectors, cell = _turned(strained, turns), _turned(vectors, turns[:1].expand_as(turns)), _turned(cell, turns)", UNIT + "test_rotation_average.py"),
    Mutation("rotation-average-share", "share = 1.0 / len(self.rotations)", "share = 1.0 / len(turns)", UNIT + "test_rotation_average.py"),
    Mutation("rotation-group-fivefold", "2 * math.pi * turn / 5", "2 * math.pi * turn / 6", UNIT + "test_rotation_average.py"),
    Mutation("copies-of-pairs", "behind(pairs.of_edge, pairs.count)", "behind(pairs.of_edge, known.num_edges)", UNIT + "test_rotation_average.py"),
    Mutation("activations-per-degree", "zip(degrees, counts or (1,) * len(degrees))]", "zip(degrees[::-1], counts or (1,) * len(degrees))]", UNIT + "test_activations_table.py"),
    Mutation("attention-per-channel", "return self.channels.std(1)", "return self.channels.std(0)[:1].repeat(len(self.channels))", UNIT + "test_explain.py"),
    Mutation("silu-gain", "SILU_SECOND_MOMENT = 1.67", "SILU_SECOND_MOMENT = 1.65", PARITY + "test_mace_torch.py"),
    # --------------------------------------------------------------------------------------------------- equivariant
    Mutation("harmonics-sign", "np.array([path[-1] for path in paths])))", "np.array([path[-1] for path in paths]) * (-1) ** (degree // 2)))", UNIT + "test_equivariant.py"),
    Mutation("silu-curvature", "factor * s * (1 - s) * (2 + x * (1 - 2 * s))", "factor * s * (1 - s) * (2 - x * (1 - 2 * s))", UNIT + "test_activations.py"),
    Mutation("silu-curvature-in-place", "torch.mul(x, s).mul_(-2).add_(x).add_(2)", "torch.mul(x, s).mul_(-2).add_(x).add_(1)", UNIT + "test_activations.py"),
    Mutation("contraction-repeats", "factorial(order) // np.prod", "1 + 0 * np.prod", UNIT + "test_equivariant.py"),
    Mutation("clebsch-gordan-phase", "total += (-1) ** k / (below", "total += 1.0 / (below", PARITY + "test_efa_blocks.py"),
    Mutation("filter-normalisation", "coefficients / np.sqrt(2 * degree_of + 1)", "coefficients / np.sqrt(2 * degree_of + 2)", PARITY + "test_efa_blocks.py"),
    Mutation("parity-rule", "abs(l1 - l2) <= l3 <= l1 + l2 and p3 == p1 * p2", "abs(l1 - l2) <= l3 <= l1 + l2 and p3 == p1 * abs(p2)", PARITY + "test_efa_blocks.py"),
    # --------------------------------------------------------------------------------------------------------- hosts
    Mutation("zbl-counted-twice", "energies = 0.5 * COULOMB", "energies = 1.0 * COULOMB", PARITY + "test_mace_torch.py"),
    Mutation("agnesi-exponents", "x.pow(self.p - self.q)", "x.pow(self.q)", PARITY + "test_mace_torch.py"),
    Mutation("soft-transform", "touching * (4.0 / 3.0)", "touching * 1.25", PARITY + "test_mace_torch.py"),
    Mutation("density-of-mace", "return (summed + 1.0).unsqueeze(2)", "return (summed + 2.0).unsqueeze(2)", PARITY + "test_mace_torch.py"),
    Mutation("nequip-normalisation", "avg_num_neighbors**-0.5", "avg_num_neighbors**-1.0", PARITY + "test_nequip.py"),
    Mutation("visnet-rejection", "zeros, -np.ones(size**2)", "zeros, np.ones(size**2)", PARITY + "test_pyg_visnet.py"),
    Mutation("visnet-update-order", "(first * second).sum(1) * o2 + o3", "(first * second).sum(1) * o3 + o2", PARITY + "test_pyg_visnet.py"),
    Mutation("o3mpnn-switch", "nn.functional.silu(1 - self.switch)", "nn.functional.silu(self.switch)", PARITY + "test_efa_model.py"),
    # ---------------------------------------------------------------------------------------------------------- MARA
    Mutation("mara-node-gate-receiver", "return (1 + mean).index_select(0, edges.senders)", "return (1 + mean).index_select(0, edges.receivers)", UNIT + "test_mara.py"),
    Mutation("mara-scale-of-logits", "scale = (len(W_h) // num_heads) ** -0.5", "scale = len(W_h) ** -0.5", UNIT + "test_mara.py"),
    Mutation("mara-answering-point", "centre[:, :1] + c * field + B]", "centre[:, :1] + c * field - B]", UNIT + "test_mara.py"),
    Mutation("mara-point-field", "torch.stack([F.expand_as(field), centre[:, 1:], field], dim=1)", "torch.stack([B.expand_as(field), centre[:, 1:], field], dim=1)", UNIT + "test_mara.py"),
    Mutation("mara-shift-of-values", "@ w.detach() + shift.squeeze(1)", "@ w.detach() - shift.squeeze(1)", UNIT + "test_mara.py"),
    Mutation("mara-slope-of-field", "2 * pull.sum(1, keepdim=True) - along", "2 * pull.sum(1, keepdim=True) + along", UNIT + "test_mara.py"),
    Mutation("mara-latitudes", "math.pi * np.arange(num_lat) / (num_lat - 1)", "math.pi * np.arange(num_lat) / num_lat", UNIT + "test_sphere_grids.py"),
    # ----------------------------------------------------------------------------------------------------------- EFA
    Mutation("rotary-sign", "real * phases.cos() - imaginary * phases.sin()", "real * phases.cos() + imaginary * phases.sin()", UNIT + "test_efa.py " + PARITY + "test_efa_attention.py"),
    Mutation("quarter-turn", "torch.stack([-sums[:, :, 1], sums[:, :, 0]], dim=2)", "torch.stack([sums[:, :, 1], -sums[:, :, 0]], dim=2)", UNIT + "test_efa.py " + PARITY + "test_efa_attention.py"),
    Mutation("crossed-queries", "torch.cat([-second, first], dim=2)", "torch.cat([second, -first], dim=2)", UNIT + "test_efa.py " + PARITY + "test_efa_attention.py"),
    Mutation("opposite-wave-vectors", "counted = 1 + integers.any(1)", "counted = 2 + 0 * integers.any(1)", "tests/physics/test_efa_waves.py"),
    Mutation("reciprocal-volume-sign", "inverse.T, inverse, volume.abs()", "inverse.T, inverse, volume", "tests/physics/test_efa_waves.py " + CONTRACT + "'left_handed or symmetries'"),
    Mutation("shell-window", "(1 - x.square()).clamp(min=0.0).pow(3)", "(1 - x.square()).clamp(min=0.0).pow(2)", "tests/physics/test_efa_waves.py"),
    Mutation("weights-of-half-a-rule", "points[first], 2 * weights[first]", "points[first], weights[first]", UNIT + "test_efa.py"),
    Mutation("wave-slope", "waves[:, :, 0] * gradient[:, :, 1] - waves", "waves[:, :, 0] * gradient[:, :, 1] + waves", UNIT + "test_efa.py"),
    Mutation("order-of-harmonics", "for parity in (0, 1)]).squeeze(1).argsort()", "for parity in (0, 1)]).squeeze(1)", UNIT + "test_efa.py"),
    Mutation("scale-of-scores", "queries * self.size**-0.5", "queries * queries[0].numel() ** -0.5", UNIT + "test_efa.py"),
    Mutation("place-of-padded-atoms", "place[atoms[known]] = offset + torch", "place[atoms[known]] = torch", UNIT + "test_efa.py"),
    Mutation("slopes-of-pairs", "by_products = _times(waves, by_scores)", "by_products = _times(products, by_scores)", UNIT + "test_efa.py"),
    Mutation("half-of-the-lattice", "(grid[:, 1] == 0) & (grid[:, 2] > 0)", "(grid[:, 1] == 0) & (grid[:, 2] >= 0)", "tests/physics/test_efa_waves.py"),
    Mutation("cell-of-each-crystal", "own, cell[numbers[0]]", "own, cell[0]", "tests/physics/test_efa_waves.py"),
    Mutation("efa-waves-code", "cosine * by_sine - sine * by_cosine", "cosine * by_sine + sine * by_cosine", UNIT + "test_efa_cpu.py", True),
    Mutation("efa-sums-code", "found[half], t, [w for w, _ in rows]", "found[1 - half], t, [w for w, _ in rows]", UNIT + "test_efa_cpu.py", True),
    Mutation("efa-pairs-code", "wave * self._kept(\"given\"), \"queries\"", "wave * self._kept(\"taken\"), \"queries\"", UNIT + "test_efa_cpu.py", True),
    # ----------------------------------------------------------------------------------------------------- data, units
    Mutation("virial-sign", "-stress_matrix(real_numbers", "stress_matrix(real_numbers", UNIT + "test_data_read.py"),
    Mutation("kbar", '"kbar": 0.1 * ase_units.GPa', '"kbar": 10 * ase_units.GPa', UNIT + "test_units.py"),
    Mutation("force-unit", "energy_factor(energy) / length_factor(length)", "energy_factor(energy) * length_factor(length)", UNIT + "test_units.py"),
    Mutation("fractions-in-the-fit", "fractions = counts / sizes[:, None]", "fractions = counts", UNIT + "test_data_statistics.py"),
    Mutation("interaction-per-atom", "for z in frame.numbers)) / len(frame)\n        for frame", "for z in frame.numbers))\n        for frame", UNIT + "test_data_statistics.py"),
    # ------------------------------------------------------------------------------------------------------- training
    Mutation("loss-energy-per-atom", "error = error / graph.atoms_per_system.clamp(min=1)", "error = error * graph.atoms_per_system.clamp(min=1)", UNIT + "test_training.py -k 'by_hand or kinds'"),
    Mutation("loss-weights", "return self.weights[label] * cost.mean()", "return cost.mean()", UNIT + "test_training.py -k 'by_hand or kinds'"),
    Mutation("average-forgets", "(1 + self.num_updates) / (10 + self.num_updates)", "(1 + self.num_updates) / (9 + self.num_updates)", UNIT + "test_training.py -k average"),
    Mutation("cosine-schedule", "0.5 * (1.0 + math.cos(math.pi * t))", "0.5 * (1.0 + math.cos(0.5 * math.pi * t))", UNIT + "test_training.py -k cosine"),
    Mutation("warm-up", "self.base * (step + 1) / warmup", "self.base * step / warmup", UNIT + "test_training.py -k 'cosine or plateau'"),
    Mutation("decay-of-vectors", "parameter.ndim >= 2 and", "parameter.ndim >= 1 and", UNIT + "test_training.py -k decay"),
    # ----------------------------------------------------------------------------------------- dynamics and evaluation
    Mutation("half-kick", "self.half_kick = 0.5 * self.timestep", "self.half_kick = 0.505 * self.timestep", "tests/physics/test_device_md.py -k nve_equals_ase"),
    Mutation("thermostat-spread", "(1.0 - self.decay**2) / self.masses", "(1.0 - self.decay) / self.masses", "tests/physics/test_device_md.py -k 'thermostats or friction'"),
    Mutation("friction-unit", "-settings.friction / (1000 * units.fs)", "-settings.friction / (100 * units.fs)", "tests/physics/test_device_md.py -k friction"),
    Mutation("bussi-cross-term", "2.0 * one * (self.decay * fresh).sqrt()", "-2.0 * (self.decay * fresh).sqrt()", "tests/physics/test_device_md.py -k thermostats"),
    Mutation("pairs-per-shell", "ideal = 0.5 * num_atoms * (num_atoms - 1)", "ideal = num_atoms * (num_atoms - 1)", "tests/physics/test_md.py -k analysis"),
    Mutation("quantile-position", "position = (total - 1) * probability", "position = total * probability", UNIT + "test_evaluation_metrics.py"),
]  # fmt: skip


def apply(mutation: Mutation, source: Path) -> str | None:
    """Change the copy; the reason where that is impossible."""
    holders = [file for file in sorted(source.rglob("*.py")) if mutation.old in file.read_text(encoding="utf-8")]
    texts = [file.read_text(encoding="utf-8") for file in holders]
    times = sum(text.count(mutation.old) for text in texts)
    if times != 1:
        return f"NOT FOUND: the text stands {times} times in the package"
    holders[0].write_text(texts[0].replace(mutation.old, mutation.new), encoding="utf-8")
    return None


def run_tests(mutation: Mutation, copy: Path, cache: Path, log: Path) -> None:
    """In a process of its own: the tests of one mutation on the changed copy; the exit status is pytest's."""
    with log.open("w", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    # the cache is never the user's own: what broken sources generate must not stay there
    os.environ |= {"PYTHONPATH": str(copy), "STERADIAN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    sys.path[:0] = [str(ROOT), str(copy)]
    os.chdir(ROOT)
    options = ["-x", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--no-header"]
    sys.exit(int(pytest.main([*options, *shlex.split(mutation.tests)])))


def answer_of(process: BaseProcess, log: Path) -> str:
    """What noticed the mutation, from how pytest ended and what it printed."""
    text = log.read_text(encoding="utf-8")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
    if process.exitcode == 1 and failed:
        return failed[1]
    if process.exitcode == 0:
        ran = re.search(r"\d+ passed", text)
        return f"SURVIVES: {ran[0] if ran else 'no test ran'}"
    return f"NOT RUN: pytest ended with {process.exitcode}: {' '.join(text.strip().splitlines()[-1:])}"


def answers(chosen: list[Mutation], jobs: int, scratch: Path) -> Iterator[tuple[Mutation, float, str]]:
    """Mutation, seconds and what noticed it, in the order in which they end."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(chosen), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutation = waiting.pop(0)
            copy, log = scratch / mutation.name, scratch / f"{mutation.name}.log"
            shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
            reason = apply(mutation, copy / "steradian")
            if reason is not None:
                yield mutation, 0.0, reason
                continue
            cache = scratch / (f"code-{mutation.name}" if mutation.code else "code")
            process = context.Process(target=run_tests, args=(mutation, copy, cache, log))
            process.start()
            running[process.sentinel] = process, mutation, log, time.perf_counter()
        for sentinel in wait(list(running), timeout=1.0):
            process, mutation, log, start = running.pop(sentinel)
            process.join()
            yield mutation, time.perf_counter() - start, answer_of(process, log)
            shutil.rmtree(scratch / mutation.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="NAME", help="mutations whose name contains one of them"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time")
    parser.add_argument("--list", action="store_true", help="names and changes, nothing is run")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if any(part in mutation.name for part in arguments.only)]
    if not chosen:
        parser.error(f"no mutation is called {' or '.join(arguments.only)}")
    if arguments.list:
        print("\n".join(f"{mutation.name}: {mutation.old!r} -> {mutation.new!r}" for mutation in chosen))
        return 0
    for module in WARM:
        importlib.import_module(module)
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        for mutation, seconds, answer in answers(chosen, arguments.jobs, Path(folder)):
            if not answer.startswith("tests/"):
                unnoticed.append(mutation.name)
            print(f"{mutation.name:26} {seconds:5.0f} s  {answer}", flush=True)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} noticed" + "".join(f"\n  {name}" for name in unnoticed))
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
