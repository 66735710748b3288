"""What is left works: every kind of layer refitted after neurons are removed; nothing else of the model changes."""

import copy

import pytest
import torch
from torch import nn

import netopt
from netopt.errors import InvalidArgumentError, MissingDataError


def mixed(size, count=3, rows=96):
    """Batches whose entries depend on one another, so that what is removed can be told from what stays."""
    generator = torch.Generator().manual_seed(1)
    shape = torch.randn(size[0], size[0], generator=generator) if len(size) == 1 else None
    found = [torch.randn(rows, *size, generator=generator) for _ in range(count)]
    return [one @ shape for one in found] if shape is not None else found


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 24) / 3)
        self.b = nn.Parameter(torch.randn(24) / 3)
        self.v = nn.Parameter(torch.randn(24, 4) / 5)

    def forward(self, x):
        return (x @ self.w + self.b).relu() @ self.v


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 24) / 3)
        self.down = nn.Parameter(torch.randn(3, 24, 4) / 5)

    def forward(self, x):
        hidden = torch.bmm(x.expand(3, *x.shape), self.up).relu()
        return torch.bmm(hidden, self.down).sum(0)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        h = self.first(x)
        h = h + self.down(self.up(self.norm(h)).relu())
        return self.out(h)


class Last(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.out = cell, nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (4, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.o(y.transpose(1, 2).flatten(2)))


MODELS = {
    "linear": lambda: (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), (8,)),
    "no bias": lambda: (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4, bias=False)), (8,)),
    "conv1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 12, 3), nn.ReLU(), nn.Conv1d(12, 4, 3, stride=2), nn.Flatten()),
        (2, 16),
    ),
    "conv2d": lambda: (
        nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3, dilation=2, padding=1), nn.Flatten()),
        (2, 8, 8),
    ),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(1, 8, 2), nn.ReLU(), nn.Conv3d(8, 3, 2), nn.Flatten()), (1, 5, 5, 5)),
    "grouped": lambda: (
        nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1)),
        (2, 8, 8),
    ),
    "depthwise": lambda: (
        nn.Sequential(nn.Conv2d(2, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 3, 1)),
        (2, 8, 8),
    ),
    "transposed": lambda: (
        nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 4, 3, stride=2)),
        (2, 8, 8),
    ),
    "batch norm": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 12, 3),
            nn.ReLU(),
            nn.Conv2d(12, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 3, 1),
        ),
        (2, 8, 8),
    ),
    "product": lambda: (Product(), (8,)),
    "experts": lambda: (Experts(), (8,)),
    "residual": lambda: (Residual(), (8,)),
    "lstm": lambda: (Last(nn.LSTM(5, 16, batch_first=True)), (6, 5)),
    "gru": lambda: (Last(nn.GRU(5, 16, batch_first=True)), (6, 5)),
    "attention": lambda: (Attention(), (7, 16)),
}


def built(name):
    torch.manual_seed(0)
    model, size = MODELS[name]()
    return model.eval(), mixed(size)


def error(model, dense, data):
    with torch.no_grad():
        return sum(float((model(x) - dense(x)).square().mean()) for x in data)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_come_nearer_to_what_they_were_on_other_data(name):
    model, data = built(name)
    dense, bare = copy.deepcopy(model), copy.deepcopy(model)
    arguments = {"amount": 0.4, "importance": "magnitude", "data": data[:2], "progress": False}
    netopt.prune_neurons(bare, data[0][:4], repair=False, **arguments)
    report = netopt.prune_neurons(model, data[0][:4], **arguments)
    assert report.repair is not None
    assert report.repair.removed, report.repair
    assert error(model, dense, data[2:]) < 0.8 * error(bare, dense, data[2:])
    assert [p.shape for p in model.parameters()] == [p.shape for p in bare.parameters()]


def test_repair_false_leaves_what_masking_would():
    model, data = built("linear")
    masked = copy.deepcopy(model)
    report = netopt.prune_neurons(model, data[0], 0.5, importance="magnitude", data=data, repair=False, progress=False)
    assert report.repair is None
    assert report.to_dict()["repair"] is None
    netopt.prune_neurons(masked, data[0], 0.5, importance="magnitude", mode="mask", progress=False)
    torch.testing.assert_close(model(data[1]), masked(data[1]))


def test_without_data_nothing_is_repaired_and_true_needs_them():
    model, data = built("linear")
    report = netopt.prune_neurons(model, data[0], 0.25, importance="magnitude", progress=False)
    assert report.repair is None
    with pytest.raises(MissingDataError, match="repair=True needs data="):
        netopt.prune_neurons(model, data[0], 0.25, importance="magnitude", repair=True, progress=False)
    with pytest.raises(InvalidArgumentError, match="mode='remove'"):
        netopt.prune_neurons(model, data[0], 0.25, data=data, repair=True, mode="mask", progress=False)
