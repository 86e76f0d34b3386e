"""Triton's kernels of polynomials against plain PyTorch; without a GPU under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="kernels for GPUs need triton, which PyTorch brings with CUDA only")

from steradian.equivariant.harmonics import harmonics_polynomial
from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.paths import _message_polynomial, _product_polynomial, coupling_paths
from steradian.equivariant.symmetric_contraction import contraction_polynomial
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.graph.topology import Rows
from steradian.hosts.nequip import scaling_polynomial
from steradian.hosts.visnet_tables import product_polynomial, rejected_product, vector_message
from steradian.polynomials import Operand, Polynomial, Terms, triton_source, use_backend
from steradian.polynomials import triton as triton_kernels
from steradian.polynomials.program import program_of
from steradian.polynomials.reference import evaluate_reference
from steradian.polynomials.triton import Tile, evaluate_triton, name_of, polynomial
from steradian.polynomials.triton_source import source_of
from steradian.radial import _interpolation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}  # of the largest number; rounding of sums of some hundred terms


def numbers(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE, dtype)


def rows(count, bound, seed=0, in_order=False):
    index = torch.randint(0, bound, (count,), generator=torch.Generator().manual_seed(seed))
    return (index.sort().values if in_order else index).to(DEVICE)


def case(table, sizes, gathers=None, scatter=None, num_rows=None, channels=3, dtype=torch.float64):
    """A polynomial with random inputs; ``sizes`` are their numbers of rows."""
    inputs = [
        numbers(size, operand.dim, *([channels] if operand.has_channels else []), dtype=dtype, seed=place)
        for place, (size, operand) in enumerate(zip(sizes, table.inputs))
    ]
    return table, inputs, gathers or [None] * len(inputs), scatter, num_rows


def product(channels=3, dtype=torch.float64, edges=9, atoms=3, in_order=True):
    table, _ = channelwise_polynomial(natural_degrees(1), 2, natural_degrees(1))
    gathers = [rows(edges, atoms, 2), None, None]
    scatter = rows(edges, max(1, atoms - 1), 1, in_order)  # the last atom has no edges
    return case(table, [atoms, edges, edges], gathers, scatter, atoms, channels, dtype)


def contraction(channels=3, dtype=torch.float64, atoms=5):
    table = contraction_polynomial(natural_degrees(2), natural_degrees(1), 3)
    return case(table, [3, atoms], [rows(atoms, 3, 3), None], channels=channels, dtype=dtype)


def message_of_o3(edges=8, atoms=3):
    table = _message_polynomial(coupling_paths(natural_degrees(1), natural_degrees(1), natural_degrees(1)))
    return case(table, [atoms, edges, edges], [rows(edges, atoms), None, None], rows(edges, atoms, 1, True), atoms)


def product_of_o3():
    return case(_product_polynomial(coupling_paths(natural_degrees(1), natural_degrees(1), natural_degrees(2))), [4, 4])


def vectors_of_visnet(edges=8, atoms=3):
    table = vector_message(8, True)
    return case(table, [atoms, edges, edges], [rows(edges, atoms), None, None], rows(edges, atoms, 1), atoms)


def rejection_of_visnet(edges=6, atoms=3):
    gathers = [rows(edges, atoms), rows(edges, atoms, 1), rows(edges, 4, 2), None]
    return case(rejected_product(1), [atoms, atoms, 4, edges], gathers)


def products_of_visnet(edges=6, atoms=3):
    return case(
        product_polynomial(3), [atoms, atoms, 4], [rows(edges, atoms), rows(edges, atoms, 1), rows(edges, 4, 2)]
    )


def scalars_gathered(work=7):
    """Numbers without channels that are gathered: their gradients are sums over channels and over rows."""
    terms = Terms((0, 1), np.array([[0, 0], [1, 1], [0, 1]]), np.array([0, 0, 2]), np.array([1.0, -0.5, 2.0]))
    table = Polynomial((Operand("x", 2), Operand("s", 2, has_channels=False)), Operand("y", 3), (terms,))
    return case(table, [3, 4], [rows(work, 3), rows(work, 4)])


CASES = {
    "product": product,
    "product, any order": lambda: product(in_order=False),
    "product, no edges": lambda: product(edges=0),
    "product, one atom": lambda: product(edges=1, atoms=1),
    "contraction": contraction,
    "contraction, no atoms": lambda: contraction(atoms=0),
    "harmonics": lambda: case(harmonics_polynomial(3), [5]),
    "message of O3": message_of_o3,
    "product of O3": product_of_o3,
    "nonlinearity of NequIP": lambda: case(scaling_polynomial(((1, -1), (2, 1))), [4, 4]),
    "vectors of ViSNet": vectors_of_visnet,
    "rejection of ViSNet": rejection_of_visnet,
    "products of ViSNet": products_of_visnet,
    "radial table": lambda: case(_interpolation(3), [4, 6], [rows(6, 4), None]),
    "scalars gathered": scalars_gathered,
}


def by_triton(table, inputs, gathers, scatter, num_rows):
    return evaluate_triton(table, inputs, gathers, scatter, num_rows, inputs[0].dtype)


def derivatives(evaluate, table, inputs, gathers, scatter, num_rows):
    """The value, the gradients by all inputs, and the gradients of a mixture of these by all inputs and cotangents."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    value = evaluate(table, inputs, gathers, scatter, num_rows)
    cotangent = numbers(*value.shape, dtype=value.dtype, seed=5).requires_grad_()
    first = torch.autograd.grad(value, inputs, cotangent, create_graph=True)
    mixture = sum((gradient * numbers(*gradient.shape, dtype=value.dtype, seed=6)).sum() for gradient in first)
    second = torch.autograd.grad(mixture, [*inputs, cotangent], allow_unused=True)
    return [value, *first, *(gradient for gradient in second if gradient is not None)]


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for one, truth in zip(ours, theirs):
        assert one.shape == truth.shape
        assert one.dtype == truth.dtype
        if truth.numel():
            difference = float((one - truth).detach().abs().max())
            assert difference <= TOLERANCE[truth.dtype] * max(1e-30, float(truth.detach().abs().max()))


