"""A step as one graph of elementary operations, compiled by TorchInductor.

The step is traced below autograd, so forces, and in training the gradients of the loss on forces, are part of the graph
and are optimised together. Weights, buffers and all tensors of the batch are inputs of the graph: it stays valid while
weights change. What has no name in the module (constants of the couplings, grids) is part of the graph.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steradian.compiler.capture import static_step
from steradian.compiler.native import cache_folder
from steradian.execution.graphs import map_tensors, tensors_in

__all__ = ["compile_step", "keep_compiled_code", "named_state"]

Outputs = Any


def keep_compiled_code() -> None:
    """Let the compiler keep its code in this package's cache, unless ``TORCHINDUCTOR_CACHE_DIR`` names a place."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / "inductor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # the compiler then uses a folder of its own
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, as tensors that take no gradient but share their memory."""
    with torch.no_grad():
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {name: value.detach() for name, value in named.items()}


def compile_step(
    step: Callable[[dict[str, Tensor], dict[str, Tensor]], Outputs],
    module: nn.Module,
    inputs: dict[str, Tensor],
    *,
    backend: str = "inductor",
) -> Callable[[dict[str, Tensor]], Outputs]:
    """Trace a step on example inputs and compile it.

    Args:
        step: outputs from the module's state (:func:`named_state`) and the inputs; tensors in nests.
        module: whose state is an input.
        inputs: example; only tensors of the same shapes can be given later.
        backend: ``inductor``; ``trace`` runs the traced operations one by one; else one of ``torch.compile``.

    Returns:
        A function of the inputs. It reads the module's present weights, as long as they are changed in place.

    Raises:
        Exception: whatever tracing raises, and on its first call compiling; the caller falls back.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # takes seconds to import

    keep_compiled_code()
    names, state = list(inputs), named_state(module)
    shape: list[Outputs] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(state, tensors[: len(state)])), dict(zip(names, tensors[len(state) :]))
        outputs = step(*given)
        shape[:] = [outputs]
        return [value.detach() for value in tensors_in(outputs)]

    arguments = [*state.values(), *inputs.values()]
    with static_step(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's own
        traced = make_fx(flat, tracing_mode="real")(*arguments)
        # once more without writing into slices, which compilers do not follow
        traced = make_fx(torch.func.functionalize(traced), tracing_mode="real")(*arguments)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    nest = map_tensors(lambda value: value.detach().new_empty(0), shape[0])
    compiled = _compiled(traced, arguments, backend)

    def run(given: dict[str, Tensor]) -> Outputs:
        with torch.no_grad():
            found = compiled(*state.values(), *(given[name] for name in names))
        return _filled(nest, found)

    return run


def _compiled(traced: Any, arguments: Sequence[Tensor], backend: str) -> Callable[..., Sequence[Tensor]]:
    if backend == "trace":
        return traced  # type: ignore[no-any-return]
    if backend == "inductor":
        # below torch.compile, which would look at every weight at every call to see whether it is still the same
        from torch._inductor import compile as compile_graph

        with torch.no_grad():
            return compile_graph(traced, list(arguments))  # type: ignore[return-value]
    return torch.compile(traced, backend=backend, fullgraph=True, dynamic=False)


def _filled(nest: Outputs, values: Sequence[Tensor]) -> Outputs:
    """The nest with these tensors in place of its own, in order."""
    left = iter(values)
    return map_tensors(lambda _: next(left), nest)
