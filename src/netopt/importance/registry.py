"""Criteria by name.

A criterion is a pure function from evidence about a tensor to a score for each of its entries; higher means keep.
Modules, dimensions and axes are not its business. A criterion of layers does more: from a layer's weight and the second
moments of its inputs it decides what is kept, and returns new values for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from netopt.errors import ArgumentTypeError, InvalidArgumentError, UnknownNameError

__all__ = ["Criterion", "Importance", "criterion", "lookup", "name_of", "names", "updates_layers"]

KINDS = ("weights", "neurons", "layers")
MANY = 8
"""So many vectors are worth being joined."""
PART = 1 << 17
"""Entries judged at a time where each is judged by itself: what fits in a cache is not written to memory and back."""


@dataclass(frozen=True)
class Criterion:
    """A function from evidence to a score, with the evidence it needs.

    Attributes:
        name: The name it is registered under.
        function: Takes the evidence about one tensor, returns a score of the tensor's shape; higher means keep. One of
            ``"layers"`` takes a :class:`netopt.reconstruction.Problem`, returns new weights and what is kept of them.
        needs: What is to be collected for it; see :class:`netopt.importance.Evidence`. One of ``"layers"`` needs what a
            :class:`netopt.reconstruction.Problem` holds, or with ``{"moment"}`` no ``target`` of the unpruned model:
            then all layers of a block are read at once, none of which makes up for another.
        of: ``"weights"`` if it scores entries of weights, ``"neurons"`` if it scores activations, ``"layers"`` if it
            decides and updates whole weights, layer after layer.
        paper: Where it was proposed.
        entrywise: Whether each entry's score depends on that entry alone, so that a weight may be judged in parts.
        relative_error: Wanted of the evidence where it is estimated.
    """

    name: str
    function: Callable[[Any], Any]
    needs: frozenset[str] = frozenset()
    of: str = "weights"
    paper: str = ""
    entrywise: bool = False
    relative_error: float = 0.1

    def __call__(self, evidence: Any) -> Any:
        """Returns the scores of one tensor, or what a criterion of layers decides."""
        return self.function(evidence)

    def parts(self, evidence: Any) -> Iterator[tuple[slice, Tensor]]:
        """Yields the scores of one tensor, some of its rows at a time where that is possible."""
        weight = evidence.weight
        if not (self.entrywise and weight.numel() > PART):
            yield slice(None), self(evidence)
            return
        step = max(1, PART * weight.shape[0] // weight.numel())
        for index, rows in enumerate(weight.split(step)):
            yield slice(index * step, (index + 1) * step), self(evidence.of(rows))

    def together(self, evidence: Sequence[Any]) -> Sequence[Tensor]:
        """Returns the scores of many vectors, judged as one; none where few are, or each has to be judged by itself."""
        if not self.entrywise or len(evidence) < MANY:
            return ()
        weights = [one.weight for one in evidence]
        if len({(weight.device, weight.dtype) for weight in weights}) != 1:
            return ()
        joined = torch.cat(weights)
        scores = self(evidence[0].of(joined))
        alike = isinstance(scores, Tensor) and scores.shape == joined.shape
        return scores.split([weight.shape[0] for weight in weights]) if alike else ()


Importance: TypeAlias = str | Criterion | Callable[[Any], Tensor]
"""A criterion's name, a criterion, or a function of evidence."""

_Function = TypeVar("_Function", bound=Callable[[Any], Any])
_REGISTERED: dict[tuple[str, str], Criterion] = {}


