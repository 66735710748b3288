"""Forwards and backwards over data: what each weight reads, and the gradients at the outputs of its layer.

The gradients are of the outputs times random signs, whose expected square is the change of all outputs; or of the loss.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.batches import Batch, Data
from netopt.errors import MissingDataError
from netopt.importance.contractions import Contraction, ContractionWatch, Use, Uses
from netopt.importance.evidence import gradients
from netopt.importance.inputs import InputWatch
from netopt.model.kernels import Unfused
from netopt.model.parameters import Place
from netopt.model.ranks import add_up_numbers, is_shared
from netopt.model.restore import restored
from netopt.model.writes import CopyOnWrite
from netopt.progress import bar

__all__ = ["Differentiation", "padding", "squares"]

aten = torch.ops.aten
PROBES = 2


class Differentiation(ABC):
    """Runs a model forwards once and backwards twice on every batch, and shows what it sees of some weights.

    Args:
        model: Run in eval mode, and given back as it was.
        watched: The weights.
        loss_fn: If given, gradients are those of the loss, in one backward pass.
        outputs: From the forward's result to the outputs that count.

    Attributes:
        samples: How many were seen.
        square: The sum of squares of the outputs; 0 with ``loss_fn``.
        uses: How each weight is used.
        batch: The number of the present batch.
        count: Its samples.
        passes: How many gradients each weight gets a batch.
        mask: Where it holds tokens and no padding, if it says so.
        produced: What each weight has put out on it.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Mapping[str, Place],
        loss_fn: Callable[[Any, Any], Tensor] | None,
        outputs: Callable[[Any], list[Tensor]],
    ) -> None:
        self.model, self.watched, self.loss_fn, self.outputs = model, watched, loss_fn, outputs
        self.writes = CopyOnWrite(model.parameters())
        self.samples, self.square = 0, 0.0
        self.uses: dict[str, Use] = {}
        self.batch, self.count = 0, 1
        self.passes = PROBES if loss_fn is None else 1
        self.mask: Tensor | None = None
        self.produced: dict[str, list[Contraction]] = {}
        self._generator = torch.Generator().manual_seed(0)

    @abstractmethod
    def see_inputs(self, seen: Contraction) -> None:
        """A weight is multiplied with its inputs."""

    @abstractmethod
    def see_gradient(self, name: str, gradient: Tensor) -> None:
        """A gradient has come to the outputs of a weight, ``(groups, rows, outputs)``."""

    def add_up(self) -> None:
        """Takes in what other processes have seen."""
        samples, self.square = add_up_numbers(self.samples, self.square)
        self.samples = round(samples)

    def run(self, data: Data, progress: bool) -> None:
        """Sees all batches.

        Raises:
            MissingDataError: No output depends on any weight in a differentiable way.
            ForwardError: The outputs cannot be differentiated.
        """
        with restored(self.model, writes=False) as log:
            log.callback(self.writes.undo)
            log.enter_context(torch.inference_mode(False), Unfused(attention=False))
            with self.writes.saving():
                batches.set_eval(self.model)
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            shown = bar(batches.iterate(data), "moments", shown=progress, total=batches.steps(data))
            for self.batch, batch in enumerate(shown):
                self._see(batch)
        if is_shared():
            self.add_up()
        if not self.samples:
            raise MissingDataError("no output depends on the weights in a differentiable way; nothing can be scored.")

    def _see(self, batch: Batch) -> None:
        inputs, targets = batches.split(batch)
        self.count = max((len(one) for _, one in batches.tensors(inputs) if one.dim() > 0), default=1)
        self.mask, self.produced = padding(batch), {}
        uses = Uses(self.model)

        def visit(contraction: Contraction) -> bool:
            uses.see(contraction)
            if not contraction.reading.counts and not contraction.is_sum:
                self.see_inputs(contraction)
                self.produced.setdefault(contraction.reading.name, []).append(_bare(contraction))
            return False

        with _sources(self.model, inputs) as (given, sources), torch.enable_grad():
            watch = ContractionWatch(self.watched, visit, uses.after)
            with watch, self.writes.first_run():
                result = batches.feed(self.model, given if isinstance(given, (Tensor, Mapping)) else (given, None))
            self.uses = uses.found | self.uses
            found = [one for one in self.outputs(result) if one.requires_grad]
            if not found:
                return
            self.samples += self.count
            if self.loss_fn is None:
                self.square += squares(found, self.mask)
            loss = None if self.loss_fn is None else self.loss_fn(result, targets) * self.count
            for turn in range(self.passes):
                value = self._signed(found) if loss is None else loss
                with _GradientWatch(self.watched, self.see_gradient).knowing(watch):
                    gradients(value, sources, retain_graph=turn < self.passes - 1)

    def _signed(self, found: Sequence[Tensor]) -> Tensor:
        """The outputs times random signs; those of padding count for nothing."""
        total = found[0].new_zeros(())
        for one in found:
            signs = torch.randint(0, 2, one.shape, generator=self._generator).to(one) * 2 - 1
            mask = self.mask
            if mask is not None and one.dim() >= 2 and one.shape[:2] == mask.shape:
                signs = signs * mask.to(one).view(*mask.shape, *[1] * (one.dim() - 2))
            total = total + (one * signs).sum()
        return total


class _GradientWatch(InputWatch):
    """Calls ``add`` with a weight's name and the gradient at its outputs, during a backward pass."""

    def __init__(self, watched: Mapping[str, Place], add: Callable[[str, Tensor], None]) -> None:
        self._add = add
        super().__init__(watched, self._product_seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten.convolution_backward.default:
            found = self._find(args[2])
            if found is not None:
                gradient, groups = args[0], args[9]
                split = gradient.unflatten(1, (groups, -1)).movedim(2, -1).movedim(1, 0)
                self._add(found[1].name, split.flatten(1, -2))
        return out

    def _product_seen(self, reading: Any) -> None:
        if reading.counts or reading.convolution is not None:
            return
        groups = reading.matrix.size[0]
        self._add(reading.name, reading.inputs if groups > 1 else reading.inputs.flatten(0, -2)[None])


@contextlib.contextmanager
def _sources(model: nn.Module, inputs: Any) -> Iterator[tuple[Any, list[Tensor]]]:
    """The inputs, and the tensors that gradients are taken of so that they pass everything behind the inputs."""
    sources: list[Tensor] = []
    device = batches.device_of(model)
    if device is not None:
        inputs = batches.move(inputs, device)

    def lent(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            sources.append(value.detach().clone().requires_grad_())
            return sources[-1]
        if isinstance(value, Mapping):
            return {key: lent(one) for key, one in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)([lent(one) for one in value])
        return value

    given = lent(inputs)
    tables = [one.weight for one in model.modules() if isinstance(one, (nn.Embedding, nn.EmbeddingBag))]
    chosen = tables or ([] if sources else model.parameters())
    sources += [one.requires_grad_() for one in chosen if one.is_floating_point()]
    try:
        yield given, sources
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(False)


def _bare(seen: Contraction) -> Contraction:
    """The same without its inputs."""
    return replace(seen, output=seen.output.detach())


def squares(found: Sequence[Tensor], mask: Tensor | None) -> float:
    """The sum of squares of outputs, those of padding left out."""
    total = 0.0
    for one in found:
        square = one.detach().double().square()
        if mask is not None and one.dim() > 1 and one.shape[:2] == mask.shape:
            square = square * mask.to(square).view(*mask.shape, *[1] * (one.dim() - 2))
        total += float(square.sum())
    return total


def padding(batch: Batch) -> Tensor | None:
    """Where a batch of texts holds tokens and no padding, if it says so as transformers do."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
