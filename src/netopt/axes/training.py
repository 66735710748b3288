"""Whether a part of a model does the like in training mode.

A module of a few parts that asks for its mode (a stochastic depth, a batch norm of one's own) is called once more in
training mode, on what it was just given. If its result has the same dimensions, and nothing more is to be said of them,
the rest of the model need not be run in that mode to know.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from netopt.axes.held import attributes_given_back
from netopt.axes.layout import unify
from netopt.axes.trace import Trace
from netopt.restore import version_of

__all__ = ["is_alike_in_training", "is_small"]

_FEW = 4


def is_small(module: nn.Module) -> bool:
    """Whether a module has few parts, so that calling it again costs little."""
    return all(count <= _FEW for count, _ in enumerate(module.modules(), 1))


def is_alike_in_training(
    trace: Trace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> bool:
    """Whether ``module``, in training mode, makes of its arguments a tensor with the dimensions of ``result``.

    The two are then stated to be the same. Attributes are as before afterwards; values of buffers are not.
    """
    given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    versions, marks = list(map(version_of, given)), trace.marks
    parts = list(module.named_modules())
    with attributes_given_back(parts):
        for _, part in parts:
            vars(part)["training"] = True
        try:
            trained = module.forward(*args, **kwargs)
        except Exception:
            # As batch norm fails in training mode on a single value; what the whole model does there is seen then.
            return False
    tensors = isinstance(result, Tensor) and isinstance(trained, Tensor)
    if not tensors or trained.shape != result.shape or versions != list(map(version_of, given)):
        return False
    before, after = trace.dims(result), trace.dims(trained)
    for one, two in zip(before, after, strict=True):
        unify(one.layout, two.layout, lambda: f"has parts that {type(module).__name__} aligns in two ways in training")
    # Where training says more than that, all that follows has to be seen in that mode.
    return trace.marks == marks and all(two.zero or not one.zero for one, two in zip(before, after, strict=True))
