"""One executed operation, as a rule sees it.

A rule reads the dimensions of an operation's tensors, states equations between them and returns the dimensions of the
result. The registry maps operations to rules; an operation without one freezes what it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._mode_utils import no_dispatch

from netopt.axes.layout import (
    LAYOUTS,
    Atom,
    Layout,
    atoms,
    concat,
    freeze,
    mark_inexact,
    product,
    resolve,
    split_concat,
    split_product,
)
from netopt.axes.layout import unify as unify_layouts
from netopt.errors import InvalidArgumentError
from netopt.symbolic import DimSize, SymbolicInt

if TYPE_CHECKING:
    from netopt.axes.tracing.dims import DimTracer


@final
class Dim(NamedTuple):
    """One dimension of a traced tensor.

    Attributes:
        layout: What its positions are.
        zero: Whether a masked position of it holds zeros: then summing over it is the same as removing it.
    """

    layout: Layout
    zero: bool = False

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.layout.size


class Mark(NamedTuple):
    """What holds of a layout should the tensor it is noted on reach a result: that it is frozen, or inexact."""

    state: Callable[[Layout, str], None]
    layout: Layout
    why: str


Dims = list[Dim]
Rule = Callable[..., Any]
_RULES: dict[str, Rule] = {}


def rule(*operations: Any) -> Callable[[Rule], Rule]:
    """Registers how dimensions go through an operation.

    Args:
        operations: Overload packets (``torch.ops.mylib.scale``), overloads, or names (``"mylib::scale"``).

    Returns:
        A decorator. The function gets the :class:`Operation` and the operation's own arguments, and returns the
        dimensions of its result: a list for one tensor, a tuple of lists for several. Entries are
        :class:`Dim` or layouts; ``None`` leaves the dimensions of the result unrelated to anything.

    Raises:
        InvalidArgumentError: An operation has a rule already, or is none.

    Example:
        >>> library = torch.library.Library("netopt_doctest", "FRAGMENT")
        >>> _ = library.define("double(Tensor x) -> Tensor")
        >>> library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
        >>> @rule("netopt_doctest::double")
        ... def double(op, x):
        ...     return op.dims(x)
    """

    def register(function: Rule) -> Rule:
        for operation in operations:
            name = operation_name(operation)
            if name in _RULES:
                raise InvalidArgumentError(f"operation {name} has a rule already; a second one would be ambiguous.")
            _RULES[name] = function
        return function

    return register


def operation_name(operation: Any) -> str:
    """``"aten::mm"``, of an overload, an overload packet or a name."""
    if isinstance(operation, str):
        return operation
    if isinstance(operation, torch._ops.OpOverload):
        return str(operation._schema.name)
    if isinstance(operation, torch._ops.OpOverloadPacket):
        return str(operation._qualified_op_name)
    raise InvalidArgumentError(
        f"{operation!r} is no operation; pass an overload packet such as torch.ops.aten.mm, or a name, 'aten::mm'."
    )


def find_rule(name: str) -> Rule | None:
    """The rule of an operation; an in-place operation shares the rule of the one it is named after."""
    found = _RULES.get(name)
    if found is None and name.endswith("_") and not name.endswith("__"):
        found = _RULES.get(name[:-1])
    return found


def known_operations() -> tuple[str, ...]:
    """Names of all operations with a rule."""
    return tuple(sorted(_RULES))


class Operation:
    """One executed operation: its name, its result, and the equations that its rule states."""

    __slots__ = ("_place", "_short", "marks", "name", "out", "tensors", "trace", "when_read")

    def __init__(self, trace: DimTracer, name: str, tensors: Sequence[Tensor], out: Any) -> None:
        self._place: str | None = None
        self._short: str | None = None
        self.trace = trace
        self.name = name
        self.tensors = tensors
        self.out = out
        self.marks: list[Mark] = []
        self.when_read: dict[int, list[Mark]] = {}

    def dims(self, tensor: Tensor) -> Dims:
        """The dimensions of a tensor the operation reads or wrote, resolved."""
        return self.trace.dims(tensor)

    @property
    def where(self) -> str:
        """The line of the user's code that made the operation run."""
        if self._place is None:
            self._place = self.trace.where()
        return self._place

    def same(self, left: Dim | Layout, right: Dim | Layout) -> Layout:
        """States that two dimensions are one and the same, and returns it."""
        a = left[0] if type(left) is Dim else left
        b = right[0] if type(right) is Dim else right
        if a is not b:
            unify_layouts(a, b, self._misaligned)
        return resolve(a)

    def _misaligned(self) -> str:
        return f"has parts that {self.short} aligns in two ways, at {self.where}"

    @property
    def short(self) -> str:
        """The operation's name without its library, as a user would write it."""
        if self._short is None:
            self._short = self.name.rpartition("::")[2].strip("_") or self.name
        return self._short

    def freeze(self, dims: Dim | Layout | Iterable[Dim], why: str) -> None:
        """Keeps every position of these dimensions, for a reason that completes "the axis ..."."""
        for dim in [dims] if isinstance(dims, _ONE) else dims:
            layout = dim[0] if type(dim) is Dim else dim
            if type(layout) is Atom and layout.bound is None:  # by far the most are
                if layout.frozen is None:
                    layout.frozen = f"{why}, at {self.where}"
            elif any(atom.frozen is None for atom in atoms(layout)):
                freeze(layout, f"{why}, at {self.where}")

    def inexact(self, dims: Dim | Layout | Iterable[Dim], why: str) -> None:
        """States that a removed position of these dimensions differs from a masked one, if the result is used."""
        for dim in [dims] if isinstance(dims, _ONE) else dims:
            layout = dim[0] if type(dim) is Dim else dim
            if type(layout) is Atom and layout.bound is None:
                if layout.inexact is not None or layout.frozen is not None:
                    continue
            else:
                layout = resolve(layout)
                if all(atom.inexact is not None or atom.frozen is not None for atom in atoms(layout)):
                    continue
            self.marks.append(Mark(mark_inexact, layout, f"{why}, at {self.where}"))

    def numbered(self, index: int, dim: Dim) -> None:
        """States that the result of this index holds numbers of positions: they must stay, if it is used."""
        if any(atom.frozen is None for atom in _atoms(resolve(dim.layout))):
            why = f"is numbered by {self.short}, at {self.where}"
            self.when_read.setdefault(index, []).append(Mark(freeze, dim.layout, why))

    def frozen(self, size: int, why: str) -> Dim:
        """A new dimension none of whose positions may go."""
        return Dim(Atom(size, f"{why}, at {self.where}"))

    def new_size(self, size: int, *, zero: bool = False) -> Dim:
        """A new dimension whose size is an argument of the call being made."""
        dim = Dim(Atom(size), zero)
        if size > 1:
            self.trace.new_sizes.append(dim.layout)
        return dim

    def is_weight(self, tensor: Any) -> bool:
        """Whether a tensor is made of parameters, buffers and constants alone, not of the model's inputs."""
        return isinstance(tensor, Tensor) and not self.trace.depends_on_data(tensor)

    def is_member(self, tensor: Tensor) -> bool:
        """Whether a tensor is a member of the model, or was made of one alone, as the opposite of a mask."""
        known = self.trace._info(tensor)
        if known is None or known.data or known.source is None:
            return False
        if self.trace.members[known.source].dtype != tensor.dtype:
            return False
        while len(known.parents) == 1:
            (known,) = known.parents
        return not known.parents

    def contract(self, tensor: Tensor, summed: Iterable[Dim], kept: Iterable[Dim]) -> None:
        """Notes which dimensions of a weight an operation sums over (reads) and which remain (makes)."""
        if self.is_weight(tensor):
            self.trace.note_roles(self.short, tensor, summed, kept)

    def plays(self, role: str, dims: Iterable[Dim]) -> None:
        """Notes the part that dimensions play in this operation, such as heads, which tells the kind of their axes."""
        self.trace.roles[role].extend(dim.layout for dim in dims if dim.size > 1)

    def keep_multiple(self, dim: Dim, step: int) -> None:
        """States that the operation runs for multiples of a step alone, if this dimension is one."""
        if dim.size % step == 0:
            constraints = self.trace.constraints
            constraints.guard(operator.eq, SymbolicInt(dim.size, DimSize(dim.layout), constraints) % step, 0, True)

    def note_slice(self, tensor: Tensor, whole: Dim, part: Dim) -> None:
        """Notes that a part of a weight was read by its position; what no operation reads is not a neuron."""
        if self.is_weight(tensor):
            self.trace.sliced.append(whole.layout)
            self.trace.selected.append(part.layout)

    def summed(self, left: Dim, right: Dim) -> None:
        """States that two dimensions are one, multiplied and summed over."""
        self.same(left, right)
        if not (left.zero or right.zero):
            self.inexact(left, f"is summed over by {self.short} where a masked neuron need not be zero")


