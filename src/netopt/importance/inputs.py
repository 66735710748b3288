"""What each weight is multiplied with, seen while the model runs.

A contraction is recognised below autograd, by the storage of the weight it reads; so fused projections, functional
weights, recurrent cells and attention need no module of a known kind. What is read is reported and not kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from netopt.model.dispatch import ThreadDispatchMode
from netopt.model.parameters import Place

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Convolution", "InputWatch", "Matrix", "Reading", "filled_like"]

aten = torch.ops.aten
CHUNK = 1 << 24


@dataclass(frozen=True)
class Matrix:
    """Which entries of a weight were multiplied as a matrix, one row an output, as the operation read them.

    Several matrices side by side, each with inputs of its own, are groups: of a convolution, or a batched product.

    Attributes:
        size: ``(groups, outputs, *inputs)``; of a convolution the inputs are its kernel and, innermost, the channels.
        stride: How far apart neighbours along each of these are, in entries of the weight as it lies in memory.
        offset: How far the first entry is from the weight's first.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @property
    def columns(self) -> int:
        """The number of inputs of a group."""
        return math.prod(self.size[2:])

    @property
    def count(self) -> int:
        """The number of entries."""
        return math.prod(self.size)

    def rows(self, tensor: Tensor) -> Tensor:
        """Returns these entries of a tensor that lies in memory as the weight does, ``(groups, outputs, inputs)``."""
        return self._view(tensor).flatten(2)

    def write(self, tensor: Tensor, rows: Tensor) -> None:
        """Writes what :meth:`rows` returns back into ``tensor``."""
        self._view(tensor).copy_(rows.reshape(self.size))

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Returns a value for each input, ``(groups, inputs)``, in the shape of the weight ``like``; zero elsewhere."""
        spread = values.view(self.size[0], 1, *self.size[2:]).expand(self.size)
        if self.size[0] == 1 and like.is_contiguous():
            # In the weight's own order of dimensions, without a tensor of its size.
            order = sorted(range(1, len(self.size)), key=lambda dim: -self.stride[dim])
            ordered = spread[0].permute([dim - 1 for dim in order])
            if ordered.shape == like.shape:
                return ordered
        full = filled_like(like, 0, values.dtype)
        self._view(full).copy_(spread)
        return full

    def _view(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


class Convolution(NamedTuple):
    """How a convolution walks over its inputs, one number a spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]

    def windows(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Returns ``(batch, channels, *positions, *kernel)``: the input at each entry of the kernel for each output."""
        stride, padding = self.stride, [(one, one) for one in self.padding]
        if self.transposed:
            # A transposed convolution is one of step 1, its kernel turned round, over inputs set apart by its stride.
            x = _set_apart(x, stride)
            reach = [gap * (size - 1) for size, gap in zip(kernel, self.dilation, strict=True)]
            padding = [
                (far - one, far - one + more)
                for far, one, more in zip(reach, self.padding, self.output_padding, strict=True)
            ]
            stride = (1,) * len(kernel)
        x = F.pad(x, [amount for one in reversed(padding) for amount in one])
        for dim, (size, step, gap) in enumerate(zip(kernel, stride, self.dilation, strict=True)):
            x = x.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
        return x.flip(list(range(-len(kernel), 0))) if self.transposed else x


def filled_like(tensor: Tensor, value: float, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that lies in memory as ``tensor`` does, gaps among them, which ``torch.full_like`` leaves out."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device=tensor.device)
    return made.fill_(value)


@dataclass(frozen=True, eq=False)
class Reading:
    """One contraction of a weight with its inputs.

    Attributes:
        name: The weight's name.
        matrix: What of the weight took part, as a matrix.
        inputs: The other operand: ``(..., inputs)`` of a product, of a batched one ``(groups, samples, inputs)``,
            ``(batch, channels, ...)`` of a convolution, integer rows of an embedding.
        convolution: How a convolution walks, or ``None``.
        ends: Of a grouped product, ``(samples, inputs)`` sorted by group, where the samples of each group end.
    """

    name: str
    matrix: Matrix
    inputs: Tensor
    convolution: Convolution | None = None
    ends: Tensor | None = None

    @property
    def counts(self) -> bool:
        """Whether the weight was looked up, which is a product with rows of a single one each."""
        return not self.inputs.is_floating_point()

    def pairs_with(self, other: Reading) -> bool:
        """Whether the samples of another run of the same contraction are these, one by one."""
        ends = self.ends, other.ends
        grouped = ends[0] is not None and ends[1] is not None and torch.equal(ends[0], ends[1])
        return self.inputs.shape == other.inputs.shape and (grouped or ends == (None, None))

    def square_sums(self) -> Tensor:
        """Returns the sum of squares of what each input was, ``(groups, inputs)``."""
        groups, columns = self.matrix.size[0], self.matrix.columns
        if self.counts:
            return torch.bincount(self.inputs.flatten(), minlength=columns).float()[None]
        if self.ends is not None:
            parts = [part.to(_wide(part)).square().sum(0) for part in self._by_group(self.ends)]
            return torch.stack(parts)
        squares = self.inputs.to(_wide(self.inputs)).square()
        if self.convolution is None:
            return squares.view(groups, -1, columns).sum(1) if groups > 1 else squares.flatten(0, -2).sum(0)[None]
        kernel = self.matrix.size[2:-1]
        windows = self.convolution.windows(squares, kernel)
        sums = windows.sum([0, *range(2, 2 + len(kernel))])
        return sums.unflatten(0, (groups, -1)).movedim(1, -1).flatten(1)

    def samples(self) -> Iterator[Tensor]:
        """Yields what the matrix was multiplied with, in parts of bounded size, ``(groups, samples, inputs)``."""
        groups = self.matrix.size[0]
        if self.ends is not None:
            yield from self._padded(self._by_group(self.ends))
            return
        if self.convolution is None:
            yield self.inputs if groups > 1 else self.inputs.flatten(0, -2)[None]
            return
        kernel = self.matrix.size[2:-1]
        for part in self._batches(kernel):
            windows = self.convolution.windows(part, kernel).unflatten(1, (groups, -1)).movedim(2, -1)
            yield windows.movedim(1, 0).flatten(1, 1 + len(kernel)).flatten(2)

    def _by_group(self, ends: Tensor) -> list[Tensor]:
        bounds = [0, *ends.tolist()]
        return [self.inputs[start:stop] for start, stop in itertools.pairwise(bounds)]

    def _padded(self, parts: list[Tensor]) -> Iterator[Tensor]:
        """Groups of unequal size side by side, what is missing filled up with zeros, which add to no moment."""
        step = max(CHUNK // max(len(parts) * self.matrix.columns, 1), 1)
        for start in range(0, max(map(len, parts)), step):
            rows = [part[start : start + step] for part in parts]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _batches(self, kernel: tuple[int, ...]) -> Iterator[Tensor]:
        assert self.convolution is not None, "products have no windows"
        one = self.convolution.windows(self.inputs[:1], kernel).numel()
        return iter(self.inputs.split(max(CHUNK // max(one, 1), 1)))


class InputWatch(ThreadDispatchMode):
    """Calls ``see`` with a :class:`Reading` for every contraction of a watched weight, while it is entered."""

    def __init__(self, watched: Mapping[str, Place], see: Callable[[Reading], None]) -> None:
        super().__init__()
        self._report = see
        self._by_storage: dict[int, list[tuple[Tensor, Place]]] = {}
        # The latest product with a mask, or copy in another dtype, of each weight: kept so that its storage stays its.
        self._derived: dict[str, Tensor] = {}
        for place in watched.values():
            self._register(place.parameter.detach(), place)

    def knowing(self, other: InputWatch) -> Self:
        """The same, which recognises the copies and masked products of weights that another has seen made."""
        self._by_storage, self._derived = other._by_storage, other._derived
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        note = _CONTRACTIONS.get(func) or _CONTRACTIONS_BY_NAME.get(func.name())
        if note is not None:
            note(self, args + tuple((kwargs or {}).values()), out)
        return out

    def _register(self, tensor: Tensor, place: Place) -> None:
        self._by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((tensor, place))

    def _find(self, tensor: Any) -> tuple[Tensor, Place] | None:
        if not isinstance(tensor, Tensor):
            return None
        for known, place in self._by_storage.get(tensor.untyped_storage().data_ptr(), ()):
            offset = tensor.storage_offset() - known.storage_offset()
            # What lies in memory in another order than the parameter cannot be located by its strides.
            if 0 <= offset < max(known.numel(), 1) and known.stride() == place.parameter.stride():
                return known, place
        return None

    def _derive(self, sources: Iterable[Any], out: Tensor) -> None:
        for source in sources:
            found = self._find(source)
            if found and out.shape == found[0].shape == source.shape:
                self._forget(found[1].name)
                self._derived[found[1].name] = out
                self._register(out.detach(), found[1])
                return

    def _forget(self, name: str) -> None:
        old = self._derived.pop(name, None)
        if old is not None:
            del self._by_storage[old.untyped_storage().data_ptr()]

    def _product(self, left: Tensor, right: Tensor) -> None:
        """Sees a product of two matrices, either of which may be the weight."""
        if self._find(right):
            self._contracted(right.mT[None], left)
        elif self._find(left):
            self._contracted(left[None], right.mT)

    def _batched(self, left: Tensor, right: Tensor) -> None:
        for used, inputs in ((right.mT, left), (left, right.mT)):
            if self._find(used):
                # A matrix repeated for the whole batch is one.
                repeated = used.stride(0) == 0 or used.shape[0] == 1
                self._contracted(used[:1] if repeated else used, inputs)
                return

    def _grouped(self, inputs: Tensor, weights: Tensor, ends: Tensor | None) -> None:
        """Sees a product of samples, sorted by group, with the matrix of each one's group."""
        if ends is None:
            self._batched(inputs, weights)
        elif weights.dim() == 3 and self._find(weights):
            self._contracted(weights.mT, inputs, ends)

    def _contracted(self, used: Tensor, inputs: Tensor, ends: Tensor | None = None) -> None:
        """Reports ``used``, a view of a weight as ``(groups, outputs, inputs)``."""
        found = self._find(used)
        assert found is not None, "the caller has found it"
        known, place = found
        offset = int(used.storage_offset() - known.storage_offset())
        # Along a dimension of one entry any stride would do; one and the same makes equal matrices equal.
        stride = tuple(step if size > 1 else 0 for size, step in zip(used.shape, used.stride(), strict=True))
        self._report(Reading(place.name, Matrix(tuple(used.shape), stride, offset), inputs, ends=ends))

    def _convolution(self, inputs: Tensor, weight: Tensor, walk: Convolution, groups: int) -> None:
        found = self._find(weight)
        if found is None or weight.shape != found[0].shape:
            return
        strides, sizes = weight.stride(), weight.shape
        kernel, steps = tuple(sizes[2:]), tuple(strides[2:])
        if walk.transposed:
            channels = sizes[0] // groups
            size = (groups, sizes[1], *kernel, channels)
            stride = (channels * strides[0], strides[1], *steps, strides[0])
        else:
            outputs = sizes[0] // groups
            size = (groups, outputs, *kernel, sizes[1])
            stride = (outputs * strides[0], strides[0], *steps, strides[1])
        self._report(Reading(found[1].name, Matrix(size, stride), inputs, walk))

    def _lookup(self, weight: Tensor, rows: Tensor) -> None:
        found = self._find(weight)
        if found is not None and weight.shape == found[0].shape:
            size, stride = weight.shape, weight.stride()
            self._report(Reading(found[1].name, Matrix((1, size[1], size[0]), (0, stride[1], stride[0])), rows))


def _convolution(watch: InputWatch, args: tuple[Any, ...], out: Tensor) -> None:
    del out
    inputs, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
    spatial = weight.dim() - 2

    def full(one: list[int]) -> tuple[int, ...]:
        return tuple(one) * (spatial // len(one))

    walk = Convolution(full(stride), full(padding), full(dilation), transposed, full(output_padding))
    watch._convolution(inputs, weight, walk, groups)


_CONTRACTIONS: dict[Any, Callable[[InputWatch, Any, Any], None]] = {
    aten.mm.default: lambda watch, args, _: watch._product(args[0], args[1]),
    aten.addmm.default: lambda watch, args, _: watch._product(args[1], args[2]),
    aten.mv.default: lambda watch, args, _: watch._product(args[0], args[1][:, None]),
    aten.addmv.default: lambda watch, args, _: watch._product(args[1], args[2][:, None]),
    aten.bmm.default: lambda watch, args, _: watch._batched(args[0], args[1]),
    aten.baddbmm.default: lambda watch, args, _: watch._batched(args[1], args[2]),
    aten.linear.default: lambda watch, args, _: watch._product(args[0], args[1].mT),
    aten.convolution.default: _convolution,
    aten.embedding.default: lambda watch, args, _: watch._lookup(args[0], args[1]),
    aten.mul.Tensor: lambda watch, args, out: watch._derive(args[:2], out),
    aten.div.Tensor: lambda watch, args, out: watch._derive(args[:1], out),
    aten._weight_norm_interface.default: lambda watch, args, out: watch._derive(args[:1], out[0]),
    aten._to_copy.default: lambda watch, args, out: watch._derive(args[:1], out),
}

# Operations that libraries define for themselves; fused experts of transformers go by the first where torch's own
# refuses their alignment.
_CONTRACTIONS_BY_NAME: dict[str, Callable[[InputWatch, Any, Any], None]] = dict.fromkeys(
    ("aten::_grouped_mm", "transformers::grouped_mm_fallback"),
    lambda watch, args, _: watch._grouped(args[0], args[1], args[2] if len(args) > 2 else None),
)


def _set_apart(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Puts ``stride - 1`` zeros between neighbours along each spatial dimension."""
    if all(step == 1 for step in stride):
        return x
    spread = x.new_zeros(*x.shape[:2], *[(size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)])
    spread[(..., *[slice(None, None, step) for step in stride])] = x
    return spread


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
