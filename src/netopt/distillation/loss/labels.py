"""Where the labels of a batch are, and which positions of its output count."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.errors import ArgumentTypeError, InvalidArgumentError

__all__ = ["UNLABELLED", "Labelling", "Labels", "is_causal"]

Labels: TypeAlias = str | Callable[[Any], Tensor] | None
"""Where labels are: a key of the batch, a function of it, or ``None`` for the batch's targets."""

UNLABELLED = -1


class Labelling(NamedTuple):
    """How labels are found.

    Args:
        where: A key of the batch, a function of it, or ``None`` for the batch's targets.
        ignore_index: The label of what does not count.
        causal: Whether a position's label is the next one's.
    """

    where: Labels
    ignore_index: int
    causal: bool

    def of(self, batch: Any, positions: tuple[int, ...]) -> Tensor | None:
        """Returns the labels of a batch, each at the position that should predict it; ``None`` if it has none."""
        found = self._found(batch)
        if found is None or not isinstance(found, Tensor):
            if self.where is not None:
                raise ArgumentTypeError(f"labels= gave a {type(found).__name__}; let it give a tensor.")
            return None
        if self.causal and self.where is None and isinstance(batch, Mapping) and tuple(found.shape) == positions:
            found = _shifted(found, self.ignore_index)
        if found.dim() == len(positions) + 1 and found.shape[-1] == 1 and not found.is_floating_point():
            found = found.squeeze(-1)
        return found

    def _found(self, batch: Any) -> Any:
        if callable(self.where):
            return self.where(batch)
        if self.where is None:
            return batches.split(batch)[1]
        if not isinstance(batch, Mapping) or self.where not in batch:
            keys = list(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise InvalidArgumentError(f"labels={self.where!r} is no key of the batch, {keys}.")
        return batch[self.where]

    def valid(self, batch: Any, labels: Any, positions: tuple[int, ...]) -> Tensor | None:
        """Returns which positions count, bool in the shape of ``positions`` or of their samples; ``None`` for all.

        Integer labels rule out where they equal ``ignore_index``; without labels a Hugging Face batch's attention mask
        rules out padding.
        """
        if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool:
            if labels.shape == positions or labels.shape == positions[:1]:
                # In host memory a look is cheap, and most batches have nothing to rule out.
                host = labels.device.type == "cpu"
                if host and self.ignore_index < 0 <= (labels.numpy().min() if labels.numel() else 0):
                    return None
                return labels != self.ignore_index
            return None
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and tuple(mask.shape) == positions:
            return mask.bool()
        return None


def is_causal(model: nn.Module) -> bool:
    """Whether labels belong to the position before, as Hugging Face's language models have it."""
    kind = getattr(model, "loss_type", None) or type(model).__name__
    return re.search(r"ForCausalLM|LMHeadModel", str(kind)) is not None


def _shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Returns ``labels`` moved to the positions that predict them; the last position predicts nothing."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), ignore_index)], dim=1)
