"""How much is to be removed, and which neurons then stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from netopt import measure
from netopt.errors import ArgumentTypeError, InvalidArgumentError, SelectorError
from netopt.importance.neurons import NeuronScores
from netopt.plan.build import make_plan
from netopt.prune.candidates import choices, fits
from netopt.prune.loadable import Choices, choose_alike, choose_within, positions
from netopt.prune.look import Found
from netopt.selection import (
    Amount,
    Limits,
    Ranking,
    Scope,
    best,
    check_amount,
    check_scope,
    check_threshold,
    grouped,
    removed,
    select,
    select_within,
)

__all__ = ["Budget", "by_axis", "choose", "without"]


Cost: TypeAlias = Callable[[Mapping[str, Tensor]], int]


OF = ("now", "original")


@dataclass(frozen=True)
class Budget:
    """How much is to be removed: exactly one of the first four is given."""

    amount: Amount | None
    threshold: float | None
    max_params: float | None
    max_macs: float | None
    scope: Scope
    round_to: int
    loadable: bool = False
    of: str = "now"

    def check(self) -> None:
        """Checks everything before any work is done.

        Raises:
            InvalidArgumentError: Something is out of range, or not exactly one of the four is given.
            ArgumentTypeError: Something is no number.
        """
        given = self._given()
        if len(given) != 1:
            got = " and ".join(given) if given else "none"
            raise InvalidArgumentError(f"give exactly one of amount, threshold, max_params and max_macs, not {got}.")
        if self.amount is not None:
            check_amount(self.amount)
        if self.threshold is not None:
            check_threshold(self.threshold)
        if self.loadable and self.scope == "kind":
            raise InvalidArgumentError(
                "loadable=True ties the counts of axes of several kinds; use scope='global', or 'layer'."
            )
        if self.loadable and self.threshold is not None:
            raise InvalidArgumentError(
                "loadable=True ties the counts of axes, which a threshold decides one by one; give amount, max_params "
                "or max_macs."
            )
        check_scope(self.scope)
        self._check_of()
        Limits(self.round_to)
        for name in ("max_params", "max_macs"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ArgumentTypeError(f"{name} must be a fraction of the model's, in (0, 1], not {value!r}.")
            if not 0 < value <= 1:
                raise InvalidArgumentError(f"{name} must be a fraction of the model's, in (0, 1], not {value}.")

    def _check_of(self) -> None:
        refused = self.amount is None or self.loadable or self.scope == "kind"
        if self.of not in OF or (self.of == "original" and refused):
            raise InvalidArgumentError(
                f"of={self.of!r} is 'now', or 'original' for an amount, without loadable=True or scope='kind'."
            )

    def _given(self) -> dict[str, Any]:
        four = {name: getattr(self, name) for name in ("amount", "threshold", "max_params", "max_macs")}
        return {name: value for name, value in four.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """The request, for the report."""
        loadable = {"loadable": True} if self.loadable else {}
        return {**self._given(), "scope": self.scope, "round_to": self.round_to, **loadable}


def choose(found: Found, scored: NeuronScores, budget: Budget, groups: Choices | None = None) -> dict[str, Tensor]:
    """The positions that stay, by axis; with ``groups``, as many as one choice from each of them says.

    Raises:
        InvalidArgumentError: An axis that may not shrink would have to, because the model computes with its size.
        NothingToPruneError: The budget cannot be met.
    """
    scores, normalization = scored.scores, "none" if scored.comparable else None
    if groups is not None:
        return best(scores, {**found.sizes, **_from_groups(found, scores, budget, groups)})
    limits, ranked = Limits(budget.round_to, _feasible(found)), _together(found, budget.scope)
    if budget.amount is not None or budget.threshold is not None:
        return select(
            scores,
            by_axis(found, budget.amount),
            threshold=budget.threshold,
            ranking=Ranking(ranked, normalization),
            limits=limits,
        )
    cost_of, share = _cost(found, budget)
    whole = cost_of({})
    costs = None
    if budget.scope != "layer":  # where the order on an axis is all that counts
        costs = _unit_costs(found.sizes, cost_of, whole, limits)
    return select_within(
        scores,
        cost_of,
        int(share * whole),
        ranking=Ranking(ranked, normalization, costs),
        limits=limits,
    )


def _together(found: Found, scope: Scope) -> list[list[str]] | None:
    """The axes whose neurons are ranked together, ``None`` for all."""
    if scope == "global":
        return None
    return grouped([axis.kind if scope == "kind" else None for axis in found.chosen], found.sizes)


def without(found: Found, remove: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The positions that stay where these are removed, by the name of an axis or of the layer that makes it.

    Raises:
        UnknownNameError: There is no axis of a name.
        InvalidArgumentError: A position does not exist, none would stay, the axis cannot shrink, or the counts left do
            not fit the sizes of other axes.
    """
    kept: dict[str, Tensor] = {}
    for name, removed_here in remove.items():
        axis = found.axes[name]
        wrong = [one for one in removed_here if not 0 <= one < axis.size]
        stays = torch.tensor(sorted(set(range(axis.size)).difference(removed_here)), dtype=torch.int64)
        why = found.kept_out.get(axis.name)
        if why is not None or wrong or not len(stays):
            why = (
                f"it {why}" if why else f"{wrong[0]} is no position of its {axis.size}" if wrong else "none would stay"
            )
            raise InvalidArgumentError(f"neurons of axis `{axis.name}` cannot be removed: {why}.")
        kept[axis.name] = stays
    counts = {name: len(stays) for name, stays in kept.items()}
    possible = found.axes.feasible(counts)
    tied = [name for name, n in possible.items() if n != counts.get(name, found.axes[name].size)]
    if tied:
        nearest = ", ".join(f"{name}: {possible[name]}" for name in dict.fromkeys([*counts, *tied]))
        raise InvalidArgumentError(
            f"the model computes with sizes of these axes; the nearest possible counts are {nearest}."
        )
    return kept


