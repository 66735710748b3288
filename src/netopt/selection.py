"""Which neurons stay: from scores to kept positions.

Scores of different axes are made comparable by one stated normalisation, ranked together or in groups, and cut at an
amount, a threshold, or a budget. Names, numbers and scores only: nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from netopt.errors import (
    ArgumentTypeError,
    InvalidArgumentError,
    NonFiniteError,
    NothingToPruneError,
    SelectorError,
    UnknownNameError,
    nearest,
    percent,
)

__all__ = [
    "NORMALIZATIONS",
    "Amount",
    "Limits",
    "Ranking",
    "best",
    "check_amount",
    "check_scope",
    "check_threshold",
    "grouped",
    "normalized",
    "removed",
    "select",
    "select_within",
]

Amount = float | int | Mapping[str, float | int]
"""A fraction in [0, 1), a count, or one of these for each axis name or pattern."""

Scope = Literal["global", "kind", "layer"]

Groups = Sequence[Sequence[str]]
"""Names of axes, each in one group, whose neurons are ranked together; every group loses the same share."""

Scores = Mapping[str, Tensor]
"""One score a neuron, higher means keep, by axis name."""


@dataclass(frozen=True)
class Ranking:
    """In which order neurons go.

    Attributes:
        groups: Axes that are ranked together; by default all.
        normalization: What makes scores of different axes comparable; by default the one in use.
        unit_costs: What one neuron of each axis costs in the whole model, only their ratios matter; by default alike.
    """

    groups: Groups | None = None
    normalization: str | None = None
    unit_costs: Mapping[str, float] | None = None


Counts = dict[str, int]


def _as_they_are(scores: Tensor) -> Tensor:
    return scores


def _by(scale: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def divided(scores: Tensor) -> Tensor:
        size = scale(scores.abs())
        return scores / size if float(size) > 0 else scores

    return divided


def _share_of_what_is_left(scores: Tensor) -> Tensor:
    """Each score over the sum of those that are not below it: the last neuron of an axis is worth the whole axis."""
    order = torch.sort(scores, stable=True).indices
    ascending = (scores - scores.min().clamp(max=0))[order]
    left = ascending.flip(0).cumsum(0).flip(0)
    shares = torch.where(left > 0, ascending / left, torch.zeros_like(left))
    return torch.empty_like(scores).index_copy_(0, order, shares)


NORMALIZATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": _as_they_are,
    "mean": _by(torch.mean),
    "max": _by(torch.max),
    "sum": _by(torch.sum),
    "left": _share_of_what_is_left,
}
"""What makes scores of different axes comparable; none changes the order within an axis."""

NORMALIZATION = "left"
"""The one in use, after LAMP (Lee et al., 2021, https://arxiv.org/abs/2010.07611).

With the default criterion it is the best of these on an MNIST net at a share of neurons, near the best global one at
a share of MACs, and near the best on MiniLM; docs/neurons.md has both trials.
"""


@dataclass(frozen=True)
class Limits:
    """What every choice has to respect.

    Args:
        round_to: Keep a multiple of this many neurons on every axis that has more.
        feasible: The nearest counts that satisfy every equation between sizes, from counts by axis name.
    """

    round_to: int = 1
    feasible: Callable[[Mapping[str, int]], Mapping[str, int]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int):
            raise ArgumentTypeError(f"round_to must be a whole number, got {self.round_to!r}")
        if self.round_to < 1:
            raise InvalidArgumentError(f"round_to must be 1 or more, got {self.round_to}")

    def settle(self, counts: Mapping[str, int], sizes: Mapping[str, int], *, down: bool = False) -> Counts:
        """The counts nearest to ``counts`` that are allowed; with ``down``, not above where that can be helped."""
        rounded = {name: self._round(count, sizes[name], down=down) for name, count in counts.items()}
        return dict(self.feasible(rounded)) if self.feasible is not None else rounded

    def _round(self, count: int, size: int, *, down: bool) -> int:
        step = self.round_to
        if step == 1 or count >= size:
            return max(1, min(count, size))
        multiple = (count // step if down else math.floor(count / step + 0.5)) * step
        return min(max(multiple, step), size)


def select(
    scores: Scores,
    amount: Amount | None = None,
    *,
    threshold: float | None = None,
    ranking: Ranking = Ranking(),
    limits: Limits = Limits(),
) -> dict[str, Tensor]:
    """Keeps what an amount or a threshold leaves; at least one neuron on every axis.

    Args:
        scores: One score a neuron, by axis; higher means keep.
        amount: Fraction in [0, 1) of all neurons, a count, or a mapping from axis names or patterns to these, whose
            amounts are each of one axis and which leaves the other axes whole.
        threshold: Instead of an amount: neurons that score below are removed.
        ranking: What is ranked together; the amount is of each group, and costs do not matter.
        limits: Multiples and equations to respect.

    Returns:
        Kept positions, ascending, of every axis.

    Raises:
        InvalidArgumentError: The amount or threshold is out of range, or both or none are given.
        NonFiniteError: Some score is NaN or infinite.

    Example:
        >>> select({"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([5.0, 5.0])}, 0.4)
        {'a': tensor([0]), 'b': tensor([0, 1])}
    """
    _check_scores(scores)
    sizes = {name: len(one) for name, one in scores.items()}
    if (amount is None) == (threshold is None):
        raise InvalidArgumentError("give exactly one of amount and threshold")
    if threshold is not None:
        check_threshold(threshold)
        counts = {name: int((one >= threshold).sum()) for name, one in scores.items()}
    else:
        assert amount is not None
        check_amount(amount)
        counts = _counts(scores, amount, replace(ranking, unit_costs=None))
    return best(scores, limits.settle(counts, sizes))


def best(scores: Scores, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The positions of the ``counts`` best neurons of every axis, ascending; of equal ones the first."""
    # Tensors take several times as long to sort a few hundred numbers.
    order = {name: np.argsort(-one.double().numpy(), kind="stable") for name, one in scores.items()}
    return {name: torch.from_numpy(np.sort(first[: counts[name]])) for name, first in order.items()}


def select_within(
    scores: Scores,
    cost: Callable[[Mapping[str, Tensor]], int],
    limit: int,
    *,
    ranking: Ranking = Ranking(),
    limits: Limits = Limits(),
) -> dict[str, Tensor]:
    """Keeps as much as a budget allows.

    Neurons go in the order of least score for the cost they free: that of the greedy solution of the knapsack problem,
    with each neuron's cost taken in the whole model; of several groups each loses the same share. How many go is found
    by bisection on the true cost, so that the result is never above ``limit``, and with one neuron, or the next smaller
    share, removed it would be.

    Args:
        scores: One score a neuron, by axis; higher means keep.
        cost: What a model with these kept positions costs (parameters, MACs); falls as neurons go.
        limit: The most it may cost.
        ranking: What is ranked together, and what one neuron of each axis costs.
        limits: Multiples and equations to respect.

    Raises:
        NothingToPruneError: Even one neuron on every axis costs more than ``limit``.
    """
    _check_scores(scores)
    sizes = {name: len(one) for name, one in scores.items()}
    steps = _Steps.of(_queues(scores, ranking))
    tried: dict[int, tuple[dict[str, Tensor], int]] = {}

    def attempt(step: int) -> tuple[dict[str, Tensor], int]:
        if step not in tried:
            kept = best(scores, limits.settle(steps(step), sizes, down=True))
            tried[step] = kept, cost(kept)
        return tried[step]

    low, high = 0, steps.count
    if attempt(high)[1] > limit:
        raise NothingToPruneError(
            f"the budget allows {limit:,}, and with one neuron left on every axis that may be pruned the model still "
            f"costs {attempt(high)[1]:,}; allow more, or exclude less"
        )
    while low < high:
        middle = (low + high) // 2
        if attempt(middle)[1] <= limit:
            high = middle
        else:
            low = middle + 1
    return attempt(high)[0]


class _Queue:
    """The neurons of axes that are ranked together, in the order in which they go; one stays on every axis."""

    def __init__(self, scores: Scores, ranking: Ranking) -> None:
        self._sizes = {name: len(one) for name, one in scores.items()}
        self._order = _cheapest_first(scores, ranking)
        self.size = sum(self._sizes.values())

    def __len__(self) -> int:
        """How many may go."""
        return len(self._order)

    def counts(self, gone: int) -> Counts:
        """How many neurons each axis keeps when so many go, or all that may."""
        order = self._order[:gone]
        return {name: size - int((order == place).sum()) for place, (name, size) in enumerate(self._sizes.items())}


def _queues(scores: Scores, ranking: Ranking) -> list[_Queue]:
    groups = ranking.groups or [list(scores)]
    return [_Queue({name: scores[name] for name in group}, ranking) for group in groups]


@dataclass(frozen=True)
class _Steps:
    """Counts by axis once the same share of every group has gone; it grows by as little as removes one neuron more."""

    queues: Sequence[_Queue]
    shares: Sequence[Fraction]

    @classmethod
    def of(cls, queues: Sequence[_Queue]) -> _Steps:
        # Half a neuron is rounded up, so at these shares one more goes.
        shares = {Fraction(2 * gone - 1, 2 * one.size) for one in queues for gone in range(1, len(one) + 1)}
        return cls(queues, [Fraction(0), *sorted(shares)])

    @property
    def count(self) -> int:
        return len(self.shares) - 1

    def __call__(self, step: int) -> Counts:
        share, found = self.shares[step], {}
        for one in self.queues:
            found |= one.counts(math.floor(share * one.size + Fraction(1, 2)))
        return found


def normalized(scores: Tensor, how: str | None = None) -> Tensor:
    """Scores of one axis made comparable with those of others.

    Args:
        scores: Of the neurons of one axis.
        how: A name in :data:`NORMALIZATIONS`; by default the one in use.

    Raises:
        UnknownNameError: There is no normalisation of that name.
    """
    how = NORMALIZATION if how is None else how
    if how not in NORMALIZATIONS:
        raise UnknownNameError.of("normalization", how, NORMALIZATIONS)
    return NORMALIZATIONS[how](scores)


def check_amount(amount: Amount) -> None:
    """Checks an amount before any work is done.

    Raises:
        ArgumentTypeError: It is not a number, or a mapping of names to numbers.
        InvalidArgumentError: It is out of range.
    """
    if isinstance(amount, Mapping):
        if not amount:
            raise InvalidArgumentError("amount is an empty mapping, so nothing would be removed")
        for one in amount.values():
            if isinstance(one, Mapping):
                raise ArgumentTypeError("an amount inside a mapping must be a number")
            check_amount(one)
        return
    if isinstance(amount, bool) or not isinstance(amount, (int, float)):
        raise ArgumentTypeError(f"amount must be a fraction in [0, 1), a count or a mapping of these, got {amount!r}")
    if isinstance(amount, float) and not 0 <= amount < 1:
        hint = f"; for a count write {int(amount)}" if amount.is_integer() and amount >= 1 else ""
        raise InvalidArgumentError(f"amount must be a fraction in [0, 1), got {amount}{hint}{percent(amount)}")
    if amount < 0:
        raise InvalidArgumentError(f"amount must be 0 or more, got {amount}")


def _counts(scores: Scores, amount: Amount, ranking: Ranking) -> Counts:
    """How many neurons each axis keeps."""
    if isinstance(amount, Mapping):
        return _counts_by_name({name: len(one) for name, one in scores.items()}, amount)
    queues = _queues(scores, ranking)
    if isinstance(amount, int) and ranking.groups is None and amount > len(queues[0]):
        raise InvalidArgumentError(
            f"amount asks for {amount} neurons and {len(queues[0])} can go: {queues[0].size} on {len(scores)} axes, of "
            f"which each keeps one{percent(amount)}"
        )
    return {name: count for one in queues for name, count in one.counts(removed(amount, one.size)).items()}


def _counts_by_name(sizes: Mapping[str, int], amounts: Mapping[str, float | int]) -> Counts:
    unused = set(amounts)
    counts = {}
    for name, size in sizes.items():
        fitting = [key for key in amounts if key == name or fnmatchcase(name, key)]
        unused.difference_update(fitting)
        chosen = name if name in fitting else next(iter(fitting), None)
        counts[name] = size if chosen is None else max(1, size - removed(amounts[chosen], size))
    if unused:
        wrong = min(unused)
        raise SelectorError(f"amount names {wrong!r}, which fits no axis. {nearest(wrong, sizes)}".strip())
    return counts


def removed(amount: float, size: int) -> int:
    """How many of ``size`` an amount removes, to the nearest; half a neuron is rounded up."""
    return math.floor(amount * size + 0.5) if isinstance(amount, float) else min(amount, size)


def _cheapest_first(scores: Scores, ranking: Ranking) -> Tensor:
    """The axis (by place) of every neuron that may go, in the order they go; the best of every axis stays.

    Only axes are listed: on each, the neurons with the lowest scores go first.
    """
    costs = ranking.unit_costs or dict.fromkeys(scores, 1.0)
    ranks, places = [], []
    for place, (name, one) in enumerate(scores.items()):
        going = normalized(one.double(), ranking.normalization).sort().values[:-1]
        ranks.append(going / max(float(costs[name]), 1e-12))
        places.append(torch.full((len(going),), place))
    if not ranks:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat(places)[torch.sort(torch.cat(ranks), stable=True).indices]


def _check_scores(scores: Scores) -> None:
    if not scores:
        raise NothingToPruneError("no axis has scores, so there is nothing to select from")
    for name, one in scores.items():
        if one.dim() != 1 or not one.shape[0]:
            raise InvalidArgumentError(f"axis `{name}` needs one score a neuron, got shape {tuple(one.shape)}")
    if math.isfinite(torch.cat([*scores.values()]).sum(dtype=torch.float64).item()):
        return  # as nothing is in the sum then
    for name, one in scores.items():
        if not bool(one.isfinite().all()):
            raise NonFiniteError(f"scores of axis `{name}` are not finite; look for NaN or infinity in its weights")


def grouped(kinds: Iterable[str | None], names: Iterable[str]) -> list[list[str]]:
    """The names of each kind; one of no kind is by itself.

    Example:
        >>> grouped(["ffn", "width", "ffn", None], ["fc1", "out", "fc2", "rest"])
        [['fc1', 'fc2'], ['out'], ['rest']]
    """
    found: dict[str | int, list[str]] = {}
    for place, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        found.setdefault(place if kind is None else kind, []).append(name)
    return list(found.values())


def check_scope(scope: str) -> Scope:
    """The scope of that name.

    Raises:
        UnknownNameError: There is none.
    """
    scopes: Sequence[Scope] = ("global", "kind", "layer")
    for known in scopes:
        if scope == known:
            return known
    raise UnknownNameError.of("scope", str(scope), scopes)


def check_threshold(threshold: float) -> None:
    """Checks a threshold before any work is done.

    Raises:
        ArgumentTypeError: It is not a number.
        InvalidArgumentError: It is NaN.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise ArgumentTypeError(f"threshold must be a number, got {threshold!r}")
    if math.isnan(threshold):
        raise InvalidArgumentError("threshold is NaN, so nothing compares with it")
