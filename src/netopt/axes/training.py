"""Whether a part of a model does the like in training mode.

A module of a few parts that asks for its mode (a stochastic depth, a batch norm of one's own) is called once more in
training mode, on what it was just given. If its result has the same dimensions, and nothing more is to be said of them,
the rest of the model need not be run in that mode to know.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from netopt.axes.layout import Layout, atoms, unify
from netopt.axes.operation import Dim
from netopt.axes.tracing.dims import DimTracer
from netopt.model.attributes import COMMON, NUMBERS, is_configuration, is_library
from netopt.model.restore import Snapshot, version_of
from netopt.symbolic import DimSize, SymbolicFloat, SymbolicInt, leaves, plain

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

    def __init__(self, trace: DimTracer) -> None:
        self._trace = trace
        self._alike: set[Any] = set()
        self._kept: list[Any] = []

    def is_alike(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        """Whether ``module``, in training mode, makes of its arguments a tensor with the dimensions of ``result``.

        The two are then stated to be the same. Attributes are as before afterwards; values of buffers are not.
        """
        parts = list(module.modules())
        with torch._C.DisableTorchFunction():  # what is asked here is no question of the user's code
            given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
            touched = [*given, *module.parameters(), *module.buffers()]
            signature = _Signature(self._trace, parts, touched, self._kept)
            kind = (signature.of(args), signature.of(kwargs), *map(signature.of_part, parts))
            if kind in self._alike:
                return True
            told, noted = self._told(touched), self._noted()
        if not _is_alike(self._trace, module, args, kwargs, result):
            return False
        constraints, guards = self._trace.constraints, noted[0]
        fixed = all(
            isinstance(leaf, DimSize) and _stays(leaf.layout)
            for condition in constraints.guards[guards:]
            for leaf in (*leaves(condition.left), *leaves(condition.right))
        )
        if fixed and told == self._told(touched) and noted[1:] == self._noted()[1:]:
            self._alike.add(kind)  # training says nothing more, and will not of others of this kind
        return True

    def _noted(self) -> tuple[int, ...]:
        """How much was noted of integers, of tensors, and of values that were looked at."""
        trace, constraints = self._trace, self._trace.constraints
        return (
            len(constraints.guards),
            len(constraints.equations),
            len(constraints.numbers),
            len(trace.touched),
            trace.looks,
        )

    def _told(self, tensors: Iterable[Tensor]) -> list[Any]:
        """What is known of the dimensions of tensors."""
        return [
            (id(layout), zero, [(atom.frozen, atom.inexact) for atom in atoms(layout)])
            for tensor in tensors
            for layout, zero in self._trace.dims(tensor)
        ]


class _Signature:
    """What a module and its arguments are but for the sizes that may change, to be compared with that of others.

    Args:
        trace: The trace they run in.
        parts: The module and those in it.
        tensors: Which they hold and are given: an integer that is none of their sizes is taken as it is.
        kept: Objects that are told apart by their address, so that it is not reused.
    """

    def __init__(
        self, trace: DimTracer, parts: Sequence[nn.Module], tensors: Iterable[Tensor], kept: list[Any]
    ) -> None:
        self._trace = trace
        self._parts = {id(part): place for place, part in enumerate(parts)}
        self._layouts: dict[int, int] = {}
        self._known = kept
        self._inside: set[int] = set()
        sizes = {layout.size for tensor in tensors for layout, _ in trace.dims(tensor) if not _stays(layout)}
        self._sizes = sizes - {1}

    def of_part(self, part: nn.Module) -> Any:
        own = [(key, self.of(one)) for key, one in vars(part).items() if key not in COMMON or one]
        return type(part), tuple(own), _class_values(type(part))

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind is SymbolicInt:
            number = plain(value)
            return kind, None if number in self._sizes else number
        if kind is SymbolicFloat:
            return kind
        if kind in NUMBERS:
            return kind, value
        if isinstance(value, Tensor):
            return kind, value.dtype, value.device, value.layout, *map(self._of_dim, self._trace.dims(value))
        if kind in (tuple, list):
            return kind, tuple(map(self.of, value))
        if kind is set:
            return kind, frozenset(map(self.of, value))
        if kind in (dict, OrderedDict):
            return kind, tuple([(key, self.of(one)) for key, one in value.items()])
        if id(value) in self._parts:
            return kind, self._parts[id(value)]
        self._known.append(value)
        if not is_configuration(value) or id(value) in self._inside:
            return id(value)
        self._inside.add(id(value))
        return id(value), self.of(vars(value))

    def _of_dim(self, dim: Dim) -> Any:
        """Which dimensions are the same, which are zero where they are masked, and what of them stays."""
        layout, zero = dim
        fixed = tuple([stays for stays, _ in itertools.groupby(atom.frozen is not None for atom in atoms(layout))])
        place = self._layouts.setdefault(id(layout), len(self._layouts))
        return place, zero, fixed, layout.size if all(fixed) else layout.size == 1


def _class_values(kind: type[nn.Module]) -> Any:
    """The plain values of a module's classes, which its code may have changed."""
    return tuple([vars(base).get(key) for base, key in _class_names(kind)])


@functools.cache
def _class_names(kind: type[nn.Module]) -> Sequence[tuple[type, str]]:
    return [
        (base, key)
        for base in kind.__mro__
        if not is_library(base.__module__)
        for key, value in vars(base).items()
        if type(value) in NUMBERS and not key.startswith("__")
    ]


def _stays(layout: Layout) -> bool:
    """Whether no position of a dimension may go."""
    return all(atom.frozen is not None for atom in atoms(layout))


def _is_alike(trace: DimTracer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Runs a module in training mode, to see whether its result has the dimensions of ``result``."""
    given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    versions, marks = list(map(version_of, given)), trace.marks
    parts = list(module.named_modules())
    snapshot = Snapshot(module, values=False)
    try:
        for _, part in parts:
            vars(part)["training"] = True
        trained = module.forward(*args, **kwargs)
    except Exception:
        # As batch norm fails in training mode on a single value; what the whole model does there is seen then.
        return False
    finally:
        snapshot.put_back_attributes()
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
