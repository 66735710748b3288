"""What an axis's neurons carry, as its consumers read it.

A tap is an argument of a contraction in which an axis's activations arrive. The model is run with every call named, the
tensors at the taps are noted, and sums over everything but the axis are kept: nothing else survives a batch.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from netopt import batches
from netopt.batches import Batch, Data
from netopt.errors import EmptyDataError, ForwardError, MissingDataError, NonFiniteError
from netopt.importance.batch_dimension import as_batch, begins_with, sample_count, samples_of
from netopt.importance.evidence import _ready, gradients
from netopt.importance.scoring import USUAL_ERROR, Precision, ScoredAxes
from netopt.model.calls import Call, CallNames
from netopt.model.parameters import places
from netopt.model.ranks import add_up_all, add_up_numbers, gathered
from netopt.model.restore import restored
from netopt.model.signals import UndoLog
from netopt.model.view import ModelView
from netopt.progress import bar

__all__ = ["Saliency", "Tap", "activations", "float_outputs", "recordable", "saliency"]

SAMPLES_AT_ONCE = 64
ENTRIES_AT_ONCE = 2**26
"""So many activations, and so many entries of their gradients, are held at a time; at least those of one sample."""

PROBES_AT_LEAST, PROBES_AT_MOST, PROBES_IF_ASKED = 2, 9, 64
"""Random signs a sample: with the most, all take 20 forwards' time; more where an error is asked for, a hundred times
as many for a tenth of it. Samples share them: once the sum is known well enough, each further one gets the least."""

Taps = Mapping[str, Sequence["Tap"]]


class Tap(Protocol):
    """Where an axis's activations are contracted."""

    @property
    def call(self) -> Call:
        """The contraction."""
        ...

    @property
    def argument(self) -> int:
        """Which of its operands carries the axis."""
        ...

    @property
    def dim(self) -> int:
        """Along which dimension."""
        ...

    @property
    def positions(self) -> Tensor:
        """The position of the axis at each index of that dimension, -1 elsewhere."""
        ...


@dataclass(frozen=True)
class Saliency:
    """Sums of squared gradients of the outputs with respect to neurons' activations, by axis.

    Attributes:
        scores: One score a neuron, by axis, float64.
        exact: Whether every output was differentiated; otherwise the sum is an unbiased estimate.
        error: Estimated relative error, the worst axis's; 0 if exact.
        probes: Random sign vectors a sample, on average; 0 if exact.
        samples: How many samples were averaged.
        unread: Axes whose activations no contraction was seen to read; their scores are zero.
    """

    scores: dict[str, Tensor]
    exact: bool
    error: float
    probes: float
    samples: int
    unread: frozenset[str] = frozenset()

    def summary(self) -> str:
        """How it was computed, in words."""
        how = "exact" if self.exact else f"{self.probes:.3g} random signs a sample, relative error {self.error:.1%}"
        return f"{how}, over {self.samples} sample{'s' if self.samples != 1 else ''}"


def saliency(
    model: nn.Module | ModelView,
    axes: ScoredAxes,
    data: Data,
    *,
    outputs: Callable[[Any], list[Tensor]] | None = None,
    precision: Precision | None = None,
    progress: bool = False,
) -> Saliency:
    r"""Importance of every neuron, :math:`\sum_j (\partial y_j / \partial x_i)^2`.

    :math:`x_i` is the neuron's activation as its consumers read it; the squares are summed over its positions (a
    channel's pixels, a unit's tokens) and consumers, and averaged over samples. The model runs in eval mode, and is
    given back as it was; no ``.grad`` is touched.

    Args:
        model: Any module.
        axes: Whose neurons are scored.
        data: Batches of inputs; targets are not used.
        outputs: From the forward's result to the outputs that count; by default all floating tensors of the result
            but the loss and internal states.
        precision: Of the estimate where outputs are many.
        progress: Whether to show a progress bar.

    Raises:
        MissingDataError: No output depends on any activation in a differentiable way.
        NonFiniteError: Gradients are NaN or infinite.

    References:
        Optimal Brain Damage (LeCun et al., 1989) for derivatives as importance; Hutchinson's estimator (1990) for the
        random signs.
    """
    view = ModelView.of(model)
    with restored(view) as log:
        log.enter_context(_differentiable(view))
        run = _Differentiation(view, axes, outputs or float_outputs, precision or Precision())
        for batch in bar(batches.iterate(data), "saliency", shown=progress, total=batches.steps(data)):
            run.see(batch)
        run.add_up()
        return run.finish()


