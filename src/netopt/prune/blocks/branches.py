"""Which parts of a block are branches, seen in one run: what they return is added to the stream by the block itself.

The stream is what the block is given, and every sum of it with a branch; the block returns it as it is. A branch is the
modules that the block calls from one such sum to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netopt.model.dispatch import ThreadDispatchMode
from netopt.model.view import ModelView
from netopt.model.writes import storage_of
from netopt.plan.blocks import BlockPlan, fingerprint_of
from netopt.plan.branches import BranchCut, Part
from netopt.prune.blocks.stacks import Block, Stack
from netopt.prune.blocks.standins import Forward, Forwards
from netopt.prune.verify import Forward as ModelForward
from netopt.surgery import Operation

__all__ = ["Branch", "find_branches", "make_branch_plan"]

aten = torch.ops.aten
_SUMS = (aten.add, aten.add_)
_ZERO_TO_ZERO = (aten.mul, aten.mul_, aten.div, aten._to_copy, aten.clone, aten.neg)
_ALONE = "is a single branch; to remove it is to remove the block"
_NONE = "has no branch that it adds itself to what it is given: a norm comes after the sum, or the sum is inside a part"


@dataclass
class Branch(Block):
    """A part of a block that may go alone.

    Attributes:
        cut: How it goes, once the block is known.
    """

    cut: BranchCut = field(default_factory=lambda: BranchCut("", ()))


@dataclass
class _Called:
    """A module that a block called."""

    module: nn.Module
    argument: int | str | None
    length: int | None


@dataclass
class _Frame:
    """One call of a block: where its stream is, and what was called since the last sum."""

    stream: set[int]
    called: list[_Called] = field(default_factory=list)
    since: int = 0
    made: dict[int, tuple[int, ...]] = field(default_factory=dict)
    branches: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    inside: int = 0
    held: list[Tensor] = field(default_factory=list)

    def storage(self, tensor: Tensor) -> int:
        """Of a tensor, which is held so that no other takes its place in memory."""
        self.held.append(tensor)
        return storage_of(tensor)


class _Recorder(ThreadDispatchMode):
    """Watches the calls of blocks, of the modules that these call, and the sums between."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: dict[int, list[_Frame]] = {}
        self.returned: dict[int, bool] = {}
        self._active: list[_Frame] = []

    def block(self, block: nn.Module) -> Callable[[Forward], Forward]:
        def wrap(own: Forward) -> Forward:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                given = [one for one in tree_leaves((args, kwargs)) if _floats(one)]
                frame = _Frame(set())
                frame.stream |= {frame.storage(one) for one in given[:1]}
                self.frames.setdefault(id(block), []).append(frame)
                self._active.append(frame)
                try:
                    result = own(*args, **kwargs)
                finally:
                    self._active.pop()
                made = next((one for one in tree_leaves(result) if _floats(one)), None)
                whole = made is not None and storage_of(made) in frame.stream
                self.returned[id(block)] = self.returned.get(id(block), True) and whole
                return result

            return recorded

        return wrap

    def part(self, module: nn.Module) -> Callable[[Forward], Forward]:
        def wrap(own: Forward) -> Forward:
            def recorded(*args: Any, **kwargs: Any) -> Any:
                frame = self._active[-1] if self._active else None
                if frame is None:
                    return own(*args, **kwargs)
                frame.inside += 1
                try:
                    result = own(*args, **kwargs)
                finally:
                    frame.inside -= 1
                if not frame.inside:
                    _note(frame, module, args, kwargs, result)
                return result

            return recorded

        return wrap

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        frame = self._active[-1] if self._active else None
        if frame is not None and not frame.inside and packet in (*_SUMS, *_ZERO_TO_ZERO):
            _follow(frame, packet in _SUMS, [storage_of(one) for one in args if isinstance(one, Tensor)], made)
        return made


def _floats(one: Any) -> bool:
    return isinstance(one, Tensor) and one.is_floating_point()


