"""What forwards do besides arithmetic: branches, loops, detached parts, checkpoints, writes in place, hooks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn
from torch.utils.checkpoint import checkpoint


@case(
    "branch_on_data",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    fake="it branches by value",
    expected=[axis("embed:0 small.weight:1 head.weight:1 small:0", 8, False)],
)
class BranchOnData(nn.Module):
    """One branch is taken, by a mean over the channels; the residual sum ties what both would do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.small = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        if x.abs().mean() > 0:
            small = self.small(x)
            x = x + small
        else:
            x = x - self.small(x)
        steps = int(x.detach().abs().max().clamp(1, 2).item())
        for _ in range(steps):
            x = x.tanh()
        return self.head(x)


@case(
    "training_only_branch",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.99,
    expected=[axis("conv1:0 conv2.weight:1 auxiliary.weight:1", 8), axis("conv2:0 head.weight:1", 10)],
)
class TrainingOnly(nn.Module):
    """An auxiliary head in training mode only, and whole blocks dropped at random."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1)
        self.auxiliary = nn.Linear(8, 4)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.conv1(x).relu()
        out = self.head(self.conv2(x).mean((2, 3)))
        if self.training:
            return out + 0.3 * self.auxiliary(x.mean((2, 3)))
        return out


@case(
    "stochastic_depth",
    inputs=(4, 10),
    other=(2, 10),
    share=0.99,
    expected=[
        axis("embed:0 ups.0.weight:1 ups.1.weight:1 downs:0 head.weight:1", 8),
        axis("ups.0:0 downs.0.weight:1", 12),
        axis("ups.1:0 downs.1.weight:1", 12),
    ],
)
class StochasticDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.ups = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def drop_path(self, x, p=0.5):
        if not self.training or p == 0.0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = x.new_empty(shape).bernoulli_(1 - p)
        return x * keep.div_(1 - p)

    def forward(self, x):
        x = self.embed(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + self.drop_path(down(up(x).relu()))
        return self.head(x)


@case(
    "frozen_parameters",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("0:0 1:0 3.weight:1", 12), axis("3:0 5.weight:1", 8)],
    prepare=lambda model: model[:2].requires_grad_(False),
)
def frozen_parameters():
    return nn.Sequential(nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


@case(
    "no_grad_and_detach",
    inputs=(4, 10),
    other=(2, 10),
    share=0.99,
    expected=[
        axis("backbone.0:0 backbone.2.weight:1", 12),
        axis("backbone.2:0 probe.weight:1 gate.weight:1", 8),
        axis("probe:0 gate:0 head.weight:1", 6),
    ],
)
class LinearProbe(nn.Module):
    """The backbone runs under no_grad; a gate works on a detached copy."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 8))
        self.probe, self.gate = nn.Linear(8, 6), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        with torch.inference_mode(False):
            gate = self.gate(features.detach().clone()).sigmoid()
        return self.head(self.probe(features) * gate.data)


