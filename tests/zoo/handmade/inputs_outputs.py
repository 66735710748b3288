"""Inputs and outputs of every shape: tuples, dicts, None, nesting, dataclasses."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case
from torch import Tensor, nn


@case(
    "inputs_tuple_with_none",
    inputs=lambda: (torch.randn(4, 10), None, torch.randn(4, 6)),
    other=lambda: (torch.randn(2, 10), torch.rand(2, 1), torch.randn(2, 6)),
    share=0.98,
    expected=[axis("left:0 head.weight:1", 8, label="l"), axis("right:0 head.weight:1", 7, label="r")],
    sizes={"head.in_features": "l + r"},
)
class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(10, 8), nn.Linear(6, 7)
        self.head = nn.Linear(15, 3)

    def forward(self, a, weight=None, b=None):
        a, b = self.left(a).relu(), self.right(b).relu()
        if weight is not None:
            a = a * weight
        return self.head(torch.cat((a, b), dim=-1))


@case(
    "inputs_dict_nested",
    inputs=lambda: {
        "batch": {"image": torch.randn(2, 3, 8, 8), "boxes": [torch.randn(2, 4), torch.randn(2, 4)]},
        "flag": True,
    },
    other=lambda: {"batch": {"image": torch.randn(3, 3, 6, 6), "boxes": [torch.randn(3, 4)]}, "flag": True},
    share=0.98,
    expected=[axis("conv:0 box:0 head.weight:1", 8)],
)
class NestedInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.box = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, batch, flag=False, scale=1.0):
        x = self.conv(batch["image"]).mean((-1, -2))
        for boxes in batch["boxes"]:
            x = x + scale * self.box(boxes)
        return self.head(x if flag else -x)


@dataclass
class Detection:
    """What a detector returns."""

    boxes: Tensor
    scores: Tensor | None = None
    features: list | None = None


@case(
    "outputs_dataclass_with_none",
    inputs=(4, 10),
    other=(2, 10),
    share=0.97,
    expected=[axis("trunk:0 boxes.weight:1 scores.weight:1", 12)],
    frozen={"boxes.weight:0": "output"},
)
class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(10, 12)
        self.boxes, self.scores = nn.Linear(12, 4), nn.Linear(12, 1)

    def forward(self, x):
        x = self.trunk(x).relu()
        return Detection(self.boxes(x).sigmoid(), scores=self.scores(x), features=None)


@case(
    "outputs_dict_nested",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.99,
    expected=[axis("stem:0 body.weight:1 side.weight:1", 8), axis("body:0 head.weight:1", 6)],
)
class ManyOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head, self.side = nn.Conv2d(6, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        low = self.stem(x).relu()
        out = self.head(self.body(low).relu())
        label = out.mean((2, 3)).argmax(1)
        return OrderedDict(out=out, aux=[(self.side(low), None), {"label": label}], shape=tuple(x.shape), text="ok")


class Encoded(NamedTuple):
    """What the encoder found and the decoder made of it."""

    mean: Tensor
    log_variance: Tensor
    reconstruction: Tensor


@case(
    "variational_autoencoder",
    inputs=(4, 10),
    other=(2, 10),
    share=0.95,
    expected=[axis("encode:0 mean.weight:1 log_variance.weight:1", 12), axis("decode.0:0 decode.2.weight:1", 9)],
    frozen={"mean.weight:0": "output", "decode.0.weight:1": "output"},
)
class VariationalAutoencoder(nn.Module):
    """Its code is returned, so the code's width stays."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(10, 12)
        self.mean, self.log_variance = nn.Linear(12, 4), nn.Linear(12, 4)
        self.decode = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 10))

    def forward(self, x):
        h = F.relu(self.encode(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return Encoded(mean, log_variance, self.decode(z))


@case(
    "hidden_features_returned",
    inputs=(4, 10),
    other=(2, 10),
    share=0.86,
    expected=[axis("fc1:0 fc2.weight:1", 12)],
    frozen={"fc2.weight:0": "output"},
)
class ReturnsFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(10, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        features = self.fc2(self.fc1(x).relu())
        return self.head(features.relu()), {"features": features}


@case(
    "loss_in_forward",
    inputs=lambda: {"input_ids": torch.randint(11, (2, 5)), "labels": torch.randint(11, (2, 5))},
    other=lambda: {"input_ids": torch.randint(11, (3, 4)), "labels": torch.randint(11, (3, 4))},
    share=0.96,
    expected=[axis("embed:1 fc.weight:1", 8), axis("fc:0 head.weight:1", 9)],
    frozen={"head.weight:0": "output"},
)
class LossInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(11, 8), nn.Linear(8, 9), nn.Linear(9, 11)

    def forward(self, input_ids, labels=None, return_dict=True):
        logits = self.head(self.fc(self.embed(input_ids)).relu())
        loss = None if labels is None else F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))
        return {"loss": loss, "logits": logits} if return_dict else (loss, logits)


@case(
    "loss_only",
    inputs=lambda: (torch.randn(4, 10), torch.randint(3, (4,))),
    other=lambda: (torch.randn(2, 10), torch.randint(3, (2,))),
    share=0.97,
    expected=[axis("fc:0 head.weight:1", 9)],
)
class LossOnly(nn.Module):
    """Only a scalar comes out, but the classes are numbered by the targets."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(10, 9), nn.Linear(9, 3)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x, target):
        return self.loss(self.head(self.fc(x).relu()), target)


@case(
    "scalar_and_positional_arguments",
    inputs=lambda: (torch.randn(2, 3, 8), 2, "mean"),
    other=lambda: (torch.randn(3, 3, 9), 3, "mean"),
    share=0.97,
    expected=[axis("conv:0 head.weight:1", 8)],
)
class PlainArguments(nn.Module):
    """Numbers and words among the inputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x, stride, reduce):
        x = F.avg_pool1d(self.conv(x), stride)
        return self.head(getattr(x, reduce)(-1))


@case(
    "diffusion_step",
    inputs=lambda: (torch.randn(2, 3, 8, 8), torch.tensor([3, 7])),
    other=lambda: (torch.randn(3, 3, 6, 6), torch.tensor([1, 2, 9])),
    share=0.99,
    expected=[
        axis("time.0:0 time.2.weight:1", 12),
        axis("conv1:0 time.2:0 norm:0 conv2.weight:1", 2, None, "g"),
        axis("conv1:0 time.2:0 norm:0 conv2.weight:1", 4, False, "c"),
        axis("conv2:0 last.weight:1 skip:0", 6),
    ],
    sizes={"norm.num_groups": "g", "norm.num_channels": "g * c"},
)
class DiffusionStep(nn.Module):
    """A time embedding from sines, added to the channels."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 12), nn.SiLU(), nn.Linear(12, 8))
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv2, self.skip = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x, t):
        frequencies = torch.exp(torch.arange(8, device=x.device, dtype=x.dtype) * -1.1)
        angles = t[:, None].to(x.dtype) * frequencies[None]
        emb = self.time(torch.cat((angles.sin(), angles.cos()), dim=-1))
        h = self.norm(self.conv1(x) + emb[:, :, None, None])
        return self.last(self.conv2(F.silu(h)) + self.skip(x))
