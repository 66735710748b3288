"""How much each neuron matters: one number for each position of an axis.

A criterion of weights is reduced onto an axis once, over all its members; a criterion of neurons judges what is known
of the axis itself, its activations and its weights. What an axis is, is not known here: a name with members and taps.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.batches import Batch, Data, Inputs
from netopt.errors import (
    ArgumentTypeError,
    InvalidArgumentError,
    MissingDataError,
    NonFiniteError,
    ShapeMismatchError,
)
from netopt.importance.activations import Saliency, activations, gather, over_others, saliency
from netopt.importance.curvature import reconstruction_scores
from netopt.importance.evidence import Evidence, missing_data
from netopt.importance.registry import PART, Criterion, criterion, lookup
from netopt.importance.scores import scores
from netopt.importance.scoring import Member, Precision, ScoredAxes, Scoring
from netopt.model.parameters import effective, places
from netopt.model.view import ModelView
from netopt.progress import bar

__all__ = ["ComparableScores", "Member", "NeuronScores", "Neurons", "neuron_scores", "reduce", "saliency_within"]


@dataclass(frozen=True)
class Neurons:
    """What is known about the neurons of one axis; what no criterion asked for is absent.

    Attributes:
        name: The axis's name.
        size: Number of neurons.
        weights: Values of the parameters in which the axis appears, each with the dimension and the axis's position at
            each index of it.
        scales: Those among them that are the weights of a normalisation.
        saliency: Squared gradients of the outputs, see :func:`netopt.importance.activations.saliency`; None where no
            contraction reads the axis.
        activation: Mean absolute activation.
        reconstruction: What is lost when neurons go and all that reads them is refitted, see
            :func:`netopt.importance.curvature.reconstruction_scores`.
    """

    name: str
    size: int
    weights: tuple[tuple[Tensor, int, Tensor], ...]
    scales: tuple[tuple[Tensor, int, Tensor], ...] = ()
    saliency: Tensor | None = None
    activation: Tensor | None = None
    reconstruction: Tensor | None = None

    def total(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Sums ``function`` of every weight entry onto the neurons it belongs to; float64."""
        return _total([(function(tensor), dim, positions) for tensor, dim, positions in self.weights], self.size)

    def products(self) -> Tensor:
        """Inner products of the neurons' weight vectors, ``(size, size)``, float64."""
        gram = torch.zeros(self.size, self.size, dtype=torch.float64)
        for tensor, dim, positions in self.weights:
            rows = (
                tensor.movedim(dim, 0).flatten(1).double().cpu() if tensor.dim() > 1 else tensor.double().cpu()[:, None]
            )
            here = torch.nonzero(positions >= 0).flatten()
            # A neuron may own several rows (a channel flattened to pixels): the k-th of one meets the k-th of another.
            turns = _turns(positions[here])
            for turn in range(int(turns.max()) + 1 if len(turns) else 0):
                chosen = here[turns == turn]
                at = positions[chosen]
                gram[at[:, None], at[None, :]] += rows[chosen] @ rows[chosen].T
        return gram


@dataclass(frozen=True)
class NeuronScores:
    """Scores of neurons by axis, higher means keep, and what is known of how good an estimate they are.

    Attributes:
        scores: One score a neuron, by axis, float64.
        saliency: How the saliency was computed, if it was.
        comparable: Whether scores of different axes can be compared as they are.
        scale: The outputs' mean sum of squares, if scores are changes of that; else 0.
    """

    scores: dict[str, Tensor]
    saliency: Saliency | None = None
    comparable: bool = False
    scale: float = 0.0


class ComparableScores(dict[str, Tensor]):
    """Scores of neurons by axis, one tensor each, that may be compared across axes as they are.

    Attributes:
        scale: The outputs' mean sum of squares, if sums of scores are changes of that; else 0.
    """

    def __init__(self, scores: Mapping[str, Tensor], scale: float = 0.0) -> None:
        super().__init__(scores)
        self.scale = scale