def activations(
    model: nn.Module | ModelView, axes: ScoredAxes, data: Data, *, progress: bool = False
) -> dict[str, Tensor]:
    """Mean absolute activation of every neuron, over samples, positions and consumers; by axis, float64.

    Args:
        model: Run in eval mode, and given back as it was.
        axes: Whose activations are averaged.
        data: Batches of inputs.
        progress: Whether to show a progress bar.
    """
    taps, sizes = read_at(axes), axes.sizes
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    seen = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    view = ModelView.of(model)
    with restored(view) as log:
        log.enter_context(torch.no_grad(), _ready(view.model, {}, ("input_norm",)))
        for batch in bar(batches.iterate(data), "activations", shown=progress, total=batches.steps(data)):
            with UndoLog() as reading:
                readings = reading.enter_context(_Readings(view, taps, gradients=False))
                batches.feed(view.model, batch)
            for name, tensor, dim, positions in readings.tensors:
                size = tensor.numel() // max(tensor.shape[dim], 1)
                sums[name] += gather(over_others(tensor.abs(), dim), positions, sizes[name])
                full = torch.full((len(positions),), float(size), dtype=torch.float64)
                seen[name] += gather(full, positions, sizes[name])
    sums, seen = add_up_all(sums), add_up_all(seen)
    return {name: total / seen[name].clamp(min=1) for name, total in sums.items()}


def read_at(axes: ScoredAxes) -> Taps:
    """Where the activations of each axis are read."""
    return {name: axes.taps(name) for name in axes.sizes}


def gather(values: Tensor, positions: Tensor, size: int) -> Tensor:
    """Adds up the values of the indices at each position of an axis; index -1 belongs to none."""
    here = positions >= 0
    total = torch.zeros(size, dtype=torch.float64)
    return total.index_add_(0, positions[here].cpu(), values.to("cpu", torch.float64)[here.cpu()])


_WIDE = (torch.float32, torch.float64)


class _Place(NamedTuple):
    axis: str
    edge: int
    dim: int
    positions: Tensor


