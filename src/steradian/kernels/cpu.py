"""The loop that runs a tape on a CPU, compiled by numba on first use and cached.

One compiled function per dtype and block of channels serves every polynomial and every derivative: the polynomial is
data. The inner step, a sum of products of vectors, is written in LLVM's own language so that the sum stays in vector
registers. Gather and scatter are part of the loop: factors are read where they lie, and results are added where they
belong, row of the output by row of the output, so the bits of a result do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["BLOCKS", "run"]

BLOCKS = (64, 32, 16)
"""Numbers of channels that are worked on at once."""

#: Sums may be fused and rearranged (once, at compile time); NaN and infinity keep their meaning.
FLAGS = ("contract", "reassoc", "nsz")


def _data(context: Any, builder: Any, array_type: Any, value: Any) -> Any:
    return context.make_array(array_type)(context, builder, value).data


def _make_node(reduce_flag: bool) -> Callable:
    """The step ``result = start + sum of products``, or its sum over the block of channels.

    The number of channels of a block is 16 times the length of the tuple ``lanes``, so that it is part of the type.
    """

    @intrinsic
    def run_node(typing, pointers, scalars, factors, coefficients, row, zeros, lanes):
        real = coefficients.dtype
        width = 16 * len(lanes)

        def codegen(context, builder, signature, arguments):
            scalar = ir.FloatType() if real == types.float32 else ir.DoubleType()
            vector = ir.VectorType(scalar, width)
            i64 = ir.IntType(64)
            itemsize = 4 if real == types.float32 else 8
            data = [
                _data(context, builder, kind, value) for kind, value in zip(signature.args[:4], arguments[:4])
            ]
            pointer_data, scalar_data, factor_data, coefficient_data = data
            row_data = arguments[4]
            zeros_address = arguments[5]

            def entry(column):
                address = builder.add(row_data, ir.Constant(i64, 8 * column))
                return builder.load(builder.inttoptr(address, i64.as_pointer()))

            def address_of(place):
                return builder.load(builder.gep(pointer_data, [place]))

            def vector_at(address):
                pointer = builder.inttoptr(address, vector.as_pointer())
                value = builder.load(pointer)
                value.align = itemsize
                return value

            def factor(term, column):
                position = builder.add(builder.shl(term, ir.Constant(i64, 1)), ir.Constant(i64, column))
                return builder.load(builder.gep(factor_data, [position]))

            def splat(value):
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
                mask = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)

            def coefficient(term):
                return builder.load(builder.gep(coefficient_data, [term]))

            def add_product(total, a, b):
                return builder.fadd(total, builder.fmul(a, b, flags=FLAGS), flags=FLAGS)

            def linear(total, term):
                return add_product(total, vector_at(address_of(factor(term, 0))), splat(coefficient(term)))

            def scaled(total, term):
                number = builder.load(builder.gep(scalar_data, [factor(term, 1)]))
                number = builder.fmul(number, coefficient(term), flags=FLAGS)
                return add_product(total, vector_at(address_of(factor(term, 0))), splat(number))

            def weighted_product(total, term):
                a = vector_at(address_of(factor(term, 0)))
                b = vector_at(address_of(factor(term, 1)))
                return add_product(total, builder.fmul(a, splat(coefficient(term)), flags=FLAGS), b)

            def product(total, term):
                return add_product(
                    total, vector_at(address_of(factor(term, 0))), vector_at(address_of(factor(term, 1)))
                )

            def loop(start, stop, total, body):
                before = builder.block
                head = builder.append_basic_block("head")
                inside = builder.append_basic_block("body")
                after = builder.append_basic_block("after")
                builder.branch(head)
                builder.position_at_end(head)
                term = builder.phi(i64)
                running = builder.phi(vector)
                term.add_incoming(start, before)
                running.add_incoming(total, before)
                builder.cbranch(builder.icmp_signed("<", term, stop), inside, after)
                builder.position_at_end(inside)
                updated = body(running, term)
                following = builder.add(term, ir.Constant(i64, 1))
                term.add_incoming(following, builder.block)
                running.add_incoming(updated, builder.block)
                builder.branch(head)
                builder.position_at_end(after)
                return running

            bounds = [entry(column) for column in range(3, 8)]
            if reduce_flag:
                total = vector_at(zeros_address)
            else:
                place = address_of(entry(1))
                adds = builder.icmp_signed("!=", entry(2), ir.Constant(i64, 0))
                total = vector_at(builder.select(adds, place, zeros_address))
                total = loop(bounds[0], bounds[1], total, linear)
                total = loop(bounds[1], bounds[2], total, scaled)
            total = loop(bounds[2], bounds[3], total, weighted_product)
            total = loop(bounds[3], bounds[4], total, product)
            if not reduce_flag:
                stored = builder.store(total, builder.inttoptr(place, vector.as_pointer()))
                stored.align = itemsize
                return ir.Constant(scalar, 0.0)
            suffix = f"v{width}f{8 * itemsize}"
            sum_type = ir.FunctionType(scalar, [scalar, vector])
            reducer = cgutils.get_or_insert_function(builder.module, sum_type, f"llvm.vector.reduce.fadd.{suffix}")
            return builder.call(reducer, [ir.Constant(scalar, 0.0), total], fastmath=FLAGS)

        return real(pointers, scalars, factors, coefficients, row, zeros, lanes), codegen

    return run_node


@intrinsic
def load_real(typing, address, like):
    """The number at an address, of the dtype of the array ``like``."""
    real = like.dtype

    def codegen(context, builder, signature, arguments):
        kind = ir.FloatType() if real == types.float32 else ir.DoubleType()
        return builder.load(builder.inttoptr(arguments[0], kind.as_pointer()))

    return real(address, like), codegen


@intrinsic
def add_real(typing, address, value):
    """Add a number to the one at an address."""

    def codegen(context, builder, signature, arguments):
        kind = arguments[1].type
        pointer = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.store(builder.fadd(builder.load(pointer), arguments[1]), pointer)
        return context.get_dummy_value()

    return types.void(address, value), codegen


@intrinsic
def load_index(typing, address):
    """The int64 at an address."""

    def codegen(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.int64(address), codegen


vector_node = _make_node(reduce_flag=False)
channel_sum_node = _make_node(reduce_flag=True)


@njit(cache=True, nogil=True, fastmath=set(FLAGS), error_model="numpy")
def run(
    nodes, factors, coefficients, loads, bounds, stores, sizes, inputs, outputs, rows, segments, first, last,
    block_first, block_last, lanes,
):  # fmt: skip
    """Work on segments ``first ... last`` and blocks of channels ``block_first ... block_last``.

    inputs: [K, 5] address, components, address of the row index or 0, 1 with channels.
    outputs: [O, 4] address, components, 1 if rows are segments (scatter), 1 with channels.
    rows: [B] rows of the work in order of their segment; segments: [S + 1] bounds.
    lanes: a tuple of one sixteenth as many numbers as a block has channels.
    sizes: places of vectors, own buffers, scalars, channels (a multiple of the width), 1 if rows are in order.
    """
    width = 16 * len(lanes)
    num_vectors, num_buffers, num_scalars, channels, in_order = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    itemsize = coefficients.itemsize
    memory = np.zeros((num_buffers + 1) * width + 32, coefficients.dtype)
    start = memory.ctypes.data + 127
    start -= start % 128
    zeros = start + num_buffers * width * itemsize
    pointers = np.zeros(num_vectors, np.int64)
    for place in range(num_buffers):
        pointers[place] = start + place * width * itemsize
    scalars = np.zeros(num_scalars, coefficients.dtype)
    node_address = nodes.ctypes.data
    num_inputs, num_outputs = inputs.shape[0], outputs.shape[0]
    previous = np.empty(num_inputs, np.int64)
    for block in range(block_first, block_last):
        shift = block * width * itemsize
        previous[:] = -1
        for segment in range(first, last):
            for store in range(stores.shape[0]):
                output = stores[store, 0]
                if stores[store, 3] and outputs[output, 2]:
                    row = segment * outputs[output, 1] + stores[store, 1]
                    pointers[stores[store, 2]] = outputs[output, 0] + row * channels * itemsize + shift
            for position in range(segments[segment], segments[segment + 1]):
                b = position if in_order else rows[position]
                for operand in range(num_inputs):
                    row = b
                    if inputs[operand, 2]:
                        row = load_index(inputs[operand, 2] + 8 * b)
                    if row == previous[operand]:
                        continue
                    previous[operand] = row
                    base = inputs[operand, 0]
                    if inputs[operand, 3]:
                        base += row * inputs[operand, 1] * channels * itemsize + shift
                        for load in range(bounds[operand], bounds[operand + 1]):
                            pointers[loads[load, 2]] = base + loads[load, 1] * channels * itemsize
                    else:
                        base += row * inputs[operand, 1] * itemsize
                        for load in range(bounds[operand], bounds[operand + 1]):
                            scalars[loads[load, 2]] = load_real(base + loads[load, 1] * itemsize, coefficients)
                for store in range(stores.shape[0]):
                    output = stores[store, 0]
                    if stores[store, 3] and not outputs[output, 2]:
                        row = b * outputs[output, 1] + stores[store, 1]
                        pointers[stores[store, 2]] = outputs[output, 0] + row * channels * itemsize + shift
                for node in range(nodes.shape[0]):
                    row_address = node_address + 64 * node
                    kind = nodes[node, 0]
                    if kind == 0:
                        vector_node(pointers, scalars, factors, coefficients, row_address, zeros, lanes)
                    elif kind == 1:
                        scalars[nodes[node, 1]] = channel_sum_node(
                            pointers, scalars, factors, coefficients, row_address, zeros, lanes
                        )
                    else:
                        total = scalars[nodes[node, 1]] if nodes[node, 2] else 0 * coefficients[0]
                        for term in range(nodes[node, 3], nodes[node, 4]):
                            total += coefficients[term] * scalars[factors[term, 0]]
                        for term in range(nodes[node, 4], nodes[node, 5]):
                            product = scalars[factors[term, 0]] * scalars[factors[term, 1]]
                            total += coefficients[term] * product
                        scalars[nodes[node, 1]] = total
                for store in range(stores.shape[0]):
                    output = stores[store, 0]
                    if not stores[store, 3]:
                        row = segment if outputs[output, 2] else b
                        address = outputs[output, 0] + (row * outputs[output, 1] + stores[store, 1]) * itemsize
                        add_real(address, scalars[stores[store, 2]])
    memory[0] = 0  # numba frees an array after its last use; addresses of this one are in use up to here