_ONE = (Dim, *LAYOUTS)


def _atoms(layout: Layout) -> Iterable[Atom]:
    """The atoms of a resolved layout; by far the most are one."""
    return (layout,) if type(layout) is Atom else atoms(layout)


def is_zero(op: Operation, value: Any) -> bool:
    """Whether a value, a number or a constant of one entry, is certainly zero."""
    if not isinstance(value, Tensor):
        return value == 0
    known = op.trace._info(value)
    if value.numel() != 1 or (known is not None and (known.data or known.source is not None)):
        return False
    value = getattr(value, "constant", None) if isinstance(value, FakeTensor) else value
    with no_dispatch():
        return value is not None and not value.is_meta and not value.any().item()


def merge(dims: Sequence[Dim]) -> Dim:
    """Dimensions flattened into one, row-major."""
    if len(dims) == 1:
        return dims[0]
    return Dim(product(dim.layout for dim in dims), all(map(vanishes, dims)))


def join(dims: Sequence[Dim]) -> Dim:
    """Dimensions one after the other."""
    if len(dims) == 1:
        return dims[0]
    return Dim(concat(dim.layout for dim in dims), all(map(vanishes, dims)))


def vanishes(dim: Dim) -> bool:
    """Whether every position of a dimension that could be masked is zero then; of a frozen one, none can be."""
    return dim.zero or dim.size == 1 or all(atom.frozen is not None for atom in atoms(dim.layout))


def rows(dim: Dim, size: int) -> tuple[Dim, Dim] | None:
    """A dimension read as ``size`` rows, or ``None`` where its boundaries forbid it."""
    halves = split_product(dim.layout, size)
    return None if halves is None else (Dim(halves[0], dim.zero), Dim(halves[1], dim.zero))


def cut(dim: Dim, size: int) -> tuple[Dim, Dim] | None:
    """A dimension cut after ``size`` positions, or ``None`` where its boundaries forbid it."""
    halves = split_concat(dim.layout, size)
    return None if halves is None else (Dim(halves[0], dim.zero), Dim(halves[1], dim.zero))
