"""The choice among counts that come in groups: such as one width for all layers, and whole heads with it.

Each group is a list of choices, of which one is taken; which neurons then go is free on every axis. The choices taken
lose the least of the scores for what they save, by one price for all groups that is found by bisection, as Everett,
Generalized Lagrange Multiplier Method (1963), https://doi.org/10.1287/opre.11.3.399; two groups at a time are then
chosen anew, which uses up the budget.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor

from netopt.errors import NothingToPruneError

__all__ = ["Choices", "choose_alike", "choose_within", "positions"]

Choices: TypeAlias = Sequence[Sequence[Mapping[str, int]]]
"""Groups of choices, each the counts of some axes; the first of every group are the present ones."""
Counts = dict[str, int]
_HALVINGS = 60
_MOST_TRIED = 128  # choices of the smaller of two groups
_LEAST_PRICE, _MOST_PRICE = 1e-12, 1e12


def choose_within(
    scores: Mapping[str, Tensor],
    groups: Choices,
    cost: Callable[[Mapping[str, int]], int],
    limit: int,
    *,
    comparable: bool = False,
) -> Counts:
    """The choices that lose the least of the scores, at a cost of at most ``limit``.

    Args:
        scores: One score a neuron, by axis.
        groups: Of choices.
        cost: Of counts by axis; axes not named keep theirs.
        limit: The most it may cost.
        comparable: Whether scores of different axes can be added up as they are. Otherwise the share that an axis keeps
            counts.

    Raises:
        NothingToPruneError: No choices cost as little.
    """
    lost = _losses(scores, comparable=comparable)
    groups = [_worthwhile(group, lost, cost) for group in groups if len(group) > 1]
    losses = [[sum(lost[name][count] for name, count in one.items()) for one in group] for group in groups]
    gone = [[sum(group[0].values()) - sum(one.values()) for one in group] for group in groups]
    units = _unit_costs(groups, gone, cost)

    def at(price: float) -> list[int]:
        worth = [
            [loss - price * unit * less for loss, less in zip(one, freed, strict=True)]
            for one, freed, unit in zip(losses, gone, units, strict=True)
        ]
        return [min(range(len(one)), key=one.__getitem__) for one in worth]

    smallest = [max(range(len(one)), key=one.__getitem__) for one in gone]
    if cost(_taken(groups, smallest)) > limit:
        raise NothingToPruneError(
            f"the budget allows {limit:,}, and the smallest model that its configuration can say and these axes allow "
            f"costs {cost(_taken(groups, smallest)):,}; allow more, include more, or leave out loadable=True"
        )
    low, high, chosen = math.log(_LEAST_PRICE), math.log(_MOST_PRICE), smallest
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = at(math.exp(middle))
        if cost(_taken(groups, found)) <= limit:
            high, chosen = middle, found
        else:
            low = middle
    return _taken(groups, _improved(groups, losses, chosen, lambda picked: cost(_taken(groups, picked)) <= limit))


def _worthwhile(
    group: Sequence[Mapping[str, int]], lost: Mapping[str, Sequence[float]], cost: Callable[[Mapping[str, int]], int]
) -> list[Mapping[str, int]]:
    """The choices beside which none loses as little and costs less, the present one first."""
    found: list[Mapping[str, int]] = []
    least = math.inf
    for _, one in sorted(enumerate(group), key=lambda two: (sum(lost[n][c] for n, c in two[1].items()), two[0])):
        price = cost(one)
        if price < least:
            found.append(one)
            least = price
    return found


def choose_alike(groups: Choices, targets: Mapping[str, int]) -> Counts:
    """Of every group that has axes with a target the largest choice in which none of these is above it."""
    chosen: Counts = {}
    for group in groups:
        named = [name for name in group[0] if name in targets and min(one[name] for one in group) < group[0][name]]
        fitting = [one for one in group if all(one[name] <= targets[name] for name in named)]
        if named:
            chosen.update(max(fitting, key=lambda one: sum(one.values())) if fitting else group[-1])
    return chosen


def _losses(scores: Mapping[str, Tensor], *, comparable: bool) -> dict[str, list[float]]:
    """By axis, how much is lost where so many of its best neurons stay.

    That is the sum of what goes, or where scores cannot be compared minus the logarithm of the share kept.
    """
    found = {}
    for name, one in scores.items():
        values = one.double()
        values = (values - values.min().clamp(max=0)).sort(descending=True).values
        values = values + values.sum() * 1e-9 + 1e-300  # so that none is worth nothing
        kept = values.cumsum(0) / values.sum()
        loss = values.sum() * (1 - kept.clamp(max=1)) if comparable else -kept.clamp(max=1).log()
        found[name] = [math.inf, *loss.tolist()]
    return found


def _unit_costs(
    groups: Choices, gone: Sequence[Sequence[int]], cost: Callable[[Mapping[str, int]], int]
) -> list[float]:
    """What a neuron of each group costs in the whole model: the saving of its middle choice, spread over what goes."""
    whole, units = cost({}), []
    for group, less in zip(groups, gone, strict=True):
        middle = max(1, len(group) // 2)
        units.append(max(whole - cost(group[middle]), 1e-9) / max(less[middle], 1))
    return [one / max(whole, 1) for one in units]


def _taken(groups: Choices, picked: Sequence[int]) -> Counts:
    return {name: n for group, at in zip(groups, picked, strict=True) for name, n in group[at].items()}


def _improved(
    groups: Choices,
    losses: Sequence[Sequence[float]],
    picked: Sequence[int],
    fits: Callable[[Sequence[int]], bool],
) -> list[int]:
    """Choices that lose less and still fit: of two groups at a time the best, until that gains nothing."""
    orders = [sorted(range(len(one)), key=one.__getitem__) for one in losses]

    def best_beside(now: list[int], place: int) -> list[int] | None:
        """The choice of one group that loses least of those that fit beside the others."""
        order = orders[place]
        trials = [[*now[:place], choice, *now[place + 1 :]] for choice in order]
        least = bisect_left(trials, True, key=fits)
        return trials[least] if least < len(trials) else None

    def lost(now: list[int]) -> float:
        return sum(one[at] for one, at in zip(losses, now, strict=True))

    now = list(picked)
    sizes = sorted(range(len(groups)), key=lambda place: len(groups[place]))
    pairs = list(combinations(sizes, 2)) or [(0, 0)] * len(groups)
    while True:
        before = now
        for one, other in pairs:
            tried = {now[one], *orders[one][:: -(-len(orders[one]) // _MOST_TRIED)]}
            found = [best_beside([*now[:one], at, *now[one + 1 :]], other) for at in sorted(tried)]
            now = min([now, *(each for each in found if each is not None)], key=lost)
        if now == before:
            return now


def positions(counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Positions in the numbers that counts say, where it does not matter which."""
    return {name: torch.arange(count) for name, count in counts.items()}
