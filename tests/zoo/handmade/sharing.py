"""Modules and parameters used more than once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case, tokens
from torch import nn


@case(
    "module_called_twice",
    inputs=(4, 10),
    other=(2, 10),
    share=0.99,
    expected=[axis("embed:0 block.0.weight:1 block.2:0 head.weight:1", 8), axis("block.0:0 block.2.weight:1", 14)],
)
class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.block = nn.Sequential(nn.Linear(8, 14), nn.ReLU(), nn.Linear(14, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(self.block(self.embed(x))))


@case(
    "shared_under_two_names",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("layers.0:0 layers.1:0 layers.1.weight:1 head.weight:1", 8)],
)
class SharedUnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        first, shared = nn.Linear(10, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList([first, shared, shared])
        self.again = shared
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in [*self.layers, self.again]:
            x = layer(x).tanh()
        return self.head(x)


@case(
    "siamese",
    inputs=lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)),
    other=lambda: (torch.randn(3, 3, 6, 6), torch.randn(3, 3, 6, 6)),
    share=0.99,
    expected=[axis("trunk.0:0 trunk.1:0 trunk.3.weight:1", 8), axis("trunk.3:0 compare.weight:1", 10)],
    sizes={},
)
class Siamese(nn.Module):
    """Two images through one trunk; a difference, a product and both sides are compared."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.compare = nn.Linear(40, 2)

    def forward(self, left, right):
        a, b = self.trunk(left), self.trunk(right)
        return self.compare(torch.cat([a, b, (a - b).abs(), a * b], dim=-1))


@case(
    "contrastive_towers",
    inputs=lambda: {"image": torch.randn(3, 12), "text": torch.randint(9, (3, 5))},
    other=lambda: {"image": torch.randn(2, 12), "text": torch.randint(9, (2, 7))},
    share=0.99,
    expected=[
        axis("image_tower.0:0 image_tower.2.weight:1", 10),
        axis("words:1 text_projection:0", 8),
        axis("image_tower.2:0 text_projection:1", 6, None),
    ],
)
class Contrastive(nn.Module):
    """Two towers that meet in a product only (CLIP)."""

    def __init__(self):
        super().__init__()
        self.image_tower = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 6))
        self.words = nn.Embedding(9, 8)
        self.text_projection = nn.Parameter(torch.randn(8, 6))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image, text):
        image = self.image_tower(image)
        text = self.words(text).mean(1) @ self.text_projection
        image = image / image.norm(dim=-1, keepdim=True)
        text = text / text.norm(p=2, dim=-1, keepdim=True)
        logits = self.logit_scale.exp() * image @ text.t()
        return {"per_image": logits, "per_text": logits.T}


@case(
    "tied_layers",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("a:0 b:0 c:0 d.weight:1 head.weight:1", 8), axis("c.weight:1 d:0", 9)],
)
class TiedLayers(nn.Module):
    """One Parameter under two layers, biases of their own, and a layer that is the other's transpose at birth only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 8), nn.Linear(10, 8)
        self.b.weight = self.a.weight
        self.d = nn.Linear(8, 9)
        self.c = nn.Linear(9, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x).relu() + self.b(x.flip(0)).relu()
        return self.head(x + self.c(self.d(x).relu()))


@case(
    "shared_norm_and_activation",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 6, 6),
    share=0.99,
    expected=[axis("conv1:0 conv2:0 conv2.weight:1 conv3.weight:1 norm:0 act:0", 8), axis("conv3:0 head.weight:1", 6)],
)
class SharedNorm(nn.Module):
    """One BatchNorm and one PReLU after two convolutions: their channels become one axis."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.PReLU(8)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.act(self.norm(self.conv1(x)))
        x = self.act(self.norm(self.conv2(x)))
        return self.head(self.conv3(x).relu())


@case(
    "encoder_decoder_shared_embedding",
    inputs=lambda: (torch.randint(11, (2, 5)), torch.randint(11, (2, 4))),
    other=lambda: (torch.randint(11, (3, 4)), torch.randint(11, (3, 6))),
    share=1.0,
    expected=[axis("shared:1 encoder.weight_ih:1 decoder.weight_ih:1 project:0", 8), axis(
        "encoder.weight_ih:0 encoder.weight_hh:0 encoder.weight_hh:1 encoder.bias_ih:0 encoder.bias_hh:0 "
        "decoder.weight_ih:0 decoder.weight_hh:0 decoder.weight_hh:1 decoder.bias_ih:0 "
        "decoder.bias_hh:0 project.weight:1", 9)],
)  # fmt: skip
class SequenceToSequence(nn.Module):
    """One embedding for source, target and output; the decoder starts where the encoder ended."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(11, 8)
        self.encoder, self.decoder = nn.GRUCell(8, 9), nn.GRUCell(8, 9)
        self.project = nn.Linear(9, 8)

    def forward(self, source, target):
        h = None
        for word in self.shared(source).transpose(0, 1):
            h = self.encoder(word, h)
        out = []
        for word in self.shared(target).unbind(1):
            h = self.decoder(word, h)
            out.append(self.project(h))
        return F.linear(torch.stack(out, 1), self.shared.weight)


@case(
    "recursive_depth",
    inputs=tokens(2, 8, 11),
    other=tokens(3, 4, 11),
    share=0.98,
    expected=[axis("embed:1 join:0 join.weight:1 head.weight:1", 8)],
)
class Recursive(nn.Module):
    """Neighbours joined pair by pair until one is left: both halves of the join read the same axis."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.join = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        while x.shape[1] > 1:
            x = torch.tanh(self.join(torch.cat((x[:, 0::2], x[:, 1::2]), dim=2)))
        return self.head(x.squeeze(1))
