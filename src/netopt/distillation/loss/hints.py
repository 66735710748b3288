"""Layers of the student learn from layers of the teacher; where their widths differ, a projection is made for them.

A hint is a pair of dotted names with a kind. After `prune_neurons` no projection is needed: the plan holds which of the
teacher's neurons each of the student's *is*, and the pair is compared neuron by neuron.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netopt import batches
from netopt.errors import ArgumentTypeError, InvalidArgumentError, ShapeMismatchError, UnknownNameError
from netopt.model.hooks import put_hook
from netopt.model.signals import UndoLog

if TYPE_CHECKING:
    from netopt.distillation.loss.objective import Items

__all__ = ["Hint", "HintTerm", "Hints", "captured", "hint_terms"]

Kind: TypeAlias = Literal["hint", "attention", "relation", "similarity"]
CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention)


BETWEEN_SAMPLES = ("relation", "similarity")
# Light: the kept neurons of a deeply cut layer must be free to take over from those that are gone.
PLAN_WEIGHT = 0.1


@dataclass(frozen=True)
class Hint:
    """What a layer of the student should learn from the teacher.

    Args:
        layer: Dotted name of the teacher's layer.
        kind: ``"hint"``, the mean squared difference after a projection (FitNets, https://arxiv.org/abs/1412.6550);
            ``"attention"``, where the energy lies (AT, https://arxiv.org/abs/1612.03928); ``"relation"``, distances
            and angles between samples (RKD, https://arxiv.org/abs/1904.05068); ``"similarity"``, which samples
            resemble which (SP, https://arxiv.org/abs/1907.09682).
        weight: Of this term beside the loss on the outputs.

    Example:
        >>> Hint("layer2", "attention", weight=100.0)
        Hint(layer='layer2', kind='attention', weight=100.0)
    """

    layer: str
    kind: Kind = "hint"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UnknownNameError.of("kind of hint", self.kind, _KINDS)
        if not 0 <= self.weight < math.inf:
            raise InvalidArgumentError(f"the weight of a hint must be finite and not negative, not {self.weight}.")


Hints: TypeAlias = Mapping[str, "str | Hint"] | Any
"""Student's layer to teacher's layer, or the plan (or report) of the pruning that made the student."""


class HintTerm:
    """One hint, bound to its layers.

    Args:
        student: Dotted name of the student's layer.
        hint: The teacher's layer, kind and weight.
        dims: The channel dimension of either layer's activation.
        kept: Which of the teacher's neurons the student's are, if it was cut out of the teacher.
    """

    def __init__(self, student: str, hint: Hint, dims: tuple[int, int], kept: Tensor | None = None) -> None:
        self.student, self.hint, self.dims, self.kept = student, hint, dims, kept
        self.projection: nn.Module | None = None
        self.token_wise = False

    @property
    def name(self) -> str:
        """How the report calls the term."""
        return f"{self.hint.kind} {self.student}"

    @property
    def weight(self) -> float:
        """Its weight in the objective."""
        return self.hint.weight

    def pair(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns both activations, the student's projected already, the teacher's narrowed to the kept neurons."""
        theirs = teacher[self.hint.layer]
        if self.kept is not None:
            theirs = theirs.index_select(self.dims[1], self.kept.to(theirs.device))
        return student[self.student], theirs

    def learn(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> None:
        """Makes the projection, if the widths differ, from the activations of the first batch.

        Raises:
            ShapeMismatchError: the activations cannot be compared even so.
        """
        # What only compares samples with each other takes features of any shape.
        alike = self.hint.kind in BETWEEN_SAMPLES or student.dim() == teacher.dim()
        if not alike or student.shape[0] != teacher.shape[0] or min(student.dim(), teacher.dim()) < 2:
            raise ShapeMismatchError(
                f"the hint {self.student!r} has shape {tuple(student.shape)} in the student and {self.hint.layer!r} "
                f"{tuple(teacher.shape)} in the teacher; pair layers with the same number of dimensions, or use "
                "Hint(..., 'similarity')."
            )
        last = (self.dims[0] % student.dim()) == student.dim() - 1
        self.token_wise = last and student.dim() == 3 and self.hint.kind == "hint"
        if self.hint.kind == "hint":
            width, wanted = student.shape[self.dims[0]], teacher.shape[self.dims[1]]
            if width != wanted:
                self.projection = _projection(student.dim(), width, wanted, last, generator).to(
                    device=student.device, dtype=torch.float32 if student.dtype != torch.float64 else student.dtype
                )

    def count(self, items: Items, samples: int) -> int:
        """How many items this term runs over."""
        return items.places() if self.token_wise and len(items.positions) == 2 else samples

    def total(self, student: Tensor, teacher: Tensor, items: Items) -> Tensor:
        """Returns the term's sum over its items."""
        if self.token_wise:
            values = (student - teacher).square().mean(-1)
            return items.spread(values).sum() if len(items.positions) == 2 else items.whole(values.mean(1)).sum()
        student, teacher = student.movedim(self.dims[0], 1), teacher.movedim(self.dims[1], 1)
        if self.hint.kind not in BETWEEN_SAMPLES:
            student, teacher = _same_place(student, teacher)
        if items.mask is not None:
            student, teacher = _unmasked(student, items.mask), _unmasked(teacher, items.mask)
        return _KINDS[self.hint.kind](student, teacher).sum()


def hint_terms(hints: Hints, student: nn.Module, teacher: nn.Module) -> list[HintTerm]:
    """Returns the terms meant by ``hints=``.

    Raises:
        UnknownNameError: a name that is no layer of its model.
        ArgumentTypeError: neither a mapping nor a plan.
        InvalidArgumentError: a plan that prunes no layer both models have.
    """
    if hints is None:
        return []
    plan: Any = getattr(hints, "plan", hints)
    if hasattr(plan, "tensors") and not isinstance(hints, Mapping):
        return _from_plan(plan.tensors, student, teacher)
    if not isinstance(hints, Mapping):
        raise ArgumentTypeError(
            f"hints must map the student's layers to the teacher's, or be a pruning plan, not {type(hints).__name__}."
        )
    terms = []
    for ours, theirs in hints.items():
        hint = Hint(theirs) if isinstance(theirs, str) else theirs
        if not isinstance(hint, Hint):
            raise ArgumentTypeError(
                f"the hint for {ours!r} must be a layer's name or a Hint, not {type(hint).__name__}."
            )
        dims = _channel(_layer(student, ours, "student")), _channel(_layer(teacher, hint.layer, "teacher"))
        terms.append(HintTerm(ours, hint, dims))
    return terms


@contextmanager
def captured(model: nn.Module, layers: Mapping[str, Any] | list[str]) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that each forward of ``model`` fills with the main outputs of ``layers``; hooks go on leaving."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, result: Any) -> None:
            seen[name] = batches.primary(result)

        return hook

    with UndoLog() as log:
        log.callback(seen.clear)
        for name in dict.fromkeys(layers):
            put_hook(log, model.get_submodule(name), remember(name), with_kwargs=False)
        yield seen


def _from_plan(tensors: Mapping[str, Mapping[int, Tensor]], student: nn.Module, teacher: nn.Module) -> list[HintTerm]:
    ours = dict(student.named_modules())
    terms = []
    for name, module in teacher.named_modules():
        if name not in ours or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        kept = _kept_outputs(module, name, tensors)
        if kept is None or len(kept) != _width(ours[name]):
            continue
        channel = _channel(module)
        terms.append(HintTerm(name, Hint(name, weight=PLAN_WEIGHT), (channel, channel), kept))
    if not terms:
        raise InvalidArgumentError(
            "the plan removes no output neuron of a layer that student and teacher share; pass the unpruned model as "
            "teacher and the pruned one as student."
        )
    return terms


def _kept_outputs(module: nn.Module, name: str, tensors: Mapping[str, Mapping[int, Tensor]]) -> Tensor | None:
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    for tensor, dim in (("bias", 0), ("weight", 1 if transposed else 0)):
        kept = tensors.get(f"{name}.{tensor}".lstrip("."), {}).get(dim)
        if kept is not None:
            return torch.as_tensor(kept, dtype=torch.long)
    return None


def _width(module: nn.Module) -> int | None:
    width = getattr(module, "out_channels", getattr(module, "out_features", None))
    return width if isinstance(width, int) else None


def _layer(model: nn.Module, name: str, who: str) -> nn.Module:
    known = dict(model.named_modules())
    if name not in known or not name:
        raise UnknownNameError.of(f"layer of the {who}", name, [one for one in known if one])
    return known[name]


def _channel(module: nn.Module) -> int:
    """Guesses by a layer's type which dimension of its activation holds the neurons; -2 means: by its rank."""
    if isinstance(module, CHANNELS_LAST):
        return -1
    if isinstance(module, CHANNELS_SECOND):
        return 1
    inner = [one for one in module.modules() if isinstance(one, (*CHANNELS_LAST, *CHANNELS_SECOND))]
    return -1 if inner and isinstance(inner[-1], CHANNELS_LAST) else 1


def _projection(rank: int, width: int, wanted: int, last: bool, generator: torch.Generator) -> nn.Module:
    layer = nn.Linear(width, wanted) if last or rank == 2 else _convolution(rank)(width, wanted, 1)
    bound = 1 / math.sqrt(width)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def _convolution(rank: int) -> type[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    return {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[rank]


def _same_place(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Averages the larger of two feature maps down to the smaller one."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(size)]
    return pool(student, size), pool(teacher, size)


def _unmasked(features: Tensor, mask: Tensor) -> Tensor:
    """Returns the samples that count of ``(samples, neurons, ...)``, tokens that do not count set to zero."""
    if mask.dim() == 2 and features.dim() == 3 and mask.shape[1] == features.shape[2]:
        features = features.masked_fill(~mask.to(features.device).unsqueeze(1), 0)
    counts = mask if mask.dim() == 1 else mask.flatten(1).any(1)
    return features[counts.nonzero().squeeze(1).to(features.device)]


def _hint(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().flatten(1).mean(1)


def _attention(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = (F.normalize(one.square().mean(1).flatten(1), dim=1) for one in (student, teacher))
    return (ours - theirs).square().sum(1)


def _similarity(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = (F.normalize(one.flatten(1) @ one.flatten(1).T, dim=1) for one in (student, teacher))
    return (ours - theirs).square().mean(1)


def _relation(student: Tensor, teacher: Tensor, distance: float = 1.0, angle: float = 2.0) -> Tensor:
    if len(student) < 2:
        return student.flatten(1).sum(1) * 0
    pairs = zip(_distances(student), _distances(teacher), strict=True)
    lengths, angles = (F.smooth_l1_loss(ours, theirs, reduction="none").flatten(1).mean(1) for ours, theirs in pairs)
    return distance * lengths + angle * angles


def _distances(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns distances between samples, in units of their mean, and the cosines of the angles at each sample."""
    apart = features.flatten(1)[None] - features.flatten(1)[:, None]
    # The root has no derivative at zero, where a sample meets itself.
    squares = apart.square().sum(-1)
    lengths = torch.where(squares > 0, squares.clamp_min(1e-12).sqrt(), 0.0)
    mean = lengths.sum() / max(1, lengths.numel() - len(lengths))
    directions = F.normalize(apart, dim=-1)
    return lengths / mean.clamp_min(1e-12), directions @ directions.transpose(1, 2)


_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hint": _hint,
    "attention": _attention,
    "relation": _relation,
    "similarity": _similarity,
}
