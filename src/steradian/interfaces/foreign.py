"""What the importers of foreign weights share: lookup with clear errors, and the signs of coupling coefficients."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from steradian.equivariant.irreps import Degrees
from steradian.polynomials import Polynomial

__all__ = ["ForeignArrays", "ForeignModelError", "coupling_signs"]


class ForeignModelError(ValueError):
    """A foreign model that cannot be converted; the message says what stands in the way."""


class ForeignArrays:
    """Lookup in a state dict that says in one line what is missing, and what was never asked for.

    Args:
        state: arrays by name.
        package: whose model it is, for messages.
    """

    def __init__(self, state: Mapping[str, np.ndarray], package: str) -> None:
        self.state = state
        self.package = package
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.state:
            raise ForeignModelError(f"'{name}' is missing: is this the whole state dict of a {self.package} model?")
        self.used.add(name)
        return np.asarray(self.state[name])

    def get(self, name: str, default: np.ndarray) -> np.ndarray:
        return self[name] if name in self.state else default

    def shaped(self, name: str, *shape: int) -> np.ndarray:
        """The array in float64 and in this shape.

        Raises:
            ForeignModelError: another number of entries.
        """
        value = self[name]
        if value.size != np.prod(shape):
            raise ForeignModelError(f"'{name}' has {value.size} entries; the hyperparameters ask for {list(shape)}")
        return value.astype(np.float64).reshape(shape)

    def check_nothing_left(self, ignored: re.Pattern[str]) -> None:
        """Refuse a model with entries that were never asked for, except empty ones and those to be ignored."""
        left = [name for name in self.state if name not in self.used]
        left = [name for name in left if not (ignored.search(name) or np.asarray(self.state[name]).size == 0)]
        if left:
            raise ForeignModelError(f"the model has parts without counterpart here: {', '.join(left[:3])}")


def coupling_signs(
    state: Mapping[str, np.ndarray],
    prefix: str,
    polynomial: Polynomial,
    degrees_in: Degrees,
    paths: Sequence[tuple[int, int, int]],
    degrees_out: Degrees,
) -> np.ndarray:
    """``[P]`` sign of every path's coupling there against the one here.

    Versions of e3nn differ in the phases of the Wigner 3j symbols, so these are read from the model.

    Args:
        state: holds the Wigner 3j symbols as ``..._w3j_L1_L2_L3``.
        prefix: of the layer, preferred where several layers hold a symbol.
        polynomial, degrees_in, paths, degrees_out: our product and its paths (see
            :class:`~steradian.equivariant.tensor_product.PathTable`).

    Raises:
        ForeignModelError: a symbol is missing, or a coupling differs by more than a sign.
    """
    (group,) = polynomial.terms
    starts = np.cumsum([0] + [2 * degree + 1 for degree, _ in degrees_in])
    counts = [sum(entry[2] == block for entry in paths) for block in range(len(degrees_out))]
    blocks = np.cumsum([0] + [count * (2 * degree + 1) for count, (degree, _) in zip(counts, degrees_out)])
    signs = []
    for path, (index_in, degree_y, block) in enumerate(paths):
        mine = group.indices[:, 2] == path
        shape = (2 * degrees_in[index_in][0] + 1, 2 * degree_y + 1, 2 * degrees_out[block][0] + 1)
        own = np.zeros(shape)
        component = (group.outputs[mine] - blocks[block]) // counts[block]
        own[group.indices[mine, 0] - starts[index_in], group.indices[mine, 1] - degree_y**2, component] = (
            group.coefficients[mine]
        )
        degrees = (degrees_in[index_in][0], degree_y, degrees_out[block][0])
        table = _wigner_3j(state, prefix, degrees) * np.sqrt(shape[2])
        sign = np.sign(np.vdot(own, table))
        if np.abs(own * sign - table).max() > 1e-6:  # the symbols may be float32
            raise ForeignModelError("coupling {} x {} -> {} differs by more than a sign".format(*degrees))
        signs.append(sign)
    return np.array(signs)


def _wigner_3j(state: Mapping[str, np.ndarray], prefix: str, degrees: tuple[int, int, int]) -> np.ndarray:
    """Those with a degree 0 are not stored there: they are positive, a plain product."""
    if 0 in degrees:
        shape = tuple(2 * degree + 1 for degree in degrees)
        return np.eye(max(shape)).reshape(shape) * max(shape) ** -0.5
    ending = "_w3j_{}_{}_{}".format(*degrees)
    names = sorted(name for name in state if name.endswith(ending))
    for name in names:
        if name.startswith(f"{prefix}."):
            return np.asarray(state[name], dtype=np.float64)
    if not names:
        raise ForeignModelError(f"'{prefix}...{ending}' is missing: give the buffers of the model too")
    return np.asarray(state[names[0]], dtype=np.float64)
