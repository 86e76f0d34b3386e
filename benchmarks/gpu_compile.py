"""What Triton's kernels of polynomials cost on an NVIDIA H200, read from the compiled code; needs no GPU.

    python benchmarks/gpu_compile.py [--channels 128] [--degrees 1] [--out benchmarks/results/gpu_compile.json]

Compiles the kernels of MACE's products (value, first and second derivatives) and reports registers, spilled bytes and
instructions of each. These are facts of compilation, not speeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import triton
from settings import text
from triton_compile import H200, MI300, compile_part

from steradian.equivariant.irreps import natural_degrees
from steradian.equivariant.symmetric_contraction import contraction_polynomial
from steradian.equivariant.tensor_product import channelwise_polynomial
from steradian.polynomials.program import Program, program_of
from steradian.polynomials.triton import CHANNELS, THREADS, Tile
from steradian.polynomials.triton_source import parts_of

INSTRUCTIONS = ("FFMA", "FMUL", "FADD", "LDG", "STG", "LDS", "STS", "SHFL", "BAR", "LDL", "STL")


def programs(degree: int, l_max: int, correlation: int) -> dict[str, Program]:
    """The two polynomials of MACE with their derivatives of two orders, by all inputs."""
    product, _ = channelwise_polynomial(natural_degrees(degree), l_max, natural_degrees(l_max))
    contraction = contraction_polynomial(natural_degrees(l_max), natural_degrees(degree), correlation)
    found = {}
    for name, value in (
        ("tensor product", program_of(product, (0, None, None), 1)),
        ("contraction", program_of(contraction, (0, None), None)),
    ):
        count = len(value.inputs)
        first = value.gradient((True,) * count, (True,))
        found[name] = value
        found[f"{name}, first derivative"] = first
        found[f"{name}, second derivative"] = first.gradient((True,) * (count + 1), (True,) * count)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--degrees", type=int, default=1, help="highest degree of the features")
    parser.add_argument("--l-max", type=int, default=3)
    parser.add_argument("--correlation", type=int, default=3)
    parser.add_argument("--target", choices=("h200", "mi300"), default="h200")
    parser.add_argument("--orders", type=int, default=2, help="highest order of derivatives")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    target = H200 if options.target == "h200" else MI300
    rows = []
    orders = ("first", "second")[options.orders :]
    for name, program in programs(options.degrees, options.l_max, options.correlation).items():
        if any(order in name for order in orders):
            continue
        for part in parts_of(program):
            wide = options.channels % (2 * CHANNELS) == 0 and part.num_terms <= 128
            for block in (CHANNELS, 2 * CHANNELS)[: 1 + wide]:
                rows.append(row(name, part, block, options.channels, target))
                print(json.dumps(rows[-1]), flush=True)
    if options.out:
        content = {
            "what": "registers and instructions of compiled kernels; nothing was run",
            "target": str(target),
            "triton": triton.__version__,
            "torch": torch.__version__,
            "settings": {key: value for key, value in vars(options).items() if key != "out"},
            "kernels": rows,
        }
        options.out.write_text(text(content))


def row(name: str, part, block: int, channels: int, target) -> dict:
    tile = Tile(THREADS // CHANNELS, block, THREADS // target.warp_size)
    done = compile_part(part, tile, channels, target)
    return {
        "program": name,
        "outputs": [slot.operand.name for slot in part.program.outputs],
        "scattered": part.index is not None,
        "components": sum(node is not None for nodes in part.program.nodes for node in nodes),
        "terms": part.num_terms,
        "channels_per_thread": block // CHANNELS,
        "registers": done.registers,
        "stack_bytes": done.stack,
        "shared_bytes": done.shared,
        "instructions": {key: done.instructions[key] for key in INSTRUCTIONS if key in done.instructions},
    }


if __name__ == "__main__":
    main()
