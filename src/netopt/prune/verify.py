"""Whether the small model does what was promised: outputs of the same shape, and the same as the masked model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.batches import Inputs
from netopt.errors import ForwardError, VerificationError
from netopt.model.kernels import Unfused
from netopt.model.restore import preserve_random_state, restored
from netopt.surgery import Operation, Swap, find_tensor

__all__ = ["Reference", "masked_tensors", "reference_outputs", "run", "zeroed"]

Counted = Callable[[Any], list[Tensor]]

Tensors = Mapping[str, Mapping[int, Tensor]]
"""Kept indices by tensor name and dimension, of what is narrowed."""

Steady = Sequence[Sequence[bool]] | None
"""For each output and dimension whether its size depends on no values."""

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
"""Largest difference allowed, as a share of the largest output: rounding grows with depth, errors are of size 1."""


class Reference:
    """What the model's outputs have to be after the surgery."""

    def __init__(self, expected: list[Tensor], *, equal: bool, steady: Steady = None) -> None:
        self._expected = expected
        self._equal = equal
        self._steady = steady

    def check(self, model: nn.Module, inputs: Inputs, counted: Counted) -> None:
        """Runs ``model`` and compares.

        Raises:
            VerificationError: Its outputs have other shapes, or other values where they must not.
        """
        try:
            found = run(model, inputs, counted)
        except ForwardError as error:
            raise VerificationError(
                f"the smaller model cannot be run: {error.__cause__}. Everything was put back. Where a kernel wants "
                "multiples, say round_to=8; else exclude the layer it names, and report it, please."
            ) from error
        shapes = [tuple(tensor.shape) for tensor in self._expected]
        if not self._fits(found):
            raise VerificationError(
                f"the smaller model's outputs have shapes {[tuple(tensor.shape) for tensor in found]}, not {shapes}; "
                "everything was put back. Exclude the layer that decides this shape, and report it, please."
            )
        if not self._equal or not all(map(_comparable, self._expected)):
            return
        if [tuple(tensor.shape) for tensor in found] != shapes:
            return  # the values say how many entries there are
        difference, place = _difference(found, self._expected)
        if difference > _tolerance(found[place]) and not self._is_random(model, inputs, counted, found):
            raise VerificationError(
                f"output {place} of the smaller model differs from the masked model's by {difference:.1e} of its size; "
                "everything was put back. Set verify=False if the difference is meant, and report it, please."
            )

    def _fits(self, found: list[Tensor]) -> bool:
        """Whether the shapes are those promised, but for sizes that depend on values."""
        if self._steady is None or len(self._steady) != len(self._expected):
            return [one.shape for one in found] == [one.shape for one in self._expected]
        return len(found) == len(self._expected) and all(
            one.dim() == other.dim()
            and all(a == b for a, b, is_steady in zip(one.shape, other.shape, flags, strict=True) if is_steady)
            for one, other, flags in zip(found, self._expected, self._steady, strict=True)
        )

    def is_kept(self, model: nn.Module, inputs: Inputs, counted: Counted) -> bool:
        """Whether the outputs are finite, of the shapes and of the values promised, to half of what is tolerated."""
        found = run(model, inputs, counted)
        if [one.shape for one in found] != [one.shape for one in self._expected]:
            return False
        if not all(map(_comparable, [*found, *self._expected])):
            return False
        difference, place = _difference(found, self._expected)
        return difference <= _tolerance(found[place]) / 2 if found else False

    def _is_random(self, model: nn.Module, inputs: Inputs, counted: Counted, found: list[Tensor]) -> bool:
        """Whether the model gives something else each time it runs, so that nothing can be compared."""
        with preserve_random_state():
            torch.rand(1)
            again = run(model, inputs, counted)
        return _difference(again, found)[0] > 0


def reference_outputs(
    model: nn.Module,
    inputs: Inputs,
    counted: Counted,
    kept: Tensors | None,
    *,
    equal: bool = False,
    steady: Steady = None,
) -> Reference:
    """Runs the model as it is, or with everything but ``kept`` masked, and notes what the smaller one has to return.

    Args:
        model: Before the surgery; given back as it was.
        inputs: Of one forward call.
        counted: From a result to the outputs that count.
        kept: Kept indices by tensor name and dimension, if the masked model's outputs are promised; else None.
        equal: Without ``kept``: whether the model's own outputs are promised, or only their shapes.
        steady: For each output, which sizes depend on no values, see :class:`~netopt.axes.Axes`; absent: all.
    """
    if kept is None:
        return Reference(run(model, inputs, counted), equal=equal, steady=steady)
    operation = Operation(model, masked_tensors(model, kept))
    return Reference(operation.dry_run(lambda: run(model, inputs, counted)), equal=True, steady=steady)


def masked_tensors(model: nn.Module, kept: Tensors) -> list[Swap]:
    """Exchanges each tensor for a copy that is zero wherever an index is not kept."""
    changes, seen = [], set()
    with torch.inference_mode(False), torch.no_grad():
        for name, cuts in kept.items():
            tensor = find_tensor(model, name)
            if tensor is None or id(tensor) in seen or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            seen.add(id(tensor))
            masked = zeroed(tensor.detach().clone(), cuts)
            changes.append(Swap(tensor, masked.requires_grad_(tensor.requires_grad and tensor.is_leaf)))
    return changes


def zeroed(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    """Writes zeros to all indices of ``tensor`` that are not kept; what is not a number does not survive there."""
    for dim, kept in cuts.items():
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
        gone[kept] = False
        tensor.index_fill_(dim, torch.nonzero(gone).flatten().to(tensor.device), 0)
    return tensor


def run(model: nn.Module, inputs: Inputs, counted: Counted) -> list[Tensor]:
    """The outputs that count, in eval mode and without gradients; the model is given back as it was."""
    # A masked row divided by its own length is no number, which the fused kernel makes one of in short sequences.
    with restored(model), Unfused(), torch.no_grad():
        return [tensor.detach().clone() for tensor in counted(batches.call(model.eval(), inputs))]


def _comparable(tensor: Tensor) -> bool:
    return not tensor.is_meta and bool(torch.isfinite(tensor).all())


def _difference(found: list[Tensor], expected: list[Tensor]) -> tuple[float, int]:
    """The largest difference as a share of the largest value of its output, and which output."""
    worst, where = 0.0, 0
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        if not one.numel():
            continue
        wide = torch.complex128 if other.is_complex() else torch.float64
        size = float(other.to(wide).abs().max()) if other.is_floating_point() or other.is_complex() else 1.0
        gap = float((one.to(wide) - other.to(wide)).abs().max()) / max(size, 1e-12)
        if not gap <= worst:
            worst, where = gap, place
    return worst, where


def _tolerance(tensor: Tensor) -> float:
    return TOLERANCE.get(tensor.dtype, 1e-3)
