"""Whether a part of a model does the like in training mode.

A module of a few parts that asks for its mode (a stochastic depth, a batch norm of one's own) is called once more in
training mode, on what it was just given. If its result has the same dimensions, and nothing more is to be said of them,
the rest of the model need not be run in that mode to know.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from netopt.axes.attributes import COMMON, NUMBERS, attributes_given_back
from netopt.axes.layout import Layout, atoms, unify
from netopt.axes.sizes import Extent, Scalar, Size, leaves
from netopt.axes.trace import Trace
from netopt.restore import version_of

__all__ = ["Trials", "is_small"]

_FEW = 4


def is_small(module: nn.Module) -> bool:
    """Whether a module has few parts, so that calling it again costs little."""
    return all(count <= _FEW for count, _ in enumerate(module.modules(), 1))


class Trials:
    """Asks small modules what they do in training, once for all that are the same but for their sizes.

    Args:
        trace: The trace they run in.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._alike: set[Any] = set()

    def is_alike(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Whether ``module``, in training mode, makes of its arguments a tensor with the dimensions of ``result``.

        The two are then stated to be the same. Attributes are as before afterwards; values of buffers are not.
        """
        parts = [part for _, part in module.named_modules()]
        with torch._C.DisableTorchFunction():  # what is asked here is no question of the user's code
            kind = (self._signature(args), self._signature(kwargs), *map(self._part, parts))
            if kind in self._alike:
                return True
            given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
            touched = [*given, *module.parameters(), *module.buffers()]
            told, noted = self._told(touched), self._noted()
        if not _is_alike(self._trace, module, args, kwargs, result):
            return False
        ledger, conditions = self._trace.ledger, noted[0]
        fixed = all(
            isinstance(leaf, Extent) and _stays(leaf.layout)
            for condition in ledger.conditions[conditions:]
            for leaf in (*leaves(condition.left), *leaves(condition.right))
        )
        if fixed and told == self._told(touched) and noted[1:] == self._noted()[1:]:
            self._alike.add(kind)  # training says nothing more, and will not of others of this kind
        return True

    def _noted(self) -> tuple[int, ...]:
        """How much was noted of integers, and of tensors."""
        ledger = self._trace.ledger
        return len(ledger.conditions), len(ledger.equations), len(ledger.numbers), len(self._trace.touched)

    def _told(self, tensors: Iterable[Tensor]) -> list[Any]:
        """What is known of the dimensions of tensors."""
        return [
            (id(layout), zero, [(atom.frozen, atom.inexact) for atom in atoms(layout)])
            for tensor in tensors
            for layout, zero in self._trace.dims(tensor)
        ]

    def _part(self, part: nn.Module) -> Any:
        held = vars(part).items()
        own = [(key, self._signature(one)) for key, one in held if key not in COMMON or one]
        return type(part), tuple(own)

    def _signature(self, value: Any) -> Any:
        """What a value is but for the sizes in it that may change, to be compared with that of others."""
        kind = type(value)
        if kind in (Size, Scalar):
            return kind
        if kind in NUMBERS:
            return kind, value
        if isinstance(value, Tensor):
            sizes = [layout.size if _stays(layout) else layout.size == 1 for layout, _ in self._trace.dims(value)]
            return kind, value.dtype, value.device, value.layout, tuple(sizes)
        if kind in (tuple, list):
            return kind, tuple(map(self._signature, value))
        if kind is set:
            return kind, frozenset(map(self._signature, value))
        if kind in (dict, OrderedDict):
            return kind, tuple([(key, self._signature(one)) for key, one in value.items()])
        return kind if isinstance(value, nn.Module) else id(value)


def _stays(layout: Layout) -> bool:
    """Whether no position of a dimension may go."""
    return all(atom.frozen is not None for atom in atoms(layout))


def _is_alike(trace: Trace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Runs a module in training mode, to see whether its result has the dimensions of ``result``."""
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
    if not tensors or versions != list(map(version_of, given)):
        return False
    before, after = trace.dims(result), trace.dims(trained)
    if [dim.size for dim in before] != [dim.size for dim in after]:
        return False
    for one, two in zip(before, after, strict=True):
        unify(one.layout, two.layout, lambda: f"has parts that {type(module).__name__} aligns in two ways in training")
    # Where training says more than that, all that follows has to be seen in that mode.
    return trace.marks == marks and all(two.zero or not one.zero for one, two in zip(before, after, strict=True))
