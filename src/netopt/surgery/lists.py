"""Entries leave a list of modules, and their parameters the optimizers: order and identity of what stays are kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from netopt.errors import InvalidArgumentError, OptimizerStateError

__all__ = ["Dropped", "ListCut", "dropped_states", "former_prefixes", "left_behind"]


class ListCut:
    """A ``ModuleList`` or ``Sequential`` keeps some of its entries; numbered ones are numbered anew.

    Args:
        container: Whose entries go.
        kept: Positions that stay, ascending.

    Attributes:
        leaving: Each entry that goes, as the table that holds it, by identity, and its key there.
    """

    def __init__(self, container: nn.Module, kept: Sequence[int]) -> None:
        self._held = container._modules
        self._before = dict(self._held)
        self.leaving = {(id(self._held), key) for place, key in enumerate(self._held) if place not in kept}
        self._after = {new: self._before[old] for new, old in _keys(container, kept)}

    def do(self) -> None:
        """Takes the entries out."""
        self._fill(self._after)

    def undo(self) -> None:
        """Puts them back."""
        self._fill(self._before)

    def _fill(self, entries: dict[str, nn.Module | None]) -> None:
        self._held.clear()
        self._held.update(entries)


def former_prefixes(container: nn.Module, name: str, kept: Sequence[int]) -> dict[str, str]:
    """The prefixes that tensors of entries had before others left the list of this name, by those they have then."""
    start = f"{name}." if name else ""
    return {f"{start}{new}.": f"{start}{old}." for new, old in _keys(container, kept)}


def _keys(container: nn.Module, kept: Sequence[int]) -> Iterator[tuple[str, str]]:
    """New and old keys of the entries that stay; where they are numbers, they are numbered anew."""
    names = list(container._modules)
    numbered = names == [str(place) for place in range(len(names))]
    for new, old in enumerate(kept):
        yield str(new) if numbered else names[old], names[old]


def left_behind(model: nn.Module, leaving: Collection[tuple[int, str]]) -> list[Tensor]:
    """The parameters that nothing holds any more once these entries have left, whatever names they had."""
    stays: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        stays[id(module)] = module
        for key, child in module._modules.items():
            if child is not None and id(child) not in stays and (id(module._modules), key) not in leaving:
                visit(child)

    visit(model)
    kept = {id(one) for module in stays.values() for one in module._parameters.values()}
    return [one for one in model.parameters() if id(one) not in kept]


class Dropped:
    """One optimizer forgets some parameters; doing and undoing may be called again."""

    def __init__(self, optimizer: Optimizer, gone: set[int]) -> None:
        self._optimizer, self._gone = optimizer, gone
        self._groups = [(group, group["params"]) for group in optimizer.param_groups]
        self._states = dict(optimizer.state)

    def do(self) -> None:
        """Drops the parameters and their state."""
        for group, members in self._groups:
            group["params"] = [one for one in members if id(one) not in self._gone]
        for key in self._states:
            if id(key) in self._gone:
                self._optimizer.state.pop(key, None)

    def undo(self) -> None:
        """Takes them back."""
        for group, members in self._groups:
            group["params"] = members
        if len(self._optimizer.state) < len(self._states):
            self._optimizer.state.clear()
            self._optimizer.state.update(self._states)  # in the order there was


def dropped_states(optimizers: Iterable[Optimizer], gone: Sequence[Tensor]) -> Iterator[Dropped]:
    """What every optimizer has to forget when these parameters go.

    Raises:
        InvalidArgumentError: An optimizer trains none of the parameters that go, though there are some.
        OptimizerStateError: An optimizer keeps one vector for all parameters, of which no part can be taken.
    """
    ids = {id(parameter) for parameter in gone}
    for optimizer in optimizers:
        members: list[Any] = [one for group in optimizer.param_groups for one in group["params"]]
        if ids and not any(id(one) in ids for one in members):
            raise InvalidArgumentError(
                f"the optimizer, a {type(optimizer).__name__}, trains none of the parameters that are removed; pass "
                "the one that was built from this model's parameters()."
            )
        if "_numel_cache" in vars(optimizer):
            raise OptimizerStateError(
                f"{type(optimizer).__name__} keeps one vector for all parameters; build a new one after pruning."
            )
        yield Dropped(optimizer, ids)
