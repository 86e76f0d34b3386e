"""Machine code of MARA's gate: attention among the K points of a sphere around an atom, one edge per vector lane.

The logits of an edge are ``s_kl = f_l b_k + f_k F_l + q_l + P_kl`` with ``b_k = s + c f_k + B_k`` (see
:mod:`steradian.operators.mara.factorised` for what they stand for), the field is ``f_k = |x - |x| g_k|`` or its
square, and

    pooled = sum_k w_k o_k,   o_k = sum_l A_kl t_l,   A_kl = softmax_l(s_kl),   t_l = V f_l + v_l

The derivative by a logit is ``M_kl = w_k A_kl (t_l - o_k)`` and everything else follows from sums of M over rows and
columns. A second derivative is wanted only along a direction (a cotangent of the first), so it is the derivative of M
along that direction. Rows are formed one after the other: K numbers per lane are kept, never K x K.
"""

from __future__ import annotations

import math
from typing import Any

from steradian.compiler.lanes import I64, Array, Lanes, Value

__all__ = ["ARGUMENTS", "KINDS", "num_scratch", "num_table", "sphere_attention_module"]

#: Names of the numbers and addresses that a call finds in its first argument.
ARGUMENTS = (
    "num_edges",
    "num_points",
    "row_size",  # of ``rows``, in numbers
    "vectors",  # [E, 3]
    "receivers",  # [E] int64
    "nodes",  # [N, 1 + K]: s, q
    "tables",  # [2 + 4 K + K^2]: c, V, B [K], F [K], v [K], w [K], P [K, K]
    "grid",  # [K, 3]
    "gradient",  # [E] cotangent of pooled
    "vectors_direction",  # [E, 3]
    "nodes_direction",  # [N, 1 + K]
    "pooled",  # [E] out
    "by_vectors",  # [E, 3] out
    "rows",  # [E, row_size] out: derivatives by s, q
)
#: value: pooled. slopes: also its derivatives by vectors, slope, point. tables: derivatives of sum(gradient pooled) by
#: the tables. tangent: pooled's derivative along the direction, and the derivatives of that by everything.
KINDS = ("value", "slopes", "tables", "tangent")
ARRAYS = (
    *("field", "inverse", "value", "point", "row"),
    *("by_field", "by_point"),
    *("field_dot", "value_dot", "point_dot", "row_dot", "by_field_dot", "column", "received", "received_dot"),
)
LOG2_E = math.log2(math.e)


def num_scratch(num_points: int) -> int:
    """Vectors of scratch memory that a call needs."""
    return len(ARRAYS) * num_points


def num_table(num_points: int) -> int:
    """Numbers in the tables."""
    return 2 + 4 * num_points + num_points**2


def sphere_attention_module(kind: str, field: str, itemsize: int) -> str:
    """LLVM's text of ``run(arguments, scratch, sums, first, last)`` for blocks of edges first..last.

    ``sums`` is where derivatives by the tables are added up, a vector for every number of a table.
    """
    return _Kernel(kind, field, itemsize).text


