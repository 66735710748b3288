"""What a contraction of a weight reads and puts out, row by row, while the model runs.

An :class:`~netopt.importance.inputs.InputWatch` sees inputs; here the outputs are seen as well, in the same order of
rows, and where a constant can be added to them: a bias the operation adds, one added just after it, or the mean that
the batch normalisation behind it takes away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from netopt.importance.inputs import InputWatch, Matrix, Reading
from netopt.model.parameters import Place

__all__ = ["Contraction", "ContractionWatch", "Offset", "Use", "Uses"]

aten = torch.ops.aten
_BIAS = {
    aten.addmm.default: 0,
    aten.baddbmm.default: 0,
    aten.addmv.default: 0,
    aten.linear.default: 2,
    aten.convolution.default: 2,
}
_RIGHT = {
    aten.mm.default: 1,
    aten.addmm.default: 2,
    aten.mv.default: 1,
    aten.addmv.default: 2,
    aten.bmm.default: 1,
    aten.baddbmm.default: 2,
}
_MEAN = {
    aten.native_batch_norm.default: 3,
    aten._native_batch_norm_legit_no_training.default: 3,
    aten.cudnn_batch_norm.default: 3,
}
_SUMS = (aten.add.Tensor, aten.add_.Tensor)
_NORMALISATIONS = (aten.native_layer_norm.default, aten.pow.Tensor_Scalar, aten.square.default)
"""What first reads the rows that are normalised: a root mean square is written out in squares."""


@dataclass(frozen=True, eq=False)
class Contraction:
    """One operation that multiplies a weight with its inputs.

    Attributes:
        reading: The weight, as which matrix, and its inputs.
        output: What the operation returned.
        flipped: Whether the weight is the left operand, so that the outputs are the first dimension.
        bias: What the operation adds to every row, if anything.
        is_sum: Whether ``output`` is what it returned and what is then added to it, as on a residual stream.
    """

    reading: Reading
    output: Tensor
    flipped: bool = False
    bias: Tensor | None = None
    is_sum: bool = False

    @property
    def count(self) -> int:
        """The number of rows, of each group."""
        size = self.reading.matrix.size
        return self.output.numel() // max(size[0] * size[1], 1)

    def inputs(self, rows: Tensor) -> Tensor:
        """What these rows of the outputs were made from, ``(groups, rows, inputs)``."""
        reading = self.reading
        groups = reading.matrix.size[0]
        if reading.convolution is None:
            whole = reading.inputs if groups > 1 else reading.inputs.flatten(0, -2)[None]
            return whole[:, rows]
        kernel = reading.matrix.size[2:-1]
        windows = reading.convolution.windows(reading.inputs, kernel).unflatten(1, (groups, -1))
        windows = windows.movedim(2, -1).movedim(1, 0)
        return windows[(slice(None), *self._places(rows))].flatten(2)

    def outputs(self, rows: Tensor) -> Tensor:
        """These rows of the outputs, ``(groups, rows, outputs)``."""
        groups, width = self.reading.matrix.size[:2]
        if self.reading.convolution is None:
            out = self.output.mT if self.flipped and self.output.dim() > 1 else self.output
            return out.reshape(groups, -1, width)[:, rows]
        out = self.output.unflatten(1, (groups, width)).movedim(2, -1).movedim(1, 0)
        return out[(slice(None), *self._places(rows))]

    def _places(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The sample and the place in space of each row of a convolution's outputs."""
        return torch.unravel_index(rows, (self.output.shape[0], *self.output.shape[2:]))


