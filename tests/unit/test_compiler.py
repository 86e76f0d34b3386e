"""Machine code and its cache, comparisons at first use, constant folding, threads and forks."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import pickle
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from steradian.compiler import checked, native
from steradian.compiler.checked import FirstUse, MismatchError, agrees, difference, require_equal
from steradian.compiler.folding import Folded
from steradian.equivariant.harmonics import harmonics_polynomial
from steradian.equivariant.linear import IrrepsLinear
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.graph.topology import Rows
from steradian.operators.efa.cpu import waves_module
from steradian.operators.efa.cpu_sums import sums_module
from steradian.operators.mara.cpu_code import sphere_attention_module
from steradian.polynomials import Polynomial, codegen, evaluate, use_backend
from steradian.polynomials import cpu as apply
from steradian.polynomials.codegen import module_of
from steradian.polynomials.program import Graph, program_of
from steradian.polynomials.reference import OWN, ROWS, evaluate_program, sample

DEGREES = ((0, 1), (1, -1))


def fresh(l_max=2):
    """A polynomial of which nothing was made yet."""
    table = apply._with_channels(harmonics_polynomial(l_max))
    return Polynomial(table.inputs, table.output, table.terms)


def program():
    return program_of(fresh(), (None,), None)


def files(folder):
    return sorted(entry.name for entry in (folder / "kernels").iterdir())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STERADIAN_CACHE", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------- keys


MAKERS = {
    "polynomials": (module_of, ("compiler.lanes", "polynomials.codegen", "polynomials.program")),
    "waves": (waves_module, ("compiler.lanes", "operators.efa.cpu")),
    "sums": (sums_module, ("compiler.lanes", "operators.efa.cpu_sums")),
    "MARA": (sphere_attention_module, ("compiler.lanes", "operators.mara.cpu_code")),
}


@pytest.mark.parametrize(
    ("name", "module"), [(name, module) for name, (_, modules) in MAKERS.items() for module in modules]
)
def test_a_sign_changed_in_any_source_of_code_gives_another_key(name, module, monkeypatch):
    maker, _ = MAKERS[name]
    before = native.key_of(maker, "same")
    read = native._text_of
    sign = (b" - ", b" + ") if b" - " in read(f"steradian.{module}") else (b"fadd", b"fsub")

    def changed(other):
        text = read(other)
        return text.replace(*sign, 1) if other == f"steradian.{module}" else text

    assert changed(f"steradian.{module}") != read(f"steradian.{module}")
    monkeypatch.setattr(native, "_text_of", changed)
    native.source_of.cache_clear()
    try:
        assert native.key_of(maker, "same") != before
    finally:
        native.source_of.cache_clear()
    monkeypatch.undo()
    assert native.key_of(maker, "same") == before


def test_imports_are_followed_in_all_their_forms(monkeypatch):
    texts = {
        "steradian.a": b"import steradian.b\nfrom steradian.c import (\n    d,\n    e as f,\n)\n",
        "steradian.c": b"def late():\n    from steradian.g import h\n",
    }
    seen = []
    monkeypatch.setattr(native, "_text_of", lambda name: seen.append(name) or texts.get(name, b""))
    native.source_of.__wrapped__("steradian.a")
    assert {"steradian.b", "steradian.c", "steradian.c.d", "steradian.g"} <= set(seen)


def test_numbers_of_a_program_are_part_of_its_key():
    keys = {native.key_of(module_of, text) for text in (program().contents(), program().contents() + " ")}
    assert len(keys) == 2
    table = fresh()
    doubled = Polynomial(table.inputs, table.output, tuple(_times(group, 2.0) for group in table.terms))
    assert program_of(doubled, (None,), None).contents() != program().contents() == program().contents()


def _times(group, factor):
    return type(group)(group.factors, group.indices, group.outputs, factor * group.coefficients)


# --------------------------------------------------------------------------------------------------------------- cache


class TestKeptCode:
    def made(self, itemsize=4, channels=16):
        code = codegen.compiled(program(), itemsize, channels)
        new = code.new
        code.keep()
        return new

    def test_code_is_kept_and_a_damaged_file_is_made_anew(self, cache, monkeypatch):
        assert self.made()
        (name,) = files(cache)
        assert not self.made()
        path = cache / "kernels" / name
        content = path.read_bytes()
        for damaged in (content[:-7], content[:100] + bytes([content[100] ^ 1]) + content[101:], b""):
            path.write_bytes(damaged)
            assert self.made()
            assert path.read_bytes() == content
        assert files(cache) == [name]

    def test_a_file_under_the_name_of_another_key_is_made_anew(self, cache):
        assert self.made(4, 16)
        (first,) = files(cache)
        assert self.made(4, 32)
        (second,) = set(files(cache)) - {first}
        os.replace(cache / "kernels" / first, cache / "kernels" / second)
        assert self.made(4, 32)
        assert not self.made(4, 32)

    def test_code_that_was_not_compared_is_not_kept(self, cache):
        assert codegen.compiled(program(), 4, 16).new
        assert files(cache) == []

    def test_dtype_and_channels_have_code_of_their_own(self, cache):
        for itemsize, channels in ((4, 16), (4, 32), (8, 16)):
            assert self.made(itemsize, channels)
        assert len(files(cache)) == 3

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners of files are not known here")
    def test_what_somebody_else_could_have_written_is_not_executed(self, cache, tmp_path):
        assert self.made()
        (name,) = files(cache)
        path = cache / "kernels" / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o620)
        assert self.made()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        elsewhere = tmp_path / "elsewhere"
        os.replace(path, elsewhere)
        path.symlink_to(elsewhere)  # with the right content even
        content = elsewhere.read_bytes()
        assert self.made()
        assert not path.is_symlink()
        assert elsewhere.read_bytes() == content
        path.unlink()
        os.mkfifo(path)
        assert self.made()  # and does not wait for a writer

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners of files are not known here")
    def test_a_private_folder_that_another_user_has_taken_is_not_used(self, tmp_path, monkeypatch):
        monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path))
        own = native._private_folder()
        assert own is not None
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
        assert native._private_folder() == own
        own.chmod(0o770)
        assert native._private_folder() is None
        own.rmdir()
        (tmp_path / "planted").mkdir(mode=0o700)
        own.symlink_to(tmp_path / "planted")
        assert native._private_folder() is None
        own.unlink()
        if os.geteuid() == 0:  # nobody else can make a folder of another user
            own.mkdir(mode=0o700)
            os.chown(own, 12345, -1)
            assert native._private_folder() is None


@pytest.mark.parametrize("case", ["no home", "a file in its place", "no folder at all"])
def test_where_nothing_can_be_kept_everything_works_and_one_line_says_so(case, tmp_path, monkeypatch, capsys):
    def no_home(*_):
        raise RuntimeError("Could not determine home directory.")  # neither HOME nor an entry in passwd

    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("STERADIAN_CACHE", str(tmp_path / "file"))
    if case == "no home":
        monkeypatch.delenv("STERADIAN_CACHE")
        monkeypatch.setattr(native.Path, "home", no_home)
    temporary = tmp_path / "file" if case == "no folder at all" else tmp_path
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(temporary))
    native._folders.cache_clear()
    try:
        given = torch.randn(5, 3, 16)
        for _ in range(2):
            with use_backend("cpu"):
                found = evaluate(fresh(), [given])
        with use_backend("reference"):
            assert difference(found, evaluate(fresh(), [given])) < 1e-6
        again = codegen.compiled(program(), 4, 16).new
    finally:
        native._folders.cache_clear()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "machine code is" in line]
    assert "STERADIAN_CACHE" in line
    assert ("made anew in every process" in line) == again == (case == "no folder at all")
    assert len(list(tmp_path.glob("steradian-*/*.o"))) == (case != "no folder at all")


# --------------------------------------------------------------------------------------------------- first use on a CPU


class TestFirstUse:
    def test_wrong_machine_code_is_not_used_not_kept_and_told_once(self, cache, monkeypatch):
        factors = codegen._Generator._factors
        monkeypatch.setattr(codegen._Generator, "_factors", lambda self, term: factors(self, (-term[0], *term[1:])))
        table, given = fresh(), torch.randn(7, 3, 16, dtype=torch.float64)
        with use_backend("cpu"):
            with pytest.warns(UserWarning, match=r"code of 'harmonics' is not used .* differs from the reference"):
                found = evaluate(table, [given])
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(evaluate(table, [given]), found)
        with use_backend("reference"):
            assert torch.equal(evaluate(table, [given]), found)
        assert files(cache) == []

    @pytest.mark.parametrize("order", [1, 2])
    def test_a_wrong_derivative_is_noticed(self, order, cache, monkeypatch):
        """The program of a derivative is compared with what autograd makes of the polynomial, not with itself."""
        make = codegen.Program._make_gradient

        def wrong(self, wanted, given):
            made = make(self, wanted, given)
            depth = 1 + (self.derived is not None)
            if depth == order:
                for node, terms in enumerate(made.graph.terms):
                    if node >= len(self.graph.terms) and terms:
                        coefficient, *factors = terms[0]
                        made.graph.terms[node] = ((-coefficient, *factors), *terms[1:])
            return made

        monkeypatch.setattr(codegen.Program, "_make_gradient", wrong)
        results = []
        for name in ("cpu", "reference"):
            table, x = fresh(), torch.randn(4, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            x.requires_grad_()
            with use_backend(name), warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                first = torch.autograd.grad(evaluate(table, [x]).square().sum(), x, create_graph=True)[0]
                second = torch.autograd.grad(first.square().sum(), x)[0]
            assert bool(told) == (name == "cpu")
            results.append((first, second))
        for ours, truth in zip(*results):
            assert torch.allclose(ours, truth, rtol=0, atol=1e-11 * float(truth.detach().abs().max()))

    def test_code_from_the_cache_is_not_compared_again(self, cache, monkeypatch):
        asked = []
        monkeypatch.setattr(apply, "agrees", lambda compare, line: asked.append(1) or agrees(compare, line))
        for _ in range(2):
            table = fresh()
            with use_backend("cpu"):
                for _ in range(2):
                    evaluate(table, [torch.randn(3, 3, 16)])
        assert len(asked) == 1

    def test_inference_mode_and_formats(self, cache):
        with use_backend("cpu"), torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("error")
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                evaluate(fresh(), [torch.randn(3, 3, 16).to(dtype)])


def test_the_reference_of_a_derivative_is_autograd():
    table, _ = channelwise_polynomial(DEGREES, 2, DEGREES)
    value = program_of(table, (0, None, None), 1)
    first = value.gradient((True, False, True), (True,))
    second = first.gradient((True, True, False, True), (True, True))
    generator = torch.Generator().manual_seed(0)
    indices, counts, work = [torch.tensor([0, 2, 1, 2]), torch.tensor([0, 0, 1, 2])], [3, 3], 4

    def random(slot):
        rows = work if slot.index is None else counts[slot.index]
        shape = (rows, slot.operand.dim, 4) if slot.operand.has_channels else (rows, slot.operand.dim)
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    inputs = [random(slot) for slot in second.inputs]
    rows = tuple(Rows(index, count).look() for index, count in zip(indices, counts))
    padded = [torch.nn.functional.pad(value, (0, 4)) if value.ndim == 3 else value for value in inputs]
    for one in (value, first, second):
        given = len(one.inputs)
        truth = evaluate_program(one, inputs[:given], indices, counts, work)
        found = apply.run_program(one, rows, work, padded[:given], 8)
        assert len(found) == len(truth)
        for ours, exact in zip(found, truth):
            ours = ours[..., :4] if exact.ndim == 3 else ours
            assert difference(ours, exact) < 1e-13
            assert float(exact.detach().abs().max()) > 0.1


def test_a_sample_has_own_rows_and_random_ones():
    index = torch.arange(100) // 3
    own, weights = torch.full((100, 2), 5.0), torch.zeros(34, 3, 4)
    found = sample([own, weights], [None, 0], [index])
    assert [len(value) for value in found.inputs] == [ROWS, found.counts[0]]
    assert torch.equal(found.inputs[0][:OWN], own[:OWN])
    assert 0.1 < float(found.inputs[0][OWN:].std()) / 5.0 < 3
    assert bool((found.indices[0].diff() >= 0).all())
    assert int(found.indices[0].max()) < found.counts[0]
    assert float(found.inputs[1].abs().max()) > 0.1  # weights that are zero would show nothing
    own[3] = float("nan")
    assert bool(torch.isfinite(sample([own], [None], []).inputs[0]).all())
    assert len(sample([own[:3]], [None], []).inputs[0]) == ROWS


# ---------------------------------------------------------------------------------------------------------- comparisons


def test_difference_takes_nothing_strange_for_small():
    truth = torch.tensor([2.0, -4.0])
    assert difference(truth, truth) == 0.0
    assert difference(truth + torch.tensor([0.0, 1.0]), truth) == pytest.approx(0.25)
    assert difference(truth / 1e3, truth * 0, floor=1.0) == pytest.approx(4e-3)
    for strange in (truth * math.nan, truth * math.inf, truth[:1]):
        assert difference(strange, truth) == math.inf
    assert difference(truth[:0], truth[:0]) == 0.0


def test_what_is_required_equal():
    truth = torch.tensor([1.0, -3.0])
    require_equal("forces", truth + 1e-4, truth, 1e-4, 1e-3)
    for wrong in (truth + 1e-3, truth * math.nan):
        with pytest.raises(MismatchError, match=r"forces differ by .* of 3, allowed is 1e-04 of it"):
            require_equal("forces", wrong, truth, 1e-4, 1e-3)
    require_equal("forces", truth, truth * math.nan, 1e-4, 1e-3)  # the model has failed, not the fast way


def test_a_verdict_is_reached_once_and_told_once():
    verdicts, asked = FirstUse(), []

    def compare(error):
        asked.append(error)
        return error, 1e-5

    assert verdicts.trusts("right", lambda: compare(1e-6), "it {}")
    with pytest.warns(UserWarning, match=r"it differs from the reference by 1.0e-04 \(relative; 1e-05 is allowed\)"):
        assert not verdicts.trusts("wrong", lambda: compare(1e-4), "it {}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not verdicts.trusts("wrong", lambda: compare(0.0), "it {}")
    assert asked == [1e-6, 1e-4]
    with pytest.warns(UserWarning, match="it fails \\(ValueError: no device\\)"):
        assert not agrees(lambda: (_ for _ in ()).throw(ValueError("no device\nmore")), "it {}")
    with pytest.warns(UserWarning, match="it differs"):
        assert not agrees(lambda: (math.nan, 1.0), "it {}")


def test_bounds_are_not_looser_than_they_were():
    """Loosened bounds are how a comparison comes to pass always."""
    bounds = {what: dict(own) for what, own in checked.TOLERANCES.items()}
    assert bounds["polynomial"] == {"float64": 1e-11, "float32": 2e-5, "bfloat16": 2.0**-8}
    assert bounds["model"] == {"float64": 1e-8, "float32": 2e-4, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}
    assert bounds["prepared step"] == {"float64": 1e-8, "float32": 2e-4, "narrow": 0.03}
    assert checked.OF_GRADIENTS == {"model": 5.0, "prepared step": 10.0}


# -------------------------------------------------------------------------------------------------------------- folding


class TestFolding:
    def test_made_once_until_a_weight_changes(self):
        weight, folded, made = torch.ones(3), Folded(), []

        def twice():
            made.append(1)
            return 2 * weight

        for _ in range(3):
            assert torch.equal(folded("twice", twice, weight), 2 * weight)
        assert len(made) == 1
        weight.add_(1.0)
        assert torch.equal(folded("twice", twice, weight), torch.full((3,), 4.0))
        weight.data = torch.zeros(3)
        assert torch.equal(folded("twice", twice, weight), torch.zeros(3))
        assert len(made) == 3

    def test_a_weight_put_in_the_place_of_another_is_seen(self):
        """Its memory may be that of the old one, and its version is zero too."""
        folded = Folded()
        for number in range(200):
            weight = torch.full((64,), float(number))
            assert float(folded("same", lambda weight=weight: weight + 1, weight)[0]) == number + 1
            del weight

    def test_trained_and_uncounted_weights_are_not_kept(self):
        folded, weight = Folded(), nn.Parameter(torch.ones(2))
        assert folded("twice", lambda: 2 * weight, weight).requires_grad
        with torch.inference_mode():
            other = torch.ones(2)
        for _ in range(2):
            folded("twice", lambda: 2 * other, other)
            with torch.inference_mode():
                other.add_(1.0)
        assert float(folded("twice", lambda: 2 * other, other)[0]) == 6.0

    def test_what_is_made_in_inference_mode_can_be_differentiated_through_later(self):
        linear = IrrepsLinear(DEGREES, 4, 4).requires_grad_(False)
        features = torch.randn(2, 4, 4)
        with torch.inference_mode():
            inside = linear(features)
        leaf = features.clone().requires_grad_()
        linear(leaf).sum().backward()
        assert torch.equal(linear(features), inside)

    def test_copies_and_pickles_of_a_module_start_empty(self):
        linear = IrrepsLinear(DEGREES, 4, 4).requires_grad_(False)
        features = torch.randn(2, 4, 4)
        before = linear(features)
        for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
            assert not other.folded._known
            assert torch.equal(other(features), before)
            other.weight.zero_()
            assert not other(features).any()
        assert torch.equal(linear(features), before)

    def test_a_copied_polynomial_is_the_same_and_a_pickled_one_works(self):
        table, given = fresh(), torch.randn(3, 3, 16)
        with use_backend("cpu"):
            before = evaluate(table, [given])
            assert copy.deepcopy(table) is table
            again = pickle.loads(pickle.dumps(table))
            assert not again.made
            assert torch.equal(evaluate(again, [given]), before)


# ---------------------------------------------------------------------------------------------------- threads and forks


def _evaluate_threaded(seed: int, threads: int = 0) -> torch.Tensor:
    if threads:
        torch.set_num_threads(threads)
    apply.WORTH_A_THREAD = 0
    # small enough for PyTorch's own loops to use one thread: where a forked process asks for more, they would hang
    table, x = fresh(), torch.randn(40, 3, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    with use_backend("cpu"):
        (gradient,) = torch.autograd.grad(evaluate(table, [x]).square().sum(), x)
    return gradient


STARTED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_compiler import _evaluate_threaded, multiprocessing

if __name__ == "__main__":
    method = sys.argv[2]
    expected = _evaluate_threaded(3, 2)
    with multiprocessing.get_context(method).Pool(1) as pool:
        threads = pool.apply_async(torch.get_num_threads).get(timeout=60)
        found = [pool.apply_async(_evaluate_threaded, (3, more)).get(timeout=60) for more in (0, 2, 2)]
    for one in found:
        assert torch.allclose(one, expected, rtol=1e-5, atol=1e-4)
    assert torch.allclose(_evaluate_threaded(3), expected, rtol=1e-5, atol=1e-4)
    print("threads", threads)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_started_after_threads_were_used_computes(method, tmp_path):
    """A forked one with one thread; where it is asked for more it says one line."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("no such way to start a process here")
    script = tmp_path / "started.py"
    script.write_text(STARTED)
    command = [sys.executable, str(script), str(Path(__file__).parent), method]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "threads" in found.stdout
    assert found.stderr.count("kernels use one thread") == (method == "fork")
    if method == "fork":
        assert found.stdout == "threads 1\n"


def test_a_sum_over_channels_cannot_have_channels_again():
    graph = Graph()
    x = graph.input(0, 0, True)
    dot = graph.sum([(1.0, x, x)], False)
    back = graph.sum([(1.0, x, dot)], True)
    assert graph.summed([x, dot]) == {dot}
    with pytest.raises(NotImplementedError, match="channels that depend"):
        graph.summed([x, dot, back])
