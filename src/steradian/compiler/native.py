"""Machine code: made by LLVM on first use, kept on disk, loaded by later processes.

The cache is ``$STERADIAN_CACHE`` or ``~/.cache/steradian``; a file is written whole or not at all, and carries its own
checksum. Where it cannot be written, code is made anew in every process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from steradian.compiler.allocator import keep_freed_memory
from steradian.polynomials.program import Program, needed_in_order

__all__ = ["cache_folder", "compiled", "compiled_text"]

#: Part of what identifies code in the cache: to be raised with every change of its makers.
VERSION = 4
#: Name of the function in every module.
FUNCTION = "run"
#: Seconds of work after which the user is told.
WORTH_A_LINE = 1.0
_LOCK = threading.Lock()
_FUNCTIONS: WeakKeyDictionary[Program, dict[tuple[int, int, tuple[bool, ...]], Callable]] = WeakKeyDictionary()
_ENGINES: list[Any] = []
_seconds = 0.0


def cache_folder() -> Path:
    """Where compiled programs are kept."""
    chosen = os.environ.get("STERADIAN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "steradian"


def compiled(program: Program, itemsize: int, channels: int, halves: tuple[bool, ...] = ()) -> Callable:
    """The function of a program (see :mod:`steradian.polynomials.codegen`), in float32 (4) or float64 (8),
    with that many channels and with ``halves`` of its inputs and outputs in bfloat16 (empty: none)."""
    key = (itemsize, channels, halves)
    known = _FUNCTIONS.get(program, {}).get(key)
    if known is not None:
        return known
    with _LOCK:
        functions = _FUNCTIONS.setdefault(program, {})
        if key not in functions:
            functions[key] = _load(_program_code(program, itemsize, channels, halves), 9)
        return functions[key]


def _program_code(program: Program, itemsize: int, channels: int, halves: tuple[bool, ...] = ()) -> bytes:
    from steradian.polynomials.codegen import module_of

    names = ", ".join(slot.operand.name for slot in program.outputs)
    stored = f" {''.join('fh'[half] for half in halves)}" if halves else ""
    description = f"{itemsize} {channels}{stored} {_description(program)}"
    return _object_code(names, description, lambda: module_of(program, itemsize, channels, halves))


def compiled_text(name: str, description: str, make: Callable[[], str], num_arguments: int) -> Callable:
    """The function ``run`` of a module in LLVM's language, of int64 arguments.

    Args:
        name: what it computes, for messages.
        description: everything the code depends on, the version of its maker included.
        make: returns the text; not called where the code is at hand.
        num_arguments: of the function.
    """
    with _LOCK:
        return _load(_object_code(name, description, make), num_arguments)


@cache
def _target() -> tuple[Any, str]:
    """LLVM's code generator for this processor, and a description of both."""
    import llvmlite
    import llvmlite.binding as llvm

    keep_freed_memory()  # here begins the fast path, for which it matters
    with contextlib.suppress(RuntimeError):  # newer versions do this by themselves and say so by an error
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=name, features=features, opt=2, reloc="pic", codemodel="small")
    return machine, f"{VERSION} {llvmlite.__version__} {target.triple} {name} {features}"


def _object_code(name: str, description: str, make: Callable[[], str]) -> bytes:
    _, target = _target()
    key = hashlib.sha256(f"{target} {description}".encode()).hexdigest()
    path = cache_folder() / "kernels" / f"{key}.o"
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return content[32:]
    code = _compile(name, make)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    return code


def _description(program: Program) -> str:
    """Everything the code depends on."""
    order = needed_in_order(program)
    graph = program.graph
    slots = [
        (slot.operand.dim, slot.operand.has_channels, slot.index is None, slot.operand.read_once)
        for slot in program.inputs
    ]
    targets = [(slot.operand.dim, slot.operand.has_channels, slot.index is None) for slot in program.outputs]
    nodes = [(node, graph.vector[node], graph.source[node], graph.terms[node]) for node in order]
    return repr((slots, targets, program.nodes, nodes))


def _compile(name: str, make: Callable[[], str]) -> bytes:
    import llvmlite.binding as llvm

    global _seconds
    started = time.perf_counter()
    machine, _ = _target()
    code = machine.emit_object(llvm.parse_assembly(make()))
    before, _seconds = _seconds, _seconds + time.perf_counter() - started
    if before < WORTH_A_LINE <= _seconds:
        print("steradian: making machine code for this model (once; kept for later runs)", file=sys.stderr)
    if os.environ.get("STERADIAN_VERBOSE_KERNELS"):
        print(f"steradian: {name}: {time.perf_counter() - started:.2f} s, {len(code)} bytes", file=sys.stderr)
    return code


def _load(code: bytes, num_arguments: int) -> Callable:
    import llvmlite.binding as llvm

    machine, _ = _target()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)  # the code lives as long as its engine
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * num_arguments)
    return signature(engine.get_function_address(FUNCTION))