def neuron_scores(
    model: nn.Module | ModelView, axes: ScoredAxes, scoring: Scoring, example_inputs: Inputs | None = None
) -> NeuronScores:
    """Scores every neuron of some axes.

    Args:
        model: Run only if the criterion needs that, in eval mode, and given back as it was.
        axes: Whose neurons are scored.
        scoring: By what; data that hold inputs and no targets fall back to ``example_inputs``.
        example_inputs: Of one forward call.

    Raises:
        UnknownNameError: No such criterion.
        MissingDataError: The criterion needs targets, and there is no data.
        NonFiniteError: A weight or a score is NaN.
        ShapeMismatchError: A criterion gives no score, or several, for some neuron.
    """
    sizes, members = axes.sizes, axes.members
    if isinstance(scoring.importance, Mapping):
        return _given(scoring.importance, sizes)
    chosen = lookup(scoring.importance, of="neurons")
    if scoring.data is None and chosen.of == "weights" and chosen.needs:
        raise missing_data(f"importance {chosen.name!r}", chosen.needs, scoring.loss_fn)
    view = ModelView.of(model)
    values, model = _values(view, {name for axis in sizes for name, _, _ in members[axis]}), view.model
    if chosen.of == "weights" and not chosen.needs:
        return NeuronScores(_streamed(chosen, values, members, sizes, progress=scoring.progress))
    _check_finite(values)
    if chosen.of == "weights":
        wanted = {name: place for name, place in places(view).items() if name in values and _floating(place.parameter)}
        elementwise = scores(
            model, scoring.data, chosen, loss_fn=scoring.loss_fn, wanted=wanted, progress=scoring.progress
        )
        reduced = {name: reduce(elementwise, members[name], size) for name, size in sizes.items()}
        return NeuronScores({name: _checked(one, name, sizes[name]) for name, one in reduced.items()})
    seen: Data = ()
    if chosen.needs:
        seen = _only(example_inputs) if scoring.data is None else scoring.data
    found, active, lost, scale = None, {}, {}, 0.0
    if "reconstruction" in chosen.needs:
        lost, scale = reconstruction_scores(model, axes, replace(scoring, data=seen))
    if "saliency" in chosen.needs:
        precision = Precision(chosen.relative_error)
        found = saliency(view, axes, seen, outputs=scoring.outputs, precision=precision, progress=scoring.progress)
    if "activation" in chosen.needs:
        active = activations(view, axes, seen, progress=scoring.progress)
    scales = _scales(view)
    result = {}
    for name, size in sizes.items():
        own = [(tensor, values[_bare(tensor)], dim, at) for tensor, dim, at in members[name] if _bare(tensor) in values]
        weights = tuple((value, dim, at) for _, value, dim, at in own)
        norm = tuple((value, dim, at) for tensor, value, dim, at in own if _bare(tensor) in scales)
        known = found.scores[name] if found and name not in found.unread else None
        evidence = Neurons(name, size, weights, norm, known, active.get(name), lost.get(name))
        result[name] = _checked(chosen(evidence), name, size)
    return NeuronScores(result, found, comparable=bool(lost), scale=scale)


def _given(scores: Mapping[str, Tensor], sizes: Mapping[str, int]) -> NeuronScores:
    checked = {name: _checked(scores.get(name), name, size) for name, size in sizes.items()}
    comparable = isinstance(scores, ComparableScores)
    return NeuronScores(checked, comparable=comparable, scale=scores.scale if comparable else 0.0)


def _streamed(
    chosen: Criterion,
    values: Mapping[str, Tensor],
    members: Mapping[str, Sequence[Member]],
    sizes: Mapping[str, int],
    *,
    progress: bool,
) -> dict[str, Tensor]:
    """Scores of a criterion that judges each weight by itself: one tensor of scores exists at a time, or a part."""
    readers: dict[str, dict[int, list[tuple[str, Tensor | None]]]] = {}
    for axis, size in sizes.items():
        whole: dict[int, Tensor | None] = {}  # most dimensions are the axis itself, position by position
        for tensor, dim, positions in members[axis]:
            if id(positions) not in whole:
                whole[id(positions)] = None if torch.equal(positions, torch.arange(size)) else positions
            readers.setdefault(_bare(tensor), {}).setdefault(dim, []).append((axis, whole[id(positions)]))
    sums: dict[str, list[Tensor]] = {axis: [] for axis in sizes}
    # Models have many vectors, each read in its only dimension.
    vectors = [name for name, value in values.items() if value.dim() == 1 and value.numel() <= PART]
    judged = dict(zip(vectors, chosen.together([Evidence(name, values[name], {}) for name in vectors]), strict=False))
    for name, value in bar(values.items(), "importance", shown=progress, unit="tensor"):
        own = readers.get(name, {})
        parts = [(slice(None), judged[name])] if name in judged else chosen.parts(Evidence(name, value, {}))
        for dim, total in _sums(parts, name, value, own).items():
            for axis, positions in own[dim]:
                sums[axis].append(total if positions is None else gather(total, positions, sizes[axis]))
    totals = {
        axis: torch.stack(several).sum(0, dtype=torch.float64) if several else torch.zeros(sizes[axis]).double()
        for axis, several in sums.items()
    }
    if totals and not math.isfinite(torch.cat([*totals.values()]).sum().item()):
        _check_finite(values)
        return {name: _checked(one, name, sizes[name]) for name, one in totals.items()}
    return totals