def _from_groups(found: Found, scores: Mapping[str, Tensor], budget: Budget, groups: Choices) -> dict[str, int]:
    """The counts of one choice of each group, within the budget."""
    sizes, amount = found.sizes, by_axis(found, budget.amount)
    groups = [_rounded([one[0], *found.axes.satisfying(one[1:])], budget.round_to) for one in groups]
    if isinstance(amount, Mapping):
        return choose_alike(
            groups, {name: size - removed(amount[name], size) for name, size in sizes.items() if name in amount}
        )
    if amount is not None and budget.scope == "layer":
        return choose_alike(groups, {name: size - removed(amount, size) for name, size in sizes.items()})
    cost, share = _cost(found, budget)
    if amount is not None:
        whole = sum(sizes.values())
        return choose_within(
            scores, groups, lambda counts: sum({**sizes, **counts}.values()), whole - removed(amount, whole)
        )
    return choose_within(scores, groups, lambda counts: cost(positions(counts)), int(share * cost({})))


def _rounded(group: Sequence[Mapping[str, int]], step: int) -> list[Mapping[str, int]]:
    """The choices in which every axis keeps all or a multiple of so many."""
    return [one for one in group if all(n == group[0][name] or n % step == 0 for name, n in one.items())]


def _cost(found: Found, budget: Budget) -> tuple[Cost, float]:
    """What the budget counts, and the share of it that may stay; of an amount, the share of parameters is not used."""
    if budget.max_macs is not None:
        return _macs(found), budget.max_macs
    return _parameters(found), budget.max_params or 1.0


def by_axis(found: Found, amount: Amount | None) -> Amount | None:
    """An amount by name, pattern or kind as one by axis; a name goes before what comes first of the others."""
    if not isinstance(amount, Mapping):
        return amount
    by_axis = {name: one for name, one in amount.items() if name in found.sizes}
    for key, one in amount.items():
        fitting = [axis.name for axis in found.chosen if fits(axis, key)]
        if not fitting:
            raise SelectorError(f"amount names {key!r}, which fits no axis. {choices(found.axes)}")
        for name in fitting:
            by_axis.setdefault(name, one)
    return by_axis


def _feasible(found: Found) -> Callable[[Mapping[str, int]], dict[str, int]]:
    sizes = found.sizes

    def feasible(counts: Mapping[str, int]) -> dict[str, int]:
        possible = found.axes.feasible(counts)
        coupled = next((one for one, n in possible.items() if one not in sizes and n < found.axes[one].size), None)
        if coupled is not None:
            raise InvalidArgumentError(
                f"axis `{coupled}` would have to shrink with the others because the model computes with their sizes, "
                "and it is excluded; exclude what it is tied to as well, or include it."
            )
        return {name: possible[name] for name in sizes}

    return feasible


def _parameters(found: Found) -> Cost:
    """Entries of all parameters once these positions stay, a shared one counted once."""
    parameters = found.view.own_parameters

    def cost_of(kept: Mapping[str, Tensor]) -> int:
        tensors, total = found.axes.tensor_indices(kept), 0
        for name, parameter in parameters.items():
            cuts = tensors.get(name, {})
            total += math.prod(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(parameter.shape))
        return total

    return cost_of


def _macs(found: Found) -> Cost:
    """Operations of one forward: by arithmetic where that gives what is counted in a run, else by dry runs."""
    inputs = found.forward.inputs
    predictable = found.axes.macs() == found.macs

    def cost_of(kept: Mapping[str, Tensor]) -> int:
        if predictable:
            return found.axes.macs({name: len(positions) for name, positions in kept.items()})
        if not kept:
            return found.macs
        plan = make_plan(found.view, found.axes, kept)
        return plan.prepare(found.view).dry_run(lambda: measure.count_macs(found.view, inputs))

    return cost_of


def _unit_costs(sizes: Mapping[str, int], cost_of: Cost, whole: int, limits: Limits) -> dict[str, float]:
    """What one neuron of each axis costs in the whole model: the saving of halving the axis, spread over what goes."""
    costs = {}
    full = {name: torch.arange(size) for name, size in sizes.items()}
    for name, size in sizes.items():
        counts = limits.settle({**sizes, name: max(1, size // 2)}, sizes, down=True)
        gone = sum(sizes[other] - count for other, count in counts.items())
        kept = {other: full[other][:count] for other, count in counts.items()}
        costs[name] = max((whole - cost_of(kept)) / gone, 1e-9) if gone else 1.0
    return costs
