"""What each weight is multiplied with, seen while the model runs.

A contraction is recognised below autograd, by the storage of the weight it reads; so fused projections, functional
weights, recurrent cells and attention need no module of a known kind. What is seen is handed on and not kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from netopt.parameters import Orientation, Place

__all__ = ["InputWatch", "Reading", "every_contraction"]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Reading:
    """One contraction of a weight with its inputs.

    Attributes:
        name: The weight's name.
        orientation: How the weight, and so the inputs, read as a matrix.
        inputs: The other operand: ``(..., inputs)`` of a product, of a batched one ``(batch, samples, inputs)``,
            ``(batch, channels, ...)`` of a convolution, integer rows of an embedding.
        dim: The dimension of the weight that was contracted, or ``None`` for a convolution or an embedding.
        rows: Which entries of the other dimension took part, of a product.
        convolution: Stride, padding, dilation, groups, and whether transposed.
        shape: The weight's shape.
    """

    name: str
    orientation: Orientation
    inputs: Tensor
    shape: torch.Size
    dim: int | None = None
    rows: slice | None = None
    convolution: tuple[Any, ...] | None = None

    def square_sums(self) -> Tensor:
        """Returns the sum of squares of what each entry was multiplied with, of a shape that expands to the weight."""
        if self.dim is not None:
            squares = self.inputs.to(_wide(self.inputs)).square()
            if len(self.shape) == 3:
                return squares.sum(1, keepdim=True) if self.dim == 2 else squares.sum(1)[..., None]
            sums = squares.flatten(0, -2).sum(0)
            return sums.view(*[-1 if dim == self.dim else 1 for dim in range(len(self.shape))])
        if self.convolution is None:
            counts = torch.bincount(self.inputs.flatten(), minlength=self.shape[0])
            return counts.float().view(-1, *[1] * (len(self.shape) - 1))
        stride, padding, dilation, groups, transposed = self.convolution
        squares = self.inputs.to(_wide(self.inputs)).square()
        if transposed:
            sums = squares.sum([0, *range(2, squares.dim())])
            return sums.view(-1, *[1] * (len(self.shape) - 1))
        windows = _windows(squares, self.shape[2:], stride, padding, dilation)
        spatial = len(self.shape) - 2
        sums = windows.sum([0, *range(2, 2 + spatial)])
        grouped = sums.view(groups, self.shape[1], *self.shape[2:])
        return grouped.repeat_interleave(self.shape[0] // groups, dim=0)

    def matrices(self) -> Tensor | None:
        """Returns ``(groups, samples, columns)``, columns as in the weight's rows; ``None`` if there is no such matrix.

        Of a transposed convolution the inputs meet the kernel's positions separately, and of an embedding not at all.
        """
        if self.dim is not None:
            along = self.orientation.inputs if self.orientation.inputs is not None else len(self.shape) - 1
            return self.inputs.flatten(0, -2)[None] if self.dim == along and len(self.shape) == 2 else None
        if self.convolution is None or self.convolution[4]:
            return None
        stride, padding, dilation, groups, _ = self.convolution
        windows = _windows(self.inputs, self.shape[2:], stride, padding, dilation)
        spatial = len(self.shape) - 2
        split = windows.unflatten(1, (groups, -1)).movedim(2, -1)
        return split.movedim(1, 0).flatten(1, 1 + spatial).flatten(2)


class InputWatch(TorchDispatchMode):
    """Calls ``see`` with a :class:`Reading` for every contraction of a watched weight, while it is entered."""

    def __init__(self, watched: Mapping[str, Place], see: Callable[[Reading], None]) -> None:
        super().__init__()
        self._see = see
        self._known: dict[int, list[tuple[Tensor, Place]]] = {}
        # The latest product with a mask, or copy in another dtype, of each weight: kept so that its storage stays its.
        self._derived: dict[str, Tensor] = {}
        for place in watched.values():
            self._learn(place.parameter.detach(), place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        look = _LOOK.get(func)
        if look is not None:
            look(self, args, out)
        return out

    def _learn(self, tensor: Tensor, place: Place) -> None:
        self._known.setdefault(tensor.untyped_storage().data_ptr(), []).append((tensor, place))

    def _find(self, tensor: Any) -> tuple[Tensor, Place] | None:
        if not isinstance(tensor, Tensor):
            return None
        for known, place in self._known.get(tensor.untyped_storage().data_ptr(), ()):
            offset = tensor.storage_offset() - known.storage_offset()
            if 0 <= offset < max(known.numel(), 1):
                return known, place
        return None

    def _derive(self, sources: Iterable[Any], out: Tensor) -> None:
        for source in sources:
            found = self._find(source)
            if found and out.shape == found[0].shape == source.shape:
                self._forget(found[1].name)
                self._derived[found[1].name] = out
                self._learn(out.detach(), found[1])
                return

    def _forget(self, name: str) -> None:
        old = self._derived.pop(name, None)
        if old is not None:
            del self._known[old.untyped_storage().data_ptr()]

    def _product(self, left: Tensor, right: Tensor) -> None:
        found = self._find(right)
        if found:
            self._contracted(*found, right, left, contracted=right.dim() - 2)
            return
        found = self._find(left)
        if found:
            self._contracted(*found, left, right.transpose(-1, -2), contracted=left.dim() - 1)

    def _batched(self, left: Tensor, right: Tensor) -> None:
        for used, inputs, axis in ((right, left, 1), (left, right.transpose(1, 2), 2)):
            found = self._find(used)
            if found and found[0].dim() == 2 and (used.stride(0) == 0 or used.shape[0] == 1):
                # A matrix repeated for the whole batch.
                self._contracted(*found, used[0], inputs, contracted=axis - 1)
                return
            if found and found[0].dim() == 3 and used.numel() == found[0].numel():
                flipped = used.stride() != found[0].stride()
                self._report(found[1], inputs, dim=3 - axis if flipped else axis)
                return

    def _contracted(self, known: Tensor, place: Place, used: Tensor, inputs: Tensor, contracted: int) -> None:
        """Finds by the strides which dimension of the weight was contracted, and by the offset which rows took part."""
        if used.dim() != known.dim() or used.dim() != 2:
            return
        flipped = used.stride() != known.stride() or used.shape[1] > known.shape[1] or used.shape[0] > known.shape[0]
        dim = 1 - contracted if flipped else contracted
        if used.shape[contracted] != known.shape[dim]:
            return
        count = used.shape[1 - contracted]
        start = int(used.storage_offset() - known.storage_offset()) // max(known.stride(1 - dim), 1)
        self._report(place, inputs, dim=dim, rows=slice(start, start + count))

    def _report(self, place: Place, inputs: Tensor, **rest: Any) -> None:
        self._see(Reading(place.name, place.orientation, inputs, place.parameter.shape, **rest))


@contextlib.contextmanager
def every_contraction(model: nn.Module) -> Iterator[None]:
    """Switches off the fused kernels that would hide contractions of ``model`` from a watch, for a while."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # Fused recurrent kernels also have no gradient in eval mode, on a GPU. Not by torch.backends.mkldnn.flags,
            # which sets and warns about settings of other devices as well.
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            torch._C._set_mkldnn_enabled(False)
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _look_convolution(watch: InputWatch, args: tuple[Any, ...], out: Tensor) -> None:
    del out
    inputs, weight, _, stride, padding, dilation, transposed, _, groups = args
    found = watch._find(weight)
    if found:
        spatial = weight.dim() - 2
        full = [tuple(one) * (spatial // len(one)) for one in (stride, padding, dilation)]
        watch._report(found[1], inputs, convolution=(*full, groups, transposed))


def _look_embedding(watch: InputWatch, args: tuple[Any, ...], out: Tensor) -> None:
    del out
    found = watch._find(args[0])
    if found:
        watch._report(found[1], args[1])


_LOOK: dict[Any, Callable[[InputWatch, Any, Any], None]] = {
    aten.mm.default: lambda watch, args, _: watch._product(args[0], args[1]),
    aten.addmm.default: lambda watch, args, _: watch._product(args[1], args[2]),
    aten.bmm.default: lambda watch, args, _: watch._batched(args[0], args[1]),
    aten.baddbmm.default: lambda watch, args, _: watch._batched(args[1], args[2]),
    aten.linear.default: lambda watch, args, _: watch._product(args[0], args[1].transpose(-1, -2)),
    aten.convolution.default: _look_convolution,
    aten.embedding.default: _look_embedding,
    aten.mul.Tensor: lambda watch, args, out: watch._derive(args[:2], out),
    aten._to_copy.default: lambda watch, args, out: watch._derive(args[:1], out),
}


def _windows(x: Tensor, kernel: torch.Size, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """Returns ``(batch, channels, *positions, *kernel)``, a view of the padded input."""
    x = F.pad(x, [amount for one in reversed(padding) for amount in (one, one)])
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
