"""One forward, traced: every operation it executes states equations between the dimensions of its tensors.

The trace sits below the user's code and above the kernels. It holds the dimensions of every tensor alive, applies to
them the rule of each operation, and never reads a value.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from netopt.axes.layout import Atom, Layout, freeze, resolve
from netopt.axes.operation import Dim, Dims, Mark, Operation, find_rule
from netopt.errors import TraceError
from netopt.flops import formula
from netopt.model.attributes import NUMBERS
from netopt.model.dispatch import ThreadDispatchMode
from netopt.model.writes import CopyOnWrite, storage_of
from netopt.symbolic import Constraints, calling_line

_serial = itertools.count()
# Operations that query a tensor and make none.
_QUERIES = frozenset(
    [
        "prim::device",
        "aten::sym_size",
        "aten::sym_numel",
        "aten::sym_stride",
        "aten::sym_storage_offset",
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::equal",
        "aten::item",
        "aten::_assert_async",
        "aten::allclose",
        "aten::_assert_tensor_metadata",
        "aten::_has_compatible_shallow_copy_type",
        "aten::is_same_size",
        "prim::layout",
    ]
)


class Traits(NamedTuple):
    """The properties of an operation that are needed at each of its calls."""

    name: str
    writes: bool
    is_query: bool
    shares: bool
    formula: Callable[..., Any] | None


_traits: dict[Any, Traits] = {}
_POSITIONS = frozenset([torch.int64, torch.int32])


def traits_of(function: Any) -> Traits:
    """The traits of an operation, an overload; computed once."""
    return _traits.get(function) or _describe(function)


def _describe(function: Any) -> Traits:
    schema = function._schema
    cost = formula(function._overloadpacket)
    found = _traits[function] = Traits(
        schema.name,
        schema.is_mutable,
        schema.name in _QUERIES,
        any(result.alias_info is not None for result in schema.returns),
        cost,
    )
    return found


# Those among them that return a value.
_VALUES = frozenset(["aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::item", "aten::allclose"])


class Work(NamedTuple):
    """An operation that costs multiplications: its formula and arguments, tensors as layouts."""

    formula: Callable[..., Any]
    args: Any
    kwargs: Any
    result: Any


class _TensorInfo:
    """The record of one tensor: its dimensions, whether it depends on the inputs, and what it is a view of.

    Together these make a graph: what a tensor was computed from, and what holds should it reach a result.
    """

    __slots__ = ("data", "dims", "marks", "memory", "parents", "source")

    def __init__(self, dims: Dims, *, data: bool, source: str | None) -> None:
        self.dims = dims
        self.data = data
        self.source = source
        self.parents: Sequence[_TensorInfo] = ()
        self.marks: Sequence[Mark] = ()
        self.memory: list[_TensorInfo] = []  # shared by a tensor and its views: the last write, if there was one

    def __deepcopy__(self, memo: dict[int, Any]) -> _TensorInfo:
        return self  # it holds of a copy of the tensor too


class DimTracer(ThreadDispatchMode):
    """The equations of one model, collected while its forward runs.

    Attributes:
        members: Every parameter, buffer and other tensor the model holds, by name; one name a tensor.
        parameters: Names of those members that are parameters.
        constraints: What is recorded of integers.
        new_sizes: Layouts made by the call in progress whose sizes are among its arguments.
        implicit_sizes: Layouts whose size no integer of a call is, each with the module that made the call.
        groups: The layout of the groups of the last grouped operation.
        reads: Per member name, the layouts its uses sum over.
        makes: Per member name, the layouts its uses produce.
        made_by: Per member name, the operations that use it as a weight.
        roles: By the part they play in an operation, layouts.
        touched: Names of the members an operation has read.
        operations: How many operations ran.
        unknown: Names of the operations that had no rule.
        kernels: Dimensions of kernels: no neurons, whatever else they meet.
        sliced: Parts of weights that a slice passes over.
        selected: Parts of weights that a slice or another selection reads.
        work: The operations that cost multiplications, of the first run only.
        counting: Whether work is being noted.
        writes: Values of parameters from before something was written to them.
        complete: Whether every tensor an operation read is an input, a member or the result of a traced operation.
        pointers: Names of integer members whose entries are positions of a layout.
        follows: The name of such a member, if the operation in progress does nothing else with it.
        by_value: Whether sizes may depend on values: something was selected by value, read as a plain number, or
            reached an operation without a rule.
    """

    def __init__(self, members: dict[str, Tensor], parameters: frozenset[str]) -> None:
        super().__init__()
        self.parameters = parameters
        self._key = f"_netopt_dims_{next(_serial)}"  # one trace may run inside another
        self.members = members
        self.constraints = Constraints()
        self.new_sizes: list[Layout] = []
        self.implicit_sizes: list[tuple[Layout, str, nn.Module]] = []
        self.groups: Layout | None = None
        self.reads: dict[str, list[Layout]] = defaultdict(list)
        self.makes: dict[str, list[Layout]] = defaultdict(list)
        self.made_by: dict[str, set[str]] = defaultdict(set)
        self.roles: dict[str, list[Layout]] = defaultdict(list)
        self.touched: set[str] = set()
        self.operations = 0
        self.unknown: set[str] = set()
        self.kernels: list[Layout] = []
        self.sliced: list[Layout] = []
        self.selected: list[Layout] = []
        self.work: list[Work] = []
        self.counting = False
        self.pointers: dict[str, Layout] = {}
        self.follows: str | None = None
        self._index_lists = frozenset(
            name for name, one in members.items() if one.dim() == 1 and one.dtype in _POSITIONS
        )
        self._read_as_values: set[str] = set()
        self.in_call = False
        self.by_value = False
        self.complete = True
        self._alive: list[_TensorInfo] = []
        self._marks: list[Mark] = []
        self._tagged: list[Tensor] = []
        self._nonzero_storages: dict[int, Any] = {}
        self._exchanged: list[tuple[Tensor, Any]] = []
        self.writes = CopyOnWrite([members[name] for name in parameters])
        for name, tensor in members.items():
            zero = tensor.is_floating_point() or tensor.is_complex()
            self._record(tensor, [Dim(Atom(size), zero) for size in tensor.shape], data=False, source=name)
        self._tagged.extend(members.values())

    def close(self) -> None:
        """Removes the records of tensors that outlive the trace, and undoes what the forward wrote into parameters."""
        self.writes.undo()
        for tensor in self._tagged:
            vars(tensor).pop(self._key, None)
        self._tagged.clear()

    def inputs(self, tensors: Iterable[Tensor]) -> None:
        """Declares these tensors inputs: none of their positions may go."""
        for tensor in tensors:
            if self._info(tensor) is None:
                dims = [Dim(Atom(size, "is a dimension of the model's input"), True) for size in tensor.shape]
                self._record(tensor, dims, data=True, source=None, mark=True)

    def dims(self, tensor: Tensor) -> Dims:
        """The dimensions of ``tensor``, resolved; a tensor from outside is a constant, whose positions all stay."""
        known = tensor.__dict__.get(self._key)
        if known is None:
            known = self._register(tensor)
        elif known.source is not None:
            self.touched.add(known.source)
        if self._nonzero_storages and storage_of(tensor) in self._nonzero_storages:
            known.dims = [Dim(resolve(layout), False) for layout, _ in known.dims]
            return known.dims
        for layout, _ in known.dims:
            if type(layout) is not Atom or layout.bound is not None:  # by far the most are settled
                known.dims = [Dim(resolve(layout), zero) for layout, zero in known.dims]
                break
        return known.dims

    def _register(self, tensor: Tensor) -> _TensorInfo:
        """The record of a tensor that an operation reads."""
        known = tensor.__dict__.get(self._key)
        if known is None:
            dims = [Dim(Atom(size, f"meets a constant tensor, at {self.where()}" if size > 1 else None))
                    for size in tensor.shape]  # fmt: skip
            known = self._record(tensor, dims, data=False, source=None, mark=True)
        elif known.source is not None:
            self.touched.add(known.source)
        return known

    def _read(self, tensors: list[Tensor], traits: Traits) -> list[_TensorInfo]:
        """The records of the tensors an operation reads, and of the last writes into their memory."""
        known = []
        for tensor in tensors:
            one = tensor.__dict__.get(self._key)
            if one is None:
                if traits.name != "aten::lift_fresh":  # which takes in a tensor made of plain numbers
                    self.complete = False
                one = self._register(tensor)
            elif one.source is not None:
                self.touched.add(one.source)
            known.append(one)
        for one in known.copy():
            known += one.memory
        return known

    def exchange(self, tensor: Tensor, value: Tensor) -> None:
        """States that ``tensor`` has been given the memory of ``value``, until the forward is over."""
        dims, data = self.dims(value), self.depends_on_data(value)
        self._exchanged.append((tensor, vars(tensor).get(self._key)))
        self._record(tensor, dims, data=data, source=None)

    def __exit__(self, *error: object) -> None:
        """Ends a forward."""
        super().__exit__(*error)
        while self._exchanged:
            tensor, known = self._exchanged.pop()
            vars(tensor)[self._key] = known
            if known is None:
                del vars(tensor)[self._key]

    def depends_on_data(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` was computed from the model's inputs."""
        known = self._info(tensor)
        return known is not None and known.data

    def pointer(self, tensor: Tensor) -> str | None:
        """The name of the member ``tensor`` is, if its entries can be read and rewritten as positions."""
        known = self._info(tensor)
        if known is None or known.source is None or self.members[known.source] is not tensor:
            return None
        readable = tensor.dim() == 1 and not tensor.is_meta and not isinstance(tensor, FakeTensor)
        return known.source if readable and tensor.dtype in _POSITIONS else None

    def note_roles(self, operation: str, tensor: Tensor, summed: Iterable[Dim], kept: Iterable[Dim]) -> None:
        """Notes, for the member a weight is made of, what an operation sums over and what it produces."""
        known = self._info(tensor)
        if known is not None and known.source is not None:
            self.reads[known.source].extend(dim.layout for dim in summed)
            self.makes[known.source].extend(dim.layout for dim in kept)
            self.made_by[known.source].add(operation)

    def mark(self, tensor: Tensor, marks: Sequence[Mark]) -> None:
        """Notes what holds of layouts should ``tensor`` reach a result."""
        known = self._register(tensor)
        known.marks = [*known.marks, *marks]
        self._marks += marks

    def reach(self, tensors: Iterable[Tensor]) -> None:
        """Notes that the values of these tensors count: they are results, or the code reads them."""
        for tensor in tensors:
            known = self._register(tensor)
            self._alive += [known, *known.memory]
            if known.source in self._index_lists:
                self._read_as_values.add(known.source)

    def finalize(self) -> None:
        """Applies the marks that reach a result; all of them where some tensor's origin was not traced."""
        seen = set(self._alive)
        waiting = list(seen)
        live: set[int] = set()
        while waiting:
            known = waiting.pop()
            live.update(map(id, known.marks))
            for parent in known.parents:
                if parent not in seen:
                    seen.add(parent)
                    waiting.append(parent)
        for mark in self._marks:
            if not self.complete or id(mark) in live:
                mark.state(mark.layout, mark.why)
        for name in self._read_as_values & self.pointers.keys():
            freeze(self.pointers[name], f"is numbered by {name}, whose entries are used in another way too")

    def merge(self, tensor: Tensor, other: Tensor, dims: Dims) -> None:
        """States that ``tensor`` may be what ``other`` is, with these dimensions."""
        known, also = self._register(tensor), self._register(other)
        known.dims = dims
        known.data = known.data or also.data
        known.parents = [*known.parents, also, *also.memory]

    def where(self) -> str:
        """The line of the user's code being run."""
        return calling_line()

    def _info(self, tensor: Tensor) -> _TensorInfo | None:
        return tensor.__dict__.get(self._key)

    def _record(self, tensor: Tensor, dims: Dims, *, data: bool, source: str | None, mark: bool = False) -> _TensorInfo:
        known = _TensorInfo(dims, data=data, source=source)
        vars(tensor)[self._key] = known
        if mark:
            self._tagged.append(tensor)
        return known

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation and applies its rule."""
        if kwargs is None:
            kwargs = {}
        traits = traits_of(function)
        if traits.is_query:
            if traits.name in _VALUES:
                self.by_value = True
                self.reach(_tensors_in(args, []))
            return function(*args, **kwargs)
        tensors = _tensors_in(args, [])
        if kwargs:
            _tensors_in(kwargs.values(), tensors)
        known = self._read(tensors, traits)
        if traits.writes:
            self.writes.save(tensors)
        out = function(*args, **kwargs)
        self._apply_rule(traits, args, kwargs, tensors, known, out)
        return out

    def _apply_rule(
        self,
        traits: Traits,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        known: list[_TensorInfo],
        out: Any,
    ) -> None:
        """States the equations of an operation, and records its cost."""
        self.operations += 1
        outs = [out] if isinstance(out, Tensor) else _tensors_in((out,), [])
        if outs:
            self._state(traits, Operation(self, traits.name, tensors, out), args, kwargs, known, outs)
            if self.counting and traits.formula is not None:
                self._note_work(traits.formula, args, kwargs, outs)

    def _state(
        self,
        traits: Traits,
        op: Operation,
        args: Any,
        kwargs: Any,
        known: list[_TensorInfo],
        outs: list[Tensor],
    ) -> None:
        found_rule = find_rule(op.name)
        if kwargs:
            kwargs.pop("out", None)
        if found_rule is None:
            self._freeze_operands(op)
            stated: Any = None
        else:
            self.follows = None
            stated = found_rule(op, *args, **kwargs)
        if self._index_lists:
            self._read_as_values.update(
                one.source for one in known if one.source in self._index_lists and one.source != self.follows
            )
        lists = stated if isinstance(stated, tuple) else (stated,)
        for index, tensor in enumerate(outs):
            written = self._info(tensor)
            dims = lists[index] if index < len(lists) else None
            if dims is None:
                dims = self._default_dims(op.name if found_rule is None else None, tensor, written)
            dims = [dim if type(dim) is Dim else Dim(dim) for dim in dims]
            if [dim[0].size for dim in dims] != list(tensor.shape):
                self._mismatch(op.name, tensor, dims)
            if written is not None and traits.writes:
                self._note_write(tensor, op.tensors, written.dims, dims)
            now = self._record_result(tensor, dims, known, written)
            self._share(now, traits, known, written)
            now.marks = [*op.marks, *op.when_read.get(index, ())] if op.when_read else op.marks
        self._marks += op.marks
        for marks in op.when_read.values():
            self._marks += marks

    def _share(
        self, now: _TensorInfo, traits: Traits, known: Sequence[_TensorInfo], written: _TensorInfo | None
    ) -> None:
        """Shares the record of writes between a result and what it is a view of."""
        if written is not None:
            now.memory = written.memory
            if traits.writes:
                now.memory[:] = [now]
                if written.source is not None:  # kept for the next forward
                    self._alive.append(now)
        elif traits.shares and known:
            now.memory = known[0].memory

    def _record_result(
        self, tensor: Tensor, dims: Dims, known: Sequence[_TensorInfo], written: _TensorInfo | None
    ) -> _TensorInfo:
        """Records a result of these operands; one that was ``written`` to keeps its source."""
        data, source = False, None
        for one in known:
            if one.data:
                data = True
            elif source is None:
                source = one.source
        if data:
            source = None
        if written is not None:
            data, source = data or written.data, written.source or source
        now = self._record(tensor, dims, data=data, source=source)
        now.parents = known
        return now

    def _default_dims(self, unruled: str | None, tensor: Tensor, written: _TensorInfo | None) -> Dims:
        """The dimensions of a result that no rule returns; ``unruled`` names an operation without one."""
        if unruled is not None:
            why = f"reaches {unruled}, which has no rule, at {self.where()}"
            return [Dim(Atom(size, why)) for size in tensor.shape]
        if written is not None and len(written.dims) == tensor.dim():
            return written.dims
        return [Dim(Atom(size)) for size in tensor.shape]

    def _note_work(self, cost: Callable[..., Any], args: Any, kwargs: Any, outs: list[Tensor]) -> None:
        result = self._layouts(outs[0]) if len(outs) == 1 else tuple(map(self._layouts, outs))
        self.work.append(Work(cost, self._as_layouts(args), self._as_layouts(kwargs), result))

    def _as_layouts(self, value: Any) -> Any:
        """Arguments with every tensor as the layouts of its dimensions."""
        if type(value) in NUMBERS:
            return value
        if isinstance(value, Tensor):
            return self._layouts(value)
        if isinstance(value, (tuple, list)):
            if not value or type(value[0]) is int:
                return value
            return type(value)([self._as_layouts(one) for one in value])
        if isinstance(value, dict):
            return {key: self._as_layouts(one) for key, one in value.items()}
        return value

    def _layouts(self, tensor: Tensor) -> tuple[Layout, ...]:
        return tuple([layout for layout, _ in tensor.__dict__[self._key].dims])

    def _freeze_operands(self, op: Operation) -> None:
        self.unknown.add(op.name)
        self.by_value = True
        for tensor in op.tensors:
            for dim in self.dims(tensor):
                if dim.size > 1:
                    freeze(dim.layout, f"reaches {op.name}, which has no rule, at {self.where()}")

    def _mismatch(self, name: str, tensor: Tensor, dims: Dims) -> NoReturn:
        sizes = tuple(dim.size for dim in dims)
        raise TraceError(f"the rule of {name} gives sizes {sizes} to a result of shape {tuple(tensor.shape)}.")

    def _note_write(self, tensor: Tensor, tensors: Sequence[Tensor], before: Dims, after: Dims) -> None:
        """After a write of what need not be zero, nothing in that storage need be zero."""
        reshaped = len(before) != len(after)  # as by unsqueeze_, which leaves the entries alone
        if (
            not reshaped
            and any(tensor is one for one in tensors)
            and any(old.zero and not new.zero for old, new in zip(before, after, strict=True) if old.size > 1)
        ):
            self._nonzero_storages[storage_of(tensor)] = tensor  # kept alive, so that its address is not reused


def _tensors_in(values: Iterable[Any], found: list[Tensor]) -> list[Tensor]:
    """The tensors among the arguments or the results of an operation, which are plain containers."""
    for value in values:
        kind = type(value)
        if kind in NUMBERS:
            continue
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            if value and type(value[0]) is not int:  # a list of sizes
                _tensors_in(value, found)
        elif kind is dict:
            _tensors_in(value.values(), found)
    return found
