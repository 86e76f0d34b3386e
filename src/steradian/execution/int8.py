"""Products with weights of 8 bits, for inference: radial networks and readouts.

Weights are rounded to int8 with one scale per output channel; *dynamic* also rounds what multiplies them, row by row,
and multiplies whole numbers (``torch._int_mm``, VNNI on a CPU). Gradients by the positions go through the same rounded
weights, and in the dynamic form are rounded row by row themselves. PyTorch's ready-made quantised modules have no
derivatives, so they cannot give forces. Nothing is trained in int8.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

from steradian.config.precision import Int8Kind, Int8Role, PrecisionConfig
from steradian.graph import Graph
from steradian.potential import Potential

__all__ = ["QuantizationError", "quantized"]


class QuantizationError(ValueError):
    """A model whose forces change too much in int8; one line with the figures."""


def quantized(
    potential: Potential,
    graphs: Sequence[Graph],
    roles: Mapping[Int8Role, Int8Kind],
    *,
    force_bound: float | None = None,
) -> Potential:
    """A copy with int8 products in some roles, checked on structures.

    Args:
        potential: stays as it is.
        graphs: batches of structures like those to come, with labels of forces unless ``force_bound`` is given.
        roles: ``radial`` or ``readout`` to ``weights`` (weights alone) or ``dynamic`` (what multiplies them too).
        force_bound: largest mean change of a force component [eV/Å]; None: 0.1 meV/Å and 5 % of the model's own error.

    Raises:
        QuantizationError: the forces change by more than the bound.
        ValueError: no structures, or no labels to get a bound from.
    """
    if not graphs:
        raise ValueError("int8 needs structures to be checked on")
    before = potential.config.precision
    plain = before if isinstance(before, PrecisionConfig) else PrecisionConfig(preset=before)
    model = copy.deepcopy(potential).set_precision(plain.model_copy(update={"int8": dict(roles)}))
    model.for_inference(radial_table=False)
    changes, errors = [], []
    for graph in graphs:
        exact, found = (one.eval()(graph).forces.double() for one in (copy.deepcopy(potential), model))
        changes.append((found - exact).abs().flatten())
        if graph.forces is not None:
            errors.append((exact - graph.forces.to(exact)).abs().flatten())
    if force_bound is None:
        if not errors:
            raise ValueError("int8 needs structures with forces, or a force_bound")
        force_bound = 1e-4 + 0.05 * float(torch.cat(errors).mean())
    change = float(torch.cat(changes).mean())
    if not change <= force_bound:
        named = ", ".join(f"{role} ({kind})" for role, kind in roles.items())
        ways = ["weights instead of dynamic"] if "dynamic" in roles.values() else []
        ways += ["fewer roles"] if len(roles) > 1 else []
        raise QuantizationError(
            f"int8 in {named} changes forces by {1e3 * change:.3g} meV/Å on average, more than {1e3 * force_bound:.3g};"
            f" {'use ' + ' or '.join(ways) + ', or ' if ways else ''}keep the model as it is"
        )
    return model
