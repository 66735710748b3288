"""Complex and integer tensors, half precision, memory formats, and submodules whose inside is compiled."""

from __future__ import annotations

import warnings

import torch
from tests.zoo.case import axis, case
from torch import nn


@case(
    "fourier_filter",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 8, 8),
    share=0.99,
    expected=[axis("stem:0 complex_weight:0 head.weight:1", 8)],
)
class FourierFilter(nn.Module):
    """Multiplication by learned complex weights in the frequencies of space; channels are carried (GFNet)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.complex_weight = nn.Parameter(0.2 * torch.randn(8, 8, 5, 2))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        _, _, h, w = x.shape
        x = torch.fft.rfft2(x, dim=(2, 3), norm="ortho")
        x = x * torch.view_as_complex(self.complex_weight)
        return self.head(torch.fft.irfft2(x, s=(h, w), dim=(2, 3), norm="ortho"))


@case(
    "fourier_neural_operator",
    inputs=(2, 1, 16),
    other=(3, 1, 24),
    share=0.99,
    expected=[axis("lift:0 spectral:0 local.weight:1", 6), axis("spectral:1 local:0 head.weight:1", 5)],
)
class SpectralConvolution(nn.Module):
    """Complex parameters contracted over channels, written into zeros mode by mode."""

    def __init__(self, modes=4):
        super().__init__()
        self.modes = modes
        self.lift = nn.Conv1d(1, 6, 1)
        self.spectral = nn.Parameter(0.3 * torch.randn(6, 5, modes, dtype=torch.cfloat))
        self.local = nn.Conv1d(6, 5, 1)
        self.head = nn.Conv1d(5, 1, 1)

    def forward(self, x):
        x = self.lift(x)
        spectrum = torch.fft.rfft(x)
        out = torch.zeros(len(x), self.spectral.size(1), x.size(-1) // 2 + 1, dtype=spectrum.dtype, device=x.device)
        out[:, :, : self.modes] = torch.einsum("bix,iox->box", spectrum[:, :, : self.modes], self.spectral.to(spectrum))
        x = torch.fft.irfft(out, n=x.size(-1)) + self.local(x)
        return self.head(x.relu())


@case(
    "fourier_over_channels",
    inputs=(4, 5, 10),
    other=(2, 7, 10),
    share=0.62,
    expected=[axis("mlp.0:0 mlp.2.weight:1", 12)],
    frozen={"embed.weight:0": "fft"},
)
class FNet(nn.Module):
    """A transform over the channels mixes what cannot be taken apart."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(10, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        return self.head(x + self.mlp(x))


@case(
    "complex_layer",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("real:0 imaginary:0 mix:1", 6), axis("mix:0 head.weight:1", 5)],
)
class ComplexLayer(nn.Module):
    """A complex matrix between two real layers."""

    def __init__(self):
        super().__init__()
        self.real, self.imaginary = nn.Linear(10, 6), nn.Linear(10, 6)
        self.mix = nn.Parameter(torch.randn(5, 6, dtype=torch.complex64))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        z = torch.complex(self.real(x), self.imaginary(x))
        z = torch.nn.functional.linear(z, self.mix.to(z.dtype))
        return self.head(z.abs() + z.angle().cos() * 0.1)


@case(
    "integer_buffers",
    inputs=lambda: torch.randint(0, 50, (3, 6)),
    other=lambda: torch.randint(0, 50, (2, 4)),
    share=0.98,
    expected=[axis("table:1 signs:0 fc.weight:1", 8), axis("fc:0 steps:0 head.weight:1", 6)],
)
class IntegerBuffers(nn.Module):
    """Integer buffers as values (signs, counts) and as row numbers (a hash)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("hash", torch.randint(0, 16, (50,)))
        self.register_buffer("signs", torch.randint(0, 2, (8,)) * 2 - 1)
        self.register_buffer("steps", torch.arange(6, dtype=torch.int32))
        self.table = nn.Parameter(torch.randn(16, 8))
        self.fc = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        x = self.table[self.hash[ids]] * self.signs
        return self.head(self.fc(x).relu() + 0.1 * self.steps).sum(1)


@case(
    "half_precision_inside",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("fc1:0 fc2.weight:1", 12), axis("fc2:0 head.weight:1", 8)],
    double=False,
    tolerance=1e-2,
)
class HalfInside(nn.Module):
    """The middle layer is bfloat16, the rest float32."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 12)
        self.fc2 = nn.Linear(12, 8, dtype=torch.bfloat16)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.fc1(x).relu()
        return self.head(self.fc2(x.to(self.fc2.weight.dtype)).float())


@case(
    "bfloat16_model",
    inputs=lambda: torch.randn(2, 3, 8, 8, dtype=torch.bfloat16),
    other=lambda: torch.randn(3, 3, 6, 6, dtype=torch.bfloat16),
    share=0.99,
    fake="torch casts no fake module in place",
    expected=[axis("0:0 1:0 3.weight:1", 8), axis("3:0 6.weight:1", 6)],
    double=False,
    tolerance=5e-2,
)
def bfloat16_model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU("tanh"), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).to(torch.bfloat16)  # fmt: skip


@case(
    "autocast_inside",
    inputs=(4, 10),
    other=(2, 10),
    share=0.98,
    expected=[axis("fc1:0 fc2.weight:1", 12), axis("fc2:0 head.weight:1", 8)],
    double=False,
    tolerance=5e-2,
)
class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(10, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.fc2(self.fc1(x).relu()).relu()
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


@case(
    "channels_last",
    inputs=lambda: torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
    other=lambda: torch.randn(3, 3, 6, 10).to(memory_format=torch.channels_last),
    share=0.99,
    fake="torch casts no fake module in place",
    expected=[axis("0:0 1:0 3:0 4.weight:1", 8), axis("4:0 7.weight:1", 6)],
)
def channels_last():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).to(memory_format=torch.channels_last)  # fmt: skip


class Scripted(nn.Module):
    """A body that torch.jit has compiled, between two layers it has not."""

    def __init__(self, body):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 8))
        self.body = body
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.body(self.first(x)))


@case(
    "scripted_submodule",
    inputs=(4, 10),
    other=(2, 10),
    share=0.4,
    expected=[axis("first.0:0 first.2.weight:1", 9)],
    frozen={"body.0.weight:0": "script", "last.weight:1": "script"},
)
def scripted_submodule():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return Scripted(torch.jit.script(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))))


@case(
    "traced_submodule",
    inputs=(4, 10),
    other=(2, 10),
    share=0.4,
    fake="torch traces no fake module",
    expected=[axis("first.0:0 first.2.weight:1", 9)],
    frozen={"body.0.weight:0": "script", "last.weight:1": "script"},
)
def traced_submodule():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        return Scripted(torch.jit.trace(body, torch.randn(2, 8)))


@case(
    "compiled_submodule",
    inputs=(4, 10),
    other=(2, 10),
    share=0.99,
    expected=[
        axis("first.0:0 first.2.weight:1", 9),
        axis("first.2:0 body._orig_mod.0.weight:1", 8),
        axis("body._orig_mod.0:0 body._orig_mod.2.weight:1", 12),
        axis("body._orig_mod.2:0 last.weight:1", 8),
    ],
    warns="The .grad attribute of a Tensor that is not a leaf",
)
def compiled_submodule():
    body = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    return Scripted(torch.compile(body, backend="eager"))
