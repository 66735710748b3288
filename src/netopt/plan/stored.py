"""Importance read from a checkpoint, for models whose weights never fit in memory together."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from netopt.errors import InvalidArgumentError, PlanMismatchError
from netopt.importance import Evidence, Importance, lookup
from netopt.plan.checkpoint import open_checkpoint

__all__ = ["stored"]


def stored(source: str | os.PathLike[str], importance: Importance = "magnitude") -> Callable[[Evidence], Tensor]:
    """A criterion that judges the weights in a checkpoint instead of the model's own, one at a time.

    The model may then be on the meta device, and :meth:`netopt.Plan.apply_to_checkpoint` carries the plan out.

    Args:
        source: A safetensors file or folder.
        importance: A criterion of weights that needs no data.

    Returns:
        A function to pass as ``importance`` to :func:`netopt.plan_neurons`.

    Raises:
        CheckpointError: There is no checkpoint.
        InvalidArgumentError: ``importance`` needs data.
    """
    criterion = lookup(importance)
    if criterion.needs:
        raise InvalidArgumentError(f"importance {criterion.name!r} needs data, and a checkpoint has only weights.")
    places = open_checkpoint(source).places

    def judge(seen: Evidence) -> Tensor:
        if seen.name not in places:
            raise PlanMismatchError(f"the checkpoint has no tensor `{seen.name}`, which the model has.")
        with places[seen.name].read(seen.name) as weight:
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            return criterion(Evidence(seen.name, wide, {}))

    return judge
