"""Removes the least important neurons of a model: look, decide, then do, all or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netopt import batches, masking, measure, surgery
from netopt.axes import Outputs
from netopt.batches import Data, Inputs
from netopt.errors import (
    ArgumentTypeError,
    InvalidArgumentError,
    NetoptError,
    NothingToPruneError,
    UnknownNameError,
)
from netopt.importance import Importance, lookup
from netopt.importance.neurons import NeuronScores, neuron_scores
from netopt.importance.scoring import Scoring
from netopt.masking.lifecycle import masks_of_indices
from netopt.masking.undo import all_or_nothing
from netopt.model.ranks import check_alike, is_shared
from netopt.model.signals import UndoLog
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.plan.build import make_plan
from netopt.plan.hooks import Note, complete, expressible
from netopt.prune.budget import Budget, choose, without
from netopt.prune.candidates import AxisSelector, holding, scored
from netopt.prune.exactness.dead_neurons import may_exist
from netopt.prune.exactness.folding import Folds, fold_removed, shifted
from netopt.prune.exactness.rescaling import Rescaling, find_rescalings, rescaled
from netopt.prune.look import Found, Where, check_model, look, without_gradients
from netopt.prune.original import as_of_now
from netopt.prune.repair import RepairReport, copy_for_repair, repaired
from netopt.prune.verify import DifferentOutputsError, Reference, Tensors, differing, proved, reference_outputs
from netopt.report import PruningReport, Row
from netopt.selection import Amount, Scope

__all__ = ["plan_neurons", "prune_neurons"]

Mode = Literal["remove", "mask"]
MODES = ("remove", "mask")


def prune_neurons(
    model: nn.Module,
    example_inputs: Inputs,
    amount: Amount | None = None,
    *,
    threshold: float | None = None,
    max_params: float | None = None,
    max_macs: float | None = None,
    importance: Importance | Mapping[str, Tensor] = "saliency",
    data: Data | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    scope: Scope = "global",
    include: AxisSelector = None,
    exclude: AxisSelector = None,
    outputs: Outputs = None,
    round_to: int = 1,
    loadable: bool = False,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    repair: bool | None = None,
    mode: Mode = "remove",
    of: Literal["now", "original"] = "now",
    verify: bool = True,
    progress: bool = True,
) -> PruningReport:
    r"""Removes the least important neurons of ``model``, in place, and everything coupled to them.

    Either the whole plan is carried out or ``model`` and ``optimizer`` are left as they were. At least one neuron stays
    on every axis. A removed neuron that is a constant (all weights that make it are zero) is folded into what reads it;
    any other is as good as masked.

    Args:
        model: Any module; its forward is run, never parsed. Its train/eval mode is kept.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs, of one forward call.
        amount: Fraction of the neurons that may be removed, in :math:`[0, 1)`, of the model as it is now; or a count;
            or a mapping from names or patterns of axes to these.
        threshold: Instead of ``amount``: remove what scores below.
        max_params: Instead of ``amount``: keep at most this fraction of the model's parameters, in :math:`(0, 1]`.
        max_macs: Instead of ``amount``: keep at most this fraction of its multiply-accumulate operations.
        importance: A criterion or its name, see :func:`netopt.importance.names`; a function of its evidence; or the
            scores, one tensor for each axis name. ``"saliency"`` needs inputs and no labels.
        data: Batches for criteria that need gradients or activations; what needs no labels falls back to
            ``example_inputs``.
        loss_fn: Of the model's result and a batch's targets, for criteria that need the loss.
        scope: ``"global"`` ranks the neurons of all axes together, each score as its share of those of its axis that
            are not below it; ``"kind"`` those of one kind (heads, inner neurons, the width), and every kind loses the
            amount, or for a budget the same share; ``"layer"`` does so for every axis.
        include: Names, patterns, types, modules, or predicates of an :class:`~netopt.axes.Axis`, whose neurons may go.
        exclude: The same, whose neurons all stay.
        outputs: Which results must keep their shape; see :func:`netopt.find_axes`.
        round_to: Keep a multiple of this many neurons on every axis that has more.
        loadable: Only counts that the model's configuration can say, so that ``from_pretrained`` loads what
            ``save_pretrained`` saves: one width for all layers, whole heads. Which neurons go is free on every axis.
        optimizer: One or several, whose state (momenta, second moments) is narrowed along with the parameters.
        repair: Refit what is left to what the model put out before, see :func:`netopt.repair`. By default it is, where
            ``data`` is given and neurons are removed; ``False`` leaves exactly what masking would. ``verify`` compares
            before.
        mode: ``"remove"``, or ``"mask"`` to put the same plan on as masks of ``torch.nn.utils.prune``.
        of: ``"original"`` takes ``amount`` of the model as the first call saw it: of 0.1, 0.2 and 0.3 in turn 0.3 goes.
        verify: Run the smaller model on the example inputs, compare the shapes of its outputs, and, where removing is
            the same as masking, their values with the masked model's, there and on a variation of the inputs. Axes
            found to differ are marked as not exact, and go all the same.
        progress: Whether to show a progress bar on long work.

    Returns:
        Parameters, MACs and bytes before and after, one row an axis, the plan, and what was frozen and why.

    Raises:
        NothingToPruneError: No axis may lose a neuron; the message lists the reasons.
        InvalidArgumentError: An argument is out of range, or not exactly one of the four amounts is given.
        MissingDataError: ``importance`` needs ``data``, or a ``loss_fn``, and none was given.
        OptimizerStateError: Some optimizer state cannot be narrowed.
        VerificationError: The smaller model fails, or its outputs have other shapes; everything was put back.

    References:
        Importance Estimation for Neural Network Pruning (Molchanov et al., 2019), https://arxiv.org/abs/1906.10771;
        isomorphic pruning, for ``scope="kind"`` (Fang et al., 2024), https://arxiv.org/abs/2407.04616

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = prune_neurons(net, torch.randn(1, 8), amount=0.25)
        >>> net[0].out_features, net[2].in_features
        (12, 12)
    """
    budget = Budget(amount, threshold, max_params, max_macs, scope, round_to, loadable, of)
    data = list(batches.iterate(data)) if isinstance(data, Iterator) else data  # for scores, and again for repair
    scoring = Scoring(importance, data, loss_fn, progress=progress)
    view = check_model(model, example_inputs)
    _check(budget, scoring, mode)
    if is_shared() and repair:
        raise InvalidArgumentError("repair=True fits to one process's data; prune in one process, or repair=False.")
    dense = copy_for_repair(model, False if is_shared() else repair, data, mode)
    optimizers = surgery.as_optimizers(optimizer)
    # A mask can be taken off; what is folded into a bias could not.
    where = Where(include, exclude, outputs)
    decision = _decide(view, example_inputs, budget, scoring, where, fold=mode == "remove")
    check_alike(decision.plan.tensors, "neurons")
    report = _Report(decision, budget, scoring, mode)
    if mode == "mask":

        def mask(_: UndoLog) -> PruningReport:
            masking.put(model, masks_of_indices(model, decision.plan.tensors))
            return report.make(decision)

        return all_or_nothing(model).run(mask)
    return _remove(decision, optimizers, report, _Calibration(dense, data, progress), verify=verify)


def plan_neurons(
    model: nn.Module,
    example_inputs: Inputs,
    amount: Amount | None = None,
    *,
    threshold: float | None = None,
    max_params: float | None = None,
    max_macs: float | None = None,
    importance: Importance | Mapping[str, Tensor] = "saliency",
    data: Data | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    scope: Scope = "global",
    include: AxisSelector = None,
    exclude: AxisSelector = None,
    outputs: Outputs = None,
    round_to: int = 1,
    loadable: bool = False,
    remove: Mapping[str, Sequence[int]] | None = None,
    verify: bool = True,
    progress: bool = True,
) -> Plan:
    """Decides what :func:`prune_neurons` would remove, and does not do it.

    The arguments are those of :func:`prune_neurons`. What the smaller model costs, and whether it computes what the
    masked one does, is found by carrying the plan out, looking, and putting everything back. Instead of an amount,
    ``remove`` gives the positions that go, by the name of an axis or of the layer that makes it: ``{"conv1": [2, 6]}``.

    Returns:
        The plan, with parameters, MACs and bytes before and after in ``plan.predicted``.

    Raises:
        NothingToPruneError: No axis may lose a neuron; the message lists the reasons.
        InvalidArgumentError: An argument is out of range, or not exactly one of the four amounts is given.
        VerificationError: The smaller model would fail, or its outputs would have other shapes.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> plan = plan_neurons(net, torch.randn(1, 8), amount=0.25)
        >>> plan.predicted["params_before"], plan.predicted["params_after"], net[0].out_features
        (212, 160, 16)
    """
    budget = Budget(amount, threshold, max_params, max_macs, scope, round_to, loadable)
    scoring = Scoring(importance, data, loss_fn, progress=progress)
    view = check_model(model, example_inputs)
    if remove is None:
        _check(budget, scoring)
    elif (amount, threshold, max_params, max_macs, loadable) != (None, None, None, None, False):
        raise InvalidArgumentError("remove says which neurons go; leave out amounts, budgets and loadable=True.")
    before = measure.cost(view, example_inputs)
    where = Where(include, exclude, outputs)
    if remove is None:
        decision = _decide(view, example_inputs, budget, scoring, where)
    else:
        found = look(view, example_inputs, where)
        decision = _complete(found, NeuronScores({}), without(found, remove), fold=True)
    carry_out = decision.plan.prepare(view).dry_run
    done, after = proved(decision, carry_out, lambda done: (done, measure.cost(view, example_inputs)), verify=verify)
    return done.plan.with_prediction(_predicted(before, after) | done.output_change())


@dataclass(frozen=True)
class _Decision:
    """A plan and what it was made from.

    Attributes:
        found: The axes.
        scores: Of their neurons.
        kept: Positions that stay, by axis.
        plan: What is done.
        rescalings: Factors in the plan, by axis.
        folds: Constants in the plan, by axis.
        nonzero: Entries that are not zero now, by parameter.
        hook_notes: What hooks say of the plan, by their names.
    """

    found: Found
    scores: NeuronScores
    kept: dict[str, Tensor]
    plan: Plan
    rescalings: Mapping[str, Rescaling]
    folds: Folds
    nonzero: Mapping[str, int]
    hook_notes: Mapping[str, Note]

    def counts(self) -> dict[str, int]:
        """How many neurons each axis keeps."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def output_change(self) -> dict[str, float]:
        """The outputs' expected squared change as a share of their squares, where scores say it."""
        if not self.scores.scale:
            return {}
        every = self.scores.scores
        lost = sum(float(every[name].sum() - every[name][at].sum()) for name, at in self.kept.items())
        return {"output_change": lost / self.scores.scale}

    def rows(self) -> tuple[Row, ...]:
        """One row an axis that could lose neurons."""
        rows = []
        exact = {cut.name: (cut.exact, cut.reason) for cut in self.plan.axes}
        for axis in self.found.chosen:
            low, high = map(float, torch.aminmax(self.scores.scores[axis.name]))
            equal, reason = exact.get(axis.name, (True, None))
            notes = [f"scores {low:.2g} to {high:.2g}", *filter(None, (reason, self._constants(axis.name)))]
            kept = len(self.kept[axis.name])
            rows.append(Row(axis.name, axis.size, kept, equal, "; ".join(notes), kind=axis.kind))
        return tuple(rows)

    def _constants(self, name: str) -> str | None:
        """What became of the constants of dead neurons of an axis."""
        if name in self.folds.shifts:
            return "constants folded into what reads them"
        why = self.folds.refused.get(name)
        return None if why is None else f"constants of dead neurons are lost: {why}"

    def part(self, names: Collection[str]) -> Plan:
        """The plan for some axes alone."""
        kept = {name: self.kept[name] for name in names}
        plan = make_plan(self.found.view, self.found.axes, kept)
        plan = rescaled(plan, {name: one for name, one in self.rescalings.items() if name in kept})
        return shifted(plan, self.folds.of([name for name in self.folds.shifts if name in kept]))

    def computing(self, names: Iterable[str]) -> Tensors:
        """What computes once some axes are cut: what stays of each tensor, and what is folded instead of masked."""
        kept = {name: self.kept[name] for name in names}
        folded = {name: at for name, at in self.folds.positions.items() if name in kept}
        kept |= {name: torch.cat([kept[name], at]).sort().values for name, at in folded.items()}
        return self.found.axes.tensor_indices(kept)

    def agrees(self, names: Sequence[str]) -> bool | None:
        """Whether cutting some axes alone is the same as masking them; None where they cannot be cut alone."""
        axes, counts = self.found.axes, {name: len(self.kept[name]) for name in names}
        possible = axes.feasible(counts)
        if any(possible[axis.name] != counts.get(axis.name, axis.size) for axis in axes.free):
            return None
        try:
            reference = reference_outputs(self.found.forward, self.computing(names))
            self.part(names).prepare(self.found.view).dry_run(reference.check)
        except DifferentOutputsError:
            return False
        except NetoptError:  # which the whole plan need not raise
            return None
        return True

    def marked(self, names: Sequence[str]) -> _Decision:
        """The same, with those of some axes that are at fault for a difference marked as not exact."""
        at_fault, why = differing(names, self.agrees), "is not the same as masking, found by comparison"
        return self._noted(at_fault, exact=False, reason=why)

    def uncompared(self) -> _Decision:
        """The same, where no values were compared."""
        return self._noted([row.name for row in self.plan.axes if row.exact], reason="by its rules; not compared")

    def _noted(self, names: Collection[str], **notes: Any) -> _Decision:
        rows = [dataclasses.replace(row, **notes) if row.name in names else row for row in self.plan.axes]
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, axes=tuple(rows)))

    def reference(self) -> Reference:
        """What the outputs have to be once everything is done: where all is exact, those of the masked model."""
        exact, cut = self.plan.exact, [row.name for row in self.plan.axes]
        return reference_outputs(self.found.forward, self.computing(cut) if exact else None, equal=exact)

    def compared(self) -> _Decision:
        """The same, where some axes are not exact, with the others compared by themselves."""
        exact = [row.name for row in self.plan.axes if row.exact]
        # With factors they were compared when these were tried.
        if len(exact) == len(self.plan.axes) or self.rescalings or not exact or self.agrees(exact) is not False:
            return self
        return self.marked(exact)


