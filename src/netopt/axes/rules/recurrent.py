"""Fused recurrent cells: gates lie one after the other in one dimension, each the size of the hidden state."""

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
