"""Removes the least important neurons of a model: look, decide, then do, all or nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netopt import batches, masking, measure, surgery
from netopt.axes import Axes, Axis, Outputs, find_axes
from netopt.axes.find import counted_outputs
from netopt.batches import Batch, Inputs
from netopt.errors import ArgumentTypeError, InvalidArgumentError, UnknownNameError
from netopt.importance import Importance, lookup
from netopt.importance.activations import recordable
from netopt.importance.neurons import NeuronScores, neuron_scores
from netopt.integrations.huggingface.config import configured
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.plan.build import make_plan
from netopt.prune.candidates import AxisSelector, candidates
from netopt.prune.exactness.dead_neurons import suspects
from netopt.prune.exactness.folding import fold_removed
from netopt.prune.exactness.rescaling import compensated
from netopt.prune.repair import RepairReport, copy_for_repair, repaired
from netopt.prune.verify import Tensors, reference_outputs
from netopt.report import PruningReport, Row
from netopt.selection import Amount, Limits, Scope, check_amount, check_scope, check_threshold, select, select_within

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
    data: Iterable[Batch] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    scope: Scope = "global",
    include: AxisSelector = None,
    exclude: AxisSelector = None,
    outputs: Outputs = None,
    round_to: int = 1,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    repair: bool | None = None,
    mode: Mode = "remove",
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
            are not below it; ``"layer"`` removes the amount of every axis.
        include: Names, patterns, types, modules, or predicates of an :class:`~netopt.axes.Axis`, whose neurons may go.
        exclude: The same, whose neurons all stay.
        outputs: Which results must keep their shape; see :func:`netopt.find_axes`.
        round_to: Keep a multiple of this many neurons on every axis that has more.
        optimizer: One or several, whose state (momenta, second moments) is narrowed along with the parameters.
        repair: Refit what is left to what the model put out before, see :func:`netopt.repair`. By default it is, where
            ``data`` is given and neurons are removed; ``False`` leaves exactly what masking would. ``verify`` compares
            before.
        mode: ``"remove"``, or ``"mask"`` to put the same plan on as masks of ``torch.nn.utils.prune``.
        verify: Run the smaller model on the example inputs, compare the shapes of its outputs, and, where removing is
            the same as masking, their values with the masked model's.
        progress: Whether to show a progress bar on long work.

    Returns:
        Parameters, MACs and bytes before and after, one row an axis, the plan, and what was frozen and why.

    Raises:
        NothingToPruneError: No axis may lose a neuron; the message lists the reasons.
        InvalidArgumentError: An argument is out of range, or not exactly one of the four amounts is given.
        MissingDataError: ``importance`` needs ``data``, or a ``loss_fn``, and none was given.
        OptimizerStateError: Some optimizer state cannot be narrowed.
        VerificationError: The smaller model failed the check; everything was put back.

    References:
        Importance Estimation for Neural Network Pruning (Molchanov et al., 2019), https://arxiv.org/abs/1906.10771

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = prune_neurons(net, torch.randn(1, 8), amount=0.25)
        >>> net[0].out_features, net[2].in_features
        (12, 12)
    """
    request = _Request(amount, threshold, max_params, max_macs, scope, Limits(round_to))
    held = _check(model, request, mode, loss_fn, importance)
    data = list(batches.iterate(data)) if isinstance(data, Iterator) else data  # for scores, and again for repair
    dense = copy_for_repair(model, repair, data, mode)
    optimizers = surgery.as_optimizers(optimizer)
    sources = _Sources(importance, data, loss_fn, progress)
    # A budget of operations is one of those counted in a run; elsewhere those of the traced forward are counted.
    macs = None if max_macs is None else measure.count_macs(model, example_inputs)
    selectors = {"include": include, "exclude": exclude, "outputs": outputs}
    # A mask can be taken off; what is folded into a bias could not.
    decision = _decide(held, example_inputs, macs, request, sources, **selectors, fold=mode == "remove")
    plan, counted = decision.plan, decision.counted
    if macs is None:
        macs = decision.axes.macs()
    before = measure.cost_of(held, macs, decision.nonzero)

    # A part of what has no zero has none, unless something is done to it besides.
    changed = mode == "mask" or plan.shifts or plan.scales or plan.values
    full = (
        () if changed else {name for name, count in decision.nonzero.items() if count == held.parameters[name].numel()}
    )

    def report(full: Collection[str] = (), repair: RepairReport | None = None) -> PruningReport:
        settings = request.settings() | {"importance": _name(importance), "mode": mode}
        if decision.unexpressed is not None:
            settings["config"] = decision.unexpressed
        if decision.scores.saliency is not None:
            settings["saliency"] = decision.scores.saliency.summary()
        if max_macs is None:
            left = decision.axes.macs(decision.counts() if mode == "remove" else {})
        else:
            left = measure.count_macs(model, example_inputs)
        now = held if mode == "remove" else ModelView(model)
        after = measure.cost_of(now, left, measure.nonzero_of(now, full))
        predicted = _predicted(before, after) | decision.output_change()
        return PruningReport(
            call="prune_neurons",
            before=before,
            after=after,
            rows=decision.rows(),
            plan=plan.with_prediction(predicted) if mode == "remove" else plan,
            frozen=decision.kept_out,
            settings=settings,
            subject=model,
            repair=repair,
        )

    if mode == "mask":
        masking.put(model, _parameter_masks(model, plan))
        return report()
    operation = plan.prepare(held, optimizers)
    reference = None
    if verify:
        reference = reference_outputs(
            model, example_inputs, counted, decision.computing() if plan.exact else None, steady=decision.axes.steady
        )

    def finish() -> PruningReport:
        if reference is not None:
            reference.check(model, example_inputs, counted)
        with repaired(model, plan, dense, data, progress) as outcome:
            return report(() if verify else full, outcome)

    return operation.run(finish)


