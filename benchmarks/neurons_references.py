"""Plain implementations of published structured pruning of language models, to hold netopt's beside.

Each removes a share of the parameters of the blocks of a model of the Llama kind, in place and from the papers alone;
no line of netopt is used. Attention loses whole groups of heads that share keys and values, the feed-forward parts lose
inner neurons. ``heads=False`` leaves attention as it is, which on small models is often better.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from weights_references import _arguments

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Part:
    """What loses units: a ``reader`` whose inputs they are, and the linear layers that make them.

    Attributes:
        makers: Layers and how many of their rows belong to one unit.
        each: How many columns of the reader belong to one unit.
        units: How many there are.
    """

    reader: nn.Linear
    makers: tuple[tuple[nn.Linear, int], ...]
    each: int
    units: int

    @property
    def cost(self) -> int:
        """Parameters of one unit."""
        made = sum(rows * layer.in_features for layer, rows in self.makers)
        return made + self.each * self.reader.out_features

    def keep(self, kept: Tensor) -> None:
        """Removes all other units."""
        for layer, rows in self.makers:
            layer.weight = nn.Parameter(layer.weight.data.unflatten(0, (-1, rows))[kept].flatten(0, 1))
            layer.out_features = len(layer.weight)
        weight = self.reader.weight.data.unflatten(1, (-1, self.each))[:, kept].flatten(1)
        self.reader.weight, self.reader.in_features = nn.Parameter(weight), weight.shape[1]


def parts(block: Any) -> tuple[Part, Part]:
    attention, mlp = block.self_attn, block.mlp
    size = attention.head_dim
    groups = attention.k_proj.out_features // size
    queries = attention.q_proj.out_features // groups
    makers = ((attention.q_proj, queries), (attention.k_proj, size), (attention.v_proj, size))
    inner = ((mlp.gate_proj, 1), (mlp.up_proj, 1))
    return (
        Part(attention.o_proj, makers, queries, groups),
        Part(mlp.down_proj, inner, 1, mlp.down_proj.in_features),
    )


def inputs_of(layer: nn.Linear, block: nn.Module, calls: Calls) -> Iterator[Tensor]:
    """What a layer of a block reads, ``(tokens, inputs)``, call by call."""
    caught: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten(0, -2)))
    try:
        for args, kwargs in calls:
            block(*args, **kwargs)
            yield caught.pop()
    finally:
        hook.remove()


def onward(block: nn.Module, calls: Calls) -> Calls:
    """The calls of the next block."""
    found = []
    for args, kwargs in calls:
        out = block(*args, **kwargs)
        found.append(((out[0] if isinstance(out, tuple) else out, *args[1:]), kwargs))
    return found


def calls_of(model: Any, data: Sequence[Any]) -> Calls:
    return [_arguments(model, model.model.layers[0], batch) for batch in data]


def size_of(blocks: nn.Module) -> int:
    return sum(one.numel() for one in blocks.parameters())


@torch.no_grad()
def flap(model: Any, data: Sequence[Any], share: float, *, heads: bool = True) -> None:
    """An et al. 2023, https://arxiv.org/abs/2312.11983: inputs that fluctuate little go, their means into a bias.

    Fluctuation times the squared norm of the weights that read it, standardised in every layer, ranked over all.
    """
    blocks, calls = model.model.layers, calls_of(model, data)
    every: list[tuple[Part, Tensor, Tensor]] = []
    for block in blocks:
        for part in parts(block)[0 if heads else 1 :]:
            count, total, squares = 0, 0, 0
            for x in map(Tensor.double, inputs_of(part.reader, block, calls)):
                count, total, squares = count + len(x), total + x.sum(0), squares + x.square().sum(0)
            mean = total / count
            metric = (squares / count - mean.square()) * part.reader.weight.double().square().sum(0)
            metric = metric.unflatten(0, (-1, part.each)).mean(1)
            every.append((part, (metric - metric.mean()) / metric.std(), mean))
        calls = onward(block, calls)
    metrics = torch.cat([metric for _, metric, _ in every])
    costs = torch.cat([torch.full_like(metric, part.cost) for part, metric, _ in every])
    order = metrics.argsort()
    count = int((costs[order].cumsum(0) < share * size_of(blocks)).sum()) + 1
    gone = torch.zeros(len(metrics), dtype=torch.bool)
    gone[order[:count]] = True
    for (part, metric, mean), lost in zip(every, gone.split([len(one) for _, one, _ in every]), strict=True):
        lost[metric.argmax()] = False  # one stays
        columns = lost.repeat_interleave(part.each)
        bias = part.reader.weight.double()[:, columns] @ mean[columns]
        part.reader.bias = nn.Parameter(bias.float())
        part.keep(torch.nonzero(~lost).flatten())


@torch.no_grad()
def slimgpt(model: Any, data: Sequence[Any], share: float, *, heads: bool = True, rising: bool = True) -> None:
    """Ling et al. 2024, https://arxiv.org/abs/2412.18110: optimal brain surgery, unit by unit, block after block.

    The share of a block rises with the logarithm of its depth, from none (``rising``), or is the same for all. What is
    kept is updated; heads go one by one, neurons a sixteenth of those left at a time.
    """
    blocks, calls = model.model.layers, calls_of(model, data)
    depth = [math.log(1 + place) if rising else 1.0 for place in range(len(blocks))]
    rise = [one / sum(depth) * len(blocks) for one in depth]
    whole, owed = size_of(blocks[0]), 0.0
    for block, factor in zip(blocks, rise, strict=True):
        attention, neurons = parts(block)
        amount = share * factor * whole / (attention.cost * attention.units * heads + neurons.cost * neurons.units)
        owed += share * factor * whole  # what rounding to whole groups of heads leaves, the neurons make up for
        if heads:
            gone = min(round(min(amount, 1.0) * attention.units), attention.units - 1)
            surgery(attention, inputs_of(attention.reader, block, calls), gone)
            owed -= gone * attention.cost
        gone = min(max(round(owed / neurons.cost), 0), neurons.units - 16)
        surgery(neurons, inputs_of(neurons.reader, block, calls), gone)
        owed -= gone * neurons.cost
        calls = onward(block, calls)


def surgery(part: Part, inputs: Iterator[Tensor], gone: int, dampening: float = 0.01) -> None:
    """Removes the units whose loss is least after the others have been updated."""
    hessian = sum((x.T @ x).double() for x in inputs)
    hessian.diagonal().add_(dampening * hessian.diagonal().mean())
    inverse, weight = torch.cholesky_inverse(torch.linalg.cholesky(hessian)), part.reader.weight.double()
    alive = torch.arange(part.units)
    while gone:
        own, columns = (
            inverse.unflatten(0, (-1, part.each)).unflatten(2, (-1, part.each)),
            weight.unflatten(1, (-1, part.each)),
        )
        places = torch.arange(len(alive))
        corner = own[places, :, places]
        errors = (columns.permute(1, 0, 2) @ torch.linalg.inv(corner) * columns.permute(1, 0, 2)).sum((1, 2))
        count = min(gone, max(1, len(alive) // 16)) if part.each == 1 else 1
        worst = errors.argsort()[:count]
        stays = torch.ones(len(alive), dtype=torch.bool)
        stays[worst] = False
        keep = stays.repeat_interleave(part.each)
        factor = torch.linalg.solve(inverse[~keep][:, ~keep], inverse[~keep])[:, keep]
        weight = weight[:, keep] - weight[:, ~keep] @ factor
        inverse = inverse[keep][:, keep] - inverse[keep][:, ~keep] @ factor
        alive, gone = alive[stays], gone - count
    part.keep(alive)
    part.reader.weight.copy_(weight)


@torch.no_grad()
def slicegpt(model: Any, data: Sequence[Any], share: float) -> None:
    """Ashkboos et al. 2024, https://arxiv.org/abs/2401.15024: the residual stream cut to its principal components.

    As a function of the model: before each half of a block the stream is projected onto the components kept there,
    found from what the blocks sliced before put out. What is stored then, its linear layers sliced and a small matrix
    on each skip, is counted by :func:`sliced_width`; it is not built, so that no latency can be measured.
    """
    blocks, calls = model.model.layers, calls_of(model, data)
    width = sliced_width(model, share)
    for block in blocks:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            moment = sum((x.T @ x).double() for x in stream_at(norm, block, calls))
            moment.diagonal().add_(0.01 * moment.diagonal().mean())
            basis = torch.linalg.eigh(moment).eigenvectors[:, -width:]
            _project(block, norm, (basis @ basis.T).float())
        calls = onward(block, calls)
    moment = sum((args[0].flatten(0, -2).T @ args[0].flatten(0, -2)).double() for args, _ in calls)
    basis = torch.linalg.eigh(moment).eigenvectors[:, -width:]
    projection = (basis @ basis.T).float()
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] @ projection,))


def stream_at(norm: nn.Module, block: nn.Module, calls: Calls) -> Iterator[Tensor]:
    caught: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: caught.append(args[0].flatten(0, -2)))
    try:
        for args, kwargs in calls:
            block(*args, **kwargs)
            yield caught.pop()
    finally:
        hook.remove()


class _Projected(nn.Module):
    """A half of a block that adds, besides its outputs, what takes the stream to its projection."""

    def __init__(self, inner: nn.Module, missing: list[Tensor]) -> None:
        super().__init__()
        self.inner, self.missing = inner, missing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        lost = self.missing.pop()
        return (out[0] - lost, *out[1:]) if isinstance(out, tuple) else out - lost


def _project(block: Any, norm: nn.Module, projection: Tensor) -> None:
    missing: list[Tensor] = []

    def before(_: nn.Module, args: Any) -> Any:
        projected = args[0] @ projection
        missing.append(args[0] - projected)
        return (projected,)

    norm.register_forward_pre_hook(before)
    half = "self_attn" if norm is block.input_layernorm else "mlp"
    setattr(block, half, _Projected(getattr(block, half), missing))


def sliced_width(model: Any, share: float) -> int:
    """The width at which linear layers, and two square matrices a block, have so much fewer parameters."""
    block, whole = model.model.layers[0], model.config.hidden_size
    linear = sum(one.weight.numel() for one in block.modules() if isinstance(one, nn.Linear))
    fits = [width for width in range(1, whole) if linear * width / whole + 2 * width**2 <= (1 - share) * linear]
    return fits[-1]


REFERENCES: dict[str, Callable[[Any, Sequence[Any], float], None]] = {
    "flap": flap,
    "flap, neurons alone": lambda *args: flap(*args, heads=False),
    "slimgpt": slimgpt,
    "slimgpt, equal shares": lambda *args: slimgpt(*args, rising=False),
    "slimgpt, neurons alone": lambda *args: slimgpt(*args, heads=False),
    "slimgpt, neurons alone, equal shares": lambda *args: slimgpt(*args, heads=False, rising=False),
    "slicegpt": slicegpt,
}


def pruned(model: Any, data: Sequence[Any], name: str, share: float) -> tuple[nn.Module, float]:
    """A copy with that share of its blocks' parameters removed by the method named, and the share that is left."""
    small = copy.deepcopy(model)
    REFERENCES[name](small, data, share)
    if name != "slicegpt":
        return small, size_of(small.model.layers) / size_of(model.model.layers)
    part = sliced_width(model, share) / model.config.hidden_size
    block = size_of(model.model.layers[0])
    return small, part + 2 * (part * model.config.hidden_size) ** 2 / block
