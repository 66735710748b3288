"""Names of a model and of the same model in a wrapper: one name but for the parts that wrappers add.

Parallel, compiled and averaged models hold the model as ``module`` or ``_orig_mod``, the whole or any part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

__all__ = ["innermost", "renaming"]

WRAPPERS = frozenset(["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])


def renaming(names: Iterable[str], known: Collection[str]) -> Callable[[str], str] | None:
    """How names become those of the same model, wrapped otherwise; ``None`` where wrappers do not explain them.

    Args:
        names: What has to be found.
        known: What there is.

    Example:
        >>> rename = renaming(["module.0.weight"], ["0.weight", "0.bias"])
        >>> rename("module.0.bias")
        '0.bias'
    """
    by_bare = {_bare(name): name for name in known}
    if len(by_bare) < len(known) or any(_bare(name) not in by_bare for name in names):
        return None
    return lambda name: by_bare.get(_bare(name), name)


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def innermost(modules: Iterable[str]) -> Callable[[str], str]:
    """How names of modules become those of the same modules, wrapped otherwise; parents come before children."""
    by_bare = {_bare(name): name for name in modules}
    return lambda name: by_bare.get(_bare(name), name)
