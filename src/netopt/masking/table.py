"""Masks by name, as a dictionary that prints as one line."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

__all__ = ["MaskTable"]

NAMED = 3
"""So many names are printed before the rest is only counted."""


class MaskTable(dict[str, Tensor]):
    """A dictionary of masks by parameter name; ``True`` for what is kept.

    Example:
        >>> MaskTable({"fc.weight": torch.tensor([[True, False]])})
        1 mask, 50.0 % of 2 entries masked: fc.weight
    """

    def __repr__(self) -> str:
        size = sum(mask.numel() for mask in self.values())
        masked = size - sum(int(torch.count_nonzero(mask)) for mask in self.values())
        if not self:
            return "no masks"
        names = [*list(self)[:NAMED], *(["..."] if len(self) > NAMED else [])]
        share = f"{masked / max(size, 1) * 100:.1f} % of {size:,} entries masked"
        return f"{len(self):,} mask{'s' if len(self) > 1 else ''}, {share}: {', '.join(names)}"

    def __reduce__(self) -> tuple[Any, ...]:
        # As a type that torch.load(weights_only=True) knows.
        return OrderedDict, (), None, None, iter(self.items())
