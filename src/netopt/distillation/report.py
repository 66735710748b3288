"""What a distillation did: a value to print, plot and keep."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from netopt.figures import figure
from netopt.tables import columns, html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DistillationReport", "Epoch"]


@dataclass(frozen=True)
class Epoch:
    """One epoch of the history.

    Args:
        epoch: Counted from 1.
        steps: Optimizer steps done since the beginning.
        loss: The objective, averaged over the epoch's steps.
        terms: Each unweighted term of it, averaged over the items it ran over.
        validation: The validation score after it, or ``None``.
        seconds: Wall-clock time it took, validation included.
    """

    epoch: int
    steps: int
    loss: float
    terms: Mapping[str, float]
    validation: float | None
    seconds: float


@dataclass(repr=False)
class DistillationReport:
    """What :func:`netopt.distill` returns.

    Args:
        history: One entry an epoch, the last one partial if training was stopped.
        stopped: ``"finished"``, ``"patience"``, ``"callback"`` or ``"interrupted"``.
        steps: Optimizer steps done.
        samples: Samples seen.
        seconds: Wall-clock time of the call.
        teacher_seconds: How much of it was spent asking the teachers.
        metric: What validation measured, or ``None``.
        best: The best validation score, or ``None``.
        best_epoch: Its epoch, or ``None``; the student's weights are those if ``kept_best``.
        kept_best: Whether the best weights were put back.
        cache: Hits, misses and where the teacher's outputs were kept; empty without a cache.
        notes: One sentence on anything the caller might want to know.
    """

    history: list[Epoch] = field(default_factory=list)
    stopped: str = "finished"
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    metric: str | None = None
    best: float | None = None
    best_epoch: int | None = None
    kept_best: bool = False
    cache: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The objective averaged over the last epoch; NaN if no step was done."""
        return self.history[-1].loss if self.history else float("nan")

    @property
    def teacher_share(self) -> float:
        """The part of the time that was spent asking the teachers, in [0, 1]."""
        return self.teacher_seconds / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, ready for JSON."""
        plain = asdict(self)
        plain["history"] = [{**asdict(one), "terms": dict(one.terms)} for one in self.history]
        return {**plain, "loss": self.loss, "teacher_share": self.teacher_share}

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draws the loss of each epoch, and the validation score on a second axis, and returns matplotlib's figure.

        Args:
            ax: Draw on these axes, and return their figure.

        Raises:
            MissingPackageError: matplotlib is missing; ``pip install 'netopt[plots]'`` brings it.
        """
        drawn_on = figure(figsize=(7, 4), layout="constrained") if ax is None else ax.get_figure(root=True)
        axes = drawn_on.add_subplot() if ax is None else ax  # type: ignore[union-attr]
        epochs = [one.epoch for one in self.history]
        lines = axes.plot(epochs, [one.loss for one in self.history], color="#2f6db2", marker="o", label="loss")
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss, mean of the epoch")
        axes.set_title(self._headline(), loc="left", fontsize=10)
        axes.locator_params(axis="x", integer=True)
        scores = [(one.epoch, one.validation) for one in self.history if one.validation is not None]
        if scores:
            other = axes.twinx()
            lines += other.plot(*zip(*scores, strict=True), color="#c8553d", marker="s", label=self._metric)
            other.set_ylabel(f"{self._metric}, on validation data" if self.metric else "validation score")
            if self.best_epoch is not None:
                label = f"best {self._metric}, {self.best:.4g}"
                lines.append(axes.axvline(self.best_epoch, color="#c8553d", linestyle=":", label=label))
        # Beside the axes, where it hides nothing.
        axes.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
        return drawn_on  # type: ignore[return-value]

    def __str__(self) -> str:
        heads, rows = self._table()
        return "\n".join([self._headline(), *columns([heads, *rows]), *self._facts()])

    def __repr__(self) -> str:
        best = "" if self.best is None else f", best {self._metric} {self.best:.4g} after epoch {self.best_epoch}"
        return f"<{self._headline()}; loss {self.loss:.4g}{best}>"

    def _repr_html_(self) -> str:
        facts = "".join(f"<p>{html.escape(one)}</p>" for one in self._facts())
        return f"<p><b>{html.escape(self._headline())}</b></p>{html_table(*self._table())}{facts}"

    @property
    def _metric(self) -> str:
        return "validation" if self.metric in (None, "<lambda>") else str(self.metric)

    def _headline(self) -> str:
        return (
            f"distillation {self.stopped}: {self.steps:,} steps, {self.samples:,} samples, {self.seconds:.1f} s, "
            f"{self.teacher_share:.0%} of it the teacher's"
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        terms = list(self.history[-1].terms) if self.history else []
        terms = terms if len(terms) > 1 else []
        columns = ["epoch", "steps", "loss", *terms, *([self._metric] if self.metric else []), "seconds"]
        rows = [
            [
                str(one.epoch),
                str(one.steps),
                f"{one.loss:.4g}",
                *(f"{one.terms[name]:.4g}" for name in terms),
                *(["" if one.validation is None else f"{one.validation:.4g}"] if self.metric else []),
                f"{one.seconds:.1f}",
            ]
            for one in self.history
        ]
        return columns, rows

    def _facts(self) -> list[str]:
        facts = []
        if self.best is not None:
            kept = ", whose weights the student has" if self.kept_best else ""
            facts.append(f"best {self._metric} {self.best:.4g} after epoch {self.best_epoch}{kept}")
        if self.cache:
            facts.append(", ".join(f"{name} {value}" for name, value in self.cache.items()))
        return facts + self.notes
