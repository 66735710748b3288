"""One snapshot of what a forward may change, put back as a whole.

A user's model is run to be inspected. What it keeps meanwhile (flags, gradients, buffers, tables, counters, caches,
entries of its configuration) is noted before and put back together after: a table without the number that says how long
it is would be worse than both left as they are.
"""

from __future__ import annotations

import operator
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import filterfalse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netopt.errors import ForwardError
from netopt.model.attributes import (
    COMMON,
    CONTAINERS,
    DEPTH,
    NUMBERS,
    Parts,
    container_of,
    copy_entries,
    differs,
    own_attributes,
    own_classes,
    refill,
)
from netopt.model.precision import uncached
from netopt.model.signals import UndoLog
from netopt.model.turns import InTurn
from netopt.model.view import ModelView
from netopt.model.writes import CopyOnWrite, write

__all__ = [
    "Gradients",
    "Snapshot",
    "preserve_random_state",
    "random_state",
    "restored",
    "version_of",
]

_common = operator.itemgetter(*(name for name, value in COMMON.items() if isinstance(value, (dict, set))))


def restored(*models: nn.Module | ModelView, rng: bool = True, writes: bool = True) -> UndoLog:
    """Restores models on leaving, by whatever way: all of a :class:`Snapshot` and, with ``rng``, random states.

    Gradients are set aside inside, so that nothing is added to them. The log can enter further contexts. A thread waits
    while another looks at any of the modules. With ``writes``, values that are written into parameters are undone too:
    of a view whose forward was not watched before, all; later those that were seen to be written to.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with restored(model):
        ...     _ = model.train()(torch.randn(8, 2)).sum().backward()
        >>> model.num_batches_tracked.item(), model.weight.grad
        (0, None)
    """
    views = [ModelView.of(model) for model in models]

    def start(log: UndoLog) -> None:
        if rng:
            log.callback(_common_random_state())
            uncached(log)
        snapshot = Snapshot(*views)
        log.callback(snapshot.put_back)
        snapshot.gradients.set_aside()
        for view in views if writes else ():
            if view.written is None:
                _watch(log, view)

    return InTurn(views, start)


def _watch(log: UndoLog, view: ModelView) -> None:
    """Undoes what is written into parameters meanwhile, and has the view know which these are."""
    saved = CopyOnWrite(view.parameters.values())

    def undo() -> None:
        saved.undo()
        view.written = saved.written

    log.callback(undo)
    log.enter_context(saved.saving())


def preserve_random_state() -> UndoLog:
    """Restores on leaving the random state of torch (on every device in use), of Python and of numpy."""
    return UndoLog(lambda log: log.callback(_common_random_state()))


_noted: dict[int, list[Callable[[], None]]] = {}
"""By thread, what puts the random state back to where it is to go back to, outermost first."""
_noting = threading.RLock()


def _common_random_state() -> Callable[[], None]:
    """As :func:`random_state`; threads that are at it at once all go back to where the first of them began."""
    thread = threading.get_ident()
    with _noting:
        first = None if thread in _noted else next((notes[0] for notes in _noted.values()), None)
        note = random_state() if first is None else partial(first)
        _noted.setdefault(thread, []).append(note)

    def put_back() -> None:
        note()
        with _noting:
            notes = _noted.get(thread, [])
            if note in notes:
                notes.remove(note)
            if not notes:
                _noted.pop(thread, None)

    return put_back


def random_state() -> Callable[[], None]:
    """Notes the random state of the process; what is returned puts it back."""
    restore = [partial(random.setstate, random.getstate()), partial(torch.set_rng_state, torch.get_rng_state())]
    if "numpy.random" in sys.modules:  # else nobody has drawn from it, and numpy loads it when first used
        restore.append(partial(np.random.set_state, np.random.get_state()))
    if torch.cuda.is_initialized():
        restore.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        restore.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))

    def put_back() -> None:
        for step in restore:
            step()

    return put_back


