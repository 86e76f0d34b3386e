"""A step of molecular dynamics on a GPU: MACE, ViSNet and NequIP, 138 and 1205 atoms.

    python benchmarks/gpu_md.py [--models MACE ViSNet NequIP] [--sizes 138 1205] [--periodic] [--steps 500]
    python benchmarks/gpu_md.py --device cpu --smoke

The device engine (:class:`steradian.simulate.device_md.DeviceMD`): Langevin, float32 weights, float64 positions, cutoff
5 Å, skin 0.5 Å, neighbour list made every 10 steps as hydrogen at 300 K with 0.5 to 1 fs needs it (the atoms here move
so little that the density stays; their number of edges is what the time depends on). Each backend of polynomials, and
each of: recorded as CUDA graphs, or called. Systems are made by this script: water (and a little
formaldehyde to make the count exact) at 0.1 atoms per Å^3, a free cluster or, with ``--periodic``, a box.

The bars are mlip's published figures on an H100 (Chignolin, 138 atoms, and Alpha-bungarotoxin, 1205 atoms, JAX-MD):
its models have other sizes than these (parameters are listed with both), so a ratio says that much and not more.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from gpu_settings import Results, build, gpu_backends, graph_of, model_config, parser, synchronise, system

#: ms per step and parameters as published (mlip 0.2.5)
BARS = {
    ("MACE", 138): 2.4,
    ("MACE", 1205): 19.2,
    ("ViSNet", 138): 1.6,
    ("ViSNet", 1205): 9.0,
    ("NequIP", 138): 3.4,
    ("NequIP", 1205): 22.0,
}
BAR_PARAMETERS = {"MACE": 3_274_016, "ViSNet": 1_172_676, "NequIP": 1_327_792}
#: how the step is run: whether it is recorded
WAYS = {"recorded": True, "called": False}


def measure(kind: str, size: int, arguments: Any, backend: str, way: str, gate: bool = False) -> dict[str, Any]:
    """One row: milliseconds per step over a stretch of steps, waiting for the GPU at its ends only."""
    from steradian.polynomials import use_backend
    from steradian.simulate.device_md import DeviceMD
    from steradian.simulate.files import MDSettings

    atoms = system(size, arguments.periodic)
    edges = graph_of(atoms).num_edges
    model = build(model_config(kind, arguments.smoke, gate), arguments.device, edges / size, force_scale=1e-6)
    record = WAYS[way]
    # so cold that the density stays as it is however long this runs
    settings = MDSettings(temperature=1.0, timestep=1.0, skin=0.5)
    steps = 12 if arguments.smoke else arguments.steps
    with use_backend(backend) if backend != "auto" else nullcontext():
        engine = DeviceMD(
            model.for_inference(),
            [atoms],
            settings,
            device=arguments.device,
            fixed_shapes=True,
            record=record and torch.device(arguments.device).type == "cuda",
            list_every=10,
        )
        engine.start()
        warm = max(steps // 5, 10)
        list(engine.run(0, warm, lambda step: False))
        synchronise(arguments.device)
        start = time.perf_counter()
        list(engine.run(warm, warm + steps, lambda step: step % 100 == 0))
        synchronise(arguments.device)
        ms = 1e3 * (time.perf_counter() - start) / steps
    bar = BARS.get((kind, size))
    recorded = engine._recorded is not None and not any(half.eager for half in engine._recorded)  # type: ignore[attr-defined]
    return {
        "ms_per_step": round(ms, 4),
        "steps_per_s": round(1e3 / ms, 2),
        "ns_per_day_at_1fs": round(86.4 / ms, 3),
        **({"bar_ms": bar, "bar_over_ours": round(bar / ms, 3)} if bar and not gate else {}),
        "edges": edges,
        "padded_edges": engine.capacity.edges if engine.capacity else edges,
        "parameters": model.num_parameters,
        "bar_parameters": BAR_PARAMETERS[kind],
        "search": engine.list.kind,  # type: ignore[union-attr]
        "recorded": recorded,
        "repeats": engine.num_repeats,
        "steps": steps,
    }


def main() -> None:
    options = parser(__doc__, "gpu_md")
    options.add_argument("--models", nargs="*", default=["MACE", "ViSNet", "NequIP"], choices=list(BAR_PARAMETERS))
    options.add_argument("--sizes", type=int, nargs="*")
    options.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options.add_argument("--periodic", action="store_true")
    options.add_argument("--steps", type=int, default=500)
    arguments = options.parse_args()
    sizes = arguments.sizes or ([17] if arguments.smoke else [138, 1205])
    results = Results(arguments, cutoff_A=5.0, skin_A=0.5, list_every=10, thermostat="langevin", dtype="float32")
    shape = "box" if arguments.periodic else "cluster"
    # compiling on a CPU takes minutes and says nothing about a GPU
    ways = arguments.ways
    for way in ways:
        for size in sizes:
            for kind in arguments.models:
                for backend in gpu_backends(arguments.device)[:: -1 if way == "recorded" else 1]:
                    name = f"{kind}, {size} atoms ({shape}), {backend}, {way}"
                    results.measure(name, lambda k=kind, s=size, b=backend, w=way: measure(k, s, arguments, b, w))
    print(results.path)


if __name__ == "__main__":
    main()
