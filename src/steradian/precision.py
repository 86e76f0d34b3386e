"""Which format each role of a model uses. Modules ask for their role; nothing changes PyTorch's global dtype.

Weights and the features that go from module to module are kept in one format (float32, or float64). A module whose role
has another format casts what enters its products, multiplies in that format, and casts the result back; the casts are
ordinary differentiable operations, so the products of the backward passes run in the same format. See
docs/precision.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steradian.compiler.folding import Folded
from steradian.config.precision import LAYER_ROLES, PRESETS, ROLES, WIDE_ROLES, PrecisionConfig

__all__ = ["POLICIES", "Int8Product", "PrecisionPolicy", "WithRole", "assign", "cast", "int8_weights", "policy_of"]


@dataclass(frozen=True)
class PrecisionPolicy:
    """A dtype per role.

    Attributes:
        name: of the preset, with what differs from it.
        weights: parameters, their gradients, and features between modules (float32 or float64).
        geometry: edge vectors, distances, radial basis. Positions are centred per system before any cast.
        harmonics: spherical harmonics of the directions.
        tables: constants of the products (Clebsch-Gordan coefficients), rounded to this.
        radial: products of the radial network; its result stays in this format.
        messages: features of the neighbours as they enter the tensor product.
        accumulate: arithmetic of the tensor product and sums over neighbours.
        paths: products that mix the paths of a tensor product, the largest of the linear maps.
        contraction: what enters the symmetric contraction.
        node: products of all other linear maps of the features.
        attention: products in the edge gates and global mixers (queries, keys, values).
        readout: products of the readout.
        energy: sum over atoms and reference energies. Totals of -20 000 eV keep only 2 meV in float32.
        forces: sums of what the edges of an atom contribute to its force.
        tf32: on a GPU, products of float32 matrices may use units of TF32 (10 bits of mantissa).
        layers: roles of single layers.
        int8: roles whose weights are int8, for inference alone (:mod:`steradian.execution.int8`).
    """

    name: str
    weights: torch.dtype = torch.float32
    geometry: torch.dtype = torch.float32
    harmonics: torch.dtype = torch.float32
    tables: torch.dtype = torch.float32
    radial: torch.dtype = torch.float32
    messages: torch.dtype = torch.float32
    accumulate: torch.dtype = torch.float32
    paths: torch.dtype = torch.float32
    contraction: torch.dtype = torch.float32
    node: torch.dtype = torch.float32
    attention: torch.dtype = torch.float32
    readout: torch.dtype = torch.float32
    energy: torch.dtype = torch.float64
    forces: torch.dtype = torch.float32
    tf32: bool = False
    layers: Mapping[int, Mapping[str, torch.dtype]] = field(default_factory=dict)
    int8: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights not in (torch.float32, torch.float64):
            raise ValueError(f"weights need float32 or float64, got {self.weights}")
        for role in WIDE_ROLES:
            if getattr(self, role).itemsize < 4:
                raise ValueError(f"{role} needs at least float32, got {getattr(self, role)}")

    def dtype(self, role: str, layer: int | None = None) -> torch.dtype:
        """The format of a role, in a layer where it has one of its own."""
        own = self.layers.get(layer, {}) if layer is not None else {}
        found: torch.dtype = own.get(role, getattr(self, role))
        return found

    @property
    def uses_float16(self) -> bool:
        """Whether gradients may vanish in float16, so that training needs a scaled loss."""
        own = [dtype for roles in self.layers.values() for dtype in roles.values()]
        return torch.float16 in (*(getattr(self, role) for role in ROLES), *own)

    @contextmanager
    def matrix_units(self) -> Iterator[None]:
        """Allow TF32 inside a ``with`` block where the policy says so; PyTorch's switch is put back after it."""
        if not self.tf32 or not torch.cuda.is_available():
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


_EVERYTHING_64: dict[str, Any] = dict.fromkeys(("weights", *ROLES), torch.float64)
_HALF_PRODUCTS: dict[str, Any] = dict.fromkeys(("radial", "messages", "paths", "node", "readout"), torch.float16)

POLICIES = {
    "float32": PrecisionPolicy("float32"),
    "float64": PrecisionPolicy("float64", **_EVERYTHING_64),
    "mixed": PrecisionPolicy("mixed", radial=torch.bfloat16, paths=torch.bfloat16),
    "half": PrecisionPolicy("half", **_HALF_PRODUCTS),
    "tf32": PrecisionPolicy("tf32", tf32=True),
}
assert set(POLICIES) == set(PRESETS)


def policy_of(config: str | PrecisionConfig) -> PrecisionPolicy:
    """The policy of a preset's name or of a section of the configuration.

    Raises:
        ValueError: an unknown preset.
    """
    if isinstance(config, str):
        if config not in POLICIES:
            raise ValueError(f"precision '{config}' is not known; choose {', '.join(POLICIES)}")
        return POLICIES[config]
    preset = POLICIES[config.preset]
    roles: dict[str, Any] = {role: getattr(torch, name) for role, name in config.roles.items()}
    layers = {
        layer: {str(role): getattr(torch, name) for role, name in own.items()} for layer, own in config.layers.items()
    }
    changes = [f"{role} {name}" for role, name in config.roles.items()]
    changes += [f"layer {layer} {role} {name}" for layer, own in config.layers.items() for role, name in own.items()]
    changes += [f"{role} int8 ({kind})" for role, kind in config.int8.items()]
    name = f"{config.preset} with {', '.join(changes)}" if changes else config.preset
    int8: dict[str, str] = {str(role): kind for role, kind in config.int8.items()}
    return replace(preset, name=name, layers=layers, int8=int8, **roles)