class Snapshot:
    """What models hold: the same objects with the same entries and, of tensors that are no parameters, the same bits.

    Noted are the attributes of each module (flags, parameters, buffers, hooks, children); the entries of containers and
    the attributes of objects reached from them, in a few steps; those of the modules' classes that are no library's;
    the bits of buffers and of tensors kept elsewhere; the states of random generators; ``.grad`` and ``requires_grad``
    of parameters. Not noted is what functions keep in closures, nor the values of parameters other than those a forward
    was seen to write to, which would double the memory of every model: see :class:`~netopt.model.writes.CopyOnWrite`.

    Args:
        models: Modules, or what they hold.
        values: Whether to copy bits at all, or to note attributes alone.
        parameters: Whether to copy the values of parameters all the same.

    Attributes:
        gradients: Of the parameters.
        own: Of each module, its attributes that not every module has, flags and texts left out.
    """

    def __init__(self, *models: nn.Module | ModelView, values: bool = True, parameters: bool = False) -> None:
        views = [ModelView.of(model) for model in models]
        self._parts: Parts = [one for view in views for one in view.parts]
        self._kept: list[tuple[Any, Any]] = []
        self._empty: list[Any] = []
        self._named: list[tuple[str, Any]] = []
        self._tensors: dict[int, Tensor] = {}
        self._generators: list[Callable[[], object]] = []
        self._scripted = [(module, module.training) for _, module in self._parts if "training" not in module.__dict__]
        self.own = self._own = own_attributes(self._parts)
        self._walk(self._note_modules())
        weights = {id(one): one for view in views for one in view.parameters.values()}
        copied = {id(one): one for view in views for one in view.buffers.values()} | self._tensors
        for written in [weights] if parameters else [view.written for view in views if view.written]:
            copied |= written
        self._values = _Values(copied.values() if values else ())
        self._memory = [*filter(None, map(_memory_of, (copied | weights).values()))]
        self.gradients = Gradients(weights.values())
        self._settled = False

    def put_back(self) -> None:
        """Puts everything back."""
        if not self._settled:
            self.put_back_attributes()
        for module, flag in self._scripted:
            module.training = flag
        for put_back in self._generators:
            put_back()
        self._values.put_back()
        self.gradients.put_back()

    def put_back_attributes(self) -> None:
        """Gives modules, classes, containers and objects the entries they had; the values of tensors are left alone."""
        for container in filter(None, self._empty):
            container.clear()
        for container, before in reversed(self._kept):
            refill(container, before)
        for give_back in self._memory:
            give_back()
        self._settled = True

    @property
    def modes_are_flags(self) -> bool:
        """Whether a change of mode sets the ``training`` of modules and nothing else, by their classes."""
        own = any("train" in module.__dict__ or "eval" in module.__dict__ for _, module in self._parts)
        return not own and all(map(_changes_flags_alone, {type(module) for _, module in self._parts}))

    @contextmanager
    def in_mode(self, model: nn.Module, *, training: bool | None, writes: CopyOnWrite | None = None) -> Iterator[bool]:
        """Puts the model these modules are of in training or evaluation mode, and attributes back on leaving.

        With ``None`` the mode is left alone. Gives whether this changed more than flags, as where a model's own
        ``train`` sets up something else. What is written into parameters is undone by ``writes``.
        """
        writes = CopyOnWrite(()) if writes is None else writes
        self._settled = False
        try:
            try:
                if training is not None and self.modes_are_flags:
                    for _, module in self._parts:
                        module.__dict__["training"] = training
                elif training is not None:
                    _set_mode(model, self._parts, writes, training)
            except Exception as error:  # a model's own train may raise anything
                name = "train" if training else "eval"
                raise ForwardError(f"{name}() of {type(model).__name__} failed; see the chained exception.") from error
            changed = training is not None and not self.modes_are_flags and self._are_changed()
            self.own = own_attributes(self._parts) if changed else self._own
            yield changed
        finally:
            self.put_back_attributes()
            writes.undo()
            for module, flag in self._scripted:
                module.training = flag

    def tensors(self) -> tuple[dict[str, Tensor], frozenset[str]]:
        """Parameters, buffers, then other tensors, each under its first name; and the names of the parameters."""
        parameters: dict[int, tuple[str, Tensor]] = {}
        buffers: dict[int, tuple[str, Tensor]] = {}
        others: dict[int, tuple[str, Tensor]] = {}
        for prefix, module in self._parts:
            start = f"{prefix}." if prefix else ""
            for held, found in ((module._parameters, parameters), (module._buffers, buffers)):
                if held:
                    for key, tensor in held.items():
                        if tensor is not None:
                            found.setdefault(id(tensor), (start + key, tensor))
        for name, value in self._named:
            for path, tensor in _tensors_in(value, name, depth=3):
                others.setdefault(id(tensor), (path, tensor))
        named = dict(parameters.values())
        names = frozenset(named)
        named.update(one for key, one in buffers.items() if key not in parameters)
        named.update(one for key, one in others.items() if key not in parameters and key not in buffers)
        return named, names

    def _note_modules(self) -> list[tuple[Any, int]]:
        """Notes modules and their classes; returns the containers among their attributes."""
        waiting: list[tuple[Any, int]] = []
        for (name, module), own in zip(self._parts, self._own, strict=True):
            attributes = module.__dict__
            self._kept.append((attributes, attributes.copy()))
            common = _common_of(attributes)
            self._kept += [(container, container.copy()) for container in filter(None, common)]
            self._empty += filterfalse(None, common)
            for key, value in own:
                kind = type(value)
                if kind is int or (kind is tuple and NUMBERS.issuperset(map(type, value))):
                    continue
                inside = self._register(value)
                if inside is not None:
                    waiting.append((inside, DEPTH - 1))
                if inside is not None or isinstance(value, Tensor):
                    self._named.append((f"{name}.{key}" if name else key, value))
        for kind in {
            base for module_kind in {type(module) for _, module in self._parts} for base in own_classes(module_kind)
        }:
            entries = {key: value for key, value in vars(kind).items() if not key.startswith("__")}
            self._kept.append((kind, entries))
            waiting += [
                (inside, DEPTH - 1) for value in entries.values() if (inside := self._register(value)) is not None
            ]
        return waiting

    def _register(self, value: Any) -> Any:
        """Notes a tensor or a generator; the entries of anything else that has some, or None."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self._tensors[id(value)] = value
            return None
        state = _generator_state(value)
        if state is not None:
            self._generators.append(state)
        return container_of(value)

    def _walk(self, waiting: list[tuple[Any, int]]) -> None:
        seen = {id(module.__dict__) for _, module in self._parts}
        while waiting:
            value, depth = waiting.pop()
            entries: Any = value
            if not isinstance(value, tuple):
                if id(value) in seen:
                    continue
                seen.add(id(value))
                if isinstance(value, CONTAINERS) and not value:
                    self._empty.append(value)
                    continue
                entries = copy_entries(value)
                self._kept.append((value, entries))
            entries = list(entries.values()) if isinstance(entries, dict) else entries
            if depth and not NUMBERS.issuperset(map(type, entries)):
                for item in entries:
                    inside = item.__dict__ if isinstance(item, nn.Module) else self._register(item)
                    if inside is not None:
                        waiting.append((inside, depth - 1))

    def _are_changed(self) -> bool:
        """Whether something else than flags is not as it was."""
        return any(self._empty) or any(map(differs, *zip(*self._kept, strict=True)))


class Gradients:
    """``requires_grad`` and the ``.grad`` objects of parameters.

    Args:
        parameters: Whose.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._noted = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]

    def set_aside(self) -> None:
        """Leaves the parameters without gradients, so that nothing is added to them."""
        for parameter, grad, _ in self._noted:
            if grad is not None:
                parameter.grad = None

    def put_back(self) -> None:
        """Puts flags and gradients back."""
        for parameter, grad, requires_grad in self._noted:
            if parameter.requires_grad is not requires_grad:
                with torch.inference_mode(parameter.is_inference()):
                    parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad


