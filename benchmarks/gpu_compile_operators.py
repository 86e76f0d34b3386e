"""What Triton's compiler makes of the kernels of MARA and EFA: registers, spills and shared memory. Needs no GPU.

    python benchmarks/gpu_compile_operators.py [--target sm_90 gfx942] [--quick] [--out FILE.json]

Every launch of a step of training is recorded as the operators make it, with the formats and sizes that matter, and
compiled for the target. Facts about code, not about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported: the interpreter compiles nothing

import torch
import triton
from settings import text
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steradian.operators.efa import triton as efa_gpu
from steradian.operators.mara import triton as mara_gpu
from steradian.operators.mara import triton_kernels as mara_triton
from steradian.operators.mara import triton_sums as mara_triton_sums

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
KERNELS = {
    mara_triton: ("row_kernel", "column_kernel"),
    mara_triton_sums: ("node_kernel", "table_kernel"),
    efa_gpu: ("moments_kernel", "apply_kernel", "contract_kernel"),
}
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
         torch.int64: "i64", torch.bool: "i1"}  # fmt: skip


class Recorder:
    """Stands in for a kernel and writes down how it is launched."""

    def __init__(self, function: Any, launches: list[dict[str, Any]]) -> None:
        self.function, self.launches = function, launches

    def __getitem__(self, grid: Any) -> Recorder:
        return self

    def __call__(self, *given: Any, **named: Any) -> None:
        options = {key: named.pop(key) for key in OPTIONS if key in named}
        values = dict(zip(self.function.arg_names, given)) | named
        # parameters, and numbers that are 1: Triton's launcher makes code of its own for these
        constants = {name: value for name, value in values.items() if name.isupper() or _is_one(value)}
        signature = {name: "constexpr" if name in constants else _type(value) for name, value in values.items()}
        # what Triton's launcher tells the compiler: addresses and numbers that are multiples of 16
        multiples = [
            name
            for name, value in values.items()
            if name not in constants and (isinstance(value, torch.Tensor) or value % 16 == 0)
        ]
        self.launches.append(
            {
                "function": self.function,
                "signature": signature,
                "constants": constants,
                "options": options,
                "attributes": {(self.function.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples},
            }
        )


def _is_one(value: Any) -> bool:
    return type(value) is int and value == 1


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "i32" if abs(value) < 2**31 else "i64"


def recorded(run: Any, *arguments: Any) -> list[dict[str, Any]]:
    """The launches of a function."""
    launches: list[dict[str, Any]] = []
    before = [(module, name, getattr(module, name)) for module, names in KERNELS.items() for name in names]
    for module, name, function in before:
        setattr(module, name, Recorder(function, launches))
    try:
        run(*arguments)
    finally:
        for module, name, function in before:
            setattr(module, name, function)
    return launches


def mara_step(num_edges: int, num_points: int, wide: torch.dtype, short: torch.dtype, squared: bool) -> None:
    """Pooled attention, its gradient and the gradient of that; of no values, for nothing runs."""
    vectors, nodes = torch.zeros(num_edges, 3, dtype=wide), torch.zeros(2, 1, 1 + num_points, dtype=short)
    tables, grid = torch.zeros(1, 2 + 4 * num_points + num_points**2, dtype=wide), torch.zeros(num_points, 3).to(wide)
    leaves = [value.requires_grad_() for value in (vectors, nodes, tables)]
    receivers = torch.zeros(num_edges, dtype=torch.int64)
    with torch.no_grad():
        mara_gpu.pool_on_sphere(*leaves, receivers, grid, squared)
    pooled = mara_gpu.pool_on_sphere(*leaves, receivers, grid, squared)
    first = torch.autograd.grad(pooled.sum(), leaves[:2], create_graph=True)
    torch.autograd.grad(pooled.sum() + sum(value.sum() for value in first), leaves)


def efa_step(products: str, num_pairs: int, width: int, num_values: int, dtype: torch.dtype) -> None:
    """The three sums."""
    waves, features = torch.zeros(1, 5, 2, num_pairs, 256).to(dtype), torch.zeros(1, num_pairs, width, 256).to(dtype)
    values, sums = (
        torch.zeros(1, num_values, 256).to(dtype),
        torch.zeros(1, 10 * num_pairs * width, num_values).to(dtype),
    )
    way, pairs = efa_gpu.TritonSums(products), [(waves, features)]
    way.moments(values, pairs)
    way.apply(sums, pairs)
    way.contract(values, sums, pairs, [True, True])


def cases(quick: bool, target: str) -> dict[str, list[dict[str, Any]]]:
    """Launches by name of a case."""
    thrice = "tf32x3" if target == "sm_90" else "ieee"  # as the operators choose
    single, double, short = torch.float32, torch.float64, torch.bfloat16
    found = {"MARA 4 x 8, float32": recorded(mara_step, 2242, 32, single, single, False)}
    found["EFA, float32"] = recorded(efa_step, thrice, 8, 8, 128, single)
    found["EFA, bfloat16"] = recorded(efa_step, "bfloat16", 8, 8, 128, single)
    if quick:
        return found
    found["MARA 4 x 8, float32, many edges"] = recorded(mara_step, 1 << 14, 32, single, single, False)
    found["MARA 4 x 8, float32, nodes bfloat16"] = recorded(mara_step, 2242, 32, single, short, False)
    found["MARA 4 x 8, float32, nodes float16"] = recorded(mara_step, 2242, 32, single, torch.float16, False)
    found["MARA 4 x 8, float64"] = recorded(mara_step, 2242, 32, double, double, False)
    found["MARA 6 points, float32, squared"] = recorded(mara_step, 2242, 6, single, single, True)
    found["MARA 50 points, float32"] = recorded(mara_step, 2242, 50, single, single, False)
    for products in ("ieee", "float16", *(["tf32"] if target == "sm_90" else [])):
        found[f"EFA, {products}"] = recorded(efa_step, products, 8, 8, 128, single)
    found["EFA, bfloat16, inputs bfloat16"] = recorded(efa_step, "bfloat16", 8, 8, 128, short)
    found["EFA, float32, one pair of width 18, 5 values"] = recorded(efa_step, thrice, 1, 18, 5, single)
    found["EFA, float32, width 1, one value"] = recorded(efa_step, thrice, 1, 1, 1, single)
    found["MARA, one edge"] = recorded(mara_step, 1, 32, single, single, False)
    found["EFA, float32, width 128"] = recorded(efa_step, thrice, 1, 128, 64, single)
    return found


def compiled(launch: dict[str, Any], target: GPUTarget) -> dict[str, Any]:
    """Compile a launch; what the code needs per thread or block."""
    function = launch["function"]
    constants = {(function.arg_names.index(name),): value for name, value in launch["constants"].items()}
    source = ASTSource(fn=function, signature=launch["signature"], constexprs=constants, attrs=launch["attributes"])
    kernel = triton.compile(source, target=target, options=launch["options"])
    facts = {"shared_bytes": kernel.metadata.shared, "warps": launch["options"]["num_warps"]}
    if target.backend == "cuda":
        facts |= _resources(kernel.asm["cubin"])
    else:
        text = kernel.asm["amdgcn"]
        for name, key in (("registers", "vgpr_count"), ("spilled_registers", "vgpr_spill_count")):
            facts[name] = int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))
    return facts


def _resources(cubin: bytes) -> dict[str, int]:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"], "local_bytes": found["LOCAL"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="the most used formats alone")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"triton": triton.__version__, "kernels": []}
    for target in arguments.target:
        for case, launches in cases(arguments.quick, target).items():
            seen: set[str] = set()
            for launch in launches:
                constants = {name: str(value) for name, value in launch["constants"].items()}
                line = {"target": target, "case": case, "kernel": launch["function"].__name__, "constants": constants}
                if json.dumps(line) in seen:
                    continue
                seen.add(json.dumps(line))
                line |= compiled(launch, TARGETS[target])
                results["kernels"].append(line)
                facts = ", ".join(
                    f"{line[key]} {key}" for key in ("registers", "stack_bytes", "shared_bytes") if key in line
                )
                print(f"{target}  {case}  {line['kernel']}: {facts}", flush=True)
    if arguments.out:
        arguments.out.write_text(text(results))
    sys.exit(0 if results["kernels"] else 1)


if __name__ == "__main__":
    main()
