"""What a saved plan may hold: every field is checked, and named if it is wrong, before anything is made of it.

A plan is data. It may come from anywhere, so that no field leads to an object that was not made here, and none makes
more memory than the sizes it states, and the length of the file, allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from netopt.errors import InvalidArgumentError
from netopt.plan.codec import Budget, decode, unpack

__all__ = ["VERSION", "fields"]

VERSION = 1
LARGEST = 1 << 62
DEEPEST = 16
"""So many steps a path, and so many levels a value, may have."""


def fields(data: Any) -> dict[str, Any]:
    """The fields of a plan that was saved, decoded, axes as mappings.

    Raises:
        InvalidArgumentError: The data is no plan, of another version, or a field is missing or broken; it is named.
    """
    if not isinstance(data, Mapping) or data.get("format") != "netopt.plan":
        raise InvalidArgumentError("this is no plan: its 'format' is not 'netopt.plan'")
    if data.get("version") != VERSION or isinstance(data.get("version"), bool):
        raise InvalidArgumentError(
            f"this plan has version {data.get('version')!r} and this library reads {VERSION}; update netopt"
        )
    shapes = _mapping(data, "shapes", _shape)
    indices = _Indices(_field(data, "indices"))
    return {
        "tensors": _mapping(data, "tensors", lambda dims, where: _dims(dims, where, indices, shapes)),
        "attributes": tuple(_list(data, "attributes", _attribute)),
        "values": _mapping(data, "values", unpack),
        "scales": _mapping(
            data, "scales", lambda one, where: unpack(one, where) if _is_packed(one) else _real(one, where)
        ),
        "axes": tuple(_list(data, "axes", lambda row, where: _axis(row, where, indices))),
        "shapes": shapes,
        "predicted": _mapping(data, "predicted", _real),
        "unsaved": tuple(_list(data, "unsaved", _text)),
        "shifts": _mapping(data, "shifts", unpack),
    }


class _Indices:
    """Lists of indices, each decoded once it is known how large it may be."""

    def __init__(self, entries: Any) -> None:
        self._entries = [_text(one, f"indices[{at}]") for at, one in enumerate(_sequence(entries, "indices"))]
        self._decoded: dict[int, Tensor] = {}
        self._budget = Budget()

    def __call__(self, place: Any, where: str, size: int | None) -> Tensor:
        """The indices at ``place``, all below ``size``."""
        at = _whole(place, where)
        if at >= len(self._entries):
            raise _wrong(where, f"is {at}, and the plan has {len(self._entries)} lists of indices")
        if at not in self._decoded:
            self._decoded[at] = decode(self._entries[at], f"indices[{at}]", size, self._budget)
        kept = self._decoded[at]
        if not len(kept):
            raise _wrong(where, "keeps nothing: it needs one or more indices")
        if size is not None and int(kept[-1]) >= size:
            raise _wrong(where, f"keeps index {int(kept[-1])} of {size}")
        return kept


def _dims(dims: Any, where: str, indices: _Indices, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, Tensor]:
    shape = shapes.get(where.removeprefix("tensors."))
    found: dict[int, Tensor] = {}
    for key, place in _items(dims, where):
        at = f"{where}.{key}"
        if not (key.isascii() and key.isdigit() and len(key) < 3):
            raise _wrong(at, "is no dimension")
        dim = int(key)
        if shape is not None and dim >= len(shape):
            raise _wrong(at, f"is no dimension of a tensor of shape {shape}")
        found[dim] = indices(place, at, None if shape is None else shape[dim])
    return found


def _attribute(pair: Any, where: str) -> tuple[tuple[Any, ...], Any]:
    both = _sequence(pair, where)
    if len(both) != 2:
        raise _wrong(where, "is no pair of a path and a value")
    path = _sequence(both[0], f"{where}[0]")
    is_path = 2 <= len(path) <= DEEPEST and isinstance(path[0], str) and isinstance(path[1], str)
    if not is_path or not all(isinstance(step, str) or _is_whole(step) for step in path):
        raise _wrong(f"{where}[0]", "is no path: a module's name, an attribute, and names or places below it")
    if any(isinstance(step, str) and step.startswith("__") for step in path):
        raise _wrong(f"{where}[0]", "leads to what Python keeps about an object, which no plan may change")
    return tuple(path), _plain(both[1], f"{where}[1]")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A number, a text, or lists and mappings of them."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return _real(value, where)
    if depth < DEEPEST and isinstance(value, list):
        return [_plain(one, where, depth + 1) for one in value]
    if depth < DEEPEST and isinstance(value, dict):
        return {_text(key, where): _plain(one, where, depth + 1) for key, one in value.items()}
    raise _wrong(where, f"is {_shown(value)}, which is no value of an attribute")


def _axis(row: Any, where: str, indices: _Indices) -> dict[str, Any]:
    size = _whole(_field(row, "size", where), f"{where}.size")
    exact, reason = _field(row, "exact", where), _field(row, "reason", where)
    if not isinstance(exact, bool):
        raise _wrong(f"{where}.exact", f"is {_shown(exact)} and not true or false")
    return {
        "name": _text(_field(row, "name", where), f"{where}.name"),
        "size": size,
        "kept": indices(_field(row, "kept", where), f"{where}.kept", size),
        "exact": exact,
        "reason": None if reason is None else _text(reason, f"{where}.reason"),
    }


def _shape(value: Any, where: str) -> tuple[int, ...]:
    return tuple(_whole(one, where) for one in _sequence(value, where))


def _is_packed(value: Any) -> bool:
    return isinstance(value, dict)


def _real(value: Any, where: str) -> float | int:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or abs(value) > LARGEST
    ):
        raise _wrong(where, f"is {_shown(value)} and no finite number")
    return value


def _whole(value: Any, where: str) -> int:
    if not _is_whole(value):
        raise _wrong(where, f"is {_shown(value)} and no whole number from 0")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, f"is {_shown(value)} and no text")
    return value


def _mapping(data: Mapping[str, Any], name: str, read: Callable[[Any, str], Any]) -> dict[str, Any]:
    return {key: read(one, f"{name}.{key}") for key, one in _items(_field(data, name), name)}


def _list(data: Mapping[str, Any], name: str, read: Callable[[Any, str], Any]) -> list[Any]:
    return [read(one, f"{name}[{at}]") for at, one in enumerate(_sequence(_field(data, name), name))]


def _items(value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        raise _wrong(where, f"is {_shown(value)} and no mapping")
    return [(_text(key, where), one) for key, one in value.items()]


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(where, f"is {_shown(value)} and no list")
    return value


def _field(data: Any, name: str, where: str = "") -> Any:
    if not isinstance(data, Mapping):
        raise _wrong(where, f"is {_shown(data)} and no mapping")
    if name not in data:
        raise _wrong(f"{where}.{name}".lstrip("."), "is missing")
    return data[name]


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
    return text if len(text) < 40 else f"{text[:36]}..."


def _wrong(where: str, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"this plan is broken: `{where}` {what}")