def plan_neurons(
    model: nn.Module,
    example_inputs: Inputs,
    amount: Amount | None = None,
    *,
    threshold: float | None = None,
    max_params: float | None = None,
    max_macs: float | None = None,
    importance: Importance | Mapping[str, Tensor] = "saliency",
    data: Iterable[Batch] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    scope: Scope = "global",
    include: AxisSelector = None,
    exclude: AxisSelector = None,
    outputs: Outputs = None,
    round_to: int = 1,
    progress: bool = True,
) -> Plan:
    """Decides what :func:`prune_neurons` would remove, and does not do it.

    The arguments are those of :func:`prune_neurons`. What the smaller model costs is found by carrying the plan out,
    measuring, and putting everything back.

    Returns:
        The plan, with parameters, MACs and bytes before and after in ``plan.predicted``.

    Raises:
        NothingToPruneError: No axis may lose a neuron; the message lists the reasons.
        InvalidArgumentError: An argument is out of range, or not exactly one of the four amounts is given.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> plan = plan_neurons(net, torch.randn(1, 8), amount=0.25)
        >>> plan.predicted["params_before"], plan.predicted["params_after"], net[0].out_features
        (212, 160, 16)
    """
    request = _Request(amount, threshold, max_params, max_macs, scope, Limits(round_to))
    held = _check(model, request, "remove", loss_fn, importance)
    sources = _Sources(importance, data, loss_fn, progress)
    before = measure.cost(model, example_inputs)
    selectors = {"include": include, "exclude": exclude, "outputs": outputs}
    decision = _decide(held, example_inputs, before.macs, request, sources, **selectors)
    after = decision.plan.prepare(model).dry_run(lambda: measure.cost(model, example_inputs))
    return decision.plan.with_prediction(_predicted(before, after) | decision.output_change())


@dataclass(frozen=True)
class _Request:
    """How much is to be removed."""

    amount: Amount | None
    threshold: float | None
    max_params: float | None
    max_macs: float | None
    scope: Scope
    limits: Limits

    def settings(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("amount", "threshold", "max_params", "max_macs")}
        return {name: value for name, value in given.items() if value is not None} | {
            "scope": self.scope,
            "round_to": self.limits.round_to,
        }


@dataclass(frozen=True)
class _Sources:
    """Where scores come from."""

    importance: Importance | Mapping[str, Tensor]
    data: Iterable[Batch] | None
    loss_fn: Callable[[Any, Any], Tensor] | None
    progress: bool


