"""Whether the smaller model computes what it must: outputs of the same shape, and the same as the masked model's.

Both are run on the example inputs and on a variation of them, since a maximum, a saturated function or a softmax over
one key gives the same for different arguments. Where outputs differ, the axes at fault are found by halving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from netopt import batches
from netopt.batches import Inputs
from netopt.errors import ForwardError, VerificationError
from netopt.model.kernels import Unfused
from netopt.model.restore import preserve_random_state, restored
from netopt.model.signals import entered
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.surgery import Operation, Swap, find_tensor

__all__ = [
    "Decision",
    "DifferentOutputsError",
    "Forward",
    "Reference",
    "alike",
    "differing",
    "masked_tensors",
    "proved",
    "reference_outputs",
    "trains",
    "varied",
    "zeroed",
]

if TYPE_CHECKING:
    from typing_extensions import Self

Result = TypeVar("Result")
Decided = TypeVar("Decided", bound="Decision")
Counted = Callable[[Any], list[Tensor]]

Tensors = Mapping[str, Mapping[int, Tensor]]
"""Kept indices by tensor name and dimension, of what is narrowed."""

Steady = Sequence[Sequence[bool]] | None
"""For each output and dimension whether its size depends on no values."""

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
"""Largest difference allowed, as a share of the largest output: rounding grows with depth, errors are of size 1."""

_TRIALS = 64


class DifferentOutputsError(VerificationError):
    """The smaller model runs, and computes something else than the masked one."""


@dataclass(frozen=True)
class Forward:
    """A model with inputs of one forward call, as it is run to be compared.

    Attributes:
        view: The model, given back as it was by every run.
        inputs: Of one forward call.
        counted: From a result to the outputs that count.
        steady: For each output, which sizes depend on no values, see :class:`~netopt.axes.Axes`; absent: all.
    """

    view: ModelView
    inputs: Inputs
    counted: Counted
    steady: Steady = None

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.view.model

    def run(self, inputs: Inputs | None = None, *modes: AbstractContextManager[Any]) -> list[Tensor]:
        """The outputs that count, in eval mode and without gradients, on the inputs at hand or on others.

        Args:
            inputs: Others.
            modes: Entered for the run.
        """
        inputs = self.inputs if inputs is None else inputs
        # A masked row divided by its own length is no number, which the fused kernel makes one of in short sequences.
        with restored(self.view) as log:
            log.enter_context(Unfused(), torch.no_grad(), *modes)
            return [
                tensor.detach().clone() for tensor in self.counted(batches.call(batches.set_eval(self.model), inputs))
            ]

    @cached_property
    def variations(self) -> tuple[Inputs, ...]:
        """Other inputs of the same kind, the one most likely to be valid last."""
        given = tree_leaves(self.inputs)
        tried = (varied(self.inputs), varied(self.inputs, integers=False))
        return tuple(one for one in tried if list(map(id, tree_leaves(one))) != list(map(id, given)))


def trains(model: nn.Module, inputs: Inputs, *modes: AbstractContextManager[Any]) -> bool:
    """Whether a model runs in training mode too, where its forward may do other things; it is given back as it was.

    Args:
        model: The model.
        inputs: Of one forward call.
        modes: Entered for the run.
    """
    try:
        # Listed anew, so that what a change of mode writes into parameters is undone as well.
        with restored(ModelView(model)) as log:
            log.enter_context(torch.no_grad(), *modes)
            model.train()
            batches.call(model, inputs)
    except Exception:  # code of the user's, which may raise anything
        return False
    return True


def varied(inputs: Inputs, *, integers: bool = True) -> Inputs:
    """Other inputs of the same kind: the same numbers in another order, fractions smaller besides, and none all zero.

    Args:
        inputs: Of one forward call.
        integers: Whether integers change places too; indices and lengths may be valid in their own order alone.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def other(tensor: Tensor) -> Tensor:
        fractions = tensor.is_floating_point() or tensor.is_complex()
        if tensor.dtype == torch.bool or tensor.is_meta or not tensor.numel() or not (fractions or integers):
            return tensor
        # What is no index in its place raises here; an accelerator would not recover from it.
        moved = _shuffled(tensor.detach(), generator) if tensor.device.type == "cpu" else tensor
        return _smaller(moved.detach(), generator) if fractions else moved

    return tree_map_only(Tensor, other, inputs)


