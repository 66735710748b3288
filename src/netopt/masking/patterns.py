"""Masks computed from scores: which entries of a matrix are kept, in which shape.

Pure functions of scores; nothing here knows a module. Of equal scores the first is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from netopt.errors import ArgumentTypeError, InvalidArgumentError, NonFiniteError
from netopt.masking.quantile import convert

__all__ = ["Pattern", "Shape", "expand_blocks", "keep_n_of_m", "keep_per_row", "mean_of_blocks", "parse"]

CHUNK = 1 << 16
LARGEST_RANKED = 32

Pattern: TypeAlias = "str | tuple[str, int, int]"
"""``"unstructured"``, ``"n:m"`` such as ``"2:4"``, or ``("block", rows, columns)``."""


@dataclass(frozen=True)
class Shape:
    """A pattern, understood.

    Attributes:
        kind: ``"unstructured"``, ``"n:m"`` or ``"block"``.
        first: ``n``, or the rows of a block.
        second: ``m``, or the columns of a block.
    """

    kind: str
    first: int = 1
    second: int = 1

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.first}:{self.second}"
        return self.kind if self.kind == "unstructured" else f"blocks of {self.first} x {self.second}"


def parse(pattern: Pattern) -> Shape:
    """Reads a pattern.

    Raises:
        InvalidArgumentError: no such pattern, or ``n`` is not below ``m``.
        ArgumentTypeError: neither a string nor a tuple.

    Example:
        >>> parse("2:4")
        Shape(kind='n:m', first=2, second=4)
    """
    known = 'patterns are "unstructured", "n:m" such as "2:4", and ("block", rows, columns)'
    if isinstance(pattern, (tuple, list)):
        sizes = pattern[1:]
        if len(sizes) != 2 or pattern[0] != "block" or not all(type(size) is int and size > 0 for size in sizes):
            numbers = len(pattern) == 2 and all(type(size) is int for size in pattern)
            hint = f' Did you mean "{pattern[0]}:{pattern[1]}"?' if numbers else ""
            raise InvalidArgumentError(f"pattern {pattern!r} is not understood; {known}.{hint}")
        return Shape("block", *sizes)
    if not isinstance(pattern, str):
        raise ArgumentTypeError(f"pattern must be a string or a tuple, not {type(pattern).__name__}; {known}.")
    if pattern == "unstructured":
        return Shape("unstructured")
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found:
        raise InvalidArgumentError(f"pattern {pattern!r} is not understood; {known}.")
    n, m = int(found[1]), int(found[2])
    if not 0 < n < m:
        raise InvalidArgumentError(f"pattern {pattern!r} keeps {n} of {m}; n must be at least 1 and below m.")
    return Shape("n:m", n, m)


def keep_n_of_m(scores: Tensor, n: int, m: int, magnitude: bool = False) -> Tensor:
    """Keeps the ``n`` best of each ``m`` neighbours along the last dimension.

    A last group of fewer than ``m`` is filled up with entries that are never kept.

    Args:
        scores: ``(..., columns)``.
        n: How many to keep of each group.
        m: The size of a group.
        magnitude: Whether ``scores`` are weights, and their absolute values the scores.

    Returns:
        Boolean, of the shape of ``scores``.

    Raises:
        NonFiniteError: a score is NaN.

    Example:
        >>> keep_n_of_m(torch.tensor([[1.0, 4.0, 2.0, 2.0]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    columns = scores.shape[-1]
    missing = -columns % m
    if missing:
        scores = F.pad(scores.abs() if magnitude else scores, (0, missing), value=-torch.inf)
        magnitude = False
    groups = scores.detach().reshape(-1, m)
    keep = _ranked(groups, n, magnitude) if m <= LARGEST_RANKED else _sorted(groups, n, magnitude)
    return keep.view(scores.shape)[..., :columns]


def _ranked(groups: Tensor, n: int, magnitude: bool) -> Tensor:
    """Compares every two of a group: who loses fewer than ``n`` times is kept.

    The members of a group are laid out in planes, so that each comparison runs over memory in order.
    """
    count, m = groups.shape
    keep = torch.empty(count, m, dtype=torch.bool)
    target = keep.numpy()
    size = max(CHUNK // m, 1)
    dtype = torch.float64 if groups.dtype == torch.float64 else torch.float32
    planes = np.empty((m, min(size, count)), np.float64 if dtype == torch.float64 else np.float32)
    lost, kept = np.empty(planes.shape, np.uint8), np.empty(planes.shape, np.bool_)
    wins, converted = np.empty(planes.shape[1], np.bool_), np.empty(planes.size, planes.dtype)
    # Who comes first wins a draw. Each loses to those after it, unless it is seen to win.
    at_worst = np.arange(m - 1, -1, -1, dtype=np.uint8)[:, None]
    for start in range(0, count, size):
        chunk = groups[start : start + size]
        if chunk.device.type == "cpu" and chunk.dtype != dtype:
            wide = converted[: chunk.numel()]
            convert(chunk.reshape(-1), wide)
            part = wide.reshape(-1, m).T
        else:
            part = chunk.to("cpu", dtype).numpy().T
        width = part.shape[1]
        rank = planes[:, :width]
        if magnitude:
            np.abs(part, out=rank)
        else:
            np.copyto(rank, part)
        if np.isnan(rank.min()):
            raise NonFiniteError("the scores hold NaN, so they cannot be ranked; repair the weights, or exclude them.")
        lost[:, :width] = at_worst
        for i in range(m):
            for j in range(i + 1, m):
                np.greater_equal(rank[i], rank[j], out=wins[:width])
                lost[j, :width] += wins[:width].view(np.uint8)
                lost[i, :width] -= wins[:width].view(np.uint8)
        np.less(lost[:, :width], n, out=kept[:, :width])
        target[start : start + width] = kept[:, :width].T
    return keep.to(groups.device)


def _sorted(groups: Tensor, n: int, magnitude: bool) -> Tensor:
    scores = groups.abs() if magnitude else groups
    if torch.isnan(scores).any():
        raise NonFiniteError("the scores hold NaN, so they cannot be ranked; repair the weights, or exclude them.")
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[:, :n], True)


def keep_per_row(scores: Tensor, remove: int) -> Tensor:
    """Removes the ``remove`` lowest of each row; ``(rows, columns)`` to boolean of that shape.

    Example:
        >>> keep_per_row(torch.tensor([[1.0, 3.0, 2.0], [6.0, 5.0, 4.0]]), 1)
        tensor([[False,  True,  True],
                [ True,  True, False]])
    """
    rows, columns = scores.shape
    if remove <= 0 or remove >= columns:
        return torch.full((rows, columns), remove <= 0, dtype=torch.bool, device=scores.device)
    threshold = scores.kthvalue(remove, dim=-1, keepdim=True).values
    keep = scores > threshold
    equal = scores == threshold
    spare = (columns - remove) - keep.sum(-1, keepdim=True)
    return keep | (equal & (equal.cumsum(-1) <= spare))


def mean_of_blocks(scores: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the mean score of each block of ``rows`` by ``columns``; blocks at the edge may be smaller."""
    height, width = -(-scores.shape[0] // rows), -(-scores.shape[1] // columns)
    padding = (0, width * columns - scores.shape[1], 0, height * rows - scores.shape[0])
    padded = F.pad(scores.to(torch.promote_types(scores.dtype, torch.float32)), padding)
    counted = F.pad(torch.ones_like(scores, dtype=padded.dtype), padding)

    def total(matrix: Tensor) -> Tensor:
        return matrix.view(height, rows, width, columns).sum((1, 3))

    return total(padded) / total(counted)


def expand_blocks(keep: Tensor, rows: int, columns: int, shape: Sequence[int]) -> Tensor:
    """Returns a mask of ``shape`` from one of blocks."""
    return keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