def assert_equals_reference(given):
    assert_close(derivatives(by_triton, *given), derivatives(evaluate_reference, *given))


@pytest.mark.parametrize("name", CASES)
def test_value_and_two_derivatives_equal_the_reference(name):
    assert_equals_reference(CASES[name]())


@pytest.mark.parametrize("channels", [1, 33])
def test_any_number_of_channels(channels):
    assert_equals_reference(product(channels, torch.float32, edges=5, atoms=2))


def test_float32():
    assert_equals_reference(contraction(2, torch.float32))


@pytest.mark.parametrize(
    "tile", [Tile(1, 2, 1), Tile(4, 8, 1), Tile(2, 4, 1, parts=3)], ids=["narrow", "wide", "divided"]
)
def test_any_tile(tile, monkeypatch):
    """Two blocks of channels, one masked block, segments divided among instances (some of them empty)."""
    plain = Tile(tile.rows, tile.block, tile.warps)
    monkeypatch.setattr(triton_kernels, "tile_of", lambda part, *_: plain if part.index is None else tile)
    assert_equals_reference(product(3))


def test_sums_taken_together(monkeypatch):
    """As compiled code does; slow in the interpreter, so on few rows."""
    monkeypatch.setattr(triton_kernels, "together", lambda: True)
    table, inputs, gathers, scatter, num_rows = product(2, edges=3, atoms=2)
    assert_equals_reference((table, inputs, gathers, scatter, num_rows))


