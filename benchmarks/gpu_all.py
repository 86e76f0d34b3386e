"""All benchmarks on a GPU in the order of their importance, within a time: checks first, results written as they come.

    python benchmarks/gpu_all.py --peer-python .venv-mace-gpu/bin/python --data ../shared/data/rmd17 [--minutes 29]
    python benchmarks/gpu_all.py --only check md                  # parts, where a run may not take long
    python benchmarks/gpu_all.py --device cpu --smoke --only md efa

Every part runs in a process of its own for less than ten minutes. What the JSON files in ``benchmarks/results`` hold is
not measured again, so the same command goes on where it was stopped; ``--again`` begins anew. Without ``--peer-python``
the comparison with mace-torch, without ``--data`` the training is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from settings import ROOT

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """A script, its share of the time [min], and what it takes beside the common options."""

    name: str
    minutes: float
    command: list[str] = field(default_factory=list)
    needs: str | None = None


PARTS = (
    Part("check", 3.0),
    Part("md", 6.0),
    Part("mace", 7.0, ["--modes", "cuda_graph", "eager"], needs="peer_python"),
    Part("mara", 4.0),
    Part("efa", 3.0),
    Part("rmd17", 4.0, needs="data"),
    Part("memory", 4.0),
)
GRACE = 1.5  # minutes for the row that is being measured when the time is over


def command(part: Part, minutes: float, arguments: argparse.Namespace) -> list[str]:
    if part.name == "check":
        return [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "gpu")]
    call = [sys.executable, str(HERE / f"gpu_{part.name}.py"), "--minutes", f"{minutes:.2f}", *part.command]
    call += ["--device", arguments.device]
    call += ["--smoke"] if arguments.smoke else []
    call += ["--again"] if arguments.again else []
    call += ["--results", str(arguments.results)] if arguments.results else []
    if part.needs == "peer_python":
        call += ["--peer-python", arguments.peer_python]
    if part.needs == "data":
        call += ["--data", str(arguments.data)]
    return call


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--smoke", action="store_true")
    options.add_argument("--again", action="store_true")
    options.add_argument("--results", type=Path)
    options.add_argument("--peer-python", help="interpreter that has mace-torch and cuEquivariance")
    options.add_argument("--data", type=Path, help="folder of rMD17")
    options.add_argument("--only", nargs="*", choices=[part.name for part in PARTS])
    options.add_argument("--minutes", type=float, default=29.0, help="of all parts together")
    arguments = options.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    failed = []
    for part in PARTS:
        if arguments.only and part.name not in arguments.only:
            continue
        if part.needs and getattr(arguments, part.needs) is None:
            print(f"== {part.name}: left out, give --{part.needs.replace('_', '-')}", flush=True)
            continue
        left = (end - time.monotonic()) / 60 - GRACE
        if left < 0.5:
            print(f"== {part.name}: left out, the time is over; the same command goes on", flush=True)
            continue
        minutes = min(part.minutes, left)
        print(f"== {part.name}: up to {minutes:.1f} minutes", flush=True)
        start = time.monotonic()
        try:
            code = subprocess.run(
                command(part, minutes, arguments), env=environment, timeout=60 * (minutes + GRACE), check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        print(
            f"== {part.name}: {'done' if code == 0 else f'exit code {code}'} {time.monotonic() - start:.0f} s",
            flush=True,
        )
        if code:
            failed.append(part.name)
    if failed:
        raise SystemExit(f"not done: {', '.join(failed)}")


if __name__ == "__main__":
    main()
