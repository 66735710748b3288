"""Criteria by name.

A criterion is a pure function from evidence about a tensor to a score for each of its entries; higher means keep.
Modules, dimensions and axes are not its business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from netopt.errors import ArgumentTypeError, InvalidArgumentError, UnknownNameError

__all__ = ["Criterion", "Importance", "criterion", "lookup", "names"]

KINDS = ("weights", "neurons")


@dataclass(frozen=True)
class Criterion:
    """A function from evidence to a score, with the evidence it needs.

    Attributes:
        name: The name it is registered under.
        function: Takes the evidence about one tensor, returns a score of the tensor's shape; higher means keep.
        needs: What is to be collected for it; see :class:`netopt.importance.Evidence`.
        of: ``"weights"`` if it scores entries of weights, ``"neurons"`` if it scores activations.
        paper: Where it was proposed.
    """

    name: str
    function: Callable[[Any], Tensor]
    needs: frozenset[str] = frozenset()
    of: str = "weights"
    paper: str = ""

    def __call__(self, evidence: Any) -> Tensor:
        """Returns the scores of one tensor."""
        return self.function(evidence)


Importance: TypeAlias = str | Criterion | Callable[[Any], Tensor]
"""A criterion's name, a criterion, or a function of evidence."""

_REGISTERED: dict[tuple[str, str], Criterion] = {}


def criterion(
    name: str, *, needs: Iterable[str] = (), of: str = "weights", paper: str = ""
) -> Callable[[Callable[[Any], Tensor]], Callable[[Any], Tensor]]:
    """Registers a function as the criterion ``name``.

    Args:
        name: A new name; the same name may stand once for weights and once for neurons.
        needs: The evidence it reads, besides the weight; see :class:`netopt.importance.Evidence`.
        of: ``"weights"`` or ``"neurons"``.
        paper: Where it was proposed.

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

    def register(function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        _REGISTERED[name, of] = Criterion(name, function, frozenset(needs), of, paper)
        return function

    return register


def names(of: str | None = None) -> tuple[str, ...]:
    """Lists the names of the registered criteria, of ``"weights"``, of ``"neurons"`` or of both, sorted."""
    return tuple(sorted({name for name, kind in _REGISTERED if of in (None, kind)}))


def lookup(importance: Importance, *, of: str = "weights") -> Criterion:
    """Returns the criterion meant; for neurons one of neurons comes first, and one of weights serves otherwise.

    A function that is no criterion becomes one, with the needs in its attribute ``needs`` if it has that.

    Raises:
        UnknownNameError: no criterion of that name; the message suggests near ones.
        ArgumentTypeError: neither a name nor callable.
    """
    if isinstance(importance, Criterion):
        return importance
    if isinstance(importance, str):
        found = _REGISTERED.get((importance, of)) or _REGISTERED.get((importance, "weights"))
        if found is None:
            raise UnknownNameError.of("importance", importance, {*names(of), *names("weights")})
        return found
    if callable(importance):
        needs = frozenset(getattr(importance, "needs", ()))
        return Criterion(getattr(importance, "__name__", type(importance).__name__), importance, needs)
    raise ArgumentTypeError(
        f"importance must be a name, a criterion or a function of evidence, not {type(importance).__name__}; "
        "netopt.importance.names() lists the names."
    )
