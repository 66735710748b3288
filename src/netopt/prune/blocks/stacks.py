"""Which lists of a model are stacks of blocks, seen in one run of it.

A block is an entry of a list that returns tensors of the shapes it is given and adds to what it is given; entries of
lists that are gone through together, or of a list of lists, are one block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from netopt.model.dispatch import ThreadDispatchMode
from netopt.model.view import ModelView
from netopt.model.writes import storage_of
from netopt.prune.blocks.standins import Form, Forward, Forwards, Kind, Seen, arguments, form_of, identity, zeros
from netopt.prune.verify import Forward as ModelForward
from netopt.surgery import Operation
from netopt.symbolic import calling_line

__all__ = ["Block", "Stack", "find_stacks", "name_frozen"]

LISTS = (nn.ModuleList, nn.Sequential)
aten = torch.ops.aten
_ADDITIONS = (aten.add, aten.add_, aten.addcmul, aten.addcmul_)
_COPIES = (aten._to_copy, aten.clone)
NO_SKIP = "has no skip connection around it; name it in include to let it go all the same"


@dataclass
class Block:
    """What may leave a stack.

    Attributes:
        name: Dotted name of its entry in the first list.
        place: In the list.
        entries: Its entries, one of each list.
        modules: What of it is run: the entries, or the entries of these.
        standins: By kind, the forwards that stand in for those of the modules.
        frozen: Why it may not go, if it may not.
        adds: Whether it adds to what it is given.
        line: Where it is called from, for messages.
    """

    name: str
    place: int
    entries: tuple[nn.Module, ...]
    modules: tuple[nn.Module, ...] = ()
    standins: dict[Kind, list[Callable[[Forward], Forward]]] = field(default_factory=dict)
    frozen: str | None = None
    adds: bool = False
    line: str = ""

    def skip(self, kind: Kind) -> Forwards:
        """What makes the model go past it."""
        return Forwards(list(zip(self.modules, self.standins[kind], strict=True)))


@dataclass
class Stack:
    """Lists that are gone through together.

    Attributes:
        lists: Their dotted names.
        blocks: Of the lists, one for each position.
    """

    lists: tuple[str, ...]
    blocks: list[Block]

    @property
    def name(self) -> str:
        """The name of the first list."""
        return self.lists[0]

    @property
    def size(self) -> int:
        """How many blocks it has."""
        return len(self.blocks)

    @property
    def free(self) -> list[Block]:
        """Blocks that may go."""
        return [block for block in self.blocks if block.frozen is None]


class _Record:
    """What was seen of one module: its calls in the order of all calls, and forms of their results."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.forms: list[Form | str] = []
        self.shown: Any = None
        self.adds = False
        self.hands_on = False
        self.line = ""


