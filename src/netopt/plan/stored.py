"""Importance read from a checkpoint, for models whose weights never fit in memory together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from netopt.errors import InvalidArgumentError, PlanMismatchError
from netopt.importance import Evidence, Importance, lookup
from netopt.importance.registry import Criterion
from netopt.plan.shards import Shard, open_checkpoint

__all__ = ["stored"]


def stored(
    source: str | os.PathLike[str], importance: Importance = "magnitude", names: Mapping[str, str] | None = None
) -> Criterion:
    """A criterion that judges the weights in a checkpoint instead of the model's own, one at a time or in parts.

    The model may then be on the meta device, and :meth:`netopt.Plan.apply_to_checkpoint` carries the plan out.

    Args:
        source: A safetensors file or folder.
        importance: A criterion of weights that needs no data.
        names: The checkpoint's names of tensors by those of the model, where they differ.

    Returns:
        What to pass as ``importance`` to :func:`netopt.plan_neurons`.

    Raises:
        CheckpointError: There is no checkpoint.
        InvalidArgumentError: ``importance`` needs data.
    """
    criterion = lookup(importance)
    if criterion.needs:
        raise InvalidArgumentError(f"importance {criterion.name!r} needs data, and a checkpoint has only weights.")
    known = {field: getattr(criterion, field) for field in ("name", "needs", "of", "paper", "entrywise")}
    return _Stored(function=criterion, **known, places=open_checkpoint(source).places, names=names or {})


@dataclass(frozen=True)
class _Stored(Criterion):
    """A criterion with the file of each weight."""

    places: Mapping[str, Shard] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, evidence: Any) -> Tensor:
        """Returns the scores of one tensor, whatever values the evidence holds."""
        return self.function(_with(evidence, self._shard(evidence).read(self._name(evidence))))

    def parts(self, evidence: Any) -> Iterator[tuple[slice, Tensor]]:
        """Yields the scores of one tensor, block by block of its file where that is possible."""
        if not self.entrywise:
            yield slice(None), self(evidence)
            return
        for rows, weight in self._shard(evidence).blocks(self._name(evidence)):
            yield rows, self.function(_with(evidence, weight))

    def together(self, evidence: Sequence[Any]) -> Sequence[Tensor]:
        """Returns nothing: each tensor is read by itself."""
        del evidence
        return ()

    def _shard(self, evidence: Evidence) -> Shard:
        name = self._name(evidence)
        if name not in self.places:
            raise PlanMismatchError(f"the checkpoint has no tensor `{name}`, which the model has.")
        return self.places[name]

    def _name(self, evidence: Evidence) -> str:
        return self.names.get(evidence.name, evidence.name)


def _with(evidence: Evidence, weight: Tensor) -> Evidence:
    return evidence.of(weight.to(torch.promote_types(weight.dtype, torch.float32)))
