"""The benchmark of backends: measured, checked first, kept for a device, overridden by the user. Fakes stand in for
GPUs."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from steradian import polynomials as kernels
from steradian.build import build_potential
from steradian.config import MACEConfig, ModelConfig
from steradian.equivariant.harmonics import harmonics_polynomial
from steradian.execution import backend_benchmark
from steradian.execution.backend_benchmark import BackendBenchmark, benchmark_backends, prepare_backend
from steradian.polynomials import Polynomial, backend, evaluate, set_backend, use_backend
from steradian.polynomials.reference import ROWS, evaluate_reference
from tests.systems import NO_REFERENCES as STATISTICS
from tests.systems import seven_atoms as graph

GPU = torch.device("cuda", 0)
SECONDS = {"reference": 4.0, "same": 2.0, "slow": 8.0, "wrong": 1.0, "broken": 1.0, "nearly": 1.0}


def potential(dtype="float64"):
    host = MACEConfig(num_channels=2, l_max=1, hidden_l=1, correlation=2, radial_mlp=[4])
    return build_potential(ModelConfig(host=host, precision=dtype), STATISTICS, seed=2).eval()


class Fakes:
    """Backends made of the reference: equal, wrong by a factor, wrong in gradients alone, broken."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.current = monkeypatch, "reference"

    @contextmanager
    def __call__(self, name):
        def evaluate_wrongly(*arguments):
            if name == "broken":
                raise RuntimeError("no code for this device\nand more")
            value = evaluate_reference(*arguments)
            if name == "nearly" and value.requires_grad:  # the value is right, its derivative is not
                return value.detach() + 1.01 * (value - value.detach())
            return 1.01 * value if name == "wrong" else value

        self.current = name
        with use_backend("reference"), self.monkeypatch.context() as patch:
            patch.setattr(kernels, "evaluate_reference", evaluate_wrongly)
            yield

    def seconds(self, step, device):
        step()
        return SECONDS[self.current]