def _sums(parts: Iterable[tuple[slice, Any]], name: str, value: Tensor, dims: Collection[int]) -> dict[int, Tensor]:
    """A weight's scores summed over every dimension but one, for each of ``dims``."""
    sums: dict[int, Tensor] = {}
    blocks: list[Tensor] = []
    for rows, score in parts:
        if not isinstance(score, Tensor):
            raise ArgumentTypeError(f"the score of {name!r} must be a tensor, not {type(score).__name__}.")
        whole = rows == slice(None)
        shape = value.shape if whole else (len(range(value.shape[0])[rows]), *value.shape[1:])
        if score.shape != shape:
            raise ShapeMismatchError(
                f"the score of {name!r} has shape {tuple(score.shape)} and the weight {tuple(shape)}."
            )
        for dim in dims:
            own = over_others(score, dim).cpu()
            if whole:
                sums[dim] = own
            elif dim == 0:
                blocks.append(own)
            elif dim in sums:
                sums[dim] += own
            else:
                sums[dim] = own.double()
    if blocks:
        sums[0] = torch.cat(blocks)
    return sums


def reduce(elementwise: Mapping[str, Tensor], members: Sequence[Member], size: int) -> Tensor:
    """Sums scores of weight entries onto the neurons they belong to, over all members of an axis.

    Args:
        elementwise: Scores of entries, by parameter name; what is not there is left out.
        members: Where the axis appears.
        size: Number of neurons.

    Returns:
        One score a neuron, float64.

    Example:
        >>> reduce({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, [("w", 0, torch.tensor([0, 1]))], 2)
        tensor([3., 7.], dtype=torch.float64)
    """
    own = [(elementwise[_bare(name)], dim, at) for name, dim, at in members if _bare(name) in elementwise]
    return _total(own, size)


def _total(entries: Sequence[tuple[Tensor, int, Tensor]], size: int) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64)
    for tensor, dim, positions in entries:
        total += gather(over_others(tensor, dim), positions, size)
    return total


@criterion("saliency", needs={"saliency"}, of="neurons", paper="https://arxiv.org/abs/1906.10771")
def _saliency(seen: Neurons) -> Tensor:
    r"""Squared gradients of all outputs by the neuron's activation, :math:`\sum_j (\partial y_j / \partial x_i)^2`."""
    if seen.saliency is None:
        # No contraction reads it, so there is no activation to speak of: its weights are all there is.
        return seen.total(torch.square)
    return seen.saliency


def saliency_within(relative_error: float) -> Criterion:
    """The saliency, where outputs are too many to be differentiated estimated to another accuracy than 10 %.

    Args:
        relative_error: Standard error of an axis's scores over their size, above 0; a tenth of it takes a hundred
            times the random sign vectors.

    Returns:
        What ``importance=`` takes.

    Raises:
        InvalidArgumentError: ``relative_error`` is not above 0.

    References:
        A stochastic estimator of the trace of the influence matrix (Hutchinson, 1990)

    Example:
        >>> saliency_within(0.02).relative_error
        0.02
    """
    if not relative_error > 0:
        raise InvalidArgumentError(f"relative_error must be above 0, such as 0.02 for 2 %, not {relative_error!r}.")
    return replace(lookup("saliency", of="neurons"), relative_error=float(relative_error))


@criterion("activation", needs={"activation"}, of="neurons", paper="https://arxiv.org/abs/1607.03250")
def _activation(seen: Neurons) -> Tensor:
    r"""Mean absolute activation, :math:`\mathbb{E}|x_i|`, as the neuron's consumers read it."""
    assert seen.activation is not None
    return seen.activation


