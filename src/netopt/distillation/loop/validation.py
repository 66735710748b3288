"""How good the student is, as one number an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.distillation.data.sources import Drawn, Source
from netopt.distillation.loop.student import Trainee, evaluating
from netopt.distillation.loss.objective import Objective
from netopt.distillation.loss.outputs import classes_last, positions_of
from netopt.distillation.loss.targets import Targets
from netopt.errors import ArgumentTypeError, MissingDataError, NonFiniteError

__all__ = ["Metric", "Validation"]

Metric: TypeAlias = str | Callable[..., Any] | None


class Validation:
    """Scores the student in eval mode.

    Args:
        data: Where batches come from, or a function of the student that returns the score itself.
        metric: ``None`` or ``"loss"``, the objective itself, lower is better; ``"accuracy"``; or a function of
            ``(output, targets)`` that returns a number or one value a sample. Higher is better for all but the loss.
        targets: Asks the teachers, where the loss is wanted.
        objective: The loss.
    """

    def __init__(
        self,
        data: Source | Callable[[nn.Module], Any],
        metric: Metric,
        targets: Targets,
        objective: Objective,
    ) -> None:
        self.data, self.metric, self.targets, self.objective = data, metric, targets, objective
        self.by_loss = isinstance(data, Source) and metric in (None, "loss")
        if isinstance(data, Source):
            self.name = "validation loss" if self.by_loss else str(getattr(metric, "__name__", metric))
        else:
            self.name = str(getattr(data, "__name__", "validation"))

    def better(self, score: float, best: float | None) -> bool:
        """Whether ``score`` beats ``best``."""
        return best is None or (score < best if self.by_loss else score > best)

    def score(self, trainee: Trainee, *, limit: int | None = None) -> float:
        """Returns the score, of the first ``limit`` batches only if that is given; flags stay as they are.

        Raises:
            NonFiniteError: it is not a finite number.
            MissingDataError: a batch has no targets, and the metric needs them.
        """
        with evaluating(trainee.student):
            score = self._score(trainee, limit)
        if not isinstance(score, (int, float)):
            raise ArgumentTypeError(f"validation must give a number, not a {type(score).__name__}.")
        if not math.isfinite(score):
            raise NonFiniteError(f"validation ({self.name}) gave {score}; look for NaN in the data, or lower lr.")
        return float(score)

    def dry_run(self, trainee: Trainee) -> None:
        """Scores one batch, so that what is wrong with the data shows before an epoch has been trained."""
        if isinstance(self.data, Source):
            self.score(trainee, limit=1)

    def _score(self, trainee: Trainee, limit: int | None) -> Any:
        if not isinstance(self.data, Source):
            score: Any = self.data(trainee.student)
            score = score.item() if isinstance(score, Tensor) and score.numel() == 1 else score
            return self.targets.engine.agreed(score) if isinstance(score, (int, float)) else score
        engine, total, count = self.targets.engine, 0.0, 0.0
        losses = [[0.0, 0.0] for _ in self.objective.names]
        for drawn in islice(self.data.begin(0), limit):
            if self.by_loss:
                self._add_loss(trainee, drawn, losses)
                continue
            batch = drawn.batch
            values = self._values(trainee.record(batches.move(batch, self.targets.engine.device)).output, batch)
            if not drawn.idle:
                total += float(values.sum())
                count += values.numel()
        if self.by_loss:
            sums = engine.sum(torch.tensor(losses, dtype=torch.float64)).tolist()
            return sum(w * one / max(1, n) for w, (one, n) in zip(self.objective.weights, sums, strict=True))
        total, count = engine.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
        return total / max(1, count)

    def _add_loss(self, trainee: Trainee, drawn: Drawn, losses: list[list[float]]) -> None:
        moved, target = self.targets.prepare(drawn, train=False)
        with self.targets.engine.autocast():
            output, features = trainee(moved)
        counts = self.objective.counts(target.items, target.labels)
        sums = self.objective.sums(output, features, target)
        for held, one, more in zip(losses, sums, counts, strict=True):
            held[0] += float(one.value)
            held[1] += more

    def _values(self, output: Tensor, batch: Any) -> Tensor:
        wanted = self.targets.labelling.of(batch, positions_of(output.shape))
        if wanted is None:
            raise MissingDataError(f"metric {self.name!r} needs targets and a validation batch has none.")
        wanted = wanted.to(output.device)
        if callable(self.metric):
            value = torch.as_tensor(self.metric(output, wanted), dtype=torch.float64)
            return value.expand(len(output)) if value.dim() == 0 else value
        right = classes_last(output).argmax(-1) == wanted
        return right[wanted >= 0].double()
