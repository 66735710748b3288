"""Checksums of a nested value, entry by entry, as a schema that a file carries along.

A table of paths and checksums, written along, finds what is missing, added, or other than written, by its name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["checksums", "difference"]


def checksums(value: Any) -> dict[str, int]:
    """Returns a checksum for every entry of dicts, lists and tuples, by path.

    Example:
        >>> table = checksums({"step": 3, "rows": [1.5]})
        >>> list(table)
        ['step', 'rows', 'rows/0']
        >>> difference({"step": 4, "rows": [1.5]}, table)
        "'step' is not what was written"
    """
    return {path: _checksum(one) for path, one in _entries(value, "")}


def difference(value: Any, table: Any) -> str:
    """Returns a sentence on the first entry of ``value`` that is not as in ``table``; empty if all are."""
    if not isinstance(table, dict):
        return "'checksums' is missing"
    found = checksums(value)
    for path in table:
        if path not in found:
            return f"{path!r} is missing"
        if found[path] != table[path]:
            return f"{path!r} is not what was written"
    more = next((path for path in found if path not in table), None)
    return "" if more is None else f"{more!r} was not written"


def _entries(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if path:
        yield path, value
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)) and not _plain(value):
        items = enumerate(value)
    for key, one in items:
        yield from _entries(one, f"{path}/{key}" if path else str(key))


def _plain(value: Any) -> bool:
    """Whether a list holds nothing but numbers and strings: one checksum is enough then."""
    return len(value) > 8 and all(isinstance(one, (int, float, str)) for one in value)


def _checksum(value: Any) -> int:
    if isinstance(value, Tensor):
        dense = torch.view_as_real(value) if value.is_complex() else value
        content: Any = dense.detach().to("cpu").reshape(-1).contiguous().view(torch.uint8).numpy()
        return zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode(), zlib.crc32(content))
    if isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and not _plain(value)):
        # What is in it has checksums of its own.
        return zlib.crc32(f"{type(value).__name__} {len(value)}".encode())
    return zlib.crc32(f"{type(value).__name__} {value!r}".encode())
