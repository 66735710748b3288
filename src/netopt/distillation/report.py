"""What a distillation did: a value to print, plot and keep."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

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


@dataclass
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

    def plot(self, ax: Any = None) -> Any:
        """Draws the loss of each epoch, and the validation score on a second axis; returns matplotlib's axes.

        Raises:
            ImportError: matplotlib is missing; ``pip install 'netopt[plots]'`` brings it.
        """
        if ax is None:
            from matplotlib.figure import Figure

            # A figure of its own, so that no global state of pyplot is touched.
            ax = Figure(figsize=(6, 4), layout="constrained").add_subplot()
        epochs = [one.epoch for one in self.history]
        ax.plot(epochs, [one.loss for one in self.history], marker="o", label="loss")
        ax.set_xlabel("epoch")
        ax.set_ylabel("loss")
        scores = [(one.epoch, one.validation) for one in self.history if one.validation is not None]
        if scores:
            other = ax.twinx()
            other.plot(*zip(*scores, strict=True), color="tab:orange", marker="s", label=self.metric)
            other.set_ylabel(self.metric or "validation")
        return ax

    def __str__(self) -> str:
        head = (
            f"distillation {self.stopped}: {self.steps} steps, {self.samples} samples, {self.seconds:.1f} s, "
            f"{self.teacher_share:.0%} of it the teacher's"
        )
        columns, rows = self._table()
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)
        ]
        return "\n".join([head, *lines, *self._facts()])

    def _repr_html_(self) -> str:
        columns, rows = self._table()
        header = "".join(f"<th>{html.escape(one)}</th>" for one in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(one)}</td>" for one in row) + "</tr>" for row in rows)
        facts = "".join(f"<p>{html.escape(one)}</p>" for one in self._facts())
        title = html.escape(str(self).splitlines()[0])
        return f"<p>{title}</p><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>{facts}"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        terms = list(self.history[-1].terms) if self.history else []
        terms = terms if len(terms) > 1 else []
        columns = ["epoch", "steps", "loss", *terms, *([self.metric] if self.metric else []), "seconds"]
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
            facts.append(f"best {self.metric} {self.best:.4g} after epoch {self.best_epoch}{kept}")
        if self.cache:
            facts.append(", ".join(f"{name} {value}" for name, value in self.cache.items()))
        return facts + self.notes
