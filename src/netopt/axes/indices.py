"""From layouts to indices: which position of an axis stands at each index of a dimension, and which indices remain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from netopt.axes.layout import Atom, Layout, Product, resolve


def indices(layout: Layout, kept: Mapping[Atom, Tensor]) -> Tensor:
    """The indices of a dimension that remain when atoms keep these positions; ``(remaining,)``, int64, sorted."""
    layout = resolve(layout)
    if isinstance(layout, Atom):
        found = kept.get(layout)
        return torch.arange(layout.size) if found is None else found.to("cpu", torch.int64)
    if isinstance(layout, Product):
        result = torch.zeros(1, dtype=torch.int64)
        for part in layout.parts:
            result = (result[:, None] * part.size + indices(part, kept)[None, :]).flatten()
        return result
    pieces, offset = [], 0
    for part in layout.parts:
        pieces.append(indices(part, kept) + offset)
        offset += part.size
    return torch.cat(pieces)


def labels(layout: Layout, group: Sequence[Atom]) -> list[Tensor]:
    """The position of an axis at each index of a dimension, -1 where there is none.

    A dimension in which the axis is a factor twice has two such tensors, ``(size,)``, int64.
    """
    if type(layout) is Atom and len(group) == 1 and layout is group[0]:
        return [torch.arange(layout.size)]  # by far the most
    offsets: dict[Atom, int] = {}
    offset = 0
    for atom in group:
        offsets[atom] = offset
        offset += atom.size
    return [found for found in _labels(layout, offsets) if bool((found >= 0).any())]


def _labels(layout: Layout, offsets: Mapping[Atom, int]) -> list[Tensor]:
    layout = resolve(layout)
    if isinstance(layout, Atom):
        start = offsets.get(layout)
        return [torch.full((layout.size,), -1) if start is None else torch.arange(start, start + layout.size)]
    if isinstance(layout, Product):
        found: list[Tensor] = []
        before, behind = 1, layout.size
        for part in layout.parts:
            behind //= part.size
            found.extend(
                one.repeat_interleave(behind).repeat(before) for one in _labels(part, offsets) if bool((one >= 0).any())
            )
            before *= part.size
        return found or [torch.full((layout.size,), -1)]
    parts = [_labels(part, offsets) for part in layout.parts]
    most = max(len(part) for part in parts)
    return [
        torch.cat([part[index] if index < len(part) else torch.full_like(part[0], -1) for part in parts])
        for index in range(most)
    ]