def criterion(
    name: str, *, needs: Iterable[str] = (), of: str = "weights", paper: str = "", entrywise: bool = False
) -> Callable[[_Function], _Function]:
    """Registers a function as the criterion ``name``.

    Args:
        name: A new name; the same name may stand once for weights and once for neurons.
        needs: The evidence it reads, besides the weight; see :class:`netopt.importance.Evidence`.
        of: ``"weights"``, ``"neurons"`` or ``"layers"``; see :class:`Criterion`.
        paper: Where it was proposed.
        entrywise: Whether each entry's score depends on that entry alone.

    Raises:
        InvalidArgumentError: the name is taken.

    Example:
        >>> @criterion("distance_to_one")
        ... def distance_to_one(seen):
        ...     return (seen.weight - 1).abs()
        >>> "distance_to_one" in names()
        True
    """
    if of not in KINDS:
        raise UnknownNameError.of("kind of criterion", of, KINDS)
    if (name, of) in _REGISTERED:
        raise InvalidArgumentError(f"the criterion {name!r} of {of} exists already; choose another name.")

    def register(function: _Function) -> _Function:
        _REGISTERED[name, of] = Criterion(name, function, frozenset(needs), of, paper, entrywise)
        return function

    return register


def names(of: str | None = None) -> tuple[str, ...]:
    """Lists the names of the registered criteria, sorted: of ``"weights"``, of ``"neurons"``, of ``"layers"``, or all.

    Example:
        >>> names("layers")
        ('admm', 'sparsegpt', 'wanda_layerwise')
    """
    return tuple(sorted({name for name, kind in _REGISTERED if of in (None, kind)}))


def lookup(importance: Importance, *, of: str = "weights") -> Criterion:
    """Returns the criterion meant, such that it scores weights or, with ``of="neurons"``, activations or weights.

    A function that is no criterion becomes one, with the needs in its attribute ``needs`` if it has that.

    Raises:
        UnknownNameError: no criterion of that name; the message suggests near ones.
        InvalidArgumentError: a criterion of layers, which scores nothing, where one that does is needed.
        ArgumentTypeError: neither a name nor callable.
    """
    found = _found(importance, of)
    if found.of == "layers" and of != "layers":
        raise InvalidArgumentError(
            f"importance {found.name!r} decides and updates the weights of whole layers, one after the other, and "
            f"scores no single {'neuron' if of == 'neurons' else 'weight'}; it is for prune_weights. "
            f"What scores is {', '.join(sorted({*names(of), *names('weights')}))}."
        )
    return found


def updates_layers(importance: Any) -> bool:
    """Whether a criterion of layers is meant: one that decides masks and new values of whole weights."""
    if isinstance(importance, str):
        return (importance, "layers") in _REGISTERED
    return isinstance(importance, Criterion) and importance.of == "layers"


def name_of(importance: Any, what: str, known: Sequence[str], others: str) -> str:
    """The name, for a report, of a criterion of whole parts: one that is known, a function, or scores.

    Raises:
        UnknownNameError: There is none of this name.
        ArgumentTypeError: It is neither a name nor one of the ``others``.
    """
    if isinstance(importance, str):
        if importance not in known:
            raise UnknownNameError.of(what, importance, known)
        return importance
    if isinstance(importance, Mapping):
        return "given"
    if not callable(importance):
        raise ArgumentTypeError(f"importance must be a name, {others}, not {type(importance).__name__}.")
    return getattr(importance, "__name__", type(importance).__name__)


def _found(importance: Importance, of: str) -> Criterion:
    if isinstance(importance, Criterion):
        return importance
    if isinstance(importance, str):
        kinds = [of, "weights", "layers"]
        found = next((_REGISTERED[importance, kind] for kind in kinds if (importance, kind) in _REGISTERED), None)
        if found is None:
            # What scores no neuron is no suggestion where neurons are scored.
            usable = [kind for kind in kinds if kind != "layers" or of != "neurons"]
            raise UnknownNameError.of("importance", importance, {name for kind in usable for name in names(kind)})
        return found
    if callable(importance):
        needs = frozenset(getattr(importance, "needs", ()))
        return Criterion(getattr(importance, "__name__", type(importance).__name__), importance, needs)
    raise ArgumentTypeError(
        f"importance must be a name, a criterion or a function of evidence, not {type(importance).__name__}; "
        "netopt.importance.names() lists the names."
    )