@criterion("reconstruction", needs={"reconstruction"}, of="neurons", paper="https://arxiv.org/abs/2302.04089")
def _reconstruction(seen: Neurons) -> Tensor:
    r"""What the outputs lose when the neuron goes and all that reads it is refitted: greedy optimal brain surgery."""
    assert seen.reconstruction is not None
    return seen.reconstruction


@criterion("l2", of="neurons", paper="https://arxiv.org/abs/1608.08710")
def _l2(seen: Neurons) -> Tensor:
    r"""Euclidean norm of all weights of the neuron, :math:`\lVert w_i \rVert_2`; ``"magnitude"`` is the sum."""
    return seen.total(torch.square).sqrt()


@criterion("bn_scale", of="neurons", paper="https://arxiv.org/abs/1708.06519")
def _bn_scale(seen: Neurons) -> Tensor:
    r"""The factor :math:`|\gamma_i|` of the normalisation the neuron passes, summed if it passes several."""
    if not seen.scales:
        raise MissingDataError(
            f"importance 'bn_scale' needs a normalisation with a weight, and axis `{seen.name}` has none; exclude it, "
            "or use another importance."
        )
    return _total([(tensor.abs(), dim, at) for tensor, dim, at in seen.scales], seen.size)


@criterion("fpgm", of="neurons", paper="https://arxiv.org/abs/1811.00250")
def _fpgm(seen: Neurons) -> Tensor:
    r"""Sum of distances to the axis's other neurons: they can replace what lies near the geometric median."""
    products = seen.products()
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0).sqrt().sum(1)


@criterion("random", of="neurons", paper="https://arxiv.org/abs/2202.02643")
def _random(seen: Neurons) -> Tensor:
    """Uniform noise, the same for the same ``torch.manual_seed``."""
    generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(seen.name.encode()))
    return torch.rand(seen.size, generator=generator, dtype=torch.float64)


def _turns(positions: Tensor) -> Tensor:
    """For each index, how many before it have the same position."""
    order = torch.sort(positions, stable=True).indices
    ordered = positions[order]
    starts = torch.searchsorted(ordered, ordered)
    turns = torch.empty_like(positions)
    turns[order] = torch.arange(len(positions)) - starts
    return turns


def _bare(name: str) -> str:
    """A member's name without what computes it: a mask, or a spectral norm by hooks."""
    return name.removesuffix("_orig")


def _floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _values(view: ModelView, wanted: set[str]) -> dict[str, Tensor]:
    """Values of the floating parameters named, zero where masked, by the name without masks."""
    bare, values = {_bare(name) for name in wanted}, {}
    for name, parameter in view.parameters.items():
        mask = view.mask_of(name)
        known = _bare(name)  # that of a mask or of a spectral norm by hooks
        if known in bare and parameter.is_floating_point():
            values[known] = parameter.detach() if mask is None else effective(parameter.detach(), mask)
    return values


def _check_finite(values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if not _is_finite(value):
            raise NonFiniteError(f"the weight {name!r} holds NaN or infinity; repair it, or exclude it.")


def _is_finite(tensor: Tensor) -> bool:
    # A sum is finite only if everything in it is, and cheaper; one that overflows proves nothing.
    return tensor.is_meta or bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _scales(view: ModelView) -> set[str]:
    """Names of the weights that multiply what was normalised: one-dimensional, beside an ``eps``."""
    return {
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in view.modules.items()
        if hasattr(module, "eps")
        and isinstance(weight := module._parameters.get("weight"), Tensor)
        and weight.dim() == 1
    }


def _only(example_inputs: Inputs | None) -> list[Batch]:
    if example_inputs is None:
        raise MissingDataError("this importance needs inputs; pass data=, a list of batches.")
    args, kwargs = batches.normalize(example_inputs)
    return [kwargs] if kwargs else [(args, None)]


def _checked(score: Any, name: str, size: int) -> Tensor:
    if not isinstance(score, Tensor):
        raise ArgumentTypeError(f"the scores of axis `{name}` must be a tensor, not {type(score).__name__}.")
    if score.shape != (size,):
        raise ShapeMismatchError(f"axis `{name}` has {size} neurons and scores of shape {tuple(score.shape)}.")
    if bool(torch.isnan(score).any()):
        raise NonFiniteError(f"scores of axis `{name}` hold NaN; check the criterion and the data.")
    return score.detach().to("cpu", torch.float64)
