"""Compiling Triton kernels for a GPU that is not there: what a kernel costs, known before it runs."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steradian.polynomials.triton import Tile, kernel_of
from steradian.polynomials.triton_source import Part

__all__ = ["Compiled", "H200", "MI300", "compile_part"]

H200 = GPUTarget("cuda", 90, 32)
MI300 = GPUTarget("hip", "gfx942", 64)

_POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Compiled:
    """Facts about a compiled kernel.

    Attributes:
        registers: of a thread; None where the tool that reads them is not there.
        stack: bytes of memory per thread, zero where nothing was spilled; None as above.
        shared: bytes of shared memory of an instance.
        instructions: of the machine code, by name; empty as above.
        seconds: to compile.
        text: assembly.
    """

    registers: int | None
    stack: int | None
    shared: int
    instructions: dict[str, int]
    seconds: float
    text: str


def compile_part(
    part: Part,
    tile: Tile,
    channels: int,
    target: GPUTarget = H200,
    real: torch.dtype = torch.float32,
    ordered: bool = True,
    formats: dict[str, torch.dtype] | None = None,
) -> Compiled:
    """Compile one kernel of a program (not under Triton's interpreter).

    Args:
        part: see :func:`steradian.polynomials.triton_source.parts_of`.
        tile: sizes, see :func:`steradian.polynomials.triton.tile_of`.
        channels: C.
        target: the GPU.
        real: format of the arithmetic, and of inputs and outputs unless ``formats`` says otherwise.
        ordered: whether rows are reached through a list in order of their segment.
        formats: of single arguments, such as ``{"i2": torch.bfloat16}`` for the third input.
    """
    kernel = kernel_of(part)
    constants: dict[str, Any] = {"C": channels, "ROWS": tile.rows, "BLOCK": tile.block}
    constants["REAL"] = tl.float64 if real == torch.float64 else tl.float32
    constants["TOGETHER"] = True
    if part.index is not None:
        constants |= {"ORDERED": ordered, "PARTS": tile.parts}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "num_rows":
            signature[name] = "i32"
        elif name in ("order", "bounds") or name.startswith("g"):
            signature[name] = "*i64"
        else:
            signature[name] = _POINTERS[(formats or {}).get(name, real)]
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*") and kind != "*i64"
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    started = time.perf_counter()
    done = triton.compile(source, target=target, options={"num_warps": tile.warps, "enable_fp_fusion": True})
    seconds = time.perf_counter() - started
    text = done.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    if target.backend == "cuda":
        registers, stack, instructions = _read_machine_code(done.asm["cubin"])
    else:
        registers, stack, instructions = _number(r"\.vgpr_count:\s+(\d+)", text), _number(
            r"\.private_segment_fixed_size:\s+(\d+)", text
        ), {}  # fmt: skip
    return Compiled(registers, stack, done.metadata.shared, instructions, seconds, text)


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else None


def _read_machine_code(code: bytes) -> tuple[int | None, int | None, dict[str, int]]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None, {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage, listing = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    counts: dict[str, int] = {}
    for name in re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", listing):
        counts[name] = counts.get(name, 0) + 1
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), counts