def _shuffled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=generator, device="cpu")
    return tensor.flatten()[order].view(tensor.shape)


def _smaller(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Entries from a twentieth of what they were on; the first sample's are the smallest, for what saturates."""
    rows = tensor if tensor.dim() else tensor.view(1)
    samples = torch.logspace(-1, 0, len(rows), device="cpu").view(-1, *[1] * (rows.dim() - 1))
    factors = samples * (1 - torch.rand(rows.shape, generator=generator, device="cpu") / 2)
    return factors.view(tensor.shape).to(tensor) * (tensor if bool(tensor.any()) else 1)


@dataclass(frozen=True)
class Reference:
    """What the model's outputs have to be after the surgery.

    Attributes:
        forward: What is run.
        expected: Inputs with the outputs promised for them, the example inputs first.
        equal: Whether values are promised, or shapes alone.
    """

    forward: Forward
    expected: Sequence[tuple[Inputs, list[Tensor]]]
    equal: bool

    def check(self, *, values: bool = True) -> None:
        """Runs the model and compares.

        Args:
            values: Whether the values are compared, where they are promised.

        Raises:
            DifferentOutputsError: Its outputs have other values where they must not.
            VerificationError: It cannot be run, or its outputs have other shapes.
        """
        values = values and self.equal
        for inputs, expected in self.expected if values else self.expected[:1]:
            found = self._run(inputs)
            self._check_shapes(found, expected)
            if not values or not all(map(_comparable, expected)):
                continue
            if [one.shape for one in found] != [one.shape for one in expected]:
                continue  # the values say how many entries there are
            difference, place = _difference(found, expected)
            if difference > _tolerance(found[place]) and not self._is_random(inputs, found):
                raise DifferentOutputsError(
                    f"output {place} of the smaller model differs from the masked model's by {difference:.1e} of its "
                    "size; everything was put back. Set verify=False if the difference is meant, and report it, please."
                )

    @property
    def compares(self) -> bool:
        """Whether there are values to compare."""
        return bool(self.expected[0][1]) and all(map(_comparable, self.expected[0][1]))

    def matches(self) -> bool:
        """Whether the outputs are finite, of the shapes and of the values promised, to half of what is tolerated."""
        return all(alike(self.forward.run(inputs), expected) for inputs, expected in self.expected)

    def _run(self, inputs: Inputs) -> list[Tensor]:
        try:
            return self.forward.run(inputs)
        except ForwardError as error:
            raise VerificationError(
                f"the smaller model cannot be run: {error.__cause__}. Everything was put back. Where a kernel wants "
                "multiples, say round_to=8; else exclude the layer it names, and report it, please."
            ) from error

    def _check_shapes(self, found: list[Tensor], expected: list[Tensor]) -> None:
        """The shapes are those promised, but for sizes that depend on values."""
        steady, shapes = self.forward.steady, [tuple(tensor.shape) for tensor in expected]
        if steady is None or len(steady) != len(expected):
            fits = [tuple(one.shape) for one in found] == shapes
        else:
            fits = len(found) == len(expected) and all(
                one.dim() == other.dim()
                and all(a == b for a, b, is_steady in zip(one.shape, other.shape, flags, strict=True) if is_steady)
                for one, other, flags in zip(found, expected, steady, strict=True)
            )
        if not fits:
            raise VerificationError(
                f"the smaller model's outputs have shapes {[tuple(tensor.shape) for tensor in found]}, not {shapes}; "
                "everything was put back. Exclude the layer that decides this shape, and report it, please."
            )

    def _is_random(self, inputs: Inputs, found: list[Tensor]) -> bool:
        """Whether the model gives something else each time it runs, so that nothing can be compared."""
        with preserve_random_state():
            torch.rand(1)
            again = self.forward.run(inputs)
        return _difference(again, found)[0] > 0


def reference_outputs(forward: Forward, kept: Tensors | None = None, *, equal: bool = True) -> Reference:
    """Runs the model as it is, or with everything but ``kept`` masked, and notes what the smaller one has to return.

    Args:
        forward: The model before the surgery, with inputs.
        kept: Kept indices by tensor name and dimension, if the masked model's outputs are promised; else None.
        equal: Whether the values are promised, or only the shapes.
    """

    def look() -> Reference:
        expected = [(forward.inputs, forward.run())]
        for inputs in forward.variations if equal and all(map(_comparable, expected[0][1])) else ():
            try:
                found = forward.run(inputs)
            except ForwardError:
                continue  # not everything of the right shape is an input; what was given is
            if all(map(_comparable, found)):
                expected.append((inputs, found))
                break
        return Reference(forward, expected, equal)

    if kept is None:
        return look()
    return Operation(forward.model, masked_tensors(forward.model, kept), forward.view).dry_run(look)


class Decision(Protocol):
    """A plan, and what can be found out about it."""

    @property
    def plan(self) -> Plan:
        """What is done."""
        ...

    def reference(self) -> Reference:
        """What the model's outputs have to be once the plan is carried out."""
        ...

    def compared(self) -> Self:
        """The same, where some axes are not exact, with the others compared by themselves."""
        ...

    def marked(self, names: Sequence[str]) -> Self:
        """The same, with those of some axes that are at fault for a difference marked as not exact."""
        ...

    def uncompared(self) -> Self:
        """The same, where no values were compared."""
        ...


def proved(
    decision: Decided,
    carry_out: Callable[[Callable[[], Result]], Result],
    finish: Callable[[Decided], Result],
    *,
    verify: bool,
) -> Result:
    """Carries out a plan, checks, finishes; where the check finds other values, with the axes at fault marked.

    Args:
        decision: With the plan.
        carry_out: Calls what it is given while the plan is carried out.
        finish: What comes after the check, given what is known by then.
        verify: Whether to check at all.
    """
    if not verify:
        return carry_out(lambda: finish(decision.uncompared()))
    reference = decision.reference()

    def check(done: Decided) -> Result:
        reference.check(values=done.plan.exact)
        return finish(done)

    compared = decision.compared() if reference.compares else decision.uncompared()
    try:
        return carry_out(lambda: check(compared))
    except DifferentOutputsError:
        marked = decision.marked([row.name for row in decision.plan.axes])
    return carry_out(lambda: check(marked))


def differing(names: Sequence[str], agree: Callable[[Sequence[str]], bool | None]) -> list[str]:
    """The axes of which removing differs from masking, found by halving.

    Args:
        names: Of axes that together differ.
        agree: Whether some axes by themselves compute the same removed as masked; None where they cannot be removed
            without others.
    """
    trials = 0

    def found(some: Sequence[str]) -> list[str]:
        nonlocal trials
        trials += 1
        same = agree(some) if trials <= _TRIALS else None
        if same:
            return []
        if same is None or len(some) == 1:
            return list(some)
        return halves(some)

    def halves(some: Sequence[str]) -> list[str]:
        middle = len(some) // 2
        parts = [found(some[:middle]), found(some[middle:])]
        return [*parts[0], *parts[1]] or list(some)  # each half alone is the same, both are not

    at_fault = halves(names) if len(names) > 1 else list(names)
    rest = [name for name in names if name not in at_fault]
    return at_fault if not rest or agree(rest) else list(names)


def masked_tensors(model: nn.Module, kept: Tensors) -> list[Swap]:
    """Exchanges each tensor for a copy that is zero wherever an index is not kept."""
    changes, seen = [], set()
    with entered(torch.inference_mode(False), torch.no_grad()):
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


def alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors are finite, of equal shapes, and of equal values to half of what is tolerated."""
    if [one.shape for one in found] != [one.shape for one in expected] or not all(
        map(_comparable, [*found, *expected])
    ):
        return False
    difference, place = _difference(found, expected)
    return bool(found) and difference <= _tolerance(found[place]) / 2


def _comparable(tensor: Tensor) -> bool:
    return not tensor.is_meta and bool(torch.isfinite(tensor).all())


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, int]:
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