def test_large_programs_are_divided(monkeypatch):
    monkeypatch.setattr(triton_source, "MOST_TERMS", 30)
    monkeypatch.setattr(triton_source, "MOST_SUMS", 3)
    table, inputs, *rest = contraction(2)
    given = (Polynomial(table.inputs, table.output, table.terms, table.outer), inputs, *rest)
    program = program_of(given[0], (0, None), None)
    parts = triton_source.parts_of(program.gradient((True, True), (True,)))
    assert len(parts) > 8
    assert all(part.num_terms <= 30 or part.program.nodes for part in parts)
    assert_equals_reference(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits_are_read_exactly_and_gradients_rounded_once(dtype):
    table, inputs, *rest = product(3, torch.float32)
    short = [value.to(dtype).requires_grad_() if place != 1 else value for place, value in enumerate(inputs)]
    wide = [value.detach().to(torch.float64).requires_grad_() for value in short]
    found = evaluate_triton(table, short, *rest, torch.float32)
    truth = evaluate_reference(table, wide, *rest)
    assert found.dtype == torch.float32
    assert float((found - truth).detach().abs().max()) <= 2e-6 * float(truth.detach().abs().max())
    cotangent = numbers(*truth.shape, dtype=torch.float32, seed=3)
    ours = torch.autograd.grad(found, [short[0], short[2]], cotangent)
    theirs = torch.autograd.grad(truth, [wide[0], wide[2]], cotangent.double())
    for one, exact in zip(ours, theirs):
        assert one.dtype == dtype
        assert float((one.double() - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())
        if DEVICE == "cuda" or dtype == torch.float16:  # the interpreter cuts bfloat16 off instead of rounding
            assert float((one == exact.to(dtype)).double().mean()) > 0.95


def test_every_number_is_stored_once_and_nothing_is_added_to_memory(monkeypatch):
    """Outputs begin as NaN here; a sum into memory, or a number left out, would keep one."""
    monkeypatch.setattr(
        triton_kernels,
        "_empty",
        lambda program, place, shape, dtype, like: like.new_full(shape, float("nan"), dtype=dtype),
    )
    given = product(3)
    results = [derivatives(by_triton, *given) for _ in range(2)]
    for one, other in zip(*results):
        assert torch.equal(one, other)
        assert bool(torch.isfinite(one).all())
    for program in _programs(given[0]):
        for part in triton_source.parts_of(program):
            assert "atomic" not in source_of(part.program, part.index)


def _programs(table):
    value = program_of(table, (0, None, None), 1)
    first = value.gradient((True,) * 3, (True,))
    return value, first, first.gradient((True,) * 4, (True,) * 3)


def test_a_prepared_index_is_sorted_once(monkeypatch):
    seen = []
    sort = Rows._sort
    monkeypatch.setattr(Rows, "_sort", lambda own: seen.append(own) or sort(own))
    table, inputs, gathers, scatter, num_rows = product(2)
    gathers = [None if index is None else Rows(index, value.shape[0]) for index, value in zip(gathers, inputs)]
    scatter = Rows(scatter, num_rows)
    for _ in range(2):
        derivatives(by_triton, table, inputs, gathers, scatter, num_rows)
    assert len(seen) == 2  # by receiver for the value, by sender for its gradient
    assert len({id(own) for own in seen}) == 2


def test_static_rows_follow_their_buffer_when_told():
    index = rows(9, 4, 1)
    kept = Rows(index, 4, static=True)
    order, bounds, inverse = kept.order, kept.bounds, kept.inverse
    index.copy_(rows(9, 4, 2))
    kept.refresh()
    fresh = Rows(index.clone(), 4, static=True)
    assert kept.order is order
    for own, expected in ((order, fresh.order), (bounds, fresh.bounds), (inverse, fresh.inverse)):
        assert torch.equal(own, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU a failed check ends the process")
def test_an_index_that_does_not_ascend_as_promised_is_noticed():
    table, inputs, gathers, _, num_rows = product(2)
    with pytest.raises(RuntimeError, match="ascend"):
        evaluate_triton(
            table, inputs, gathers, Rows(rows(9, 3, 1).flip(0), num_rows, ascending=True), num_rows, torch.float64
        )


def test_the_operation_is_what_pytorch_expects():
    table, inputs, gathers, scatter, _ = product(2, edges=5)
    name = name_of(program_of(table, (0, None, None), 1))
    inputs = [value.requires_grad_() for value in inputs]
    listed = [Rows(gathers[0], 3), Rows(scatter, 3)]
    order = [own.inverse if own.order is None else own.order for own in listed]
    bounds = [own.bounds for own in listed]
    torch.library.opcheck(polynomial, (name, inputs, [gathers[0], scatter], order, bounds, [3, 3], 5, "float64"))


def test_an_unknown_name_is_explained():
    with pytest.raises(KeyError, match="build the model"):
        polynomial("0123", [numbers(2, 3, 4)], [], [], [], [], 2, "float64")


COMPILE = """
import json, torch
from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.polynomials.program import program_of
from triton_compile import H200, MI300, compile_part
from steradian.polynomials.triton_source import parts_of
from steradian.polynomials.triton import Tile
table, _ = channelwise_polynomial(natural_degrees(1), 2, natural_degrees(1))
value = program_of(table, (0, None, None), 1)
first = value.gradient((True, True, True), (True,))
found = []
for target, program in ((H200, value), (H200, first), (MI300, value)):
    for part in parts_of(program):
        half = {name: torch.bfloat16 for name in ("i2", "o0")}
        done = compile_part(part, Tile(4, 32, 4), 128, target, formats=half)
        fused, rounds = done.instructions.get("FFMA", 0), "cvt.rn.bf16" in done.text
        found.append([target.backend, done.registers, done.stack, fused, rounds])
print(json.dumps(found))
"""
LAUNCH = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.graph.topology import Rows
from steradian.polynomials import triton as triton_kernels
from steradian.polynomials.triton import evaluate_triton

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)

class Launcher:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            done = self.kernel.warmup(*arguments, grid=grid, **constants)
            launched.append([list(grid), done.metadata.num_warps])
        return launch

launched, kernels, kernel_of = [], set(), triton_kernels.kernel_of
triton.runtime.driver.set_active(Driver())

def launcher(part):
    kernels.add(kernel_of(part))
    return Launcher(kernel_of(part))

triton_kernels.kernel_of = launcher
table, _ = channelwise_polynomial(natural_degrees(0), 1, natural_degrees(1))
channels = 33
for atoms in (15, 16):
    inputs = [torch.ones(atoms, 1, channels), torch.ones(160, 4), torch.ones(160, 2, channels, dtype=torch.bfloat16)]
    index = torch.arange(160) % atoms
    receivers = Rows(index.sort().values, atoms, ascending=True)
    evaluate_triton(table, inputs, [index, None, None], receivers, atoms, torch.float32)
print(json.dumps([launched, [len(kernel.device_caches[0][0]) for kernel in kernels]]))
"""


def run_compiled(script):
    """The last line that a process without the interpreter prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    benchmarks = str(Path(__file__).resolve().parents[2] / "benchmarks")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), benchmarks]))
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "ROCm linker" in found.stderr:
        pytest.skip("Triton 3.4 links code for AMD with a program of ROCm; later releases bring their own")
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


def test_launches_fit_the_compiled_kernels():
    """A driver without a GPU takes the arguments as a real one would, and the kernel is compiled, once for any size."""
    launched, compiled = run_compiled(LAUNCH)
    assert launched == [[[15, 2, 1], 4], [[16, 2, 1], 4]]
    assert compiled == [1]


def test_kernels_compile_for_real_gpus_without_spilling():
    """The interpreter takes what no GPU does; so code is made for an H200 and for an MI300."""
    kernels = run_compiled(COMPILE)
    assert {kernel[0] for kernel in kernels} == {"cuda", "hip"}
    for backend, registers, stack, fused, rounds in kernels:
        assert registers is None or 0 < registers < 255
        assert not stack
        if backend == "cuda":
            assert rounds  # to nearest, ties to even
            assert registers is None or fused > 10


def test_a_cpu_is_served_only_by_the_interpreter(monkeypatch):
    from steradian.polynomials import backend_for

    tensor = torch.zeros(1)
    with use_backend("triton"):
        if DEVICE == "cpu":
            assert backend_for(tensor) == "triton"
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert backend_for(tensor) in ("cpu", "reference")
