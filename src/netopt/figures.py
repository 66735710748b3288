"""Figures outside of pyplot, so that no window opens and no global state is touched, which a notebook shows."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netopt.errors import InvalidArgumentError, MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure", "scores_by_kind", "tradeoff"]

KEPT, REMOVED = "#2f6690", "#c8553d"
BINS = 40


def figure(**settings: Any) -> Figure:
    """Returns an empty figure; ``settings`` are those of matplotlib's.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib import figure as shapes
    except ImportError as error:
        raise MissingPackageError(
            "pictures are drawn with matplotlib, which is not installed; pip install 'netopt[plots]'."
        ) from error

    class Figure(shapes.Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Figure(**settings)


def tradeoff(
    curves: Mapping[str, Sequence[tuple[Any, float]]], *, cost: str = "macs", quality: str = "quality", dense: float
) -> Figure:
    """Draws quality against the share of the cost that is left, a line for each way of pruning.

    Args:
        curves: By the name of a way, pairs of a share in ``(0, 1]``, or a report that tells it, and what was measured.
        cost: Which share a report tells: ``"macs"``, ``"params"``, ``"bytes"``.
        quality: What is measured, for the axis.
        dense: The quality of the model as it was.

    Raises:
        InvalidArgumentError: A share is not in ``(0, 1]``.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> drawn = tradeoff({"magnitude": [(0.5, 0.91), (0.3, 0.62)]}, quality="accuracy", dense=0.97)
        >>> drawn.axes[0].get_ylabel()
        'accuracy'
    """
    drawn = figure(figsize=(6.4, 3.8), layout="constrained")
    axes = drawn.add_subplot()
    for name, points in curves.items():
        told = sorted((_share(left, cost), float(value)) for left, value in points)
        axes.plot([100 * left for left, _ in told], [value for _, value in told], marker="o", markersize=4, label=name)
    axes.axhline(dense, color="0.5", linewidth=1, linestyle=":", label="dense")
    axes.invert_xaxis()
    axes.set(xlabel=f"{cost} left, %", ylabel=quality)
    axes.grid(color="0.9")
    drawn.legend(loc="outside right upper", frameon=False)
    return drawn


def _share(left: Any, cost: str) -> float:
    if not isinstance(left, (int, float)):
        left = getattr(left.after, cost) / getattr(left.before, cost)
    if not 0 < left <= 1:
        raise InvalidArgumentError(f"a share of the cost that is left is in (0, 1], not {left}.")
    return float(left)


def scores_by_kind(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], kinds: Mapping[str, str | None]) -> Figure:
    """Draws how scores of neurons are distributed, a panel a kind, those that stay beside those that go.

    Args:
        scores: One score a neuron, by axis.
        kept: The positions that stay, of axes that lose some.
        kinds: Of axes; those without one are together.
    """
    panels: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for name, one in scores.items():
        stays = torch.ones(len(one), dtype=torch.bool)
        if name in kept:
            stays = torch.zeros_like(stays).index_fill_(0, kept[name].cpu(), True)
        sides = panels.setdefault(kinds.get(name) or "other", ([], []))
        sides[0].append(one[stays])
        sides[1].append(one[~stays])
    drawn = figure(figsize=(7, 0.5 + 1.7 * max(len(panels), 1)), layout="constrained")
    empty = drawn.subplots(max(len(panels), 1), 1, squeeze=False)[:, 0]
    for axes, (kind, sides) in zip(empty, panels.items(), strict=True):
        values = [torch.cat(side).double() for side in sides]
        positive = torch.cat(values)
        positive = positive[positive > 0]
        low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.5, 1.0)
        edges = torch.logspace(math.log10(low), math.log10(high), BINS + 1).tolist()
        counted = [side.clamp(min=low, max=high).tolist() for side in values]
        labels = [f"{len(side):,} {word}" for side, word in zip(values, ("stay", "go"), strict=True)]
        axes.hist(counted, edges, stacked=True, color=[KEPT, REMOVED], label=labels)
        axes.set_xscale("log")
        axes.set(ylabel="neurons", title=kind)
        axes.legend(fontsize="small", frameon=False)
    drawn.supxlabel("score", fontsize=10)
    return drawn
