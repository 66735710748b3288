"""What is minimised: weighted terms, each a sum over its items divided by how many count in the whole optimizer step.

Terms hand out sums and counts, never means. Whoever holds the whole step, across accumulated micro-batches and across
processes, adds the counts up first and then divides every sum by the total, so that an item weighs the same wherever
it happens to lie. (The mean of means does not: of 3 and 17 tokens the 3 would weigh as much as the 17.)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from netopt.distillation.loss import losses
from netopt.distillation.loss.divergence import TopK
from netopt.distillation.loss.hints import HintTerm
from netopt.distillation.loss.labels import UNLABELLED
from netopt.distillation.loss.losses import Loss
from netopt.distillation.loss.outputs import classes_last
from netopt.errors import ArgumentTypeError, InvalidArgumentError, MissingDataError, ShapeMismatchError

__all__ = ["Items", "Kept", "Objective", "Record", "SoftLoss", "Sum", "Target", "loss_terms"]

SoftLoss: TypeAlias = str | Loss | Callable[..., Tensor] | Mapping[Any, float]
Kind: TypeAlias = Literal["sample", "position", "hard"]


class Record(NamedTuple):
    """What one model returned for a batch: its output, and the activations of the layers wanted, by name."""

    output: Tensor
    features: Mapping[str, Tensor]


class Kept(NamedTuple):
    """A record as a cache gives it back: of a vocabulary maybe the largest logits alone."""

    output: Tensor | TopK
    features: Mapping[str, Tensor]


class Items(NamedTuple):
    """Which samples and positions of a batch count.

    Args:
        positions: The shape of the output's positions, samples first.
        mask: True where a position, or a whole sample, counts; ``None`` if all do.
        labelled: Whether it is known beforehand that all of them have a class for a label.
    """

    positions: tuple[int, ...]
    mask: Tensor | None = None
    labelled: bool = False

    @property
    def _whole_samples(self) -> bool:
        return self.mask is not None and self.mask.dim() == 1

    def samples(self) -> int:
        """How many samples count: those with any position that does."""
        if self.mask is None:
            return self.positions[0]
        return count(self.mask.flatten(1).any(1) if self.mask.dim() > 1 else self.mask)

    def places(self) -> int:
        """How many positions count."""
        if self.mask is None:
            return math.prod(self.positions)
        each = math.prod(self.positions[1:]) if self._whole_samples else 1
        return count(self.mask) * each

    def whole(self, output: Tensor) -> Tensor:
        """Returns the samples that count, ``(n, ...)``, their masked positions set to zero."""
        if self.mask is None:
            return output
        if self._whole_samples:
            return output[_rows(self.mask, output)]
        mask = self.mask.to(output.device)
        output = output.masked_fill(~(mask.unsqueeze(1) if output.dim() > 3 else mask[..., None]), 0)
        return output[_rows(self.mask.flatten(1).any(1), output)]

    def flat(self, output: Tensor) -> Tensor:
        """Returns the positions that count, ``(items, classes)``."""
        if self.mask is None and output.dim() == 2:
            return output
        classes = classes_last(output)
        if self._whole_samples and self.mask is not None:
            return classes[_rows(self.mask, output)].flatten(0, -2)
        flat = classes.flatten(0, -2)
        return flat if self.mask is None else flat[_rows(self.mask, output)]

    def spread(self, values: Tensor) -> Tensor:
        """Returns the entries of ``values``, one a position, at positions that count."""
        if self.mask is None:
            return values.flatten()
        if self._whole_samples:
            return values[_rows(self.mask, values)].flatten()
        return values.flatten()[_rows(self.mask, values)]


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    # Found where the mask is, in host memory as a rule, so that the device does not have to be waited for.
    return mask.flatten().nonzero().squeeze(1).to(like.device)


class Target(NamedTuple):
    """What the student should return for one micro-batch."""

    items: Items
    records: Sequence[Record | Kept]
    labels: Tensor | None


class Sum(NamedTuple):
    """A term's sum over the items of a micro-batch, and where its gradient starts from.

    Args:
        value: The sum, without a graph.
        root: What has a graph: the sum, or what it is a function of.
        seed: The gradient by ``root`` of the share of the sum that counts; ``None`` where that is the share itself.
    """

    value: Tensor
    root: Tensor
    seed: Tensor | None = None


class _Soft:
    """One term against the teachers' outputs; what its function is handed is settled once."""

    def __init__(self, loss: Loss, weight: float, temperature: float) -> None:
        self.name, self.weight = loss.name, weight
        self.kind: Kind = "position" if loss.per == "position" else "sample"
        options = {"temperature": temperature, **loss.options} if "temperature" in loss.accepts else loss.options
        self._call = partial(loss.function, **options)
        self._labelled = "labels" in loss.accepts and "labels" not in loss.options
        # An option that needs all logits, such as standardising them, rules out the condensed form.
        self.condensed, self.explicit = _bound(loss.condensed, options), _bound(loss.explicit, options)

    def sum(
        self, student: Tensor, teacher: Tensor | TopK, labels: Tensor | None, items: Items, share: float | Tensor
    ) -> Sum:
        """Returns the sum over items, differentiated already where the loss can."""
        if self.explicit is None or (isinstance(teacher, TopK) and self.condensed is None):
            return _graph(self.total(student, teacher, labels, items))
        chosen = items.flat if self.kind == "position" else items.whole
        root = chosen(student)
        theirs = _flat(teacher, items) if isinstance(teacher, TopK) else chosen(teacher)
        value, seed = self.explicit(root, theirs, share)
        return Sum(value, root, seed)

    def total(self, student: Tensor, teacher: Tensor | TopK, labels: Tensor | None, items: Items) -> Tensor:
        if isinstance(teacher, TopK):
            if self.condensed is not None:
                return self.condensed(items.flat(student), _flat(teacher, items)).sum()
            teacher = _spread(teacher)
        if self.kind == "sample":
            return self._call(items.whole(student), items.whole(teacher)).sum()
        more = {"labels": items.spread(labels)} if self._labelled and labels is not None else {}
        return self._call(items.flat(student), items.flat(teacher), **more).sum()