class WithRole(nn.Module):
    """A module that multiplies in the format of its role.

    Attributes:
        role: the module's; operators in the slots of a host have the role ``attention`` whatever it says.
        low: format to multiply in, or None: that of the features. Set by :func:`assign`.
    """

    role: str = "node"
    low: torch.dtype | None = None
    #: Whether all products go through :meth:`multiply`, so that they can be int8.
    takes_int8 = False
    #: ``weights`` or ``dynamic`` where products are int8 (:mod:`steradian.execution.int8`).
    int8: str | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.folded = Folded()

    def multiply(self, x: Tensor, weight: Tensor, scale: float = 1.0, place: int = 0) -> Tensor:
        """``x @ (weight * scale)`` in the format of the role; ``place`` tells the weights of a module apart.

        Raises:
            ValueError: training in int8.
        """
        if self.int8 is None:
            if self.low is None:
                return x @ (weight if scale == 1.0 else weight * scale)
            key = (place, scale, self.low)
            return cast(x, self.low) @ self.folded(key, lambda: cast(weight * scale, self.low), weight)
        if weight.requires_grad and self.training:
            raise ValueError("int8 is for inference; train with another precision")
        whole, scales = self.folded((place, "int8", scale), lambda: int8_weights(weight * scale), weight)
        product: Tensor = Int8Product.apply(x, whole, scales, self.int8 == "dynamic")
        return product


def cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in a format; None leaves it as it is.

    On a CPU float16 is emulated: values and gradients are rounded to it, and multiplied in the format they had, because
    PyTorch's products of float16 are some thirty times slower there.
    """
    if dtype is None:
        return value
    if dtype == torch.float16 and value.device.type == "cpu":
        return value.to(dtype).to(value.dtype)
    return value.to(dtype)


def assign(host: nn.Module, policy: PrecisionPolicy) -> None:
    """Give every module of a host the format of its role.

    Raises:
        ValueError: the policy names a layer that the host does not have, or int8 where there is none.
    """
    count = len(list(host.get_submodule("layers").children()))
    outside = sorted(layer for layer in policy.layers if not 0 <= layer < count)
    if outside:
        raise ValueError(f"precision.layers names {outside}; the host's layers are 0..{count - 1}")
    able = {module.role for module in host.modules() if isinstance(module, WithRole) and module.takes_int8}
    missing = sorted(set(policy.int8) - able)
    if missing:
        raise ValueError(f"precision.int8: this host has no {' and no '.join(missing)} that can be int8")
    for name, module in host.named_modules():
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" and len(parts) > 1 else None
        operator = bool({"gate", "mixer"} & set(parts))

        def format_of(role: str, layer: int | None = layer) -> torch.dtype | None:
            dtype = policy.dtype(role, layer)
            return None if dtype == policy.weights else dtype

        if isinstance(module, WithRole):
            module.low = format_of("attention" if operator else module.role)
            if module.takes_int8 and not operator:
                module.int8 = policy.int8.get(module.role)
        for role in ("accumulate", "tables", "harmonics", "paths"):
            # an operator's products have no map of paths behind them that reads another format
            if hasattr(module, f"{role}_dtype") and not (operator and role == "paths"):
                setattr(module, f"{role}_dtype", format_of(role, layer if role in LAYER_ROLES else None))


# --------------------------------------------------------------------------------------------------------------- int8


def int8_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[K, N]`` int8 and ``[N]`` scales of a matrix ``[K, N]``."""
    scales = (weight.detach().abs().amax(0) / 127).clamp(min=1e-30)
    return torch.round(weight.detach() / scales).to(torch.int8), scales


class Int8Product(torch.autograd.Function):
    """``x @ (whole * scales)``, derivatives through the same rounded weights; see :mod:`steradian.execution.int8`.

    PyTorch's ready-made quantised modules have no derivatives, so they cannot give forces.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor, scales: Tensor, dynamic: bool) -> Tensor:
        ctx.save_for_backward(whole, scales)
        ctx.dynamic = dynamic
        return (_dynamic(x, whole) if dynamic else x @ whole.to(x.dtype)) * scales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        whole, scales = ctx.saved_tensors
        gradient, across = gradient * scales, whole.t().contiguous()
        back = _dynamic(gradient, across) if ctx.dynamic else gradient @ across.to(gradient.dtype)
        return back, None, None, None


def _dynamic(x: Tensor, whole: Tensor) -> Tensor:
    """Rows rounded to int8, multiplied as whole numbers."""
    scales = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    rounded = torch.round(x / scales).to(torch.int8)
    return torch._int_mm(_plain(rounded), _plain(whole)).to(x.dtype) * scales


def _plain(matrix: Tensor) -> Tensor:
    """With the strides of its shape: PyTorch 2.13 multiplies wrongly where an axis of length one has another stride."""
    columns = matrix.shape[1]
    return matrix if matrix.stride() == (columns, 1) else matrix.clone(memory_format=torch.contiguous_format)
