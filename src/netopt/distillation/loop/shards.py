"""What is sharded over processes is written by all of them, each its part, and read the same way.

A checkpoint is a value of nested dicts and lists. The sharded tensors in it are taken out, and a mark with their path
is left in their place; `torch.distributed.checkpoint` writes and reads them, over another number of processes if need
be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["put_together", "read", "take_apart", "write"]

MARK = "sharded over processes"


def take_apart(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Returns ``value`` with a mark for every sharded tensor, and these by path."""
    if hasattr(value, "device_mesh"):
        return {MARK: path}, {path: value}
    if isinstance(value, Mapping):
        entries = {key: take_apart(one, f"{path}/{key}") for key, one in value.items()}
        kept: Any = {key: rest for key, (rest, _) in entries.items()}
        return kept, {name: one for _, found in entries.values() for name, one in found.items()}
    if isinstance(value, (list, tuple)):
        parts = [take_apart(one, f"{path}/{place}") for place, one in enumerate(value)]
        return type(value)([rest for rest, _ in parts]), {
            name: one for _, found in parts for name, one in found.items()
        }
    return value, {}


def put_together(value: Any, parts: Mapping[str, Tensor]) -> Any:
    """Returns ``value`` with the ``parts`` where :func:`take_apart` has left marks."""
    if isinstance(value, Mapping):
        if MARK in value:
            return parts[value[MARK]]
        return {key: put_together(one, parts) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([put_together(one, parts) for one in value])
    return value


def marks(value: Any) -> list[str]:
    """Returns the paths of all marks in ``value``."""
    if isinstance(value, Mapping):
        if MARK in value:
            return [value[MARK]]
        value = list(value.values())
    return [path for one in value for path in marks(one)] if isinstance(value, (list, tuple)) else []


def write(parts: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the sharded tensors of all processes into ``folder``; all of them call this."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(dict(parts), checkpoint_id=folder)


def read(value: Any, folder: Path, like: Callable[[str], Tensor]) -> Any:
    """Returns ``value`` whole again; ``like`` makes, of a path, an empty tensor that is sharded as wanted."""
    parts = {path: like(path) for path in marks(value)}
    if parts:
        from torch.distributed.checkpoint.state_dict_loader import load

        load(parts, checkpoint_id=folder)
    return put_together(value, parts)
