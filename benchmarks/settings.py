"""What every benchmark writes beside its numbers: machine, versions, commit; and how it measures."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Processor, versions and commit."""
    import numpy
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{names[0]} x {len(names)}" if names else cpu
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": cpu,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], repeats: int = 9, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each candidate, taken in turn (A B C A B C ...), so that drifts of the machine hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup):
        for run in candidates.values():
            run()
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def median_ms(times: list[float]) -> float:
    return round(1e3 * statistics.median(times), 3)


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios pair by pair."""
    return round(statistics.median(a / b for a, b in zip(numerator, denominator)), 4)


def write(name: str, content: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(text(content), encoding="utf-8")
    return path


def text(content: Any) -> str:
    """JSON with a line per row: lists of numbers and dictionaries without lists are one line each."""
    whole = json.dumps(content, indent=1)
    numbers = re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", whole)
    line = lambda found: "{" + re.sub(r"\n\s+", " ", found[1]) + "}"  # noqa: E731
    flat = re.sub(r"\{\s+([^{}\[\]]+?)\s+\}", line, numbers)
    return re.sub(r"\{\s+((?:[^{}\[\]]|\{[^{}\n]*\})+?)\s+\}", line, flat) + "\n"
