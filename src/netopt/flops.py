"""What an operation costs, from the shapes it is given.

Torch's own formulas, and a few for operations it leaves out; two floating-point operations are one
multiply-accumulate. A formula takes shapes, so it also gives what an operation would cost with fewer neurons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch.utils.flop_counter import flop_registry

__all__ = ["EXTRA", "formula"]

aten = torch.ops.aten
Shape: TypeAlias = Sequence[int]


def _matrix_vector(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _added_matrix_vector(_: Shape, matrix: Shape, *__: Any, **___: Any) -> int:
    return 2 * prod(matrix)


def _added_matrix_product(_: Shape, left: Shape, right: Shape, *__: Any, **___: Any) -> int:
    return 2 * prod(left) * right[-1]


def _bilinear(left: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(left[:-1]) * prod(weight)


def _product(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(left) * right[-1]


def _linear(inputs: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(inputs[:-1]) * prod(weight)


def _convolution(_: Shape, weight: Shape, *__: Any, out_val: Shape, **___: Any) -> int:
    # Every entry of the result is a sum over the kernel of one neuron.
    return 2 * prod(out_val) * prod(weight[1:])


def _transposed_convolution(inputs: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(inputs) * prod(weight[1:])


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent_layer(inputs: Shape, from_input: Shape, from_state: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(inputs[:-1]) * (prod(from_input) + prod(from_state))


def _recurrent_stack(inputs: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 2 * prod(inputs[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


# What torch's counter leaves out, as floating-point operations of the shapes an operation is given.
EXTRA: dict[Any, Callable[..., int]] = {
    aten.mv: _matrix_vector,
    aten.addmv: _added_matrix_vector,
    aten.dot: _matrix_vector,
    aten.linear: _linear,
    aten.matmul: _product,  # of matrices
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d), _convolution),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), _transposed_convolution),
    aten.addmm: _added_matrix_product,  # as torch's, which calls another formula in turn
    aten._trilinear: _bilinear,
    **dict.fromkeys((aten.scaled_dot_product_attention, aten._scaled_dot_product_flash_attention_for_cpu), _attention),
    aten.mkldnn_rnn_layer: _recurrent_layer,
    aten._cudnn_rnn: _recurrent_stack,
}


def formula(operation: Any) -> Callable[..., Any] | None:
    """The formula of an operation's floating-point operations, or ``None`` if it is not counted.

    Args:
        operation: An overload packet, such as ``torch.ops.aten.mm``.

    Returns:
        A function of the operation's arguments, each tensor as its shape, and of ``out_val``, the result's shape.

    Example:
        >>> formula(torch.ops.aten.mm)((2, 3), (3, 4), out_val=(2, 4))
        48
    """
    found = EXTRA.get(operation)
    if found is not None:
        return found
    registered = flop_registry.get(operation)
    # Torch wraps most of its formulas to take tensors; given shapes, that is half of the time they need.
    plain = getattr(registered, "__wrapped__", None)
    return registered if plain is None else functools.partial(_of_shapes, plain)


def _of_shapes(plain: Callable[..., int], *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return plain(*args, out_shape=out_val, **kwargs)