class _Recorder(ThreadDispatchMode):
    """Watches the calls of some modules, and which of them add to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[int, _Record] = {}
        self._active: list[tuple[_Record, set[int]]] = []
        self._extras: dict[int, tuple[Tensor, _Record]] = {}
        self._count = 0

    def watch(self, module: nn.Module) -> Callable[[Forward], Forward]:
        record = self.records.setdefault(id(module), _Record())

        def wrap(own: Forward) -> Forward:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                record.line = record.line or calling_line()
                return self._run(record, own, args, kwargs)

            return recorded

        return wrap

    def _run(self, record: _Record, own: Forward, args: Any, kwargs: Any) -> Any:
        record.order.append(self._count)
        self._count += 1
        leaves = arguments(args, kwargs)
        given = [leaf for leaf in leaves.values() if isinstance(leaf, Tensor)]
        for leaf in given:
            if id(leaf) in self._extras and self._extras[id(leaf)][1] is not record:
                self._extras[id(leaf)][1].hands_on = True
        self._active.append((record, {storage_of(leaf) for leaf in given}))
        try:
            result = own(*args, **kwargs)
        finally:
            self._active.pop()
        form = form_of([Seen(leaves, result)])
        record.forms.append(form)
        if not isinstance(form, str):
            record.shown = tree_map_only(Tensor, lambda _: _SHOWN, result)
            for place, leaf in enumerate(tree_leaves(result)):
                if isinstance(leaf, Tensor) and place != form.first and form.passed[place] is None:
                    self._extras[id(leaf)] = (leaf, record)
        return result

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if self._active and (packet in _ADDITIONS or packet in _COPIES):
            operands = [storage_of(one) for one in args if isinstance(one, Tensor)]
            for record, storages in self._active:
                if storages.intersection(operands):
                    if packet in _COPIES:
                        storages.add(storage_of(made))
                    elif len(operands) > 1:
                        record.adds = True
        return made


_SHOWN = torch.empty(0)


def find_stacks(
    forward: ModelForward, named: Callable[[str], bool] | None = None
) -> tuple[list[Stack], dict[str, str]]:
    """The stacks of a model, the innermost first, and the lists that are none, with the reason.

    Args:
        forward: How the model is run; once.
        named: Whether a block is named, and needs no skip connection.
    """
    view = ModelView(forward.model)
    lists = {name: one for name, one in view.parts if isinstance(one, LISTS) and len(one._modules) > 1}
    inside = {id(child): child for one in lists.values() for child in one._modules.values() if child is not None}
    recorder = _Recorder()
    watched = [
        (one, recorder.watch(one))
        for one in inside.values()
        if not isinstance(one, (nn.ModuleList, torch.jit.ScriptModule))
    ]
    Operation(forward.model, [Forwards(watched)]).dry_run(lambda: forward.run(None, recorder))
    homes = _homes(view)
    stacks, others = [], {}
    named = named or (lambda _: False)
    for names in _zipped(lists, recorder.records):
        blocks = _blocks(names, lists, recorder.records, homes)
        if all(block.frozen for block in blocks) and len({block.frozen for block in blocks}) == 1:
            others[names[0]] = f"no entry is a block: each {blocks[0].frozen}"
        else:
            stacks.append(Stack(names, blocks))
    _prefer_adding(stacks, named)
    return sorted(stacks, key=lambda stack: -len(stack.name.split(".")) if stack.name else 0), others


def _zipped(lists: Mapping[str, nn.Module], records: dict[int, _Record]) -> list[tuple[str, ...]]:
    """The names of lists, those together that are gone through in turns."""
    groups: list[list[str]] = []
    for name in lists:
        parent = name.rpartition(".")[0]
        mate = next(
            (
                group
                for group in groups
                if group[0].rpartition(".")[0] == parent and _in_turns(lists[group[0]], lists[name], records)
            ),
            None,
        )
        if mate is None:
            groups.append([name])
        else:
            mate.append(name)
    return [tuple(group) for group in groups]


def _in_turns(first: nn.Module, second: nn.Module, records: dict[int, _Record]) -> bool:
    """Whether each entry of one list is run between two of the other."""
    starts = [[records[id(one)].order[:1] if id(one) in records else [] for one in two.children()]
              for two in (first, second)]  # fmt: skip
    ours, theirs = ([start[0] for start in many if start] for many in starts)
    if len(ours) != len(first._modules) or len(theirs) != len(second._modules) or len(ours) != len(theirs):
        return False
    pairs = list(zip(ours, theirs, strict=True))
    return all(max(one) < min(later) for one, later in itertools.pairwise(pairs))


def _blocks(
    names: Sequence[str], lists: Mapping[str, nn.Module], records: dict[int, _Record], homes: dict[int, int]
) -> list[Block]:
    keys = list(lists[names[0]]._modules)
    columns = [list(lists[name]._modules.values()) for name in names]
    blocks = []
    for place, entries in enumerate(zip(*columns, strict=True)):
        held = tuple(entry for entry in entries if entry is not None)
        block = Block(f"{names[0]}.{keys[place]}".removeprefix("."), place, held)
        _describe(block, records, homes)
        if len(held) < len(names):
            block.frozen = "is None"
        blocks.append(block)
    return blocks


def _describe(block: Block, records: dict[int, _Record], homes: dict[int, int]) -> None:
    """Notes how a block can be skipped, or why it cannot."""
    run: list[tuple[nn.Module, _Record]] = []
    for entry in block.entries:
        inner = entry._modules.values() if isinstance(entry, nn.ModuleList) else [entry]
        run += [(one, records[id(one)]) for one in inner if one is not None and id(one) in records]
    run = [(one, record) for one, record in run if record.order]
    if not run:
        block.frozen = "is not run by this forward"
        return
    block.modules = tuple(one for one, _ in run)
    block.adds = all(record.adds for _, record in run)
    block.line = run[0][1].line
    forms = [_one_form(record) for _, record in run]
    why = next((form for form in forms if isinstance(form, str)), None)
    if why is None:
        block.standins["identity"] = [
            identity(form, record.shown)
            for form, (_, record) in zip(forms, run, strict=True)
            if not isinstance(form, str)
        ]
    if len(run) > 1:
        block.standins["zeros"] = [zeros] * len(run)
    if any(homes.get(id(entry), 1) > 1 for entry in block.entries):
        block.frozen = "is the same module as another entry"
    elif not block.standins:
        block.frozen = why
    elif any(record.hands_on for _, record in run):
        block.frozen = "hands on more than one tensor to the blocks after it"


def _one_form(record: _Record) -> Form | str:
    forms = set(record.forms)
    why = next((form for form in forms if isinstance(form, str)), None)
    return why or (forms.pop() if len(forms) == 1 else "returns something else from one call to the next")


def name_frozen(stacks: Sequence[Stack], frozen: dict[str, str]) -> dict[str, str]:
    """Reasons by name, those that all blocks of a stack share under the name of the stack."""
    short = dict(frozen)
    for stack in stacks:
        reasons = {block.frozen for block in stack.blocks}
        if len(reasons) == 1 and None not in reasons:
            for block in stack.blocks:
                short.pop(block.name, None)
            short[stack.name or "the model"] = f"each block {reasons.pop()}"
    return short


def _prefer_adding(stacks: Sequence[Stack], named: Callable[[str], bool]) -> None:
    """Freezes what has no skip connection, where other blocks have one; and single layers anyway."""
    alone = [block for stack in stacks for block in stack.free if len(block.modules) == 1]
    several = any(len(block.modules) > 1 for stack in stacks for block in stack.free)
    some_add = several or any(block.adds for block in alone)
    for block in alone:
        if not block.adds and not named(block.name) and (some_add or not block.modules[0]._modules):
            block.frozen = NO_SKIP


def _homes(view: ModelView) -> dict[int, int]:
    """In how many places of lists and modules each module is."""
    counts: dict[int, int] = {}
    for _, parent in view.parts:
        for child in parent._modules.values():
            counts[id(child)] = counts.get(id(child), 0) + 1
    return counts
