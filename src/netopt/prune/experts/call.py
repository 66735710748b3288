"""Removes experts of mixtures: look, try, score, select, then do, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from netopt import batches, masking, measure
from netopt.axes import Outputs
from netopt.batches import Batch, Inputs
from netopt.errors import ArgumentTypeError, InvalidArgumentError, NothingToPruneError, percent
from netopt.model.signals import entered
from netopt.plan.blocks import notes_of_hooks
from netopt.plan.experts import ExpertPlan
from netopt.prune.blocks.call import check_real, predicted
from netopt.prune.experts.law import Law, make_plan
from netopt.prune.experts.mixtures import Mixture, find_mixtures
from netopt.prune.experts.scores import ExpertImportance, check_importance, score
from netopt.prune.look import Where, check_model
from netopt.prune.verify import Forward
from netopt.report import PruningReport, Row
from netopt.selectors import Selector, chosen
from netopt.surgery import as_optimizers

__all__ = ["plan_experts", "prune_experts"]

Amount: TypeAlias = "float | Mapping[str, float]"


def prune_experts(
    model: nn.Module,
    example_inputs: Inputs,
    amount: Amount,
    *,
    importance: ExpertImportance = "reap",
    data: Iterable[Batch] | None = None,
    include: Selector = None,
    exclude: Selector = None,
    outputs: Outputs = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    verify: bool = True,
    progress: bool = True,
) -> PruningReport:
    """Removes the least important experts of every mixture of experts of ``model``, in place.

    A mixture is a router, whose scores are chosen from, and what has an entry for each score: stacked weights, or
    entries of a ``ModuleList``. The smaller model computes what the model does with scores of minus infinity at the
    removed experts, up to rounding; a mixture loses experts only where a trial shows that. As many experts stay as are
    chosen for a token, and groups of experts stay equal in size. Either everything is carried out or ``model`` and
    ``optimizer`` are left as they were.

    Args:
        model: Any module; its forward is run, never parsed. Its train/eval mode is kept.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs, of one forward call.
        amount: Fraction of the experts of every mixture, in :math:`[0, 1)`, rounded to the nearest count that fits its
            groups; or a count; or either by name or pattern of mixtures, of which the others stay as they are.
        importance: ``"reap"``, the mean over its tokens of an expert's gate times the norm of its output;
            ``"frequency"``, how often it is chosen; ``"magnitude"``, the norm of its parameters; a function of a
            mixture's name and an expert's index; or the scores by mixture. Higher means keep.
        data: Batches to score on; by default ``example_inputs``.
        include: Names, patterns, types, modules, or predicates of mixtures, or lists of them, that may lose experts.
        exclude: The same, that stay as they are.
        outputs: Which results count; see :func:`netopt.find_axes`.
        optimizer: One or several, whose state follows.
        verify: Compare the smaller model with the one whose scores are minus infinity.
        progress: Whether to show a progress bar on long work.

    Returns:
        Parameters, MACs and bytes before and after, one row a mixture, the plan, and what was frozen and why.
        ``settings["unused"]`` names experts that met no token.

    Raises:
        NothingToPruneError: No mixture may lose experts; the message lists the reasons.
        InvalidArgumentError: An argument is out of range.
        OptimizerStateError: An optimizer cannot follow.
        VerificationError: The smaller model computes something else; everything was put back.

    References:
        REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression (Lasby et al., 2025),
        https://arxiv.org/abs/2510.13999

    Example:
        >>> class Mixture(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router = nn.Linear(8, 4)
        ...         self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        ...
        ...     def forward(self, x):
        ...         gates, chosen = self.router(x).softmax(-1).topk(2)
        ...         made = torch.zeros_like(x)
        ...         for place, expert in enumerate(self.experts):
        ...             made = made + (gates * (chosen == place)).sum(-1, keepdim=True) * expert(x)
        ...         return made
        >>> mixture = Mixture()
        >>> report = prune_experts(mixture, torch.randn(6, 8), amount=1, progress=False)
        >>> len(mixture.experts), mixture.router.out_features
        (3, 3)
    """
    optimizers = as_optimizers(optimizer)
    call = _Call(model, example_inputs, amount, importance, data, progress)
    decision = call.decide(include, exclude, outputs)
    operation = decision.plan.prepare(model, optimizers)
    expected = decision.law.expected(decision.removed) if verify else None

    def finish() -> PruningReport:
        if expected is not None:
            decision.law.check(expected)
        return call.report(decision)

    return operation.run(finish)


def plan_experts(
    model: nn.Module,
    example_inputs: Inputs,
    amount: Amount,
    *,
    importance: ExpertImportance = "reap",
    data: Iterable[Batch] | None = None,
    include: Selector = None,
    exclude: Selector = None,
    outputs: Outputs = None,
    progress: bool = True,
) -> ExpertPlan:
    """Decides what :func:`prune_experts` would remove, and does not do it.

    The arguments are those of :func:`prune_experts`. What the smaller model costs is found by carrying the plan out,
    measuring, and putting everything back.

    Returns:
        The plan, with parameters, MACs and bytes before and after in ``plan.predicted``.

    Raises:
        NothingToPruneError: No mixture may lose experts; the message lists the reasons.
        InvalidArgumentError: An argument is out of range.
    """
    call = _Call(model, example_inputs, amount, importance, data, progress)
    plan = call.decide(include, exclude, outputs).plan
    return plan.with_prediction(predicted(call.before, plan.prepare(model).dry_run(call.cost)))


@dataclass(frozen=True)
class _Decision:
    """A plan and what it was made from."""

    mixtures: Sequence[Mixture]
    removed: Mapping[str, Sequence[int]]
    scores: Mapping[str, Sequence[float]]
    idle: Mapping[str, Sequence[int]]
    frozen: Mapping[str, str]
    plan: ExpertPlan
    law: Law


class _Call:
    """One call: its checked arguments, and what the model cost before."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        amount: Amount,
        importance: ExpertImportance,
        data: Iterable[Batch] | None,
        progress: bool,
    ) -> None:
        _check_amount(amount)
        self.view = check_model(model, example_inputs)
        check_real(self.view, "experts")
        self._amount, self._importance, self._progress = amount, importance, progress
        self._name = check_importance(importance)
        self._inputs, self._data = example_inputs, data
        self.before = self.cost()

    def cost(self) -> measure.Cost:
        """What the model costs now."""
        return measure.cost(self.view.model, self._inputs)

    def decide(self, include: Selector, exclude: Selector, outputs: Outputs) -> _Decision:
        """Finds the mixtures, tries each, scores their experts, and selects."""
        # In inference mode products hide from a trace.
        with entered(torch.inference_mode(False)):
            return self._decide(include, exclude, outputs)

    def _decide(self, include: Selector, exclude: Selector, outputs: Outputs) -> _Decision:
        wanted = chosen(self.view.model, include, exclude)
        forward = Forward(self.view, self._inputs, Where(outputs=outputs).counted)
        mixtures = find_mixtures(forward, self.view)
        law = Law(self.view, forward)
        for mixture in tqdm(mixtures, desc="experts", disable=not self._progress, leave=False):
            if mixture.frozen is None:
                mixture.frozen = law.settle(mixture) if wanted(mixture.name) else "is excluded"
        frozen = {mixture.name or "the model": mixture.frozen for mixture in mixtures if mixture.frozen}
        free = [mixture for mixture in mixtures if mixture.frozen is None]
        if not free:
            raise NothingToPruneError(_nothing(frozen, bool(masking.masks(self.view.model))))
        counts = _counts(free, self._amount)
        free = [mixture for mixture in free if mixture.scores.router in counts]
        scores, idle = score(self.view, free, self._importance, self._batches)
        removed = {one.scores.router: _least(scores[one.name], one.groups, counts[one.scores.router]) for one in free}
        plan = make_plan(self.view, mixtures, removed)
        return _Decision(free, removed, scores, idle, frozen, plan, law)

    def _batches(self) -> Iterable[Any]:
        if self._data is None:
            inputs = self._inputs
            return [(inputs, None)] if isinstance(inputs, tuple) else [inputs]
        return batches.iterate(self._data)

    def report(self, decision: _Decision) -> PruningReport:
        """The report, of the model as it is now."""
        after = self.cost()
        unused = {"unused": decision.idle} if decision.idle else {}
        settings = {"amount": self._amount, "importance": self._name, **unused}
        return PruningReport(
            call="prune_experts",
            before=self.before,
            after=after,
            rows=tuple(_row(mixture, decision) for mixture in decision.mixtures),
            plan=cast("Any", decision.plan.with_prediction(predicted(self.before, after))),
            frozen=decision.frozen,
            settings=settings,
            notes=notes_of_hooks(self.view.model),
            subject=self.view.model,
        )


