"""The distillation loss of one batch, for training loops that belong to someone else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.distillation.data.fingerprints import model_fingerprint
from netopt.distillation.loss.cache import TeacherCache, cache_for
from netopt.distillation.loss.labels import Labelling, Labels, is_causal
from netopt.distillation.loss.objective import Items, Kept, Objective, Record, SoftLoss, Target
from netopt.distillation.loss.outputs import Picker, check_shapes, pick, positions_of
from netopt.distillation.loss.teachers import Runner, as_teachers, shared_tensors

__all__ = ["Teaching"]


class _Unknown(NamedTuple):
    """A source whose samples are known by their contents alone."""

    samples: int = 0
    fixed: bool = False


class Teaching:
    """What :func:`netopt.distill` minimises, one batch at a time; arguments as there."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        *,
        loss: SoftLoss = "mse",
        temperature: float = 4.0,
        hard: float = 0.0,
        labels: Labels = None,
        ignore_index: int = -100,
        output: Picker = None,
        cache: Any = None,
    ) -> None:
        self.teachers, weights = as_teachers(teacher, None)
        for one in self.teachers:
            shared_tensors(student, one, None)
        self.output = output
        self.objective = Objective(loss, temperature=temperature, hard=hard, teachers=weights)
        self._labelling = Labelling(labels, ignore_index, is_causal(student))
        self._runners = self._made()
        settings, source = cache_for(cache, None), _Unknown()
        about = {"output": str(output)}
        if settings is not None and settings.path is not None:
            about["teachers"] = str(model_fingerprint(self.teachers))
        self._cache = None if settings is None else TeacherCache(settings, source, self.objective, about=about)  # type: ignore[arg-type]
        self._learnt = False

    def _made(self) -> list[Runner]:
        return [Runner(one, None, self.output, list(one.modules())) for one in self.teachers]

    def to(self, device: torch.device) -> None:
        """Takes the teachers to where batches will be."""
        for one in self.teachers:
            one.to(device)
        self._runners = self._made()

    @property
    def hits(self) -> int:
        """How many samples of a teacher were found in the cache."""
        return 0 if self._cache is None else self._cache.hits

    def loss(self, result: Any, batch: Any) -> Tensor:
        """Returns the loss of the student's ``result`` on ``batch``, each term a mean over what counts."""
        output = pick(result, self.output)
        positions = positions_of(output.shape)
        labels = self._labelling.of(batch, positions)
        items = Items(positions, self._labelling.valid(batch, labels, positions))
        target = Target(items, self._records(batch), labels)
        if not self._learnt:
            for record in target.records:
                check_shapes(output, record.output)  # type: ignore[arg-type]
            self.objective.learn(target)
            self._learnt = True
        counts = self.objective.counts(items, labels)
        pairs = zip(self.objective.weights, counts, strict=True)
        shares = [weight / max(count, 1) for weight, count in pairs]
        sums = self.objective.sums(output, {}, target, shares)
        terms = [_scaled(one.root, one.value, one.seed, share) for one, share in zip(sums, shares, strict=True)]
        return torch.stack(terms).sum()

    def _records(self, batch: Any) -> list[Record | Kept]:
        if self._cache is None:
            return [*self._run(batch)]
        return [*self._cache.records(None, batches.move(batch, torch.device("cpu")), lambda: self._run(batch))]

    def _run(self, batch: Any) -> list[Record]:
        with torch.no_grad():
            return [run(batch, {}) for run in self._runners]


def _scaled(root: Tensor, value: Tensor, seed: Tensor | None, share: float) -> Tensor:
    """A term whose value is its share of the sum, and whose gradient starts at ``root``."""
    if seed is None:
        return root * share
    linear = (root * seed).sum()
    return linear - linear.detach() + value * share