class _Kernel:
    def __init__(self, kind: str, field: str, itemsize: int) -> None:
        self.kind, self.field_kind = kind, field
        self.lanes = lanes = Lanes("run", 5, itemsize)
        arguments, scratch, self.sums, first, last = lanes.function.args
        b = lanes.b
        self.given = {
            name: b.load(b.inttoptr(b.add(arguments, I64(8 * place)), I64.as_pointer()))
            for place, name in enumerate(ARGUMENTS)
        }
        self.count = self.given["num_points"]
        self.arrays = {
            name: Array(lanes, b.add(scratch, b.mul(self.count, I64(64 * place)))) for place, name in enumerate(ARRAYS)
        }
        self.zero = lanes.value(0.0)
        with lanes.loop(first, last) as blocks:
            self._block(blocks.index)
        self.text = lanes.finish()

    # ----------------------------------------------------------------------------------------------------- what is read

    def _table(self, name: str) -> Any:
        """Address of a table."""
        place = ("B", "F", "v", "w", "P").index(name)
        b = self.lanes.b
        numbers = b.add(I64(2), b.mul(self.count, I64(place)))
        return b.add(self.given["tables"], b.mul(numbers, I64(self.lanes.itemsize)))

    def _sum(self, name: str) -> Array:
        """Where derivatives by a table are added up."""
        b = self.lanes.b
        if name in "cV":
            return Array(self.lanes, b.add(self.sums, I64(64 * "cV".index(name))))
        numbers = b.add(I64(2), b.mul(self.count, I64(("B", "F", "v", "w", "P").index(name))))
        return Array(self.lanes, b.add(self.sums, b.mul(numbers, I64(64))))

    def _block(self, block: Any) -> None:
        lanes, given = self.lanes, self.given
        rows = self.rows = lanes.rows(block, given["num_edges"])
        centres = lanes.gather_integers(lanes.addresses_of_integers(given["receivers"], rows))
        place = lanes.addresses(given["vectors"], rows, 3)
        self.x = [lanes.gather(place, axis) for axis in range(3)]
        width = lanes.b.add(self.count, I64(1))
        nodes = lanes.addresses(given["nodes"], centres, width)
        self.slope = lanes.gather(nodes)
        self.c, self.V = (lanes.broadcast(given["tables"], place) for place in range(2))
        if self.kind in ("tables", "tangent"):
            gradient = lanes.gather(lanes.addresses(given["gradient"], rows, 1))
            # lanes past the last edge repeat it: without a gradient of zero it would count twice in the sums
            self.gradient = Value(lanes, lanes.b.select(lanes.mask, gradient.ir, self.zero.ir))
        nodes_dot = None
        if self.kind == "tangent":
            place = lanes.addresses(given["vectors_direction"], rows, 3)
            self.x_dot = [lanes.gather(place, axis) for axis in range(3)]
            nodes_dot = lanes.addresses(given["nodes_direction"], centres, width)
            self.slope_dot = lanes.gather(nodes_dot)
        self._prepare(nodes, nodes_dot)
        {"value": self._value, "slopes": self._slopes, "tables": self._tables, "tangent": self._tangent}[self.kind]()

    def _prepare(self, nodes: Any, nodes_dot: Any) -> None:
        """Field, values and points of the lanes (and their directions) into arrays; zero what is added to."""
        lanes, arrays, x = self.lanes, self.arrays, self.x
        squared = _dot(x, x)
        self.r = squared.sqrt()
        # an edge of length zero has no direction: all slopes by it are zero
        self.per_r = (self.lanes.value(1.0) / self.r).where(squared.greater(0.0), 0.0)
        tangent = self.kind == "tangent"
        self.r_dot = _dot(x, self.x_dot) * self.per_r if tangent else self.zero
        # |x - r g| has a kink where the neighbour lies on the direction g. Within root epsilon of it the difference has
        # no digits left, and any slope between those of both sides is as good: zero keeps derivatives finite
        kink = self.r * (2.0**-23 if lanes.itemsize == 4 else 2.0**-52) ** 0.5
        added = ["by_field", "by_point"] if self.kind in ("slopes", "tangent") else []
        added += ["by_field_dot"] if tangent else []
        added += ["column", "received", "received_dot"] if self.kind in ("tables", "tangent") else []
        with lanes.loop(0, self.count) as loop:
            k = loop.index
            g = self._grid(k)
            apart = [a - self.r * along for a, along in zip(x, g)]
            if self.field_kind == "distance":
                field = _dot(apart, apart).sqrt()
                inverse = (lanes.value(1.0) / field).where(field.greater(kink), 0.0)
            else:
                field, inverse = _dot(apart, apart), lanes.value(2.0)
            arrays["field"][k], arrays["inverse"][k] = field, inverse
            arrays["value"][k] = self.V * field + lanes.broadcast(self._table("v"), k)
            arrays["point"][k] = lanes.gather(nodes, lanes.b.add(k, I64(1)))
            if tangent:
                moved = _dot(apart, [a - self.r_dot * along for a, along in zip(self.x_dot, g)])
                arrays["field_dot"][k] = moved * inverse
                arrays["value_dot"][k] = self.V * (moved * inverse)
                arrays["point_dot"][k] = lanes.gather(nodes_dot, lanes.b.add(k, I64(1)))
            for name in added:
                arrays[name][k] = self.zero

    def _grid(self, k: Any) -> list[Value]:
        b = self.lanes.b
        return [self.lanes.broadcast(self.given["grid"], b.add(b.mul(k, I64(3)), I64(axis))) for axis in range(3)]

    # ------------------------------------------------------------------------------------------------------------- rows

    def _logits(self, k: Any) -> tuple[Value, Value, Value]:
        """Row k of the logits into the array ``row``; returns f_k, b_k and the logits' maximum in base 2."""
        lanes, arrays = self.lanes, self.arrays
        field = arrays["field"][k]
        asking = self.slope + self.c * field + lanes.broadcast(self._table("B"), k)
        row = lanes.b.add(self._table("P"), lanes.b.mul(lanes.b.mul(k, self.count), I64(lanes.itemsize)))
        column = self._table("F")
        # below every logit, and a number in float32 too
        with lanes.loop(0, self.count, lanes.value(-3e38)) as loop:
            at = loop.index
            logit = field * lanes.broadcast(column, at) + (
                asking * arrays["field"][at] + (arrays["point"][at] + lanes.broadcast(row, at))
            )
            arrays["row"][at] = logit
            loop.totals = [loop.totals[0].maximum(logit)]
        return field, asking, loop.totals[0] * LOG2_E

    def _attend(self, k: Any) -> tuple[Value, Value, Value, Value]:
        """Exponentials of row k into ``row``; returns f_k, b_k, w_k over their sum, and o_k."""
        lanes, arrays = self.lanes, self.arrays
        field, asking, top = self._logits(k)
        with lanes.loop(0, self.count, self.zero, self.zero) as loop:
            at = loop.index
            exponential = lanes.exp2(arrays["row"][at] * LOG2_E - top)
            if self.kind != "value":
                arrays["row"][at] = exponential
            total, output = loop.totals
            loop.totals = [total + exponential, output + exponential * arrays["value"][at]]
        total, output = loop.totals
        per_total = lanes.value(1.0) / total
        return field, asking, lanes.broadcast(self._table("w"), k) * per_total, output * per_total

    def _value(self) -> None:
        lanes = self.lanes
        with lanes.loop(0, self.count, self.zero) as loop:
            *_, output = self._attend(loop.index)
            loop.totals = [loop.totals[0] + lanes.broadcast(self._table("w"), loop.index) * output]
        self._store("pooled", loop.totals[0])

    def _slopes(self) -> None:
        lanes, arrays = self.lanes, self.arrays
        with lanes.loop(0, self.count, self.zero, self.zero) as loop:
            k = loop.index
            _, asking, share, output = self._attend(k)
            pooled, by_slope = loop.totals
            with lanes.loop(0, self.count, self.zero, self.zero) as columns:
                at = columns.index
                weight = share * arrays["row"][at]
                by_logit = weight * (arrays["value"][at] - output)
                arrays["by_point"].add(at, by_logit)
                # f_l stands in the logits (times b_k) and in t_l; f_k, further down, in f_k F_l and in b_k
                arrays["by_field"].add(at, asking * by_logit + self.V * weight)
                row_field, row_column = columns.totals
                columns.totals = [
                    row_field + by_logit * arrays["field"][at],
                    row_column + by_logit * lanes.broadcast(self._table("F"), at),
                ]
            row_field, row_column = columns.totals
            arrays["by_field"].add(k, row_column + self.c * row_field)
            loop.totals = [pooled + lanes.broadcast(self._table("w"), k) * output, by_slope + row_field]
        pooled, by_slope = loop.totals
        self._store("pooled", pooled)
        self._store_rows(by_slope, None)
        pull_sum, pull_along, pulled = self._pull()
        # the sphere has the neighbour's radius, so r = |x| moves with x
        along = pull_sum * 2.0 - pull_along * self.per_r
        place = lanes.addresses(self.given["by_vectors"], self.rows, 3)
        for axis in range(3):
            lanes.scatter(self.x[axis] * along - self.r * pulled[axis], place, axis)

    def _pull(self) -> tuple[Value, Value, list[Value]]:
        """Sums over points of p_k, p_k x . g_k and p_k g_k, where df/dx = (2 x - (x . g) x / r - r g) p / by_field."""
        lanes, arrays = self.lanes, self.arrays
        with lanes.loop(0, self.count, *[self.zero] * 5) as loop:
            g = self._grid(loop.index)
            pull = arrays["by_field"][loop.index] * arrays["inverse"][loop.index]
            total, along, *pulled = loop.totals
            loop.totals = [
                total + pull,
                along + pull * _dot(self.x, g),
                *(before + pull * component for before, component in zip(pulled, g)),
            ]
        total, along, *pulled = loop.totals
        return total, along, pulled

    def _store(self, name: str, value: Value) -> None:
        self.lanes.scatter(value, self.lanes.addresses(self.given[name], self.rows, 1))

    def _store_rows(self, by_slope: Value, scale: Value | None) -> None:
        lanes = self.lanes
        place = lanes.addresses(self.given["rows"], self.rows, self.given["row_size"])
        lanes.scatter(by_slope if scale is None else by_slope * scale, place)
        with lanes.loop(0, self.count) as loop:
            value = self.arrays["by_point"][loop.index]
            lanes.scatter(value if scale is None else value * scale, place, lanes.b.add(loop.index, I64(1)))

    # ------------------------------------------------------------------------------------- derivatives by the tables

    def _tables(self) -> None:
        lanes, arrays = self.lanes, self.arrays
        with lanes.loop(0, self.count, self.zero) as loop:
            k = loop.index
            field, _, share, output = self._attend(k)
            share = share * self.gradient
            sums = self._row_of_sums(k)
            with lanes.loop(0, self.count, self.zero) as columns:
                at = columns.index
                weight = share * arrays["row"][at]
                by_logit = weight * (arrays["value"][at] - output)
                # every lane has sums of its own, which the caller adds up: here nothing runs across lanes
                sums.add(at, by_logit)
                arrays["column"].add(at, by_logit * field)
                arrays["received"].add(at, weight)
                columns.totals = [columns.totals[0] + by_logit * arrays["field"][at]]
            (row_field,) = columns.totals
            self._sum("B").add(k, row_field)
            loop.totals = [loop.totals[0] + field * row_field]
        self._sum("c").add(0, loop.totals[0])
        with lanes.loop(0, self.count, self.zero) as loop:
            at = loop.index
            self._sum("F").add(at, arrays["column"][at])
            self._sum("v").add(at, arrays["received"][at])
            loop.totals = [loop.totals[0] + arrays["received"][at] * arrays["field"][at]]
        self._sum("V").add(0, loop.totals[0])

    def _row_of_sums(self, k: Any) -> Array:
        b = self.lanes.b
        return Array(self.lanes, b.add(self._sum("P").address, b.mul(b.mul(k, self.count), I64(64))))

    # ----------------------------------------------------------------------------------------- along a direction

    def _tangent(self) -> None:
        lanes, arrays = self.lanes, self.arrays
        with lanes.loop(0, self.count, *[self.zero] * 3) as loop:
            k = loop.index
            row = self._attend_along(k)
            tangent, by_slope, by_c = loop.totals
            row_field, row_column, first_field, first_column = self._columns_along(k, *row)
            output_dot, field, field_dot = row[-1], arrays["field"][k], arrays["field_dot"][k]
            arrays["by_field"].add(k, first_column + self.c * first_field)
            arrays["by_field_dot"].add(k, row_column + self.c * row_field)
            self._sum("B").add(k, self.gradient * row_field)
            loop.totals = [
                tangent + lanes.broadcast(self._table("w"), k) * output_dot,
                by_slope + row_field,
                by_c + field * row_field + field_dot * first_field,
            ]
        tangent, by_slope, by_c = loop.totals
        self._store("pooled", tangent)
        self._store_rows(by_slope, self.gradient)
        self._sum("c").add(0, self.gradient * by_c)
        with lanes.loop(0, self.count, self.zero) as loop:
            at = loop.index
            received, received_dot = arrays["received"][at], arrays["received_dot"][at]
            self._sum("F").add(at, self.gradient * arrays["column"][at])
            self._sum("v").add(at, self.gradient * received_dot)
            loop.totals = [loop.totals[0] + received_dot * arrays["field"][at] + received * arrays["field_dot"][at]]
        self._sum("V").add(0, self.gradient * loop.totals[0])
        self._vectors_along()

    def _attend_along(self, k: Any) -> tuple[Value, ...]:
        """Row k: exponentials into ``row``, their logits' derivative minus its mean under A into ``row_dot``; returns
        b_k and its derivative, w_k over the sum of exponentials, o_k and its derivative."""
        lanes, arrays = self.lanes, self.arrays
        _, asking, top = self._logits(k)
        field_dot = arrays["field_dot"][k]
        asking_dot = self.slope_dot + self.c * field_dot
        with lanes.loop(0, self.count, *[self.zero] * 3) as loop:
            at = loop.index
            exponential = lanes.exp2(arrays["row"][at] * LOG2_E - top)
            logit_dot = field_dot * lanes.broadcast(self._table("F"), at) + (
                asking_dot * arrays["field"][at] + (asking * arrays["field_dot"][at] + arrays["point_dot"][at])
            )
            arrays["row"][at], arrays["row_dot"][at] = exponential, logit_dot
            total, output, mean = loop.totals
            loop.totals = [
                total + exponential,
                output + exponential * arrays["value"][at],
                mean + exponential * logit_dot,
            ]
        total, output, mean = loop.totals
        per_total = lanes.value(1.0) / total
        output, mean = output * per_total, mean * per_total
        # a covariance: with both factors centred first it keeps its digits
        with lanes.loop(0, self.count, self.zero) as loop:
            at = loop.index
            centred = arrays["row_dot"][at] - mean
            arrays["row_dot"][at] = centred
            change = centred * (arrays["value"][at] - output) + arrays["value_dot"][at]
            loop.totals = [loop.totals[0] + arrays["row"][at] * change]
        share = lanes.broadcast(self._table("w"), k) * per_total
        return asking, asking_dot, share, output, loop.totals[0] * per_total

    def _columns_along(
        self, k: Any, asking: Value, asking_dot: Value, share: Value, output: Value, output_dot: Value
    ) -> list[Value]:
        """Add row k of M and of its derivative to the columns; returns their sums with f_l and F_l over the row."""
        lanes, arrays = self.lanes, self.arrays
        field, field_dot = arrays["field"][k], arrays["field_dot"][k]
        sums = self._row_of_sums(k)
        with lanes.loop(0, self.count, *[self.zero] * 4) as loop:
            at = loop.index
            weight, moved = share * arrays["row"][at], arrays["row_dot"][at]
            centred = arrays["value"][at] - output
            by_logit = weight * centred
            # M = w A (t - o) along the direction: A moves by A times its centred logit, t and o by theirs
            by_logit_dot = weight * (moved * centred + (arrays["value_dot"][at] - output_dot))
            arrays["by_point"].add(at, by_logit_dot)
            arrays["by_field"].add(at, asking * by_logit + self.V * weight)
            arrays["by_field_dot"].add(at, asking_dot * by_logit + (asking * by_logit_dot + self.V * (weight * moved)))
            sums.add(at, self.gradient * by_logit_dot)
            arrays["column"].add(at, field * by_logit_dot + field_dot * by_logit)
            arrays["received"].add(at, weight)
            arrays["received_dot"].add(at, weight * moved)
            row_field, row_column, first_field, first_column = loop.totals
            column = lanes.broadcast(self._table("F"), at)
            loop.totals = [
                row_field + by_logit_dot * arrays["field"][at] + by_logit * arrays["field_dot"][at],
                row_column + by_logit_dot * column,
                first_field + by_logit * arrays["field"][at],
                first_column + by_logit * column,
            ]
        return loop.totals

    def _vectors_along(self) -> None:
        """Derivative of the tangent by the vectors: that of D = x (2 P - Q / r) - r G (see ``_pull``)."""
        lanes, arrays = self.lanes, self.arrays
        pull_sum, pull_along, pulled = self._pull()
        with lanes.loop(0, self.count, *[self.zero] * 5) as loop:
            k = loop.index
            g = self._grid(k)
            inverse = arrays["inverse"][k]
            pull = arrays["by_field"][k] * inverse
            change = arrays["by_field_dot"][k] * inverse
            if self.field_kind == "distance":
                change = change - pull * arrays["field_dot"][k] * inverse
            total, along, *moved = loop.totals
            loop.totals = [
                total + change,
                along + change * _dot(self.x, g) + pull * _dot(self.x_dot, g),
                *(before + change * component for before, component in zip(moved, g)),
            ]
        total, along, *moved = loop.totals
        scale = pull_sum * 2.0 - pull_along * self.per_r
        scale_dot = total * 2.0 - along * self.per_r + pull_along * self.r_dot * self.per_r * self.per_r
        place = lanes.addresses(self.given["by_vectors"], self.rows, 3)
        for axis in range(3):
            result = (
                self.x_dot[axis] * scale + self.x[axis] * scale_dot - self.r_dot * pulled[axis] - self.r * moved[axis]
            )
            lanes.scatter(result * self.gradient, place, axis)


def _dot(a: list[Value], b: list[Value]) -> Value:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
