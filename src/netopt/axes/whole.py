"""Calls that are seen whole: one rule says all of them, so that the operations they are made of need not be seen.

A linear layer is a transposition, a product and two views; attention is a dozen operations. What these say together is
one rule, which costs a fraction of listening to each. They are looked at all the same where something else may depend
on them; see :meth:`netopt.axes.tracing.dims.Trace.whole`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from netopt.axes.tracing.dims import Traits, traits_of

__all__ = ["WHOLE", "Whole"]


class Whole(NamedTuple):
    """A call of which one rule says all, so that the operations it is made of need not be seen.

    Attributes:
        traits: Of the operation that stands for them.
        names: Keywords that its rule knows.
        fits: Whether the rule holds for these arguments.
    """

    traits: Traits
    names: frozenset[str] = frozenset()
    fits: Callable[..., bool] = lambda *_, **__: True


def _one_head_each(query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> bool:
    """Whether queries, keys and values have equally many heads, so that none is shared."""
    return not enable_gqa and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]


def _matrices(left: Tensor, right: Tensor, *_: Any, **__: Any) -> bool:
    """Whether a product is one of matrices, as many on either side or one on the right for all."""
    one = right.dim() == 2
    return left.dim() > 1 and (one or (right.dim() > 2 and left.shape[:-2] == right.shape[:-2]))


_aten = torch.ops.aten
WHOLE: dict[Any, Whole] = {
    torch.nn.functional.linear: Whole(traits_of(_aten.linear.default)),
    torch.batch_norm: Whole(traits_of(_aten.batch_norm.default)),
    torch.layer_norm: Whole(traits_of(_aten.layer_norm.default)),
    torch.conv1d: Whole(traits_of(_aten.conv1d.default)),
    torch.conv2d: Whole(traits_of(_aten.conv2d.default)),
    torch.conv3d: Whole(traits_of(_aten.conv3d.default)),
    torch.conv_transpose1d: Whole(traits_of(_aten.conv_transpose1d.default)),
    torch.conv_transpose2d: Whole(traits_of(_aten.conv_transpose2d.input)),
    torch.conv_transpose3d: Whole(traits_of(_aten.conv_transpose3d.input)),
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__),
        Whole(traits_of(_aten.matmul.default), fits=_matrices),
    ),
    torch.nn.functional.scaled_dot_product_attention: Whole(
        traits_of(_aten.scaled_dot_product_attention.default),
        frozenset(["attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]),
        _one_head_each,
    ),
}