@dataclass(frozen=True)
class _Decision:
    """A plan and what it was made from."""

    axes: Axes
    chosen: list[Axis]
    kept_out: dict[str, str]
    scores: NeuronScores
    kept: dict[str, Tensor]
    plan: Plan
    counted: Callable[[Any], list[Tensor]]
    unexpressed: str | None
    """Why the model's configuration cannot express the smaller model."""
    folded: Mapping[str, Tensor]
    """Positions removed whose constants are folded into what reads them, by axis."""
    notes: Mapping[str, str]
    """What is to be said of axes with dead neurons."""
    nonzero: Mapping[str, int]
    """Entries that are not zero now, by parameter."""

    def counts(self) -> dict[str, int]:
        """How many neurons each axis keeps."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def output_change(self) -> dict[str, float]:
        """The outputs' expected squared change as a share of their squares, where scores say it."""
        if not self.scores.scale:
            return {}
        lost = sum(
            float(self.scores.scores[name].sum() - self.scores.scores[name][at].sum()) for name, at in self.kept.items()
        )
        return {"output_change": lost / self.scores.scale}

    def rows(self) -> tuple[Row, ...]:
        """One row an axis that could lose neurons."""
        rows = []
        exact = {cut.name: (cut.exact, cut.reason) for cut in self.plan.axes}
        for axis in self.chosen:
            scores = self.scores.scores[axis.name]
            low, high = map(float, torch.aminmax(scores))
            equal, reason = exact.get(axis.name, (True, None))
            notes = [f"scores {low:.2g} to {high:.2g}", *filter(None, (reason, self.notes.get(axis.name)))]
            rows.append(Row(axis.name, axis.size, len(self.kept[axis.name]), equal, "; ".join(notes)))
        return tuple(rows)

    def computing(self) -> Tensors:
        """What computes after the plan: what is kept of each tensor, and what is folded instead of masked."""
        if not self.folded:
            return self.plan.tensors
        others = {name: torch.cat([self.kept[name], at]).sort().values for name, at in self.folded.items()}
        return self.axes.tensor_indices({**self.kept, **others})