def _decide(
    view: ModelView,
    example_inputs: Inputs,
    budget: Budget,
    scoring: Scoring,
    where: Where,
    *,
    fold: bool = True,
) -> _Decision:
    """Look, score, select, complete."""
    found = look(view, example_inputs, where)
    budget = as_of_now(found, budget)
    scores = _score(found, scoring, where)
    if budget.loadable:
        return _decide_loadable(found, scores, budget, fold=fold)
    return _complete(found, scores, choose(found, scores, budget), fold=fold)


def _decide_loadable(found: Found, scores: NeuronScores, budget: Budget, *, fold: bool) -> _Decision:
    """Selects among counts that can be said; where the plan is refused all the same, without one group of axes."""
    groups = expressible(found.view.model, found.axes, found.sizes)
    refused: list[NetoptError] = []
    for some in (groups, *([one for one in groups if one is not other] for other in groups)):
        try:
            decision = _complete(found, scores, choose(found, scores, budget, some), fold=fold)
        except NothingToPruneError as error:
            refused.append(NothingToPruneError(f"{error}{holding(found.axes, found.kept_out)}"))
            continue
        broken = next((one for one in decision.hook_notes.items() if not one[1].is_complete), None)
        if broken is None:
            return decision
        name, text = broken[0], broken[1].text
        refused.append(InvalidArgumentError(f"loadable=True: the {name} {text.rpartition('; ')[0] or text}."))
    raise refused[0]