class ContractionWatch(InputWatch):
    """Calls ``see`` with every contraction of a watched weight; runs it again if the answer is ``True``.

    Where a contraction's output is added to something of its shape, it is called once more with the sum.

    Args:
        watched: The weights.
        see: Called with each contraction when it has been computed, and before it is added to something.
        after: Called with every other operation, its arguments and its result.
    """

    def __init__(
        self,
        watched: Mapping[str, Place],
        see: Callable[[Contraction], bool],
        after: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    ) -> None:
        self._noted: list[Reading] = []
        super().__init__(watched, self._noted.append)
        self._visit, self._after = see, after
        self._latest: tuple[Contraction, int, Callable[[], Tensor]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SUMS and self._latest is not None and not kwargs:
            self._see_sum(args)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not self._noted:
            if self._after is not None:
                self._after(func, args, out)
            return out
        reading = self._noted.pop()
        self._noted.clear()
        right = _RIGHT.get(func)
        flipped = right is not None and self._find(args[right]) is None
        place = _BIAS.get(func)
        bias = args[place] if place is not None and len(args) > place else None
        seen = Contraction(reading, out, flipped, bias)

        def again() -> Tensor:
            return func(*args, **(kwargs or {}))

        if self._visit(seen):
            out = again()
        self._latest = (replace(seen, output=out), out._version, again)
        return out

    def _see_sum(self, args: tuple[Any, ...]) -> None:
        """Shows what the latest contraction returned with what is about to be added to it."""
        assert self._latest is not None
        seen, version, again = self._latest
        own = seen.output
        if not own.is_contiguous() or own._version != version or not all(isinstance(one, Tensor) for one in args[:2]):
            return
        for one, other in (args[:2], args[1::-1]):
            same = one.data_ptr() == own.data_ptr() and one.numel() == own.numel() and one.is_contiguous()
            if same and other.shape == one.shape and other.dtype == one.dtype and other.data_ptr() != own.data_ptr():
                self._latest = None
                if self._visit(replace(seen, output=(one + other).view(own.shape), is_sum=True)):
                    own.copy_(again())
                return


@dataclass(frozen=True)
class Offset:
    """Where a constant is added to each output of a contraction.

    Attributes:
        name: A parameter's name, or that of a batch normalisation's running mean.
        start: Of the entries that belong to the outputs, in the parameter's memory.
        stop: Past the last of them.
        mean: Whether it is taken away instead of added.
    """

    name: str
    start: int
    stop: int
    mean: bool = False


@dataclass
class Use:
    """How one weight is used in a forward.

    Attributes:
        count: How often it is multiplied with inputs.
        looked_up: Whether rows of it are looked up.
        is_summed: Whether its outputs are added to something, as on a residual stream.
        is_normalised: Whether that sum is then brought to one length in every row.
        matrices: As which matrices it is multiplied.
        offset: Where its outputs take a constant.
    """

    count: int = 0
    looked_up: bool = False
    is_summed: bool = False
    is_normalised: bool = False
    matrices: list[Matrix] = field(default_factory=list)
    offset: Offset | None = None


class Uses:
    """How the weights are used in one forward, in the order in which they are first read."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, Use] = {}
        self._vectors = {
            one.untyped_storage().data_ptr(): (name, one)
            for name, one in [*model.named_parameters(), *model.named_buffers()]
            if one.dim() == 1
        }
        self._latest: tuple[str, Tensor, int, int] | None = None
        self._summed: str | None = None
        self._sum: tuple[str, Tensor] | None = None

    def see(self, contraction: Contraction) -> bool:
        """Notes a contraction, which need not be run again."""
        name, matrix = contraction.reading.name, contraction.reading.matrix
        use = self.found.setdefault(name, Use())
        if contraction.is_sum:
            use.is_summed, self._summed = True, name
            return False
        if contraction.reading.counts:
            use.looked_up = True
            return False
        use.count += 1
        if matrix not in use.matrices:
            use.matrices.append(matrix)
        width, out = matrix.size[0] * matrix.size[1], contraction.output
        self._latest = None
        if contraction.bias is not None:
            use.offset = self._offset(contraction.bias, width)
        elif not contraction.flipped:
            self._latest = (name, out, out._version, width)
        if contraction.reading.convolution is not None:
            self._latest = (name, out, out._version, width)
        return False

    def after(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Notes what is added to the outputs of the latest contraction, and what normalises them."""
        self._after_sum(func, args, out)
        if self._latest is None or not args or not isinstance(args[0], Tensor):
            return
        name, latest, version, width = self._latest
        step = int(func is aten.add_.Tensor)
        if args[0].data_ptr() != latest.data_ptr() or args[0].numel() != latest.numel():
            return
        if latest._version != version + step:
            return
        if func in _MEAN and isinstance(args[_MEAN[func]], Tensor):
            found = self._offset(args[_MEAN[func]], width)
            use = self.found[name]
            if found is not None and use.offset is None:
                use.offset = Offset(found.name, found.start, found.stop, mean=True)
        elif func in _SUMS and isinstance(args[1], Tensor) and args[1].dim() == 1 and args[0].shape[-1] == width:
            self.found[name].offset = self.found[name].offset or self._offset(args[1], width)

    def _after_sum(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        if self._summed is not None:
            self._sum, self._summed = (self._summed, out), None
        elif self._sum is not None and func in _NORMALISATIONS:
            name, total = self._sum
            if args[0].data_ptr() == total.data_ptr() and args[0].shape == total.shape:
                self.found[name].is_normalised = True

    def _offset(self, vector: Tensor, width: int) -> Offset | None:
        known = self._vectors.get(vector.untyped_storage().data_ptr())
        if known is None or vector.dim() != 1 or vector.numel() != width or not known[1].is_contiguous():
            return None
        start = int(vector.storage_offset() - known[1].storage_offset())
        return Offset(known[0], start, start + width)