@dataclass(frozen=True)
class _Custom:
    """A caller's own function, a term like any other; what it returns tells what it averages over."""

    name: str
    function: Callable[..., Tensor]
    weight: float
    temperature: float
    kind: Kind = "sample"

    def sum(
        self, student: Tensor, teacher: Tensor | TopK, labels: Tensor | None, items: Items, _share: float | Tensor
    ) -> Sum:
        return _graph(self.total(student, teacher, labels, items))

    def total(self, student: Tensor, teacher: Tensor | TopK, labels: Tensor | None, items: Items) -> Tensor:
        wanted, teacher = _named(self.function), _spread(teacher)
        options = {"labels": labels, "temperature": self.temperature}
        value = self.function(student, teacher, **{name: options[name] for name in options if name in wanted})
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"the loss {self.name!r} returned a {type(value).__name__}; return a tensor.")
        if value.dim() == 0:
            return value * items.samples()
        if tuple(value.shape) == items.positions:
            return items.spread(value).sum()
        if tuple(value.shape) == items.positions[:1]:
            return items.whole(value[:, None]).sum() if items.mask is None or items.mask.dim() == 1 else value.sum()
        raise ShapeMismatchError(
            f"the loss {self.name!r} returned shape {tuple(value.shape)}; return one value a sample, "
            f"{items.positions[:1]}, one a position, {items.positions}, or a single number."
        )


def _graph(total: Tensor) -> Sum:
    return Sum(total.detach(), total)