class _Values:
    """The bits of some tensors, copied, to be put back where they have changed."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._small: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._noted: list[tuple[Tensor, int | None, Tensor]] = []
        with torch.no_grad():
            for tensor in {id(tensor): tensor for tensor in tensors}.values():  # hashing tensors takes longer
                if type(tensor) is Tensor and tensor.dim() < 2 and _is_plain(tensor):
                    self._small.setdefault((tensor.device, tensor.dtype), []).append(tensor)
                else:
                    self._noted.append((tensor, version_of(tensor), tensor.detach().clone()))
        # Models hold many small buffers (statistics, counters): joined, they are copied and compared at once.
        self._joined = {kind: _join(several) for kind, several in self._small.items()}

    def put_back(self) -> None:
        for kind, several in self._small.items():
            if not torch.equal(_join(several), self._joined[kind]):
                values = self._joined[kind].split([tensor.numel() for tensor in several])
                for tensor, value in zip(several, values, strict=True):
                    _copy_back(tensor, value.view(tensor.shape))
        for tensor, version, value in self._noted:
            if version_of(tensor) != version:
                write(tensor, value)
            elif _is_plain(tensor):
                _copy_back(tensor, value)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's entries lie in memory and can be compared."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)
    )


def _memory_of(tensor: Tensor) -> Callable[[], None] | None:
    """What gives a tensor the memory it has now, should ``.data`` or ``resize_`` give it other."""
    if not _is_plain(tensor):
        return None
    place, address = tensor.detach(), tensor.data_ptr()

    def give_back() -> None:
        if tensor.data_ptr() != address or tensor.shape != place.shape or tensor.dtype != place.dtype:
            tensor.data = place

    return give_back


def _join(tensors: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([tensor if tensor.dim() else tensor.view(1) for tensor in tensors])


def _copy_back(tensor: Tensor, value: Tensor) -> None:
    """Copies ``value`` where it differs: elsewhere it would disturb a graph of the user's that has saved the tensor."""
    # Batch norm writes its running statistics without counting a version, so values are compared.
    if not torch.equal(tensor, value):
        write(tensor, value)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to, ``None`` where that is not counted."""
    return None if tensor.is_inference() else tensor._version


def _generator_state(value: Any) -> Callable[[], object] | None:
    """What puts a random generator back to where it is now."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    numpy: Any = sys.modules.get("numpy.random")
    if numpy is not None and isinstance(value, numpy.RandomState):
        return partial(value.set_state, value.get_state())
    if numpy is not None and isinstance(value, numpy.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _set_mode(model: nn.Module, parts: Parts, writes: CopyOnWrite, training: bool) -> None:
    """Sets the mode by the model's own ``train`` or ``eval``."""
    with writes.saving():
        if training:
            model.train()
        elif any(module.training for _, module in parts):
            model.eval()


def _changes_flags_alone(kind: type[nn.Module]) -> bool:
    plain = nn.Module
    return kind.train is plain.train and kind.eval is plain.eval and kind.__setattr__ is plain.__setattr__


def _common_of(attributes: dict[str, Any]) -> Sequence[Any]:
    """The containers that every module has."""
    try:
        if "training" in attributes:
            return _common(attributes)
    except KeyError:  # made by an older torch
        pass
    # Some of a scripted module's are no containers of Python's.
    return [value for key, value in attributes.items() if key in COMMON and type(value) in (dict, OrderedDict, set)]


def _tensors_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if type(value) in NUMBERS:
        return
    if isinstance(value, Tensor):
        yield path, value
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(() if NUMBERS.issuperset(map(type, value)) else value):
            yield from _tensors_in(item, f"{path}.{index}", depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(item, f"{path}.{key}", depth - 1)
