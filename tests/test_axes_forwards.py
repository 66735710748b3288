"""One line of code a case: what it does to the axis of a hidden layer, and that removing does as was claimed.

Each function gets the module and the output of its first layer, eight positions wide, and returns what the last layer
reads. Whatever is found free is removed; where it is claimed exact, the result must be that of masking.
"""

from __future__ import annotations

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netopt.axes import find_axes
from netopt.plan import Plan


class Net(nn.Module):
    def __init__(self, function, width=8):
        super().__init__()
        self.function = function
        self.width, self.heads, self.sizes = width, 2, [width]
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 2)
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def gated(m, h):
    a, b = h.chunk(2, -1)
    return torch.cat([a * b.sigmoid(), a], -1)


def narrowed(m, h):
    start = m.width // 4
    return torch.cat([h.narrow(1, 0, start) * 2, h.narrow(1, start, m.width - start)], -1)


def weighted(m, h):
    return torch.cat([part * index for index, part in enumerate(h.tensor_split(3, -1), 1)], -1)


def written(m, h):
    out = torch.zeros(len(h), m.width).to(h)
    out[:, :] = h * 2
    return out


def mean_written(m, h):
    out = torch.zeros(len(h), 1).to(h)
    out[:, 0] = h.mean(-1)
    return h * out


def slope(m, h):
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        (found,) = torch.autograd.grad((F.silu(h) * m.scale).sum(), h)
    return found