def _bound(function: Callable[..., Any] | None, options: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Returns a loss's other form with its ``options``, unless it lacks one of them."""
    if function is None or not set(options) <= set(losses.keywords(function)):
        return None
    return partial(function, **options)


def _flat(teacher: TopK, items: Items) -> TopK:
    top, which, rest, classes = teacher
    return TopK(items.flat(top), items.flat(which), items.flat(rest), classes)


def _named(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except ValueError:
        return set()


def loss_terms(loss: SoftLoss) -> list[tuple[str, Loss | Callable[..., Tensor], float]]:
    """Returns name, function and weight of each term meant by ``loss=``.

    Raises:
        UnknownNameError: A name that is not registered.
        ArgumentTypeError: Neither a name, nor a function, nor a mapping of these to weights.
        InvalidArgumentError: A weight that is negative or not finite, or no term at all.
    """
    pairs: list[tuple[Any, Any]] = list(loss.items()) if isinstance(loss, Mapping) else [(loss, 1.0)]
    if not pairs:
        raise InvalidArgumentError("loss is an empty mapping; name at least one loss, such as {'kl': 1.0}.")
    terms: list[tuple[str, Loss | Callable[..., Tensor], float]] = []
    for entry, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise InvalidArgumentError(
                f"the weight of the loss {entry!r} must be finite and not negative, not {weight}."
            )
        if isinstance(entry, str):
            found = losses.get(entry)
            terms.append((found.name, found, float(weight)))
        elif isinstance(entry, Loss):
            terms.append((entry.name, entry, float(weight)))
        elif callable(entry):
            function: Any = entry
            terms.append((getattr(entry, "__name__", type(entry).__name__), function, float(weight)))
        else:
            raise ArgumentTypeError(
                f"loss must be a name, a function of (student, teacher) or a mapping of these to weights, "
                f"not {type(entry).__name__}."
            )
    return terms


class Objective:
    """The sum of all terms, made from the caller's arguments.

    Args:
        loss: As given to :func:`netopt.distill`.
        temperature: Softening of the losses that have one.
        hard: Weight of the labels' term, in [0, 1]; the soft terms weigh ``1 - hard``.
        teachers: One weight a teacher, summing to 1.
        hints: Terms between layers, with weights of their own.
    """

    def __init__(
        self,
        loss: SoftLoss,
        *,
        temperature: float,
        hard: float,
        teachers: Sequence[float],
        hints: Sequence[HintTerm] = (),
    ) -> None:
        self.temperature, self.hard, self.teachers, self.hints = temperature, hard, tuple(teachers), tuple(hints)
        self.soft: list[_Soft | _Custom] = []
        for name, function, weight in loss_terms(loss):
            share = weight * (1 - hard)
            if isinstance(function, Loss):
                self.soft.append(_Soft(function, share, temperature))
            else:
                self.soft.append(_Custom(name, function, share, temperature))
        self._counted: dict[tuple[int, ...], list[int]] = {}
        self.probabilistic = any(one.kind == "position" for one in self.soft)
        self.names = [one.name for one in self.soft]
        self.weights = [one.weight for one in self.soft]
        if hard > 0:
            self.names.append("labels")
            self.weights.append(hard)
        for hint in self.hints:
            self.names.append(hint.name)
            self.weights.append(hint.weight)
        if not any(self.weights):
            raise InvalidArgumentError("every loss has weight 0, so there is nothing to learn; give one a weight.")

    def learn(self, target: Target) -> None:
        """Finds out on the first batch what the caller's own functions average over, and checks the others' shapes."""
        output = _precise(_spread(target.records[0].output))
        for place, term in enumerate(self.soft):
            if (
                isinstance(term, _Soft)
                and term.kind == "position"
                and (output.dim() < 2 or classes_last(output).shape[-1] < 2)
            ):
                raise ShapeMismatchError(
                    f"the loss {term.name!r} compares distributions over classes and the output of shape "
                    f"{tuple(output.shape)} has no two classes; use loss='mse', or a model with two logits."
                )
            if isinstance(term, _Custom):
                with torch.no_grad():
                    wanted = {"labels": target.labels, "temperature": self.temperature}
                    options = {key: one for key, one in wanted.items() if key in _named(term.function)}
                    value = term.function(output, output, **options)
                per_position = isinstance(value, Tensor) and tuple(value.shape) == target.items.positions
                kind: Kind = "position" if per_position else "sample"
                self.soft[place] = replace(term, kind=kind)

    def counts(self, items: Items, labels: Tensor | None) -> list[int]:
        """Returns how many items of this micro-batch each term runs over."""
        # Where everything counts, the counts follow from the shape.
        known = items.mask is None and (self.hard == 0 or items.labelled)
        found = self._counted.get(items.positions) if known else None
        if found is None:
            found = self._count(items, labels)
            if known:
                self._counted[items.positions] = found
        return found

    def _count(self, items: Items, labels: Tensor | None) -> list[int]:
        samples = items.samples()
        places = samples if len(items.positions) == 1 else items.places()
        counts = [places if one.kind == "position" else samples for one in self.soft]
        if self.hard > 0:
            counts.append(self._labelled(items, labels))
        return counts + [one.count(items, samples) for one in self.hints]

    @property
    def condensable(self) -> bool:
        """Whether the losses need no more of the outputs than the largest logits and the sum of the others."""
        return all(isinstance(one, _Soft) and one.condensed is not None for one in self.soft)

    def sums(
        self,
        output: Tensor,
        features: Mapping[str, Tensor],
        target: Target,
        shares: Sequence[float | Tensor] | None = None,
    ) -> list[Sum]:
        """Returns each term's sum over the items of one micro-batch, in float32 at least.

        By its entry of ``shares`` a sum is multiplied in what is minimised; without them every one is 1.
        """
        output, items, found = _precise(output), target.items, []
        wanted = [one if isinstance(one, TopK) else _precise(one) for one, _ in target.records]
        # Labels are counted where they are, in host memory as a rule, and go to the device only now.
        labels = None if target.labels is None else target.labels.to(output.device, non_blocking=True)
        for place, term in enumerate(self.soft):
            if term.weight == 0:
                found.append(_graph(output.new_zeros(())))
            elif len(wanted) == 1:
                # The one teacher there is as a rule weighs 1.
                found.append(term.sum(output, wanted[0], labels, items, 1.0 if shares is None else shares[place]))
            else:
                found.append(_graph(self._averaged([term.total(output, one, labels, items) for one in wanted])))
        if self.hard > 0:
            found.append(_graph(self._labels_total(output, labels, items)))
        for hint in self.hints:
            ours, theirs = hint.pair(features, target.records[0].features)
            found.append(_graph(hint.total(_precise(ours), _precise(theirs), items)))
        return found

    def _labelled(self, items: Items, labels: Tensor | None) -> int:
        if labels is None:
            raise MissingDataError(
                f"hard={self.hard} needs labels and a batch has none; let the data yield (inputs, labels) or a dict "
                'with "labels", pass labels=, or set hard=0.'
            )
        if labels.is_floating_point():
            return items.places() if self.probabilistic else items.samples()
        if tuple(labels.shape) != items.positions:
            raise ShapeMismatchError(
                f"the labels have shape {tuple(labels.shape)} and the output's positions {items.positions}; give one "
                "class index a position."
            )
        return items.places() if items.labelled else count(items.spread(labels) > UNLABELLED)

    def _averaged(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([weight * one for weight, one in zip(self.teachers, parts, strict=True)]).sum()

    def _labels_total(self, output: Tensor, labels: Tensor | None, items: Items) -> Tensor:
        assert labels is not None, "counting comes first, and complains"
        if labels.is_floating_point():
            if labels.numel() != output.numel():
                raise ShapeMismatchError(
                    f"real-valued labels of shape {tuple(labels.shape)} do not fit the output's {tuple(output.shape)}."
                )
            labels = labels.reshape(output.shape).to(output.dtype)
            if self.probabilistic:
                return -(items.flat(labels) * items.flat(output).log_softmax(-1)).sum()
            return losses.mse(items.whole(output), items.whole(labels)).sum()
        chosen = items.spread(labels)
        if items.labelled:
            return F.cross_entropy(items.flat(output), chosen.long(), reduction="sum")
        values = F.cross_entropy(items.flat(output), chosen.long().clamp_min(0), reduction="none")
        return torch.where(chosen > UNLABELLED, values, 0).sum()


def count(mask: Tensor) -> int:
    """Returns how many entries are true; as a rule in host memory, without synchronising."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def _spread(output: Tensor | TopK) -> Tensor:
    return output.dense() if isinstance(output, TopK) else output


def _precise(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
