"""What is asked of a criterion: whose neurons it scores, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from netopt.batches import Data
from netopt.importance.registry import Importance

if TYPE_CHECKING:
    from netopt.importance.activations import Tap

__all__ = ["Member", "Precision", "ScoredAxes", "Scoring"]

Member = tuple[str, int, Tensor]
"""A tensor's name, a dimension, and the position of the axis at each index of it, -1 elsewhere."""

EXACT_OUTPUTS = 64
"""Up to so many outputs a sample every one is differentiated; beyond, random signs estimate their sum of squares."""

USUAL_ERROR = 0.1


@dataclass(frozen=True)
class Scoring:
    """Where scores come from.

    Attributes:
        importance: A criterion's name, a criterion, a function of its evidence, or the scores themselves by name.
        data: Batches, for criteria that look at them.
        loss_fn: Of the model's result and a batch's targets, for criteria that need the loss.
        outputs: From the forward's result to the outputs that count; by default all of floating point.
        progress: Whether to show a progress bar.
    """

    importance: Importance | Mapping[str, Tensor] = "saliency"
    data: Data | None = None
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    outputs: Callable[[Any], list[Tensor]] | None = None
    progress: bool = False


@dataclass(frozen=True)
class ScoredAxes:
    """Axes whose neurons are scored.

    Attributes:
        sizes: Number of neurons, by axis.
        members: Where each axis appears among the model's tensors.
        taps: Where the activations of the axis of a name are read.
    """

    sizes: Mapping[str, int]
    members: Mapping[str, Sequence[Member]]
    taps: Callable[[str], Sequence[Tap]]


class Precision(NamedTuple):
    """How well sums over many outputs are to be known.

    Attributes:
        relative_error: Wanted of the estimate where outputs are many; decides the number of random sign vectors.
        exact_outputs: Up to so many outputs a sample, each is differentiated.
    """

    relative_error: float = USUAL_ERROR
    exact_outputs: int = EXACT_OUTPUTS