def _parameter_masks(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The plan as masks of parameters: ``True`` where an entry stays."""
    masks = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in plan.tensors and parameter.is_floating_point():
            mask = torch.ones(parameter.shape, dtype=torch.bool)
            for dim, kept in plan.tensors[name].items():
                stays = torch.zeros(mask.shape[dim], dtype=torch.bool)
                stays[kept] = True
                mask &= stays.view([-1 if index == dim else 1 for index in range(mask.dim())])
            masks[name.removesuffix("_orig")] = mask
    return masks


def _decide(
    held: ModelView,
    example_inputs: Inputs,
    macs: int | None,
    request: _Request,
    sources: _Sources,
    *,
    include: AxisSelector,
    exclude: AxisSelector,
    outputs: Outputs,
    fold: bool = True,
) -> _Decision:
    model = held.model
    # In inference mode some operations hide from a trace, and none has a gradient.
    with torch.inference_mode(False):
        example_inputs = recordable(example_inputs)
        axes = find_axes(model, example_inputs, outputs=outputs)
    chosen, kept_out = candidates(model, axes, include, exclude)

    def counted(result: Any) -> list[Tensor]:
        return counted_outputs(result, outputs)

    def differentiated(result: Any) -> list[Tensor]:
        return [tensor for tensor in counted(result) if tensor.is_floating_point()]

    scored = neuron_scores(
        held,
        {axis.name: axes.members(axis) for axis in chosen},
        lambda name: axes.taps(axes[name]),
        {axis.name: axis.size for axis in chosen},
        importance=sources.importance,
        data=sources.data,
        example_inputs=example_inputs,
        loss_fn=sources.loss_fn,
        outputs=None if outputs is None else differentiated,
        progress=sources.progress,
    )
    kept = _select(model, example_inputs, axes, chosen, scored, request=request, macs=macs)
    plan = compensated(
        held,
        axes,
        kept,
        make_plan(held, axes, kept),
        make_plan=lambda some: make_plan(held, axes, some),
        inputs=example_inputs,
        counted=counted,
    )
    more, unexpressed = configured(model, plan)
    if more:
        plan = dataclasses.replace(plan, attributes=(*plan.attributes, *more))
    folded: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    nonzero = measure.nonzero_of(held)
    if fold and suspects(held, plan, nonzero):
        plan, folded, notes = fold_removed(model, axes, kept, plan, inputs=example_inputs, counted=counted)
    return _Decision(axes, chosen, kept_out, scored, kept, plan, counted, unexpressed, folded, notes, nonzero)


def _select(
    model: nn.Module,
    example_inputs: Inputs,
    axes: Axes,
    chosen: list[Axis],
    scored: NeuronScores,
    *,
    request: _Request,
    macs: int | None,
) -> dict[str, Tensor]:
    scores, normalization = scored.scores, "none" if scored.comparable else None
    sizes = {axis.name: axis.size for axis in chosen}

    def feasible(counts: Mapping[str, int]) -> dict[str, int]:
        found = axes.feasible(counts)
        coupled = next((name for name, count in found.items() if name not in sizes and count < axes[name].size), None)
        if coupled is not None:
            raise InvalidArgumentError(
                f"axis `{coupled}` would have to shrink with the others because the model computes with their sizes, "
                "and it is excluded; exclude what it is tied to as well, or include it."
            )
        return {name: found[name] for name in sizes}

    limits = Limits(request.limits.round_to, feasible)
    if request.amount is not None or request.threshold is not None:
        return select(
            scores,
            request.amount,
            threshold=request.threshold,
            scope=request.scope,
            limits=limits,
            normalization=normalization,
        )

    def cost_of(kept: Mapping[str, Tensor]) -> int:
        if request.max_params is not None:
            return _parameters_left(model, axes.tensor_indices(kept))
        if predictable:
            return axes.macs({name: len(positions) for name, positions in kept.items()})
        return make_plan(model, axes, kept).prepare(model).dry_run(lambda: measure.count_macs(model, example_inputs))

    # Operations are counted by arithmetic where that gives what was measured, else by running the smaller model.
    predictable = request.max_macs is not None and axes.macs() == macs

    whole = cost_of({})
    share = request.max_params if request.max_params is not None else request.max_macs
    assert share is not None
    return select_within(
        scores,
        cost_of,
        int(share * whole),
        unit_costs=_unit_costs(sizes, cost_of, whole, limits),
        limits=limits,
        normalization=normalization,
    )


def _parameters_left(model: nn.Module, tensors: Mapping[str, Mapping[int, Tensor]]) -> int:
    """Entries of all parameters once these cuts are made, a shared one counted once."""
    total = 0
    for name, parameter in model.named_parameters():
        cuts = tensors.get(name, {})
        total += math.prod(len(cuts[dim]) if dim in cuts else size for dim, size in enumerate(parameter.shape))
    return total


def _unit_costs(
    sizes: Mapping[str, int], cost_of: Callable[[Mapping[str, Tensor]], int], whole: int, limits: Limits
) -> dict[str, float]:
    """What one neuron of each axis costs in the whole model: the saving of halving the axis, spread over what goes."""
    costs = {}
    full = {name: torch.arange(size) for name, size in sizes.items()}
    for name, size in sizes.items():
        counts = limits.settle({**sizes, name: max(1, size // 2)}, sizes, down=True)
        gone = sum(sizes[other] - count for other, count in counts.items())
        kept = {other: full[other][:count] for other, count in counts.items()}
        costs[name] = max((whole - cost_of(kept)) / gone, 1e-9) if gone else 1.0
    return costs


def _check(
    model: nn.Module,
    request: _Request,
    mode: str,
    loss_fn: Any,
    importance: Importance | Mapping[str, Tensor],
) -> ModelView:
    """Checks every argument that can be checked before the model is looked at; what the model holds."""
    if not isinstance(model, nn.Module):
        shown = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ArgumentTypeError(f"model must be a torch.nn.Module, not {shown}.")
    held = ModelView(model)
    lazy = next((name for name, one in held.parameters.items() if nn.parameter.is_lazy(one)), None)
    if lazy is not None:
        raise InvalidArgumentError(f"{lazy!r} is not initialised yet; run the model once before pruning it.")
    _check_request(request)
    if mode not in MODES:
        raise UnknownNameError.of("mode", str(mode), MODES)
    if loss_fn is not None and not callable(loss_fn):
        raise ArgumentTypeError(f"loss_fn must be a function of result and targets, not {type(loss_fn).__name__}.")
    if not isinstance(importance, Mapping):
        lookup(importance, of="neurons")
    return held


def _check_request(request: _Request) -> None:
    names = ("amount", "threshold", "max_params", "max_macs")
    given = [name for name in names if getattr(request, name) is not None]
    if len(given) != 1:
        got = " and ".join(given) if given else "none"
        raise InvalidArgumentError(f"give exactly one of amount, threshold, max_params and max_macs, not {got}.")
    if request.amount is not None:
        check_amount(request.amount)
    if request.threshold is not None:
        check_threshold(request.threshold)
    check_scope(request.scope)
    for name in ("max_params", "max_macs"):
        value = getattr(request, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(f"{name} must be a fraction of the model's, in (0, 1], not {value!r}.")
        if not 0 < value <= 1:
            raise InvalidArgumentError(f"{name} must be a fraction of the model's, in (0, 1], not {value}.")


def _predicted(before: measure.Cost, after: measure.Cost) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind in ("params", "macs", "bytes"):
        found[f"{kind}_before"], found[f"{kind}_after"] = getattr(before, kind), getattr(after, kind)
    return found


def _name(importance: Importance | Mapping[str, Tensor]) -> str:
    return "given" if isinstance(importance, Mapping) else lookup(importance, of="neurons").name