def _row(mixture: Mixture, decision: _Decision) -> Row:
    gone, scores = decision.removed[mixture.scores.router], decision.scores[mixture.name]
    notes = [f"without {', '.join(map(str, gone))}"] if gone else []
    notes.append(f"scores {min(scores):.2g} to {max(scores):.2g}")
    idle = decision.idle.get(mixture.name)
    if idle:
        notes.append(f"no token met {', '.join(map(str, idle))}")
    name, left = mixture.name or "the model", mixture.size - len(gone)
    return Row(name, mixture.size, left, exact=True, note="; ".join(notes))


def _least(scores: Sequence[float], groups: int, count: int) -> list[int]:
    """The experts of least score, as many of each group."""
    each = len(scores) // groups
    found: list[int] = []
    for group in range(groups):
        places = sorted(range(group * each, (group + 1) * each), key=lambda place: scores[place])
        found += places[: count // groups]
    return sorted(found)


def _counts(mixtures: Sequence[Mixture], amount: Amount) -> dict[str, int]:
    """How many experts go, by router."""
    found: dict[str, int] = {}
    used: set[str] = set()
    for mixture in mixtures:
        own: Any = amount
        if isinstance(amount, Mapping):
            fits = [key for key in amount if mixture.name == key or fnmatchcase(mixture.name, key)]
            used.update(fits)
            if not fits:
                continue
            own = amount[fits[0]]
        found[mixture.scores.router] = _count(mixture, own)
    unknown = set(amount) - used if isinstance(amount, Mapping) else set()
    if unknown:
        known = ", ".join(mixture.name for mixture in mixtures)
        raise InvalidArgumentError(f"amount names {sorted(unknown)}, and the mixtures are {known}.")
    return found


def _count(mixture: Mixture, amount: float) -> int:
    if isinstance(amount, int):
        if amount > mixture.spare or amount % mixture.groups:
            groups = f", {mixture.groups} at a time" if mixture.groups > 1 else ""
            raise InvalidArgumentError(
                f"amount={amount} experts are to go from `{mixture.name}`, and up to {mixture.spare} of its "
                f"{mixture.size} may{groups}{percent(amount)}."
            )
        return amount
    return min(round(amount * mixture.size / mixture.groups) * mixture.groups, mixture.spare)


def _check_amount(amount: Any) -> None:
    values = list(amount.values()) if isinstance(amount, Mapping) else [amount]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(f"amount must be a number, or numbers by name, not {value!r}.")
        if value < 0 or (isinstance(value, float) and not value < 1):
            hint = percent(value)
            raise InvalidArgumentError(f"amount must be a fraction in [0, 1) or a count of experts, not {value}{hint}.")
    if not values:
        raise InvalidArgumentError("amount names no mixture.")


def _nothing(frozen: Mapping[str, str], masked: bool) -> str:
    if not frozen and masked:
        return (
            "no mixture of experts was found, and weights of this model are masked, so that the forward reads products "
            "of them; write the masks into the weights first, netopt.finish(model)."
        )
    if not frozen:
        return (
            "this model has no mixture of experts: no scores made by a matrix product are chosen from by topk, max or "
            "argmax to pick stacked weights or modules of a list; prune_neurons makes any layer smaller."
        )
    lines = [f"  {name}  {reason}" for name, reason in list(frozen.items())[:20]]
    return "\n".join(["no mixture of this model may lose experts:", *lines])
