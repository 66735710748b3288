"""Follows the scores of experts through a forward: from the matrix product that makes them to the choice of the best.

A product with a parameter makes scores; what is computed from them elementwise is scores still; ``topk``, ``max`` and
``argmax`` along them choose. Views and casts of a parameter count as the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from netopt.model.dispatch import ThreadDispatchMode
from netopt.model.view import ModelView

__all__ = ["PRODUCTS", "Choice", "Read", "Scores", "Step", "Watch"]

PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm", "convolution", "addmv", "mv"])
_CHOOSING = frozenset(["topk", "max", "argmax"])
_CASTS = frozenset(["_to_copy", "clone"])


class Scores(NamedTuple):
    """One score for each expert, in the last dimension.

    Attributes:
        router: Name of the parameter they were made with.
        dim: Its dimension with an entry for each expert.
        size: How many experts.
    """

    router: str
    dim: int
    size: int


class Read(NamedTuple):
    """A parameter or buffer as an operation is given it.

    Attributes:
        name: Its name.
        stored: The tensor of that name.
        given: What the operation is given: the same, a view or a cast of it.
    """

    name: str
    stored: Tensor
    given: Tensor

    def dim_of(self, dim: int, size: int) -> int | None:
        """Which dimension of the stored tensor this one of the given tensor is, whole or cut into ``size`` blocks."""
        step = self.given.stride(dim)
        for own, length in enumerate(self.stored.shape):
            if length and length % size == 0 and self.stored.stride(own) * (length // size) == step:
                return own
        return None


@dataclass
class Choice:
    """A call that chooses by scores.

    Attributes:
        scores: The scores.
        count: How many are chosen.
        groups: Into how many groups the scores are cut, among each of which is chosen.
        along: Whether experts are ranked, and not what they are offered.
    """

    scores: Scores
    count: int
    groups: int
    along: bool


@dataclass
class Step:
    """One operation that was run.

    Attributes:
        name: The operation.
        args: What it was given.
        reads: Which of that are parameters and buffers.
        scores: The scores it was given or has made.
        others: Other scores it was given, which it joins with these.
        choice: What it has chosen.
        result: What it has returned.
    """

    name: str
    args: Any
    reads: list[Read]
    scores: Scores | None
    others: list[Scores]
    choice: Choice | None
    result: Any


class Watch(ThreadDispatchMode):
    """Knows which tensors are scores, of which router; and runs a model as if some were minus infinity.

    They are so where they are made and, since a sigmoid or a bias for balance makes them finite, where is chosen.

    Args:
        view: Of the model.
        look: Called with every operation that was run.
        removed: Indices of experts whose scores are minus infinity, by the router's name.
    """

    def __init__(
        self,
        view: ModelView,
        look: Callable[[Step], None] = lambda _: None,
        removed: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self._look, self._removed = look, removed or {}
        self._stored: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in view.tensors.items():
            if tensor.dim() and tensor.layout is torch.strided:
                self._stored.setdefault(tensor.untyped_storage()._cdata, (name, tensor))
        self._cast = WeakTensorKeyDictionary()
        self._scores = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation, and looks at it."""
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        reads = [read for one in given if (read := self._read(one)) is not None]
        known = [self._scores[one] for one in given if one in self._scores]
        scores = known[0] if known else None
        choice = _choice(name, scores, args, kwargs) if scores is not None and name in _CHOOSING else None
        if choice is not None:
            args = self._chosen_from(choice, args)
        result = func(*args, **kwargs)
        if name in PRODUCTS:
            scores = _made(reads, result)
            if scores is not None and scores.router in self._removed:
                result = _without(result, self._removed[scores.router])
        for one in [one for one in tree_leaves(result) if isinstance(one, Tensor)]:
            if scores is not None and choice is None and _holds(one, scores.size):
                self._scores[one] = scores
            self._follow(name, one, reads)
        others = [one for one in known if scores is not None and one.size == scores.size and one != scores]
        self._look(Step(name, args, reads, scores, others, choice, result))
        return result

    def _chosen_from(self, choice: Choice, args: Any) -> Any:
        gone = self._removed.get(choice.scores.router)
        if gone is None or not choice.along:
            return args
        first: Tensor = args[0]
        flat = first.flatten(-2) if choice.groups > 1 else first
        return _without(flat, gone).reshape(first.shape), *args[1:]

    def _follow(self, name: str, made: Tensor, reads: Sequence[Read]) -> None:
        """A cast of what is stored counts as that, and so does a view of a cast."""
        for read in reads:
            view = read.given in self._cast and made.untyped_storage()._cdata == read.given.untyped_storage()._cdata
            if view or (name in _CASTS and made.shape == read.given.shape):
                self._cast[made] = (read.name, read.stored)

    def _read(self, tensor: Tensor) -> Read | None:
        if tensor.layout is not torch.strided:
            return None
        stored = self._stored.get(tensor.untyped_storage()._cdata)
        found = self._cast.get(tensor, default=stored)
        return None if found is None else Read(found[0], found[1], tensor)


def _without(scores: Tensor, gone: Sequence[int]) -> Tensor:
    places = torch.tensor(list(gone), dtype=torch.int64, device=scores.device)
    return scores.index_fill(-1, places, float("-inf"))


def _made(reads: list[Read], result: Any) -> Scores | None:
    """The scores a product makes, if its last operand is a parameter and lends its last dimension."""
    if not reads or not isinstance(result, Tensor) or reads[-1].given.dim() < 2 or not result.dim():
        return None
    read, size = reads[-1], result.shape[-1]
    if read.given.shape[-1] != size:
        return None
    dim = read.dim_of(-1, size)
    return None if dim is None or read.stored.shape[dim] != size else Scores(read.name, dim, size)


def _holds(tensor: Tensor, size: int) -> bool:
    shape = tensor.shape
    return bool(shape) and (shape[-1] == size or (len(shape) > 2 and shape[-2] * shape[-1] == size))


def _choice(name: str, scores: Scores, args: Any, kwargs: Any) -> Choice | None:
    first = args[0]
    if name == "topk":
        count, dim = args[1], args[2] if len(args) > 2 else kwargs.get("dim", -1)
    elif len(args) > 1 and isinstance(args[1], int):
        count, dim = 1, args[1]
    else:
        return None
    groups = 1 if first.shape[-1] == scores.size else first.shape[-2]
    return Choice(scores, count, groups, dim in (-1, first.dim() - 1))