@case(
    "checkpointed_blocks",
    inputs=(4, 10),
    other=(2, 10),
    share=0.99,
    expected=[
        axis("embed:0 blocks.0.0.weight:1 blocks.0.2:0 blocks.1.0.weight:1 blocks.1.2:0 head.weight:1", 8),
        axis("blocks.0.0:0 blocks.0.2.weight:1", 12),
        axis("blocks.1.0:0 blocks.1.2.weight:1", 12),
    ],
    warns="None of the inputs have requires_grad",
)
class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.1), nn.Linear(12, 8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + checkpoint(self.blocks[0], x, use_reentrant=False)
        x = x + checkpoint(self.blocks[1], x, use_reentrant=True)
        return self.head(x)


class SwishFunction(torch.autograd.Function):
    """x · sigmoid(x), its gradient by hand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s * (1 + x * (1 - s)))


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is turned around (domain adaptation)."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.scale * grad, None


@case(
    "custom_autograd_function",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("fc1:0 fc2.weight:1", 12), axis("fc2:0 head.weight:1 domain.weight:1", 8)],
)
class CustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(10, 12), nn.Linear(12, 8)
        self.head, self.domain = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        x = self.fc2(SwishFunction.apply(self.fc1(x))).relu()
        return self.head(x), self.domain(ReverseGradient.apply(x, 0.5))


@case(
    "in_place",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.99,
    expected=[axis("conv1:0 conv2:0 shift:0 conv3.weight:1", 8), axis("conv3:0 head.weight:1", 6)],
)
class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.shift = nn.Parameter(torch.zeros(8))
        self.conv3 = nn.Conv2d(8, 6, 3)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        y = self.conv1(x)
        y.add_(self.conv2(x)).mul_(0.5)
        y += self.shift[None, :, None, None]
        y = F.relu(y, inplace=True).mul(1.5).clamp_(max=6)
        y = self.conv3(y)
        y.transpose_(2, 3).sub_(0.1)
        return self.head(y.transpose_(2, 3))


@case(
    "writes_into_slices",
    inputs=(3, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("left:0 head.weight:1", 6, label="l"), axis("right:0 head.weight:1", 7, label="r")],
    sizes={"head.in_features": "l + r"},
)
class WritesIntoSlices(nn.Module):
    """A concatenation by hand: an empty tensor filled slice by slice."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(10, 6), nn.Linear(10, 7)
        self.head = nn.Linear(13, 3)

    def forward(self, x):
        a, b = self.left(x), self.right(x)
        n = a.shape[-1]
        out = torch.zeros(x.size(0), n + b.shape[-1], dtype=x.dtype, device=x.device)
        out[:, :n] = a
        out[:, n:] += b
        return self.head(out.sigmoid())


@case(
    "writes_along_tokens",
    inputs=(3, 5, 10),
    other=(2, 7, 10),
    share=0.98,
    fake="it writes where values are positive",
    expected=[axis("first:0 rest:0 head.weight:1", 8)],
)
class WritesAlongTokens(nn.Module):
    """Slices of another dimension: the channels are one axis all along."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(10, 8), nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        out = x.new_zeros(x.shape[0], x.shape[1], self.first.out_features)
        out[:, 0] = self.first(x[:, 0])
        out[:, 1:].copy_(self.rest(x[:, 1:]))
        out[x.sum(-1) > 0] *= 0.5
        return self.head(out)


@case(
    "unused_parts",
    inputs=(4, 10),
    other=(2, 10),
    share=0.45,
    expected=[axis("fc:0 head.weight:1 wasted.weight:1", 12)],
    frozen={"never.weight:0": "not used", "loose:0": "not used"},
)
class UnusedParts(nn.Module):
    """A layer and a parameter that no forward reaches, and a layer whose result is thrown away."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 12)
        self.head = nn.Linear(12, 3)
        self.never = nn.Linear(12, 20)
        self.loose = nn.Parameter(torch.randn(12))
        self.wasted = nn.Linear(12, 5)
        self.register_parameter("nothing", None)
        self.register_buffer("nothing_either", None)

    def forward(self, x):
        x = self.fc(x).relu()
        self.wasted(x)
        return self.head(x)


@case(
    "loop_over_time",
    inputs=(3, 6, 10),
    other=(2, 4, 10),
    share=0.98,
    expected=[axis("inside:0 state:0 state.weight:1 attend.weight:1 head.weight:1", 9), axis("attend:0 score:0", 7)],
)
class LoopOverTime(nn.Module):
    """States gathered in a list, stacked, and attended to."""

    def __init__(self):
        super().__init__()
        self.inside, self.state = nn.Linear(10, 9), nn.Linear(9, 9)
        self.attend = nn.Linear(9, 7)
        self.score = nn.Parameter(torch.randn(7))
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        h, states = None, []
        for t in range(x.shape[1]):
            h = self.inside(x[:, t]) if h is None else torch.tanh(self.inside(x[:, t]) + self.state(h))
            states.append(h)
        states = torch.stack(states, dim=1)
        weights = (self.attend(states).tanh() @ self.score).softmax(dim=1)
        return self.head(torch.bmm(weights.unsqueeze(1), states).squeeze(1))


class Caching(nn.Module):
    """Keeps a mask and a bias in plain attributes between forwards."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)
        self.slope = nn.Parameter(torch.randn(8))
        self.cache = {}
        self.last = None

    def forward(self, x):
        n = x.shape[1]
        if n not in self.cache:
            self.cache[n] = torch.linspace(0, 1, n)[:, None] * self.slope.detach().to("cpu")
        x = self.fc(x) + self.cache[n].to(x)
        self.last = x.detach()
        return self.head(x.relu())


@case(
    "caches_tensors",
    inputs=(3, 6, 10),
    other=(2, 4, 10),
    share=0.97,
    expected=[axis("fc:0 slope:0 head.weight:1", 8)],
)
def caches_tensors():
    return Caching()


# The cache hides from what it was computed: only the length that is cached is tried.
@case(
    "caches_tensors_and_has_run",
    inputs=(3, 6, 10),
    share=0.91,
    expected=[axis("fc:0 cache.6:1 head.weight:1", 8)],
    frozen={"slope:0": "not used"},
    warm=True,
)
def caches_tensors_and_has_run():
    return Caching()


class CachingUntilTrained(nn.Module):
    """Biases gathered once in evaluation mode, by length; dropped by every change of mode, as LeViT does it."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(10, 8), nn.Linear(8, 3)
        self.bias = nn.Parameter(torch.randn(5, 8))
        self.kept = {}

    def train(self, mode=True):
        if self.kept:
            self.kept = {}
        return super().train(mode)

    def biases(self, length):
        if self.training:
            return self.bias[torch.arange(length) % 5]
        if str(length) not in self.kept:
            self.kept[str(length)] = self.bias[torch.arange(length) % 5].detach()
        return self.kept[str(length)]

    def forward(self, x):
        return self.head(self.fc(x) * self.biases(x.shape[1]))


@case(
    "cache_dropped_by_a_change_of_mode",
    inputs=(3, 6, 10),
    other=(2, 4, 10),
    share=0.98,
    expected=[axis("fc:0 bias:1 kept.6:1 head.weight:1", 8)],
    warm=True,
    stir=False,
    prepare=nn.Module.eval,
)
def cache_dropped_by_a_change_of_mode():
    return CachingUntilTrained()


@case(
    "hooks",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("0:0 2.weight:1 4.weight:1", 8), axis("2:0 4.weight:1", 6)],
)
def hooks():
    """A forward hook that changes an output, and a pre-hook that joins an earlier result."""
    net = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(14, 3))
    seen = {}
    net[1].register_forward_hook(lambda module, args, out: seen.update(x=out * 2))
    net[4].register_forward_pre_hook(lambda module, args: (torch.cat([args[0], seen["x"]], dim=1),))
    return net


@case(
    "reversible_blocks_that_free_their_inputs",
    inputs=(2, 3, 6, 6),
    other=(3, 3, 8, 8),
    share=0.99,
    expected=[
        axis("stem:0 first.weight:0 first.bias:0 second.weight:1 head.weight:1", 4),
        axis("stem:0 second.weight:0 second.bias:0 first.weight:1 head.weight:1", 4),
    ],
    fake="entries are exchanged, which shapes alone have none of",
    train_step="the entries needed are gone",
)
class ReversibleBlocks(nn.Module):
    """Two halves that change each other in turn; what can be computed again is freed, as RevNet does it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        with torch.no_grad():
            a, b = (half.contiguous() for half in x.chunk(2, dim=1))
            c = a + self.first(b)
            d = b + self.second(c)
            y = torch.cat([c, d], dim=1)
            for one in (a, b, c, d):
                one.set_()
        x.data.set_()
        return self.head(y)
