"""Calls that contract activations, or normalise them: groups, kernels, heads and states."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from netopt.axes.layout import SizeReason, mark_inexact, split_product
from netopt.axes.operation import Mark
from netopt.axes.tracing.calls.registry import call_rule, contraction

if TYPE_CHECKING:
    from netopt.axes.tracing.sizes import SizeTracer

_INPUT = (0, "input")

contraction("linear", contracts={_INPUT: -1})
contraction("bilinear", contracts={(0, "input1"): -1, (1, "input2"): -1})
contraction("matmul", "__matmul__", "__rmatmul__", contracts={_INPUT: -1, (1, "other"): -2})
contraction("mm", "bmm", contracts={_INPUT: -1, (1, "mat2"): -2})
contraction("mv", contracts={_INPUT: -1, (1, "vec"): -1})
contraction("addmm", contracts={(1, "mat1"): -1, (2, "mat2"): -2})
contraction("baddbmm", "addbmm", contracts={(1, "batch1"): -1, (2, "batch2"): -2})
contraction("addmv", contracts={(1, "mat"): -1, (2, "vec"): -1})
contraction("gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", contracts={_INPUT: -1})


@call_rule("conv1d", "conv_transpose1d", contracts={_INPUT: -2})
@call_rule("conv2d", "conv_transpose2d", contracts={_INPUT: -3})
@call_rule("conv3d", "conv_transpose3d", contracts={_INPUT: -4})
def convolution(
    tracer: SizeTracer,
    result: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    third: Any = 1,
    groups: int = 1,
    last: Any = 1,
    **kwargs: Any,
) -> None:
    """Strides, paddings and dilations are no sizes of neurons, and determine how large the result is."""
    for numbers in (stride, padding, third, last, *kwargs.values()):
        tracer.keep(numbers)
    channel_shuffle(tracer, result, input, groups)


@call_rule("channel_shuffle")
def channel_shuffle(tracer: SizeTracer, result: Any, input: Tensor, groups: int) -> None:
    """Channels in groups."""
    _group(tracer, groups, "groups")


@call_rule("group_norm")
def group_norm(tracer: SizeTracer, result: Any, input: Tensor, num_groups: int, *args: Any, **kwargs: Any) -> None:
    """Channels in groups that are normalised together."""
    _group(tracer, num_groups, "num_groups")


@call_rule("deform_conv2d")
def deform_conv2d(tracer: SizeTracer, result: Any, *args: Any) -> None:
    """After five tensors and three pairs of numbers."""
    _group(tracer, args[11], "groups")


def _group(tracer: SizeTracer, number: int, name: str) -> None:
    if tracer.trace.groups is not None:
        tracer.equate(number, tracer.trace.groups, name)


@call_rule("layer_norm", "rms_norm")
def normalization(
    tracer: SizeTracer, result: Any, input: Tensor, normalized_shape: Any, *args: Any, **kwargs: Any
) -> None:
    """The last dimensions are normalised over."""
    for size, dim in zip(normalized_shape, tracer.trace.dims(result)[-len(normalized_shape) :], strict=True):
        tracer.equate(size, dim.layout, "normalized_shape")


@call_rule("lstm", contracts={_INPUT: -1})
def lstm(tracer: SizeTracer, result: Any, input: Tensor, sizes: Any, states: Any, *args: Any) -> None:
    """A state that is narrower than the other is projected, and must stay narrower."""
    states = sizes if isinstance(sizes, (tuple, list)) else states  # of a packed sequence, sizes come between
    if isinstance(states, (tuple, list)) and len(states) == 2 and states[0].shape[-1] != states[1].shape[-1]:
        narrow, wide = (tracer.number(tracer.trace.dims(state)[-1].layout) for state in states)
        tracer.constraints.guard(operator.lt, narrow, wide, True)


@call_rule("scaled_dot_product_attention", contracts={(0, "query"): -1, (1, "key"): -1})
def attention(
    tracer: SizeTracer,
    result: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    scale: float | None = None,
    **kwargs: Any,
) -> None:
    """Queries may share keys, and the default scale is that of the width of a head."""
    q, k = tracer.trace.dims(query), tracer.trace.dims(key)
    if len(q) > 2 and q[-3].size > k[-3].size:
        halves = split_product(q[-3].layout, k[-3].size)
        if halves is not None:
            # No integer of the call is how many query heads share one of the keys' heads; one of the module may be.
            name = tracer.visits.current.module
            tracer.trace.implicit_sizes.append((halves[1], name, tracer.model.get_submodule(name)))
    if scale is None:
        why = SizeReason(f"sets the default scale of attention, at {tracer.trace.where()}")
        tracer.trace.mark(result, [Mark(mark_inexact, q[-1].layout, why)])
