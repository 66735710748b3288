"""Blocks that follow one another are run by themselves, each on what the one before has put out.

A chain of blocks (the layers of a transformer, the stages of a network) is recognised by running the model once: each
is called once, and reads only what the block before returned or had been given. Then the rest of the model need not be
run to reach a block, nor need it fit beside the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from netopt import batches
from netopt.model.hooks import put_hook
from netopt.model.parameters import Place
from netopt.model.precision import autocast_state
from netopt.model.signals import UndoLog

__all__ = ["Chain", "Runner", "container_of", "noting"]

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass
class Call:
    """One call of a block: what it was given and what it returned, as flat lists."""

    block: nn.Module
    given: list[Any]
    form: TreeSpec
    returned: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Link:
    """How a block's arguments follow from the call before.

    Attributes:
        sources: For each argument where it is from: ``("returned", index)``, ``("given", index)`` or
            ``("constant", value)``.
        form: How the flat arguments are put together.
    """

    sources: tuple[tuple[str, Any], ...]
    form: TreeSpec


@dataclass
class Chain:
    """Blocks in the order they run, and the links from each to the next.

    Attributes:
        blocks: The blocks.
        form: How the first block's flat arguments are put together.
        links: For each block but the first.
    """

    blocks: list[nn.Module] = field(default_factory=list)
    form: TreeSpec | None = None
    links: list[Link] = field(default_factory=list)

    def runs_like(self, other: Chain) -> bool:
        """Whether the same blocks run in the same order."""
        return list(map(id, self.blocks)) == list(map(id, other.blocks))

    def index(self, block: nn.Module | None) -> int | None:
        """Returns where ``block`` is in the chain, or ``None``."""
        return next((index for index, one in enumerate(self.blocks) if one is block), None)


class _Notes:
    """Which block runs now, and all calls of blocks so far."""

    def __init__(self) -> None:
        self.active: nn.Module | None = None
        self.precision = autocast_state()
        self.casts = False  # whether a forward enters another one, outside of which blocks cannot be run
        self.calls: list[Call] = []

    def chain(self) -> Chain:
        """Returns the longest chain among the calls."""
        if self.casts:
            return Chain()
        chains, counts = [Chain()], [sum(call.block is one.block for one in self.calls) for call in self.calls]
        before: Call | None = None
        for call, count in zip(self.calls, counts, strict=True):
            link = _link(before, call) if before is not None and count == 1 else None
            if link is not None:
                chains[-1].blocks.append(call.block)
                chains[-1].links.append(link)
            starts = link is None and count == 1 and all(isinstance(one, (Tensor, *PLAIN)) for one in call.given)
            if starts:
                chains.append(Chain([call.block], call.form))
            before = call if starts or link is not None else None
        return max(chains, key=lambda one: len(one.blocks))


def container_of(model: nn.Module, wanted: Mapping[str, Place]) -> nn.Module | None:
    """Returns the list or sequence of modules that holds most of the weights."""
    own = {id(place.parameter) for place in wanted.values()}

    def weights(module: nn.Module) -> int:
        return sum(id(parameter) in own for parameter in module.parameters())

    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    return max(lists, key=weights, default=None)


@contextmanager
def noting(container: nn.Module | None) -> Iterator[_Notes]:
    """Notes the calls of the children of ``container``, while it is entered."""
    notes = _Notes()
    with UndoLog() as log:
        for block in dict.fromkeys(container.children()) if container is not None else ():
            put_hook(log, block, _enter(notes), before=True)
            put_hook(log, block, _leave(notes), with_kwargs=False)
        yield notes


def _enter(notes: _Notes) -> Callable[..., None]:
    def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
        notes.active = block
        given, form = tree_flatten((args, kwargs))
        notes.calls.append(Call(block, given, form))
        notes.casts |= autocast_state() != notes.precision

    return hook


def _leave(notes: _Notes) -> Callable[..., None]:
    def hook(block: nn.Module, args: Any, result: Any) -> None:
        del block, args
        notes.calls[-1].returned = tree_flatten(result)[0]
        notes.active = None

    return hook


def _link(before: Call, call: Call) -> Link | None:
    sources: list[tuple[str, Any]] = []
    for value in call.given:
        source = _source(before, value)
        if source is None:
            return None
        sources.append(source)
    return Link(tuple(sources), call.form)


def _source(before: Call, value: Any) -> tuple[str, Any] | None:
    if not isinstance(value, Tensor):
        # Anything else may remember earlier calls, such as a cache of keys and values.
        return ("constant", value) if isinstance(value, PLAIN) else None
    for kind, values in (("returned", before.returned), ("given", before.given)):
        for index, other in enumerate(values):
            if other is value:
                return kind, index
    return None


class _Reached(BaseException):
    """The first block of the chain is about to run."""


@dataclass
class _Stream:
    """One batch on its way through the chain, in the unpruned (``True``) and in this model."""

    chain: Chain
    given: dict[bool, list[Any]]

    def call(self, index: int, dense: bool) -> Any:
        """Runs a block on what it is given."""
        form = self.chain.links[index - 1].form if index else self.chain.form
        assert form is not None, "a chain with blocks has a form"
        # Cloned, as a block may work on its input in place, and runs several times.
        flat = [one.clone() if isinstance(one, Tensor) else one for one in self.given[dense]]
        args, kwargs = tree_unflatten(flat, form)
        return self.chain.blocks[index](*args, **kwargs)

    def advance(self, index: int, dense: bool) -> None:
        """Runs a block and notes what the next one is given."""
        kinds = {"returned": tree_flatten(self.call(index, dense))[0], "given": self.given[dense]}
        sources = self.chain.links[index].sources
        self.given[dense] = [value if kind == "constant" else kinds[kind][value] for kind, value in sources]


class Runner:
    """Runs the model, or a block of its chain, on every calibration batch, as it was and as it is.

    Without ``unpruned``, which makes the model what it was for a while, only as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        held: Sequence[Any],
        container: nn.Module | None,
        chain: Chain,
        *,
        unpruned: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.model, self.held, self.container, self.chain = model, held, container, chain
        self.models = (False,) if unpruned is None else (True, False)
        self._unpruned = unpruned
        self.position = -1
        self.streams: list[_Stream] | None = []

    def runs(self, block: nn.Module | None) -> Iterator[dict[bool, Callable[[], Any]]]:
        """Yields, for each batch, how to run up to some weights in the unpruned (``True``) and in this model.

        Args:
            block: The block of the chain that alone reads them, not before one asked for earlier; or ``None``.
        """
        index = self._reach(block)
        if self.streams is None or index is None:
            for batch in self.held:
                whole = _bound(batches.feed, self.model, batch)
                yield dict.fromkeys(self.models, whole)
            return
        for stream in self.streams:
            yield {dense: _bound(stream.call, index, dense) for dense in self.models}

    def being(self, dense: bool) -> AbstractContextManager[None]:
        """Makes the model what it was while this is entered, or leaves it as it is."""
        return self._unpruned() if dense and self._unpruned is not None else nullcontext()

    def _reach(self, block: nn.Module | None) -> int | None:
        """Brings every batch to ``block``; returns its index, or ``None`` if it cannot be run by itself."""
        if block is None or self.streams is None:
            return None
        index = self.chain.index(block)
        if index is None or index < self.position:
            return None
        if self.position < 0:
            # Not earlier: what runs before the chain has been pruned by now.
            self.streams = self._begin()
            self.position = 0
        if self.streams is None:
            return None
        for position in range(self.position, index):
            for stream in self.streams:
                for dense in self.models:
                    with self.being(dense), torch.no_grad():
                        stream.advance(position, dense)
        self.position = index
        return index

    def _begin(self) -> list[_Stream] | None:
        """Brings every batch to the chain's first block; ``None`` if the chain is not the same for all."""
        streams: list[_Stream] = []
        for batch in self.held:
            # Each batch has links of its own: sizes passed on as integers differ between them.
            with noting(self.container) as notes, torch.no_grad():
                batches.feed(self.model, batch)
            chain = notes.chain()
            if not chain.runs_like(self.chain):
                return None
            given = {dense: self._first(chain, batch, dense) for dense in self.models}
            if not all(given.values()):
                # What is before has been pruned, and leads elsewhere now.
                return None
            streams.append(_Stream(chain, given))
        return streams

    def _first(self, chain: Chain, batch: Any, dense: bool) -> list[Any]:
        """Returns the flat arguments of the chain's first block; none if it is not reached."""
        caught: list[Any] = []

        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            del block
            caught.extend(tree_flatten((args, kwargs))[0])
            raise _Reached

        with UndoLog() as log, suppress(_Reached):
            put_hook(log, chain.blocks[0], hook, before=True)
            with self.being(dense), torch.no_grad():
                batches.feed(self.model, batch)
        return caught


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)
