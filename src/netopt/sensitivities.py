"""How much quality each part of a model costs: one part is pruned at a time, measured, and put back."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netopt import batches, masking
from netopt.axes.find import axes_of
from netopt.batches import Data, Inputs
from netopt.errors import ArgumentTypeError, InvalidArgumentError, MissingDataError, UnknownNameError
from netopt.figures import figure
from netopt.importance.neurons import neuron_scores
from netopt.importance.scores import scores as weight_scores
from netopt.importance.scoring import Scoring
from netopt.model.restore import restored
from netopt.model.view import ModelView
from netopt.plan.build import make_plan
from netopt.progress import bar
from netopt.prune.candidates import candidates, scored
from netopt.prune.look import Where
from netopt.prune.repair import copy_of, repaired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SensitivityReport", "sensitivity"]

OVER = ("axes", "kinds", "blocks", "tensors")
Metric = Callable[[nn.Module], float]
Trial = Callable[[float, Callable[[nn.Module], float]], float]


@dataclass(frozen=True)
class SensitivityReport:
    """Quality against the amount pruned, one part at a time.

    Attributes:
        dense: The metric of the model as it is.
        over: What was pruned: ``"axes"``, ``"kinds"``, ``"blocks"`` or ``"tensors"``.
        curves: By part, the metric at each amount tried, in ascending order; a curve ends early below the floor.

    Example:
        >>> report = SensitivityReport(0.9, "axes", {"0": {0.25: 0.9, 0.5: 0.8}, "2": {0.25: 0.5}})
        >>> report.amounts(at=0.95)
        {'0': 0.25, '2': 0.0}
    """

    dense: float
    over: str
    curves: Mapping[str, Mapping[float, float]]

    def amounts(self, at: float = 0.98) -> dict[str, float]:
        """For each part the largest amount tried up to which the metric stays at ``at`` times the dense one, or above.

        The parts were pruned one at a time; pruned together they lose more. The result can be handed to
        ``prune_neurons(amount=...)`` or ``prune_weights(amount=...)``.

        Raises:
            InvalidArgumentError: ``at`` is not in ``[0, 1]``.
        """
        if not 0 <= at <= 1:
            raise InvalidArgumentError(f"at={at} must be a share of the dense metric, in [0, 1].")
        found = {}
        for name, curve in self.curves.items():
            found[name] = 0.0
            for amount, value in curve.items():
                if value < at * self.dense:
                    break
                found[name] = amount
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, ready for :func:`json.dumps`."""
        curves = {name: {str(amount): value for amount, value in curve.items()} for name, curve in self.curves.items()}
        return {"dense": self.dense, "over": self.over, "curves": curves}

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        amounts = sorted({amount for curve in self.curves.values() for amount in curve})
        rows = [
            [name, *(f"{curve[amount]:.4g}" if amount in curve else "" for amount in amounts)]
            for name, curve in self.curves.items()
        ]
        return [self.over, *(f"{amount:.0%}" for amount in amounts)], rows

    def __str__(self) -> str:
        heads, rows = self._cells()
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(cells))
            for cells in (zip(line, widths, strict=True) for line in [heads, *rows])
        ]
        return "\n".join([f"sensitivity, dense {self.dense:.4g}", *(line.rstrip() for line in lines)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        heads, rows = self._cells()
        head = "".join(f"<th>{html.escape(one)}</th>" for one in heads)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(one)}</td>" for one in row) + "</tr>" for row in rows)
        return f"<p>sensitivity, dense {self.dense:.4g}</p><table><tr>{head}</tr>{body}</table>"

    def plot(self) -> Figure:
        """Draws a curve for each part, and beside it all of them as a heat map.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        drawn = figure(figsize=(11, max(3.2, 0.8 + 0.24 * len(self.curves))), layout="constrained")
        left, right = drawn.subplots(1, 2)
        for name, curve in self.curves.items():
            left.plot([0.0, *curve], [self.dense, *curve.values()], marker=".", label=name)
        left.set(xlabel="fraction pruned", ylabel="metric", title="One part at a time")
        if len(self.curves) <= 12:
            left.legend(fontsize="small")
        amounts = sorted({amount for curve in self.curves.values() for amount in curve})
        grid = [[curve.get(amount, float("nan")) for amount in amounts] for curve in self.curves.values()]
        image = right.imshow(grid, aspect="auto", cmap="viridis")
        right.set_xticks(range(len(amounts)), [f"{amount:.0%}" for amount in amounts])
        right.set_yticks(range(len(self.curves)), list(self.curves))
        right.set(xlabel="fraction pruned", title="Metric; empty below the floor")
        drawn.colorbar(image, ax=right)
        return drawn


def sensitivity(
    model: nn.Module,
    example_inputs: Inputs,
    metric: Metric,
    *,
    amounts: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    over: str = "axes",
    importance: Any = None,
    data: Data | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    include: Any = None,
    exclude: Any = None,
    repair: bool = False,
    floor: float | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Prunes each part of ``model`` by itself, at several amounts, and measures; the model is put back each time.

    Args:
        model: Any module; left as it was.
        example_inputs: Of one forward call.
        metric: Of the model, called without gradients; higher is better.
        amounts: Fractions of the part to prune, in ``(0, 1)``.
        over: ``"axes"`` removes neurons of one axis at a time; ``"kinds"`` the same share of every axis of one kind,
            such as ``ffn``; ``"blocks"`` the same share of every axis of one numbered block; ``"tensors"`` masks
            entries of one weight at a time.
        importance: As for :func:`netopt.prune_neurons` (default ``"saliency"``) or :func:`netopt.prune_weights`
            (default ``"magnitude"``); scores are computed once.
        data: Batches for criteria that need them.
        loss_fn: For criteria that need the loss.
        include: Restricts the parts.
        exclude: Parts left out.
        repair: Refit what is left on ``data`` before measuring, see :func:`netopt.repair`; a copy of the model is
            measured then.
        floor: Larger amounts of a part are not tried once the metric is below.
        progress: Whether to show a progress bar.

    Raises:
        ArgumentTypeError: ``model`` is no module, or ``metric`` no function that returns a number.
        InvalidArgumentError: An amount is out of range, or single weights are to be repaired.
        MissingDataError: ``repair=True`` without ``data``.
        NothingToPruneError: There is no part to prune.

    References:
        Pruning Filters for Efficient ConvNets (Li et al., 2017), https://arxiv.org/abs/1608.08710, section 3.2

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> y = net(x).detach()
        >>> report = sensitivity(net, x, lambda model: -float((model(x) - y).square().mean()), progress=False)
        >>> list(report.curves), list(report.curves["0"])
        (['0'], [0.1, 0.3, 0.5, 0.7, 0.9])
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    if over not in OVER:
        raise UnknownNameError.of("over", str(over), OVER)
    tried = sorted({float(amount) for amount in amounts})
    if not tried or not 0 < tried[0] <= tried[-1] < 1:
        raise InvalidArgumentError(f"amounts must be fractions in (0, 1), not {list(amounts)}.")
    if repair and over == "tensors":
        raise InvalidArgumentError("repair refits what is left after neurons are removed; leave it out of 'tensors'.")
    if repair and data is None:
        raise MissingDataError("repair=True needs data=, calibration batches of inputs.")
    dense = _measured(model, metric)
    data = list(batches.iterate(data)) if isinstance(data, Iterator) else data
    usual = "magnitude" if over == "tensors" else "saliency"
    scoring = Scoring(usual if importance is None else importance, data, loss_fn, progress=progress)
    if over == "tensors":
        trials = _tensors(model, scoring, include, exclude)
    else:
        trials = _axes(model, example_inputs, over, scoring, Where(include, exclude), repair=repair)
    curves: dict[str, dict[float, float]] = {name: {} for name in trials}
    with bar(None, "sensitivity", total=len(trials) * len(tried), shown=progress, unit="trial") as shown:
        for name, trial in trials.items():
            for amount in tried:
                if floor is None or min(curves[name].values(), default=floor) >= floor:
                    curves[name][amount] = trial(amount, lambda smaller: _measured(smaller, metric))
                shown.update()
    return SensitivityReport(dense, over, curves)


def _measured(model: nn.Module, metric: Metric) -> float:
    with restored(model), torch.no_grad():
        value = metric(model)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"metric must return a number, not {type(value).__name__}.") from error


def _axes(
    model: nn.Module, inputs: Inputs, over: str, scoring: Scoring, where: Where, *, repair: bool
) -> dict[str, Trial]:
    view = ModelView(model)
    axes = axes_of(view, inputs)
    chosen, _ = candidates(model, axes, where.include, where.exclude)
    scores = neuron_scores(view, scored(axes, chosen), scoring, inputs).scores

    def trial_of(names: Sequence[str]) -> Trial:
        def trial(amount: float, measure: Callable[[nn.Module], float]) -> float:
            counts = {name: max(1, axes[name].size - round(amount * axes[name].size)) for name in names}
            kept = {
                other: scores[other].topk(count).indices.sort().values
                for other, count in axes.feasible(counts).items()
                if other in scores and count < axes[other].size
            }
            plan = make_plan(model, axes, kept)
            if not repair:
                return plan.prepare(model).dry_run(lambda: measure(model))
            smaller = copy_of(model)
            plan.apply(smaller)
            repaired(smaller, plan, model, scoring.data, progress=False)
            return measure(smaller)

        return trial

    parts: dict[str, list[str]] = {}
    for axis in chosen:
        part = {"axes": axis.name, "kinds": axis.kind, "blocks": _block(axis.name)}[over]
        if part is not None:
            parts.setdefault(part, []).append(axis.name)
    return {part: trial_of(names) for part, names in parts.items()}


def _block(name: str) -> str:
    """The pattern of the axes in the same numbered block, or the axis itself where it is in none."""
    found = re.match(r"(.*?\.)?\d+(?=\.)", name)
    return f"{found.group()}.*" if found else name


def _tensors(model: nn.Module, scoring: Scoring, include: Any, exclude: Any) -> dict[str, Trial]:
    found = weight_scores(
        model,
        scoring.data,
        scoring.importance,
        loss_fn=scoring.loss_fn,
        include=include,
        exclude=exclude,
        progress=scoring.progress,
    )

    def trial_of(name: str) -> Trial:
        def trial(amount: float, measure: Callable[[nn.Module], float]) -> float:
            values = found[name].float()
            mask = masking.keep_best([masking.Scores(values, False, None, name)], round(amount * values.numel()))[0]
            with _masked(model, {name: mask}):
                return measure(model)

        return trial

    return {name: trial_of(name) for name in found}


@contextmanager
def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    before = masking.masks(model)
    masking.put(model, masks)
    try:
        yield
    finally:
        masking.strip(model)
        masking.put(model, before)