def _name(scoring: Scoring) -> str:
    if isinstance(scoring.importance, Mapping):
        return "given"
    return lookup(scoring.importance, of="neurons").name


def _score(found: Found, scoring: Scoring, where: Where) -> NeuronScores:
    def differentiated(result: Any) -> list[Tensor]:
        return [tensor for tensor in where.counted(result) if tensor.is_floating_point()]

    if where.outputs is not None:
        scoring = replace(scoring, outputs=differentiated)
    try:
        return neuron_scores(found.view, scored(found.axes, found.chosen), scoring, found.forward.inputs)
    except RuntimeError as error:
        why = without_gradients(found.view, error)
        if why is None:
            raise
        raise InvalidArgumentError(f'importance "{_name(scoring)}" cannot be computed: {why}.') from error


def _complete(found: Found, scores: NeuronScores, kept: dict[str, Tensor], *, fold: bool) -> _Decision:
    """The plan, with what makes removing the same as masking: factors for sizes, constants in biases."""
    view, axes, model = found.view, found.axes, found.view.model
    rescalings = find_rescalings(view, axes, kept, found.forward)
    plan = rescaled(make_plan(view, axes, kept), rescalings)
    plan, hook_notes = complete(model, plan, axes)
    nonzero = measure.nonzero_of(view)
    folds = fold_removed(found.forward, axes, kept, plan) if fold and may_exist(view, plan, nonzero) else Folds()
    plan = shifted(plan, folds.of(list(folds.shifts)))
    return _Decision(found, scores, kept, plan, rescalings, folds, nonzero, hook_notes)


