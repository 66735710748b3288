"""Recurrent layers: packed sequences, and fused cells, whose gates lie one after the other in one dimension."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from netopt.axes.operation import Dim, Dims, Operation, join, rule


@rule("aten::_thnn_fused_lstm_cell", "aten::_thnn_fused_gru_cell")
def fused_cell(op: Operation, input_gates: Tensor, hidden_gates: Tensor, state: Tensor, *biases: Any) -> Any:
    """Gates and state of one step."""
    hidden = op.dims(state)[-1]
    number = input_gates.shape[-1] // hidden.size
    gates = join([hidden] * number)
    for tensor in (input_gates, hidden_gates, *biases):
        if isinstance(tensor, Tensor):
            op.same(op.dims(tensor)[-1], gates)
    batch: Dims = op.dims(state)[:-1]
    out = [*batch, Dim(hidden.layout)]
    return tuple(out if one.shape[-1] == hidden.size else None for one in op.out)


@rule("aten::_pack_padded_sequence")
def pack(op: Operation, tensor: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Dims, Dims]:
    """``[b, t, ...]`` without its padding: ``[tokens, ...]`` and the batch size of each step."""
    dims = op.dims(tensor)
    why = "is packed by length"
    op.freeze([*dims[:2], *op.dims(lengths)], why)
    tokens, steps = op.out
    return [op.frozen(tokens.shape[0], why), *dims[2:]], [op.frozen(steps.shape[0], why)]


@rule("aten::_pad_packed_sequence")
def pad_packed(
    op: Operation, tokens: Tensor, steps: Tensor, batch_first: bool, padding: float, length: int
) -> tuple[Dims, Dims]:
    """The inverse of packing."""
    why = "is packed by length"
    dims = op.dims(tokens)
    op.freeze([dims[0], *op.dims(steps)], why)
    padded, lengths = op.out
    passing = [Dim(dim.layout, dim.zero and padding == 0) for dim in dims[1:]]
    return [*(op.frozen(size, why) for size in padded.shape[:2]), *passing], [op.frozen(lengths.shape[0], why)]