def _note(frame: _Frame, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """Notes a call by the block itself."""
    first = result[0] if isinstance(result, tuple) and result else result
    every = [*enumerate(args), *kwargs.items()]
    argument = next((key for key, one in every if _floats(one)), None)
    if not isinstance(first, Tensor):
        argument = None
    elif argument is not None and frame.storage(first) == storage_of(dict(every)[argument]):
        return  # hands its input on, as a dropout does
    frame.called.append(_Called(module, argument, len(result) if isinstance(result, tuple) else None))
    if isinstance(first, Tensor):
        frame.made[frame.storage(first)] = (len(frame.called) - 1,)


def _follow(frame: _Frame, adds: bool, operands: Sequence[int], made: Tensor) -> None:
    """Follows what parts returned through an operation of the block itself, up to where it is added to the stream."""
    ours = [one for one in operands if one in frame.stream]
    parts = sorted({part for one in operands if one not in frame.stream for part in frame.made.get(one, ())})
    if adds and len(operands) > 1 and ours and parts:
        frame.branches.append((tuple(parts), frame.since))
        frame.stream.add(frame.storage(made))
        frame.since = len(frame.called)
    elif not ours and parts:
        frame.made[frame.storage(made)] = tuple(parts)


def find_branches(forward: ModelForward, stacks: Sequence[Stack]) -> tuple[list[Stack], dict[str, str]]:
    """The branches of the blocks of some stacks, as stacks of them; and the blocks that have none, with the reason.

    Args:
        forward: How the model is run; once.
        stacks: Whose blocks are looked into.
    """
    view = ModelView(forward.model)
    blocks = {id(block.modules[0]): block for stack in stacks for block in stack.blocks if len(block.modules) == 1}
    recorder = _Recorder()
    names = _single_homes(view)
    changes = [(block.modules[0], recorder.block(block.modules[0])) for block in blocks.values()]
    below = {id(one): one for block, _ in changes for one in block.modules() if one is not block}
    # After the blocks: one that is part of another block is seen by that one first.
    changes += [(one, recorder.part(one)) for one in below.values() if not isinstance(one, torch.jit.ScriptModule)]
    Operation(forward.model, [Forwards(changes)]).dry_run(lambda: forward.run(None, recorder))
    found, frozen = [], {}
    for stack in stacks:
        branches = []
        for block in stack.blocks:
            some = _branches(recorder, block, names) if len(block.modules) == 1 else _NONE
            if not isinstance(some, str) and len(some) == 1 and not _is_inside(block, stacks):
                some = _ALONE
            if isinstance(some, str):
                if not any(_is_inside(other, [Stack(stack.lists, [block])]) for one in stacks for other in one.blocks):
                    frozen[block.name] = some
            else:
                branches += some
        if branches:
            found.append(Stack((stack.name,), branches))
    return found, frozen


def make_branch_plan(view: ModelView, branches: Iterable[Block]) -> BlockPlan:
    """The plan to remove branches."""
    cuts = tuple(branch.cut for branch in branches if isinstance(branch, Branch))
    return BlockPlan((), fingerprint=fingerprint_of(view.model), branches=cuts)


def _branches(recorder: _Recorder, block: Block, names: Mapping[int, str]) -> list[Block] | str:
    module = block.modules[0]
    frames = recorder.frames.get(id(module), [])
    if len(frames) != 1 or not recorder.returned[id(module)] or not frames[0].branches:
        return _NONE
    (frame,) = frames
    often = {id(one.module) for one in frame.called if sum(one.module is other.module for other in frame.called) > 1}
    often |= {id(one.module) for one in frame.called if id(one.module) not in names}
    return [
        _branch(block, frame, end, since if len(ends) == 1 else end, often, names)
        for ends, since in frame.branches
        for end in ends
    ]


def _is_inside(block: Block, stacks: Sequence[Stack]) -> bool:
    """Whether it is a part of another block."""
    return any(block.name.startswith(f"{other.name}.") for stack in stacks for other in stack.blocks)


def _branch(block: Block, frame: _Frame, end: int, since: int, often: set[int], names: Mapping[int, str]) -> Block:
    """The branch of the modules called from one place to another, the last of which returns what is added."""
    called = [one for one in frame.called[since : end + 1] if id(one.module) not in often]
    last = frame.called[end]
    parts = [
        Part(names[id(one.module)], one.argument, one.length, zero=one is last)
        for one in called
        if one.argument is not None
    ]
    largest = max(called, key=lambda one: sum(p.numel() for p in one.module.parameters()), default=last)
    made = Branch(names[id(largest.module)], block.place, (largest.module,), (last.module,))
    made.standins["zeros"] = [_zeroed]
    made.cut = BranchCut(made.name, tuple(parts))
    made.line = block.line
    if id(last.module) in often or last.argument is None or len(parts) < len(called):
        made.frozen = "ends in what is called twice, or returns or is given no tensor"
    elif called[0] is not last:
        made.modules, made.standins["zeros"] = (called[0].module, last.module), [_same, _zeroed]
    return made


def _zeroed(own: Forward) -> Forward:
    """The result with zeros in place of what is added; what else is returned stays."""

    def run(*args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        if isinstance(result, tuple):
            return (torch.zeros_like(result[0]), *result[1:])
        return torch.zeros_like(result)

    return run


def _same(own: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return run


def _single_homes(view: ModelView) -> dict[int, str]:
    """The names of modules that are in one place of the model alone."""
    names: dict[int, list[str]] = {}
    for prefix, parent in view.parts:
        for key, child in parent._modules.items():
            if child is not None:
                names.setdefault(id(child), []).append(f"{prefix}.{key}".removeprefix("."))
    return {key: many[0] for key, many in names.items() if len(many) == 1}
