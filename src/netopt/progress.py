"""A bar on the screen, after a second: what is over sooner shows nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

__all__ = ["bar"]


def bar(
    over: Iterable[Any] | None = None,
    name: str = "",
    *,
    shown: bool = True,
    total: int | None = None,
    unit: str = "batch",
) -> Any:
    """Returns tqdm's bar, of the kind that fits where it is shown, a terminal or a notebook.

    Args:
        over: What to iterate over; without it the bar is moved by ``update``.
        name: What is going on.
        shown: Whether there is a bar at all.
        total: How many steps there are, by default the length of ``over``, if it has one.
        unit: What a step is.
    """
    if not shown and over is not None:
        return over
    return _kind(shown)(
        over, desc=name, total=total, unit=unit, disable=not shown, delay=1, leave=False, dynamic_ncols=True
    )


@cache
def _kind(shown: bool) -> Any:
    if not shown:
        from tqdm import tqdm
    else:
        with warnings.catch_warnings():
            # In a notebook without widgets it is shown as text, which is no reason to warn.
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm
    return tqdm