EXACT = {
    "identity": lambda m, h: h,
    "identity matrix": lambda m, h: h @ torch.eye(m.width).to(h),
    "identity matrix of a shape": lambda m, h: h @ torch.eye(h.shape[-1], h.shape[-1]).to(h),
    "unread mean": lambda m, h: (h.mean(-1), F.layer_norm(h, (m.width,)), h)[-1],
    "squared distance": lambda m, h: h * F.mse_loss(h, 2 * h, reduction="sum"),
    "squared distances": lambda m, h: F.smooth_l1_loss(h, 2 * h, reduction="none"),
    "hypotenuse": lambda m, h: torch.hypot(h, 2 * h),
    "trace": lambda m, h: h * (h.t() @ h).trace(),
    "diagonal matrices": lambda m, h: h + torch.diag_embed(h).sum(-1),
    "outer product added": lambda m, h: torch.addr(h, h.new_ones(len(h)), h[0]),
    "products summed": lambda m, h: h * torch.addbmm(h[:1, :1], h[:, None], h[:, :, None]),
    "pairwise distances": lambda m, h: h * F.pdist(h).sum(),
    "rows put in": lambda m, h: torch.slice_scatter(h, 2 * h[:1], 0, 1, 2) + torch.select_scatter(h, h[0], 0, 1),
    "own gradient": lambda m, h: h + slope(m, h),
    "relu": lambda m, h: h.relu(),
    "add a number": lambda m, h: (h + 1).relu() * 2 - 3,
    "add a parameter": lambda m, h: h + m.scale,
    "in place": lambda m, h: h.add_(1).relu_(),
    "clamp above zero": lambda m, h: h.clamp(1, 2),
    "detach": lambda m, h: h * (h.detach() > 0),
    "sum": lambda m, h: h - h.sum(-1, keepdim=True),
    "norm": lambda m, h: h / h.norm(dim=-1, keepdim=True),
    "normalize": lambda m, h: F.normalize(h, dim=-1),
    "outer": lambda m, h: (h[:, :, None] * h[:, None, :]).sum(-1),
    "einsum": lambda m, h: h * torch.einsum("bi,bi->b", h, h)[:, None],
    "gram": lambda m, h: h @ (h.t() @ h),
    "distances": lambda m, h: h * torch.cdist(h, h).sum(-1, keepdim=True),
    "view by width": lambda m, h: h.view(-1, m.width),
    "view by list": lambda m, h: h.reshape(h.shape[0], m.sizes[0]),
    "view by shape": lambda m, h: h.flatten().view(h.shape),
    "view by list of shape": lambda m, h: h.reshape(list(h.shape)),
    "view by torch.Size": lambda m, h: h.reshape(torch.Size([h.shape[0], m.width])),
    "view by product of sizes": lambda m, h: h.reshape(h.size(0), math.prod(h.shape[1:])),
    "view by number of elements": lambda m, h: h.view(-1, h.numel() // h.shape[0]),
    "view as another": lambda m, h: h.flatten().view_as(h),
    "heads exchanged": lambda m, h: h.view(len(h), m.heads, -1).transpose(1, 2).reshape(len(h), -1),
    "heads by division": lambda m, h: h.view(len(h), m.heads, m.width // m.heads).transpose(1, 2).flatten(1),
    "gated halves": gated,
    "halves by slices": lambda m, h: torch.cat([h[:, : m.width // 2] * h[:, m.width // 2 :], h[:, : m.width // 2]], -1),
    "rotated halves": lambda m, h: torch.cat([-h[..., h.shape[-1] // 2 :], h[..., : h.shape[-1] // 2]], -1),
    "larger halves": lambda m, h: torch.cat([torch.maximum(*h.chunk(2, -1)), torch.minimum(*h.chunk(2, -1))], -1),
    "split by attribute": lambda m, h: torch.cat([t.relu() for t in h.split(m.sizes[0] // 2, -1)], -1),
    "narrow": narrowed,
    "the middle of twice": lambda m, h: torch.cat([h, h], -1)[:, m.width // 2 : m.width // 2 + m.width],
    "flipped": lambda m, h: h.flip(-1) * h,
    "repeated and summed": lambda m, h: h.repeat_interleave(2, 1).view(len(h), -1, 2).sum(-1),
    "expanded": lambda m, h: h[:, :, None].expand(-1, -1, 3).mean(-1),
    "padded": lambda m, h: F.pad(h, (1, 0))[:, 1:],
    "written into zeros": written,
    "ones by shape": lambda m, h: h @ torch.ones(h.shape[-1], m.width).to(h),
    "a branch on the size": lambda m, h: h * 2 if h.shape[-1] % 2 == 0 else h,
    "a branch on a bound": lambda m, h: h * 2 if h.shape[-1] > 2 else h,
    "an assertion on shapes": lambda m, h: h if tuple(h.shape[1:]) == (m.width,) else None,
    "a number that is no size": lambda m, h: h * m.heads,
    "vmap": lambda m, h: torch.vmap(lambda row: row * 2)(h),
    "product of parameters": lambda m, h: h * (m.scale[None] * m.scale[None]),
    "lerp": lambda m, h: torch.lerp(h, h.relu(), 0.3),
    "distance": lambda m, h: h * torch.dist(h, 2 * h),
    "one of a list": lambda m, h: h * torch.isin(h.abs(), torch.ones(1).to(h), invert=True),
    "segments": lambda m, h: torch.segment_reduce(h, "sum", lengths=torch.tensor([1, 2]))[1:] + h,
    "rounded to a grid": lambda m, h: h + torch.fake_quantize_per_tensor_affine(h.float(), 0.1, 3, 0, 255).double(),
    "diagonal put in": lambda m, h: h @ torch.diagonal_scatter(h.t() @ h, torch.ones_like(m.scale)),
    "zero put in by a mask": lambda m, h: h * h.index_put((h < 0,), torch.zeros((), dtype=h.dtype)).sum(1, True),
    "zero where small": lambda m, h: torch.where(h > 0, h, 0.0).sum(-1, keepdim=True) * h,
    "padded and summed": lambda m, h: F.pad(h[:, :, None], (1, 1)).sum(1)[:, :1] + h,
    "a plane turned": lambda m, h: torch.rot90(h[:, :, None, None].expand(-1, -1, 2, 2), 1, (2, 3)).sum((2, 3)),
    "squeezed": lambda m, h: h[:, None, :, None].squeeze(),
    "a branch on bytes": lambda m, h: h * 2 if h.nbytes > 8 else h,
}  # fmt: skip

INEXACT = {
    "softmax": lambda m, h: h.softmax(-1),
    "strides": lambda m, h: h * h.stride(0),
    "bytes": lambda m, h: h / h.nbytes,
    "negative order": lambda m, h: h * torch.linalg.vector_norm(h, -1, -1, keepdim=True),
    "angle to a negative": lambda m, h: h * torch.atan2(h, -h.new_ones(())).sum(-1, keepdim=True),
    "rows filled": lambda m, h: h * torch.index_put(h, (torch.tensor([0]),), h.new_ones(())).sum(-1, keepdim=True),
    "padded with ones": lambda m, h: h * F.pad(h[:, :, None], (1, 0), value=1.0).sum((1, 2))[:, None],
    "group norm over the length": lambda m, h: F.group_norm(h[:, None], 1)[:, 0],
    "mean": lambda m, h: h - h.mean(-1, keepdim=True),
    "max": lambda m, h: h * (-h.abs()).max(-1, keepdim=True).values,
    "variance": lambda m, h: h * h.var(-1, keepdim=True),
    "product": lambda m, h: h * h.prod(-1, keepdim=True),
    "logsumexp": lambda m, h: h * h.logsumexp(-1, keepdim=True),
    "mean given away": lambda m, h: h * h.mean(-1).sum().item(),
    "mean by numpy": lambda m, h: h * float(h.detach().mean(-1).numpy().sum()),
    "mean in a list": lambda m, h: h * sum(h.detach().mean(-1).tolist()),
    "mean written and read": mean_written,
    "entries of a shape": lambda m, h: h * h.shape[1:].numel(),
    "mean squared distance": lambda m, h: h * F.mse_loss(h, 2 * h),
    "cross entropy of bits": lambda m, h: h * F.binary_cross_entropy_with_logits(h, h.sigmoid(), reduction="sum"),
    "soft margin": lambda m, h: h * F.soft_margin_loss(h, h.detach().sign(), reduction="sum"),
    "count": lambda m, h: h / (1 + (h > -9).sum(-1, keepdim=True)),
    "layer norm": lambda m, h: F.layer_norm(h, (m.width,)),
    "layer norm by shape": lambda m, h: F.layer_norm(h, h.shape[-1:]),
    "rms norm": lambda m, h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale,
    "mean of a parameter": lambda m, h: h * (m.scale / m.scale.mean()),
    "attention's default scale": lambda m, h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "divided by the size": lambda m, h: h / h.shape[-1],
    "divided by the root": lambda m, h: h / h.shape[-1] ** 0.5,
    "divided by math.sqrt": lambda m, h: h / math.sqrt(h.shape[-1]),
    "divided by numpy's root": lambda m, h: h / float(np.sqrt(h.shape[-1])),
    "divided by int": lambda m, h: h / int(h.shape[1]),
    "divided by numel": lambda m, h: h / h.numel(),
    "power": lambda m, h: h.abs() ** (1 / h.shape[-1]),
    "alpha": lambda m, h: torch.add(h, h, alpha=h.shape[-1]),
    "tensor of the size": lambda m, h: h * torch.tensor([h.shape[-1]]),
    "tensor of a fraction": lambda m, h: h * torch.tensor([h.shape[-1] / 2]),
    "full of the size": lambda m, h: h * torch.full((1,), h.shape[-1]),
}

FROZEN = {
    "view by a literal": (lambda m, h: h.flatten().view(-1, 8), "literal 8 in view"),
    "view by int": (lambda m, h: h.view(len(h), int(h.shape[1])), "literal 8 in view"),
    "view by a shift": (lambda m, h: h.view(len(h), m.width >> 1, 2).flatten(1), "literal"),
    "view by numpy": (lambda m, h: h.flatten().view(len(h), int(np.prod(h.shape[1:]))), "literal|computed"),
    "split by literals": (lambda m, h: torch.cat([t.relu() for t in h.split([3, 5], -1)], -1), "literal [35] in split"),
    "compared with a literal": (lambda m, h: h if h.shape[-1] == 8 else None, "must satisfy a comparison"),
    "looked up by the size": (lambda m, h: {8: h}[h.shape[-1]], "must satisfy a comparison"),
    "strides": (lambda m, h: h.as_strided((3, 8), (8, 1)), "viewed by strides"),
    "sort": (lambda m, h: h.sort(-1).values, "is ranked by sort"),
    "top": (lambda m, h: h * h.topk(2, -1).values[:, :1], "is ranked by topk"),
    "windowed": (lambda m, h: h * torch.hann_window(h.shape[-1]), "numbered by hann_window"),
    "the last by number": (lambda m, h: h * m.scale[h.shape[-1] - 1], "must satisfy a comparison"),
    "accumulated": (lambda m, h: h.cumsum(-1), "accumulated"),
    "numbered": (lambda m, h: h * torch.arange(h.shape[-1]), "numbered by arange"),
    "spaced": (lambda m, h: h * torch.linspace(0, 1, h.shape[-1]), "numbered by linspace"),
    "numbered by the largest": (lambda m, h: h * h.argmax(-1, keepdim=True), "numbered by argmax"),
    "numbers beside the largest": (lambda m, h: h * h.max(-1, keepdim=True).indices, "numbered by max"),
    "off the diagonal": (lambda m, h: h @ torch.eye(m.width, m.width + 1)[:, 1:].to(h), "numbered by eye"),
    "index list": (lambda m, h: h[:, [1, 0, 2, 3, 4, 5, 6, 7]], "indexed by a tensor"),
    "gathered": (lambda m, h: h.gather(1, h.argmax(-1, keepdim=True).expand(-1, 8)), "indexed by a tensor|literal"),
    "class likelihood": (
        lambda m, h: h * F.cross_entropy(h, torch.zeros(len(h), dtype=torch.long)),
        "looked up by number",
    ),
    "inverse": (
        lambda m, h: h @ torch.linalg.inv(h.t() @ h + 3 * torch.eye(m.width).to(h)),
        "goes through linalg_inv",
    ),
    "taken flat": (lambda m, h: h * h.take(torch.tensor([3])), "indexed as if flattened"),
    "unbind": (lambda m, h: torch.stack(h.unbind(-1)[::-1], -1), "taken apart by position"),
    "windows": (lambda m, h: h.unfold(1, 2, 2).flatten(1), "read in windows"),
    "scattered": (lambda m, h: torch.zeros_like(h).scatter(1, h.argmax(-1, keepdim=True), 1.0), "written to by number"),
    "spectrum": (lambda m, h: torch.fft.fft(h).real, "transformed"),
    "convolved along": (lambda m, h: F.conv1d(h[:, None], h.new_ones(1, 1, 3), padding=1)[:, 0], "spatial dimension"),
    "uneven parts": (weighted, "uneven part"),
}  # fmt: skip


COMPARED = {
    "size over a literal": lambda m, h: h * (1.0 / h.shape[-1]),
    "literal to the size": lambda m, h: h * 1.5 ** h.shape[-1],
    "literal compared": lambda m, h: h * (h.shape[-1] > 2.5) * (0.5 * h.shape[-1]),
    "literal over entries": lambda m, h: h * (1.0 / (h.shape[1:] * 2).numel()),
}  # fmt: skip


def build(function):
    torch.manual_seed(0)
    return Net(function).double(), torch.randn(3, 4).double()


def hidden(axes):
    """The axes of the outputs of the first layer."""
    return [axis for axis in axes if ("first.weight", 0) in axis.members]


@torch.no_grad()
def masked(model, axes, kept):
    """A copy in which every entry of the neurons that are not kept is zero."""
    model = copy.deepcopy(model)
    for name, positions in kept.items():
        for tensor, dim, label in axes.members(axes[name]):
            gone = (label >= 0) & ~torch.isin(label, positions)
            model.get_parameter(tensor).index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return model


def halved(axes, wanted, generator):
    counts = axes.feasible({axis.name: max(1, axis.size // 2) for axis in wanted})
    kept = {
        axis.name: torch.randperm(axis.size, generator=generator)[: counts[axis.name]].sort().values
        for axis in axes.free
        if counts[axis.name] < axis.size
    }
    attributes = tuple((change.path, change.value) for change in axes.attribute_values(counts))
    return kept, Plan(axes.tensor_indices(kept), attributes=attributes, values=axes.values(kept))


def removed(model, plan):
    model = copy.deepcopy(model)
    plan.apply(model)
    return model


@pytest.mark.parametrize("function", EXACT.values(), ids=EXACT)
def test_removing_equals_masking(function):
    model, x = build(function)
    axes = find_axes(model, x)
    found = hidden(axes)
    free = [axis for axis in found if axis.frozen is None]
    assert free, axes
    assert all(axis.exact for axis in free), axes
    for seed in range(3):
        kept, plan = halved(axes, free, torch.Generator().manual_seed(seed))
        assert kept
        smaller = removed(model, plan)
        assert smaller.first.weight.shape[0] < 8
        torch.testing.assert_close(smaller(x), masked(model, axes, kept)(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", INEXACT.values(), ids=INEXACT)
def test_what_depends_on_the_size_says_so(function):
    model, x = build(function)
    axes = find_axes(model, x)
    (axis,) = hidden(axes)
    assert axis.frozen is None
    assert not axis.exact
    assert axis.inexact
    assert "test_axes_forwards.py:" in axis.inexact
    kept, plan = halved(axes, [axis], torch.Generator().manual_seed(0))
    smaller = removed(model, plan)
    assert smaller.first.weight.shape[0] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not torch.allclose(smaller(x), masked(model, axes, kept)(x)), "exact after all"


@pytest.mark.parametrize("function", COMPARED.values(), ids=COMPARED)
def test_a_float_on_the_left_of_a_size_is_left_to_the_comparison(function):
    model, x = build(function)
    axes = find_axes(model, x)
    (axis,) = hidden(axes)
    assert axis.frozen is None
    assert axis.exact
    kept, plan = halved(axes, [axis], torch.Generator().manual_seed(0))
    assert not torch.allclose(removed(model, plan)(x), masked(model, axes, kept)(x))


@pytest.mark.parametrize(("function", "reason"), FROZEN.values(), ids=FROZEN)
def test_what_cannot_be_followed_is_frozen_with_the_reason(function, reason):
    model, x = build(function)
    axes = find_axes(model, x)
    found = hidden(axes)
    assert any(axis.frozen for axis in found), axes
    said = " | ".join(str(axis.frozen) for axis in found if axis.frozen)
    assert re.search(reason, said), said
    assert "test_axes_forwards.py:" in said
    _, plan = halved(axes, axes.free, torch.Generator().manual_seed(0))
    assert removed(model, plan)(x).shape == (3, 2)
