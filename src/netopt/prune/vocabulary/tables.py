"""What of a model has an entry for each token, tables, heads and biases, and which numbers count or name tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netopt.axes import Axes, Axis
from netopt.axes.layout import LOOKED_UP, OUTPUT
from netopt.errors import InvalidArgumentError
from netopt.model.view import ModelView
from netopt.plan import Plan, shapes_of
from netopt.plan.value import AxisCut
from netopt.surgery.attributes import Path

__all__ = ["Tables", "find_tables", "fixed_ids", "make_plan"]

OPTIONAL = ("suppress_tokens", "bad_words_ids")
"""How values of configurations end that are numbers of tokens which need not stay."""


@dataclass(frozen=True)
class Tables:
    """The axes with an entry for each token.

    Attributes:
        size: How many entries.
        axes: Of tables that tokens are looked up in, and of outputs with a score for each.
    """

    size: int
    axes: Sequence[Axis]


def find_tables(view: ModelView, axes: Axes, count: int) -> Tables:
    """Finds where a model has an entry for each of ``count`` tokens.

    The tables are those that the model names as its input embeddings, or without such names all of the least size that
    has room for the tokens; heads are outputs of the same size.

    Raises:
        InvalidArgumentError: There is none.
    """
    named = {id(one.weight) for one in _input_embeddings(view)}
    rows = {(name, 0) for name, tensor in view.tensors.items() if id(tensor) in named}
    looked = [axis for axis in axes if LOOKED_UP in (axis.frozen or "")]
    tables = [axis for axis in looked if not rows.isdisjoint(axis.members)]
    if not named:
        size = min((axis.size for axis in looked if axis.size >= count), default=0)
        tables = [axis for axis in looked if axis.size == size]
    sizes = {axis.size for axis in tables}
    if len(sizes) != 1:
        found = ", ".join(f"{axis.name} ({axis.size})" for axis in looked) or "no table at all"
        raise InvalidArgumentError(
            f"there is no table with an entry for each of the tokenizer's {count} tokens; the model looks numbers up "
            f"in {found}."
        )
    (size,) = sizes
    if size < count:
        raise InvalidArgumentError(f"the tokenizer has {count} tokens, and the table of the model {size} entries.")
    heads = [axis for axis in axes if axis not in tables and axis.size == size and OUTPUT in (axis.frozen or "")]
    return Tables(size, [*tables, *heads])


def _input_embeddings(view: ModelView) -> Iterator[nn.Embedding]:
    for module in view.modules.values():
        get = getattr(type(module), "get_input_embeddings", None)
        try:
            found = None if get is None else get(module)
        except NotImplementedError:  # how a library says that there is none
            continue
        if isinstance(found, nn.Embedding):
            yield found


def make_plan(view: ModelView, axes: Axes, tables: Tables, kept: Tensor) -> Plan:
    """Keeps these entries, and gives counts and names of tokens their new numbers."""
    stays = torch.zeros(tables.size, dtype=torch.bool).index_fill_(0, kept, True)
    tensors: dict[str, dict[int, Tensor]] = {}
    for axis in tables.axes:
        for name, dim, positions in axes.members(axis):
            chosen = (positions < 0) | stays[positions.clamp(min=0)]
            tensors.setdefault(name, {})[dim] = chosen.nonzero().flatten()
    ids = {old: new for new, old in enumerate(kept.tolist())}
    attributes = {path: len(kept) for path in _sizes(view, tables.size)}
    for path, value in _names(view):
        new = _renumbered(value, ids)
        if new != value and not (path[1] == "padding_idx" and not _is_table(view.modules[path[0]], tables.size)):
            attributes[path] = new
    return Plan(
        tensors,
        tuple(attributes.items()),
        axes=tuple(AxisCut(axis.name, axis.size, kept) for axis in tables.axes),
        shapes=shapes_of(view) | {name: tuple(view.tensors[name].shape) for name in tensors},
        unsaved=tuple(name for name in tensors if name not in view.model.state_dict()),
    )


def fixed_ids(view: ModelView, size: int) -> set[int]:
    """Tokens that the model or its configuration names, which stay."""
    found: set[int] = set()
    for path, value in _names(view):
        if path[-1] == "padding_idx" and not _is_table(view.modules[path[0]], size):
            # Positions are counted from it, so that it keeps its number.
            found.update(range(value + 1))
        elif not str(path[-1]).endswith(OPTIONAL):
            found.update(tree_leaves(value))
    return {one for one in found if type(one) is int and 0 <= one < size}


def _is_table(module: nn.Module, size: int) -> bool:
    return isinstance(module, nn.Embedding) and module.num_embeddings == size


def _sizes(view: ModelView, size: int) -> Iterator[Path]:
    return (path for path, value in _entries(view) if path[-1] == "vocab_size" and value == size)


def _names(view: ModelView) -> Iterator[tuple[Path, Any]]:
    """Values that are numbers of tokens, or lists of such."""
    for path, value in _entries(view):
        of_config = str(path[-1]).endswith(("_token_id", "_token_ids", *OPTIONAL))
        of_module = path[-1] == "padding_idx" and len(path) == 2
        if value is not None and (of_config or of_module):
            yield path, value


def _entries(view: ModelView) -> Iterator[tuple[Path, Any]]:
    """What modules and their configurations hold, each configuration once."""
    seen: set[int] = set()

    def below(path: Path, owner: Any) -> Iterator[tuple[Path, Any]]:
        for key, value in vars(owner).items():
            is_config = callable(getattr(value, "to_dict", None)) and hasattr(value, "__dict__")
            if is_config and id(value) not in seen:
                seen.add(id(value))
                yield from below((*path, key), value)
            elif not is_config:
                yield (*path, key), value

    for name, module in view.modules.items():
        yield from below((name,), module)


def _renumbered(value: Any, ids: Mapping[int, int]) -> Any:
    """New numbers; from a list, what is gone goes."""
    if type(value) is int:
        return ids.get(value, value)
    if isinstance(value, (list, tuple)):
        found = [_renumbered(one, ids) for one in value if type(one) is not int or one in ids]
        return [one for one in found if one != []]
    return value