@dataclass(frozen=True)
class _Calibration:
    """What the smaller model is refitted to: the model as it was, ``None`` for no repair, on these batches."""

    dense: nn.Module | None
    data: Data | None
    progress: bool


def _remove(
    decision: _Decision,
    optimizers: Sequence[Optimizer],
    report: _Report,
    calibration: _Calibration,
    *,
    verify: bool,
) -> PruningReport:
    """Change, check, repair, report."""

    def finish(done: _Decision) -> PruningReport:
        model, dense, data = done.found.view.model, calibration.dense, calibration.data
        outcome = None if dense is None else repaired(model, done.plan, dense, data, calibration.progress)
        return report.make(done, outcome)

    operation = decision.plan.prepare(decision.found.view, optimizers)
    return proved(decision, operation.run, finish, verify=verify)


_FIRST_SEEN: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many parameters a model had when its neurons were first removed, for the words of later reports."""


class _Report:
    """What there was before, noted at once, and the report, made when everything is done."""

    def __init__(self, decision: _Decision, budget: Budget, scoring: Scoring, mode: Mode) -> None:
        view, plan = decision.found.view, decision.plan
        self._settings = budget.settings() | {"importance": _name(scoring), "mode": mode}
        self._removes = mode == "remove"
        # A budget of operations is one of those counted in a run; elsewhere those of the traced forward are counted.
        self._counted = budget.max_macs is not None
        macs = decision.found.macs if self._counted else decision.found.axes.macs()
        self._before = measure.cost_of(view, macs, decision.nonzero)
        first = _FIRST_SEEN.setdefault(view.model, self._before.params) if self._removes else 0
        self._already = max(1 - self._before.params / first, 0.0) if first else 0.0
        # A part of what has no zero has none, unless something is done to it besides.
        changed = not self._removes or plan.shifts or plan.scales or plan.values
        full = decision.nonzero.items() if not changed else ()
        self._full = {name for name, count in full if count == view.parameters[name].numel()}

    def make(self, decision: _Decision, repair: RepairReport | None = None) -> PruningReport:
        """The report, of the model as it is now."""
        found, plan, settings = decision.found, decision.plan, {**self._settings}
        if decision.scores.saliency is not None:
            settings["saliency"] = decision.scores.saliency.summary()
        if self._counted:
            left = measure.count_macs(found.view, found.forward.inputs)
        else:
            left = found.axes.macs(decision.counts() if self._removes else {})
        now = found.view if self._removes else ModelView(found.view.model)
        after = measure.cost_of(now, left, measure.nonzero_of(now, self._full if repair is None else ()))
        predicted = _predicted(self._before, after) | decision.output_change()
        return PruningReport(
            call="prune_neurons",
            before=self._before,
            after=after,
            rows=decision.rows(),
            plan=plan.with_prediction(predicted) if self._removes else plan,
            frozen=found.kept_out,
            settings=settings,
            batch=measure.batch_size(found.forward.inputs),
            already=self._already,
            scores=decision.scores.scores,
            notes={name: note.text for name, note in decision.hook_notes.items()},
            subject=found.view.model,
            repair=repair,
        )


def _check(budget: Budget, scoring: Scoring, mode: str = "remove") -> None:
    """Checks every argument that can be checked before the model is looked at."""
    budget.check()
    if mode not in MODES:
        raise UnknownNameError.of("mode", str(mode), MODES)
    loss_fn = scoring.loss_fn
    if loss_fn is not None and not callable(loss_fn):
        raise ArgumentTypeError(f"loss_fn must be a function of result and targets, not {type(loss_fn).__name__}.")
    if not isinstance(scoring.importance, Mapping):
        lookup(scoring.importance, of="neurons")


def _predicted(before: measure.Cost, after: measure.Cost) -> dict[str, float]:
    costs = {"before": before, "after": after}
    return {f"{kind}_{at}": getattr(one, kind) for kind in ("params", "macs", "bytes") for at, one in costs.items()}
