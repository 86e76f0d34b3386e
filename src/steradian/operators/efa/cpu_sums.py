"""The sums of Euclidean fast attention through machine code; see :mod:`steradian.operators.efa.cpu_code_sums`.

:class:`CpuSums` offers what :mod:`steradian.operators.efa.sums` needs of a way to compute: its derivatives of any
order are made of the same three functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from steradian.compiler.native import function_of
from steradian.compiler.threads import run_tasks
from steradian.compiler.tiles import ROWS
from steradian.operators.efa.cpu_code_sums import ARGUMENTS, num_scratch, sums_module

__all__ = ["CpuSums", "Task", "aligned", "run_kernel"]

WORTH_A_THREAD = 1_000_000
"""Multiply-adds below which a second thread costs more than it brings."""


@dataclass(frozen=True)
class Task:
    """One call of a kernel.

    Attributes:
        function: machine code of ``(arguments, scratch, first, last)``.
        names: of the arguments.
        numbers: their values; what is not named is 0.
        scratch: vectors of scratch memory.
        parts: how many parts the work may be cut into.
        work: multiply-adds.
    """

    function: Callable
    names: Sequence[str]
    numbers: dict[str, int]
    scratch: int
    parts: int
    work: int


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it: contiguous, from an address that is a multiple of 64; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def run_kernel(task: Task) -> None:
    """Run it, over as many threads as PyTorch uses and the work is worth."""
    if not task.parts:
        return
    arguments = np.array([task.numbers.get(name, 0) for name in task.names], dtype=np.int64)
    threads = max(1, min(torch.get_num_threads(), task.parts, task.work // WORTH_A_THREAD))
    scratch = np.empty(64 * (threads * task.scratch + 1), dtype=np.uint8)
    start = -(-scratch.ctypes.data // 64) * 64  # vectors start at a multiple of their size
    cuts = [task.parts * part // threads for part in range(threads + 1)]
    calls = [
        (arguments.ctypes.data, start + 64 * task.scratch * part, first, last)
        for part, (first, last) in enumerate(pairwise(cuts))
    ]
    if threads == 1:
        task.function(*calls[0])
    else:
        run_tasks(task.function, calls, threads)


@cache
def _function(kind: str, itemsize: int, columns: int, whole: bool, single: bool) -> Callable:
    return function_of(f"sums of attention, {kind}", sums_module, (kind, itemsize, columns, whole, single), 4)


class CpuSums:
    """Sums for one arrangement of rows.

    Args:
        wave_of, feature_of: ``[J]`` int64, rows of waves and features that make row j; J a multiple of eight.
        whole: every eight rows from the start share one wave and have features next to each other.
    """

    def __init__(self, wave_of: Tensor, feature_of: Tensor, whole: bool) -> None:
        self.wave_of, self.feature_of, self.whole = wave_of.contiguous(), feature_of.contiguous(), whole
        self.num_rows = len(wave_of)
        if self.num_rows % ROWS:
            raise ValueError(f"{self.num_rows} rows are no multiple of {ROWS}")

    def moments(self, values: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``[B, C, J, P]`` from ``[B, C, K W, P]`` and pairs of ``[B, K, R, W]`` and ``[B, K, X, W]``."""
        sums = values.new_empty(*values.shape[:2], self.num_rows, values.shape[3])
        self._run("moments", aligned(values), sums, pairs)
        return sums

    def apply(self, sums: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """``[B, C, K W, P]`` from ``[B, C, J, P]`` and pairs."""
        _, blocks, _, lanes = pairs[0][0].shape
        values = sums.new_empty(*sums.shape[:2], blocks * lanes, sums.shape[3])
        self._run("apply", values, aligned(sums), pairs)
        return values

    def contract(
        self, values: Tensor, sums: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Derivatives of T by the waves and features of every pair, where wanted."""
        flat = [tensor for pair in pairs for tensor in pair]
        outputs = [
            torch.zeros_like(x, memory_format=torch.contiguous_format) if asked else None
            for x, asked in zip(flat, wanted)
        ]
        self._run("contract", aligned(values), aligned(sums), pairs, outputs)
        return outputs

    def _run(
        self,
        kind: str,
        values: Tensor,
        sums: Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
        outputs: Sequence[Tensor | None] = (),
    ) -> None:
        waves, features = ([aligned(pair[number]) for pair in pairs] for number in range(2))
        batch, blocks, num_waves, lanes = waves[0].shape
        panels, width = values.shape[1], values.shape[3]
        tables = {
            "waves": _addresses(waves), "features": _addresses(features),
            "by_waves": _addresses(outputs[::2]), "by_features": _addresses(outputs[1::2]),
        }  # fmt: skip
        numbers = {name: table.ctypes.data for name, table in tables.items()} | {
            "num_blocks": blocks, "num_waves": num_waves, "num_features": features[0].shape[2],
            "num_panels": panels, "num_tiles": self.num_rows // ROWS, "num_pairs": len(pairs),
            "wave_of": self.wave_of.data_ptr(), "feature_of": self.feature_of.data_ptr(),
            "values": values.data_ptr(), "sums": sums.data_ptr(),
        }  # fmt: skip
        parts = batch * {"moments": self.num_rows // ROWS, "apply": blocks, "contract": blocks // 2}[kind]
        function = _function(kind, values.element_size(), width // lanes, self.whole, len(pairs) == 1)
        work = batch * blocks * lanes * self.num_rows * panels * width
        scratch = num_scratch(panels * width)
        run_kernel(Task(function, ARGUMENTS, numbers, scratch, parts if panels else 0, work))


def _addresses(tensors: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], dtype=np.int64)