@pytest.mark.parametrize("training", [False, True])
def test_the_fastest_that_is_right_is_chosen(training, monkeypatch, capsys):
    fakes, model = Fakes(monkeypatch), potential().train(training)
    names = ["slow", "wrong", "broken", "nearly", "same"]
    found = benchmark_backends(model, graph(), training, names, fakes.seconds, fakes)
    assert found.name == "same"
    assert set(found.seconds) == {"reference", "slow", "same"}
    assert found.errors["same"] == 0.0
    assert found.errors["wrong"] > 1e-4
    assert found.refused["broken"] == "RuntimeError: no code for this device"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "backend wrong is not used on cpu: it differs from the reference by" in lines[0]
    assert lines[-1] == (
        "steradian: polynomials on cpu: same (speed: reference 1.00, slow 0.50, same 2.00 times; checked to 0e+00)"
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_weights_are_compared_for_training(monkeypatch):
    """A derivative of second order that is wrong shows in training alone."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, cotangent):
            return Second.apply(cotangent)

    class Second(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, cotangent):
            return 1.1 * cotangent

    @contextmanager
    def using(name):
        with use_backend("reference"), monkeypatch.context() as patch:
            if name == "wrong":
                patch.setattr(kernels, "evaluate_reference", lambda *given: Wrong.apply(evaluate_reference(*given)))
            yield

    model = potential().train()
    for training, refused in ((False, set()), (True, {"wrong"})):
        found = benchmark_backends(model, graph(), training, ["wrong"], lambda step, device: 1.0, using)
        assert set(found.refused) == refused


def test_the_reference_itself_may_not_fail(monkeypatch):
    def using(name):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        benchmark_backends(potential(), graph(), candidates=[], timer=lambda *_: 1.0, using=using)


def test_random_numbers_stay_and_a_mode_is_kept(monkeypatch):
    fakes, model = Fakes(monkeypatch), potential().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    benchmark_backends(model, graph(), True, ["same"], fakes.seconds, fakes)
    assert torch.equal(torch.rand(3), expected)
    assert model.training


def test_times_are_taken_on_this_machine():
    found = benchmark_backends(potential(), graph(), candidates=["reference"])
    assert 0 < found.seconds["reference"] < 60


@pytest.fixture
def _forgotten(monkeypatch):
    monkeypatch.delenv("STERADIAN_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_measured", {})
    monkeypatch.setattr(backend, "triton_works", lambda: True)
    backend._say_once.cache_clear()


@pytest.mark.usefixtures("_forgotten")
def test_a_choice_is_made_once_for_a_device_and_the_user_has_the_last_word(monkeypatch):
    asked = []

    def measured(model, batch, training):
        asked.append(training)
        return BackendBenchmark("cuequivariance")

    monkeypatch.setattr(backend_benchmark, "benchmark_backends", measured)
    model = SimpleNamespace(device=GPU, dtype=torch.float32)
    batch = SimpleNamespace(to=lambda device: batch)
    assert backend.backend_on(GPU, torch.float32) == "triton"  # before anything was measured
    assert prepare_backend(model, batch, training=True) == "cuequivariance"
    assert prepare_backend(model, batch) == "cuequivariance"
    assert asked == [True]
    assert backend.backend_on(torch.device("cuda", 1), torch.float32) == "triton"
    assert backend.backend_on(GPU, torch.int64) == "reference"
    with use_backend("reference"):
        assert prepare_backend(model, batch) == "reference"
    monkeypatch.setenv("STERADIAN_BACKEND", "triton")
    assert prepare_backend(model, batch) == "triton"
    monkeypatch.setenv("STERADIAN_BACKEND", "cuda")
    assert prepare_backend(model, batch) == "cuequivariance"
    backend.set_measured_backend(GPU, None)
    assert backend.backend_on(GPU, torch.float32) == "triton"
    assert asked == [True]


@pytest.mark.usefixtures("_forgotten")
def test_a_cpu_has_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(backend_benchmark, "benchmark_backends", lambda *_: pytest.fail("measured on a CPU"))
    assert prepare_backend(potential(), graph()) in ("cpu", "reference")


@pytest.mark.usefixtures("_forgotten")
def test_deterministic_algorithms_exclude_cuequivariance(monkeypatch):
    monkeypatch.setattr(backend_benchmark, "cuequivariance_works", lambda: True)
    assert backend_benchmark.available_backends() == ["reference", "triton", "cuequivariance"]
    backend.set_measured_backend(GPU, "cuequivariance")
    torch.use_deterministic_algorithms(True)
    try:
        assert backend_benchmark.available_backends() == ["reference", "triton"]
        with pytest.warns(UserWarning, match="not known to be deterministic"):
            assert backend.backend_on(GPU, torch.float32) == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    assert backend.backend_on(GPU, torch.float32) == "cuequivariance"


@pytest.mark.usefixtures("_forgotten")
def test_a_gpu_without_triton_is_served_by_the_reference_and_says_so_once(monkeypatch):
    monkeypatch.setattr(backend, "triton_works", lambda: False)
    with pytest.warns(UserWarning, match="pip install triton"):
        assert backend.backend_on(GPU, torch.float32) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.backend_on(GPU, torch.float32) == "reference"
    with pytest.raises(RuntimeError, match="needs triton"):
        set_backend("triton")


def test_an_unknown_backend_is_named(monkeypatch):
    with pytest.raises(ValueError, match="auto, reference, cpu, cuda, triton, cuequivariance"):
        set_backend("gpu")
    monkeypatch.setenv("STERADIAN_BACKEND", "gpu")
    with pytest.raises(ValueError, match="STERADIAN_BACKEND"):
        backend.requested_backend()


# ------------------------------------------------------------------------------- one polynomial before its first use


def fresh(l_max=2):
    table = harmonics_polynomial(l_max)
    return Polynomial(table.inputs, table.output, table.terms)


@pytest.fixture
def tried(monkeypatch):
    """Makes the backend of Triton a function of ours; a list of the numbers of rows it was given."""
    seen = []

    def use(function):
        def evaluate_fake(table, inputs, gathers, scatter, num_rows, dtype):
            seen.append(len(inputs[0]))
            return function(evaluate_reference(table, inputs, gathers, scatter, num_rows))

        monkeypatch.setattr("steradian.polynomials.triton.evaluate_triton", evaluate_fake)
        monkeypatch.setattr(kernels, "backend_for", lambda *_: "triton")
        return seen

    pytest.importorskip("triton", reason="the fake takes the place of Triton's kernels")
    return use


def test_a_polynomial_is_checked_once_before_its_first_use(tried):
    seen, table = tried(lambda value: value), fresh()
    for _ in range(2):
        evaluate(table, [torch.randn(3, 3)])
    assert seen == [ROWS, 3, 3]
    evaluate(table, [torch.randn(3, 3, requires_grad=True)])  # now with a gradient
    assert seen == [ROWS, 3, 3, ROWS, 3]


@pytest.mark.parametrize("fault", ["value", "gradient", "not a number", "error"])
def test_a_wrong_kernel_is_not_used_and_one_line_says_so(fault, tried):
    def spoil(value):
        if fault == "error":
            raise RuntimeError("no code for this device")
        if fault == "gradient":
            return value.detach() + 1.001 * (value - value.detach())
        return value * (float("nan") if fault == "not a number" else 1.001)

    tried(spoil)
    table, given = fresh(), torch.randn(3, 3, requires_grad=True)
    message = "no code for this device" if fault == "error" else "differs from the reference"
    with pytest.warns(UserWarning, match=f"backend triton is not used for 'harmonics' on cpu: .*{message}"):
        value = evaluate(table, [given])
    assert torch.equal(value, evaluate_reference(table, [given], [None], None, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(evaluate(table, [given]), value)


def test_nothing_is_checked_while_a_step_is_traced(tried):
    from torch.fx.experimental.proxy_tensor import make_fx

    seen, table = tried(lambda value: value), fresh()
    make_fx(lambda value: evaluate(table, [value]))(torch.randn(5, 3))
    assert seen == [5]
