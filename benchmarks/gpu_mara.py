"""What MARA's gate (4 x 8 points, in every layer) costs on a GPU: energy + forces, training step, step of dynamics.

    python benchmarks/gpu_mara.py [--sizes 135 1205 3000] [--hosts MACE ViSNet NequIP] [--mode cuda_graph]
    python benchmarks/gpu_mara.py --device cpu --smoke

The host with and without the gate, in turn in one process, random weights, float32, periodic boxes of water at 0.1
atoms per Å^3, the backend of polynomials that :mod:`steradian.execution.backend_benchmark` finds. Overheads are
medians of ratios of neighbours in time. Bar: 2 % on top of the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from gpu_md import measure as md_step
from gpu_settings import Results, build, graph_of, model_config, parser, synchronise, system, times_ms, training_steps

BAR_PERCENT = 2.0


def steps(kind: str, size: int, gate: bool, training: bool, arguments: Any) -> Callable[[], object]:
    """Energy + forces, or a training step, as it is run in use."""
    from steradian.execution.backend_benchmark import prepare_backend
    from steradian.execution.steps import Runner

    graph = graph_of(system(size, periodic=True))
    model = build(model_config(kind, arguments.smoke, gate), arguments.device, graph.num_edges / size)
    mode = "eager" if arguments.device == "cpu" else arguments.mode
    if training:
        model.train()
        prepare_backend(model, graph, training=True)
        return training_steps(model, [graph], mode)[0]
    model.for_inference()
    prepare_backend(model, graph)
    static = Runner(model, mode).static(graph.to(arguments.device))
    return lambda: static()


def overhead(kind: str, size: int, training: bool, arguments: Any) -> dict[str, Any]:
    """Both in turn, a few calls at a time, so that changes of the clock hit both alike."""
    runs = {gate: steps(kind, size, gate, training, arguments) for gate in (False, True)}
    times: dict[bool, list[float]] = {False: [], True: []}
    least, turns = (0.01, 2) if arguments.smoke else (0.3, 12)
    for _ in range(turns):
        for gate, run in runs.items():
            synchronise(arguments.device)
            times[gate].append(times_ms(run, arguments.device, least, warmup=2)["median_ms"])
    percent = [100 * (b / a - 1) for a, b in zip(times[False], times[True])]
    return {
        "host_ms": round(statistics.median(times[False]), 4),
        "with_mara_ms": round(statistics.median(times[True]), 4),
        "overhead_percent": round(statistics.median(percent), 2),
        "quartiles_percent": [round(value, 2) for value in statistics.quantiles(percent, n=4)[::2]],
        "bar_percent": BAR_PERCENT,
    }


def md_overhead(kind: str, size: int, arguments: Any) -> dict[str, Any]:
    """A step of dynamics with and without, two stretches each in turn."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 if arguments.smoke else 2):
        for gate, found in times.items():
            found.append(md_step(kind, size, arguments, "auto", "recorded", gate)["ms_per_step"])
    bare, gated = min(times[False]), min(times[True])
    return {
        "host_ms": bare,
        "with_mara_ms": gated,
        "overhead_percent": round(100 * (gated / bare - 1), 2),
        "bar_percent": BAR_PERCENT,
    }


def main() -> None:
    options = parser(__doc__, "gpu_mara")
    options.add_argument("--hosts", nargs="*", default=["MACE", "ViSNet", "NequIP"])
    options.add_argument("--sizes", type=int, nargs="*")
    options.add_argument("--mode", default="cuda_graph", choices=["eager", "cuda_graph"])
    options.add_argument("--steps", type=int, default=300)
    arguments = options.parse_args()
    arguments.periodic = False  # of the step of dynamics
    sizes = arguments.sizes or ([17] if arguments.smoke else [135, 1205, 3000])
    hosts = arguments.hosts[:1] if arguments.smoke else arguments.hosts
    results = Results(arguments, mode=arguments.mode, bar_percent=BAR_PERCENT)
    for kind in hosts:
        for size in sizes:
            for task, training in (("energy + forces", False), ("training step", True)):
                results.measure(
                    f"{kind}, {size} atoms, {task}", lambda k=kind, s=size, t=training: overhead(k, s, t, arguments)
                )
            results.measure(
                f"{kind}, {size} atoms, step of dynamics", lambda k=kind, s=size: md_overhead(k, s, arguments)
            )
    print(results.path)


if __name__ == "__main__":
    main()
