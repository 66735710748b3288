"""Fused kernels of torch as the steps they fuse, in this thread alone.

Attention and recurrent layers run as one operation hide the products inside. Torch switches these kernels by flags of
the whole process; here the call itself is answered with its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decompositions

from netopt.model.wrappers import TorchCalls

__all__ = ["Unfused", "unfused"]

_ATTENTION = "scaled_dot_product_attention"


class Unfused(TorchCalls):
    """Runs recurrent layers and attention step by step while entered, in the thread that enters.

    Args:
        attention: Whether attention is one of them; its product of queries and keys is then held in memory.

    Example:
        >>> layer = torch.nn.LSTM(2, 3)
        >>> with Unfused():
        ...     states, _ = layer(torch.zeros(4, 1, 2))
        >>> states.shape
        torch.Size([4, 1, 3])
    """

    def __init__(self, *, attention: bool = True) -> None:
        super().__init__()
        self._attention = attention

    def run_call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one call, or its steps."""
        whole = not self._attention and getattr(function, "__name__", "") == _ATTENTION
        return (function if whole else unfused(function))(*args, **kwargs)


def unfused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that makes the steps of a fused one; any other as it is."""
    steps = _STEPS.get(getattr(function, "__name__", ""))
    return function if steps is None else partial(steps, function)


def _attention(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as products and a softmax."""
    if query.is_nested or key.is_nested or value.is_nested:
        return function(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        kept, gone = (torch.full((), one, dtype=query.dtype, device=query.device) for one in (0.0, -math.inf))
        attn_mask = torch.where(attn_mask, kept, gone)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _recurrent(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A recurrent layer, time step by time step."""
    name = function.__name__
    if kwargs or not _is_fused(name, args[0]):
        return function(*args, **kwargs)
    packed = isinstance(args[3], (tuple, list))  # sizes of batches come between the tokens and the states
    data, sizes, states, weights, biases, layers, dropout, training, both = (
        args[:9] if packed else (args[0], args[0], *args[1:8])
    )
    swapped = not packed and args[8]  # batch first
    cells = name == "lstm"
    weights = decompositions.gather_params(list(weights), biases, cells and states[0].size(2) != states[1].size(2))
    hidden = list(zip(*states, strict=True)) if cells else list(states.unbind(0))
    step = partial(_LAYERS[name][packed], **({"batch_sizes": sizes.tolist()} if packed else {}))
    x = data.transpose(0, 1) if swapped else data
    last: list[Any] = []
    for layer in range(layers):
        directions = (False, True) if both else (False,)
        made = []
        for backwards in directions:
            at = layer * len(directions) + backwards
            out, state = step(x, hidden[at], weights[at], biases, reverse=backwards)
            made.append(out)
            last.append(state)
        x = torch.cat(made, -1) if both else made[0]
        if training and dropout and layer < layers - 1:
            x = torch.dropout(x, dropout, True)
    x = x.transpose(0, 1) if swapped else x
    return (x, *(torch.stack(one, 0) for one in zip(*last, strict=True))) if cells else (x, torch.stack(last, 0))


def _is_fused(name: str, data: Tensor) -> bool:
    """Whether oneDNN or the library of an accelerator would run the layer."""
    if data.device.type == "cpu":
        return name == "lstm" and data.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return data.device.type != "meta"


_LAYERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "lstm": (decompositions.one_layer_lstm, decompositions.one_layer_lstm_data),
    "gru": (
        partial(decompositions.one_layer_rnn, hidden_fn=decompositions.gru_cell),
        partial(decompositions.one_layer_rnn_data, hidden_fn=decompositions.gru_cell_data),
    ),
    **{
        f"rnn_{name}": (
            partial(decompositions.one_layer_rnn, hidden_fn=decompositions.rnn_cell(nonlinearity)),
            partial(decompositions.one_layer_rnn_data, hidden_fn=decompositions.rnn_cell_data(nonlinearity)),
        )
        for name, nonlinearity in (("tanh", torch.tanh), ("relu", torch.relu))
    },
}
_STEPS: dict[str, Callable[..., Any]] = {
    _ATTENTION: _attention,
    **dict.fromkeys(_LAYERS, _recurrent),
}