class _Readings(CallNames):
    """Notes the tensors, or their places in the graph, that arrive at taps during one forward."""

    def __init__(self, view: ModelView, taps: Taps, *, gradients: bool) -> None:
        super().__init__(view)
        self._wanted: dict[Call, list[tuple[str, Tap]]] = defaultdict(list)
        for name, several in taps.items():
            for tap in several:
                self._wanted[tap.call].append((name, tap))
        self._gradients = gradients
        self._edge_of: dict[tuple[int, int], int] = {}
        self.edges: list[GradientEdge] = []
        self.entries = 0
        self.places: list[_Place] = []
        self.tensors: list[tuple[str, Tensor, int, Tensor]] = []

    def on_call(
        self,
        call: Call,
        function: Callable[..., Any],  # noqa: ARG002 - what is seen of every call
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> Any:
        """Notes what arrives at the taps of this call."""
        for name, tap in self._wanted.get(call, ()):
            operands = [*args, *kwargs.values()]
            tensor = operands[tap.argument] if tap.argument < len(operands) else None
            if isinstance(tensor, Tensor) and tensor.shape[tap.dim] == len(tap.positions):
                self._note(name, tap, tensor)
        return result

    def _note(self, name: str, tap: Tap, tensor: Tensor) -> None:
        if not self._gradients:
            self.tensors.append((name, tensor.detach(), tap.dim % tensor.dim(), tap.positions))
            return
        if not tensor.requires_grad:
            return
        # The edge, not the tensor: a later in-place operation would make the tensor mean its new value.
        edge = get_gradient_edge(tensor)
        place = self._edge_of.setdefault((id(edge.node), edge.output_nr), len(self.edges))
        if place == len(self.edges):
            self.edges.append(edge)
            self.entries += tensor.numel()
        found = _Place(name, place, tap.dim % tensor.dim(), tap.positions)
        # One tensor read by two consumers is one activation.
        if not any(one[:3] == found[:3] for one in self.places):
            self.places.append(found)


class _Differentiation:
    """Squared gradients, summed batch by batch."""

    def __init__(
        self,
        view: ModelView,
        axes: ScoredAxes,
        outputs: Callable[[Any], list[Tensor]],
        precision: Precision,
    ) -> None:
        self.view, self.model = view, view.model
        sizes, self.outputs = axes.sizes, outputs
        self.taps, self.sizes = read_at(axes), sizes
        self.relative_error, self.exact_outputs = precision
        asked = PROBES_IF_ASKED * math.ceil((USUAL_ERROR / self.relative_error) ** 2)
        self.probes_at_most = PROBES_AT_MOST if self.relative_error == USUAL_ERROR else asked
        self.generator = torch.Generator().manual_seed(0)
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        self.variances = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        self.samples = 0
        self.at_once = SAMPLES_AT_ONCE
        self.probes = 0  # times samples
        self.reached = False
        self.read: set[str] = set()
        self.separate: bool | None = None
        """Whether samples were found not to act on one another; None before a batch of several was seen."""

    def see(self, batch: Batch) -> None:
        """Adds one batch."""
        inputs, _ = batches.split(batch)
        count = sample_count(inputs)
        if self.separate is None and count > 1:
            self.separate = self._are_separate(inputs, count)
        if not count:
            return
        self.samples += count
        if not self.separate:
            self._add(inputs, count)
            return
        for start in range(0, count, self.at_once):
            stop = min(start + self.at_once, count)
            self._add(samples_of(inputs, start, stop, count) if count > self.at_once else inputs, stop - start)

    def add_up(self) -> None:
        """Takes in what other processes have seen."""
        self.sums, self.variances = add_up_all(self.sums), add_up_all(self.variances)
        samples, probes, reached = add_up_numbers(self.samples, self.probes, self.reached)
        self.samples, self.probes, self.reached = round(samples), round(probes), reached > 0
        self.read = set().union(*gathered(self.read))

    def finish(self) -> Saliency:
        """The averages."""
        if not self.samples:
            raise EmptyDataError("there is no sample to score on: batches and example inputs have a length of 0.")
        if not self.reached:
            raise MissingDataError(
                "no output depends on the activations in a differentiable way; the forward must not run under no_grad, "
                "nor detach, and must return a floating-point tensor."
            )
        scores = {name: total / self.samples for name, total in self.sums.items()}
        wrong = next((name for name, one in scores.items() if not bool(one.isfinite().all())), None)
        if wrong is not None:
            raise NonFiniteError(f"gradients at axis `{wrong}` are not finite; check the data and the weights.")
        error = _relative_error(self.sums, self.variances) if self.probes else 0.0
        return Saliency(
            scores,
            self.probes == 0,
            error,
            self.probes / self.samples,
            self.samples,
            frozenset(self.sizes.keys() - self.read),
        )

    def _forward(self, inputs: Any) -> tuple[_Readings, list[Tensor]]:
        inputs = recordable(inputs)
        with UndoLog() as log:
            readings = log.enter_context(_Readings(self.view, self.taps, gradients=True))
            result = batches.feed(self.model, as_batch(inputs))
            found = [tensor for tensor in self.outputs(result) if tensor.requires_grad]
        return readings, found

    def _values(self, inputs: Any) -> list[Tensor]:
        """The outputs that count, without gradients."""
        with torch.no_grad():
            return list(self.outputs(batches.feed(self.model, as_batch(inputs))))

    def _are_separate(self, inputs: Any, count: int) -> bool:
        """Whether samples lie along the first dimension of all outputs and none acts on another's activations."""
        size = min(count, 4)
        whole = self._values(inputs)
        if any(tensor.dim() == 0 or len(tensor) != count for tensor in whole):
            return False
        try:
            alone = self._values(samples_of(inputs, 0, size, count))
        except ForwardError:
            return False  # it wants all its rows
        if len(alone) != len(whole) or not all(map(begins_with, whole, alone)):
            return False
        readings, found = self._forward(samples_of(inputs, 0, size, count))
        self.at_once = max(1, min(SAMPLES_AT_ONCE, ENTRIES_AT_ONCE * size // max(readings.entries, 1)))
        if not found or not readings.edges:
            return True
        touched = []
        for half in (slice(0, size // 2), slice(size // 2, size)):
            signs = []
            for tensor in found:
                sign = torch.zeros_like(tensor)
                sign[half] = torch.randn(tensor[half].shape, generator=self.generator).to(tensor)
                signs.append(sign)
            grads = gradients(found, readings.edges, signs)
            touched.append([None if grad is None else grad != 0 for grad in grads])
        return not any(
            first is not None and second is not None and bool((first & second).any())
            for first, second in zip(*touched, strict=True)
        )

    def _add(self, inputs: Any, count: int) -> None:
        readings, found = self._forward(inputs)
        if not found:
            return
        self.reached = True
        self.read.update(place.axis for place in readings.places)
        if not readings.edges:
            return
        rows = count if self.separate else 1
        flat = torch.cat([tensor.reshape(rows, -1).to(found[0].dtype) for tensor in found], dim=1)
        if flat.shape[1] <= self.exact_outputs:
            for grads in _every_output(flat, readings.edges, max(1, ENTRIES_AT_ONCE // max(readings.entries, 1))):
                self._tally(readings, grads, self.sums)
        else:
            self._estimate(readings, flat, count)

    def _tally(self, readings: _Readings, grads: Sequence[Tensor | None], sums: Mapping[str, Tensor]) -> None:
        """Adds the squares of gradients, whose first dimension runs over outputs."""
        for name, edge, dim, positions in readings.places:
            grad = grads[edge]
            if grad is not None:
                sums[name].add_(gather(over_others(grad.square(), dim + 1), positions, self.sizes[name]))

    def _estimate(self, readings: _Readings, flat: Tensor, count: int) -> None:
        """Random signs: the expectation of the squared gradient of their product with the outputs is the sum wanted."""
        first = {name: torch.zeros(size, dtype=torch.float64) for name, size in self.sizes.items()}
        second = {name: torch.zeros_like(one) for name, one in first.items()}
        done = 0
        for done in range(1, self.probes_at_most + 1):
            signs = torch.randint(0, 2, flat.shape, generator=self.generator).to(flat) * 2 - 1
            grads = gradients(flat, readings.edges, signs)
            one = {name: torch.zeros_like(total) for name, total in first.items()}
            self._tally(readings, [None if g is None else g.unsqueeze(0) for g in grads], one)
            for name, value in one.items():
                first[name] += value
                second[name] += value.square()
            if done >= PROBES_AT_LEAST and self._error_with(first, second, done) <= self.relative_error:
                break
        self.probes += done * count
        for name, total in first.items():
            mean = total / done
            self.sums[name] += mean
            self.variances[name] += (second[name] / done - mean.square()).clamp(min=0) / max(done - 1, 1)

    def _error_with(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], count: int) -> float:
        """The relative error of all that was seen, with sums over ``count`` vectors of the samples at hand."""
        means = {name: total / count for name, total in first.items()}
        variances = {
            name: self.variances[name] + (second[name] / count - mean.square()).clamp(min=0) / (count - 1)
            for name, mean in means.items()
        }
        return _relative_error({name: self.sums[name] + mean for name, mean in means.items()}, variances)


def _every_output(flat: Tensor, edges: Sequence[GradientEdge], at_once: int) -> Iterator[Sequence[Tensor | None]]:
    """Gradients of every column of ``flat``, several at once where the operations allow it."""
    basis = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
    for part in basis.split(at_once):
        directions = part.unsqueeze(1).expand(-1, *flat.shape)
        try:
            yield torch.autograd.grad(
                flat, edges, directions, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:
            # Some operations have no batched backward.
            for direction in directions:
                grads = gradients(flat, edges, direction)
                yield [None if grad is None else grad.unsqueeze(0) for grad in grads]


def over_others(values: Tensor, dim: int) -> Tensor:
    """Sums over every dimension but one, in at least single precision; a wider type would copy the whole tensor."""
    precision = values.dtype if values.dtype in _WIDE else torch.promote_types(values.dtype, torch.float32)
    if values.dim() == 1:
        return values.to(precision)
    dim %= values.dim()
    # Whole blocks are added first, then what is left within: five times faster than both at once.
    if dim and values.is_contiguous():
        values = (values if dim == 1 else values.flatten(0, dim - 1)).sum(0, dtype=precision)
        dim = 0
    if dim or values.dim() == 1:
        return _over(values, dim, precision)
    return (values if values.dim() == 2 else values.flatten(1)).sum(1, dtype=precision)


def _over(values: Tensor, dim: int, precision: torch.dtype) -> Tensor:
    others = [other for other in range(values.dim()) if other != dim]
    return values.sum(others, dtype=precision) if others else values.to(precision)


def _relative_error(means: Mapping[str, Tensor], variances: Mapping[str, Tensor]) -> float:
    """Standard error of an axis's scores over their size, of the worst axis."""
    errors = [
        math.sqrt(float(variances[name].sum())) / norm
        for name, mean in means.items()
        if (norm := float(mean.norm())) > 0
    ]
    return max(errors, default=0.0)


def float_outputs(result: Any) -> list[Tensor]:
    """The floating tensors of a result, without the loss and internal states."""
    return [
        tensor
        for path, tensor in batches.tensors(result)
        if tensor.is_floating_point() and path.split(".")[0] not in _INTERNAL
    ]


_INTERNAL = frozenset({"loss", "hidden_states", "attentions", "cross_attentions", "past_key_values"})


def recordable(value: Any) -> Any:
    """The same inputs, copied where they were made in inference mode and could not be saved for a gradient."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, Mapping):
        return {key: recordable(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(recordable(one) for one in value)
    return value


@contextlib.contextmanager
def _differentiable(view: ModelView) -> Iterator[None]:
    """Makes every activation differentiable, frozen parameters or not, whatever the caller's mode."""
    wanted = {name: place for name, place in places(view).items() if place.parameter.is_floating_point()}
    with torch.inference_mode(False), _ready(view.model, wanted, ("output_grad_sq",)):
        yield
