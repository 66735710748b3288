"""What forwards compute inside themselves: losses, gradients, decompositions, identities; and what nobody reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import nn


@case(
    "codebook_with_losses",
    inputs=(4, 8),
    other=(6, 8),
    # The rest is the codebook's rows and what is 8 wide, input and output.
    share=0.94,
    expected=[axis("encoder:0 codes:1 decoder.weight:1", 6, False)],
    frozen={"codes.weight:0!": "looked up|numbered"},
)
class Codebook(nn.Module):
    """VQ-VAE: the nearest code by distance, a straight-through gradient, and two losses beside the result."""

    def __init__(self):
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(8, 6), nn.Embedding(10, 6), nn.Linear(6, 8)

    def forward(self, x):
        z = self.encoder(x)
        codes = self.codes.weight
        nearest = (z.pow(2).sum(1, keepdim=True) + codes.pow(2).sum(1) - 2 * z @ codes.t()).argmin(1)
        q = self.codes(nearest)
        return self.decoder(z + (q - z).detach()), F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())


@case(
    "losses_inside",
    inputs=lambda: (torch.randn(4, 8), torch.tensor([0, 2, 1, 2])),
    other=lambda: (torch.randn(2, 8), torch.tensor([0, 2])),
    # The classes stay.
    share=0.98,
    expected=[axis("trunk:0 head.weight:1 same.weight:1", 9), axis("same:0", 5)],
    frozen={"head.weight:0!": "looked up by number"},
)
class LossesInside(nn.Module):
    """The loss is the result: class likelihood, and the summed distance of a projection to itself halved."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head, self.same = nn.Linear(8, 9), nn.Linear(9, 3), nn.Linear(9, 5)

    def forward(self, x, target):
        x = self.trunk(x).relu()
        y = self.same(x)
        loss = F.cross_entropy(self.head(x), target)
        return loss + F.huber_loss(y, y / 2, reduction="sum") + F.smooth_l1_loss(y, y / 3, reduction="none").sum()


@case(
    "energy_and_force",
    inputs=(4, 6),
    other=(3, 6),
    # Only the bias of the energy has no neuron.
    share=0.98,
    expected=[axis("net.0:0 net.2.weight:1", 10), axis("net.2:0 net.4.weight:1", 7)],
)
class EnergyAndForce(nn.Module):
    """An energy model: the forward returns the gradient of its own output to its input."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 10), nn.Softplus(), nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.net(x)
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
        return energy, force


@case(
    "force_on_pixels",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.97,
    expected=[axis("first:0 second.weight:1", 6), axis("second:0 last.weight:1", 5)],
)
class ForceOnPixels(nn.Module):
    """A score by gradients through convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.last = nn.Conv2d(5, 1, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.last(F.silu(self.second(F.silu(self.first(x)))))
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
        return force


@case(
    "gaussian_process",
    inputs=(4, 6),
    other=(3, 6),
    # The points and their kernel matrix stay.
    share=0.96,
    expected=[axis("net.0:0 net.2.weight:1", 10), axis("net.2:0 points:1 scale:0", 3, False)],
    frozen={"points:0!": "goes through .*cholesky", "value:0!": "goes through"},
)
class GaussianProcess(nn.Module):
    """Deep kernel learning: a kernel matrix of inducing points is decomposed, on features whose number is free.

    The matrix is made of weights alone, by a sum over the features: it mixes them.
    """

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
        self.points, self.value = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 1))
        self.scale = nn.Parameter(torch.zeros(3))

    def kernel(self, a, b):
        a, b = a * self.scale.exp(), b * self.scale.exp()
        return torch.exp(-(a[:, None] - b[None]).square().sum(-1) / 2)

    def forward(self, x):
        matrix = self.kernel(self.points, self.points) + torch.eye(len(self.points)).to(x) / 10
        return self.kernel(self.net(x), self.points) @ torch.cholesky_solve(self.value, torch.linalg.cholesky(matrix))


@case(
    "weights_nobody_reads",
    inputs=(3, 5, 7),
    other=(2, 4, 7),
    share=0.99,
    expected=[
        axis("attention.in_proj_weight:0 attention.in_proj_bias:0 attention.out_proj.weight:1", 4, label="heads"),
        axis("attention.in_proj_weight:0 attention.in_proj_bias:0 attention.out_proj.weight:1", 3, False),
        axis("lift:0 attention.in_proj_weight:1 attention.out_proj:0 head.weight:1", 12),
    ],
)
class WeightsNobodyReads(nn.Module):
    """The attention weights, averaged over heads, go nowhere: the average says nothing of the heads."""

    def __init__(self):
        super().__init__()
        self.lift, self.attention = nn.Linear(7, 12), nn.MultiheadAttention(12, 4, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = self.lift(x)
        y, _ = self.attention(x, x, x, need_weights=True, average_attn_weights=True)
        return self.head(x + y)


@case(
    "numbers_over_sizes",
    inputs=(4, 6),
    other=(3, 6),
    # Only the bias of the output has no neuron.
    share=0.98,
    expected=[axis("first:0 second.weight:1", 10), axis("second:0 head.weight:1", 8)],
    compared="a float on the left of a size keeps no origin",
)
class NumbersOverSizes(nn.Module):
    """Averages written out: by a float over a size, and by the number of entries of a shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.second(x * (1.0 / x.shape[1:].numel())).relu()
        return self.head(x * (2.0 / x.size(-1)))


@case(
    "rows_without_entries",
    inputs=(2, 5, 6),
    other=(3, 7, 6),
    # Only the bias of the output has no neuron.
    share=0.97,
    expected=[axis("lift:0 head.weight:1", 8)],
)
class RowsWithoutEntries(nn.Module):
    """A remainder that is empty on these inputs is viewed, joined to another and joined on again."""

    def __init__(self):
        super().__init__()
        self.lift, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.lift(x)
        rest = x[:, x.shape[1] :].reshape(x.shape[0], -1, x.shape[-1])
        return self.head(torch.cat([x, torch.cat([rest, rest], dim=1)], dim=1))
