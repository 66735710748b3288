"""Sizes that C code reads out of an integer leave no trace; a plan of such a forward is compared, and not exact."""

from __future__ import annotations

import copy
import decimal
import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import netopt
from netopt import masking
from netopt.errors import NothingToPruneError
from netopt.masking.lifecycle import masks_of_indices

READ: dict[str, Callable[[int], float]] = {
    "math.log": math.log,
    "math.exp": lambda n: math.exp(-n),
    "math.sqrt": math.sqrt,
    "math.hypot": lambda n: math.hypot(n, 1),
    "math.ldexp": lambda n: math.ldexp(1.0, n),
    "math.comb": lambda n: math.comb(n, 2),
    "math.fsum": lambda n: math.fsum([n, 0.5]),
    "math.prod": lambda n: math.prod([n]),
    "float": float,
    "complex": lambda n: complex(n).real,
    "over a literal": lambda n: 1.0 / n,
    "from a literal": lambda n: 100.0 - n,
    "power": lambda n: 2.0**n,
    "divmod": lambda n: divmod(100.0, n)[0],
    "round": lambda n: round(1.5 * n, 1),
    "sum": lambda n: sum([n, 0.5]),
    "bytes": lambda n: len(bytes(n)),
    "text": lambda n: len("a" * n),
    "slice of a list": lambda n: len([0] * 99) and len([*range(99)][:n]),
    "range": lambda n: sum(1 for _ in range(n)),
    "format": lambda n: int(f"{n:d}"),
    "old format": lambda n: int("%d" % n),  # noqa: UP031 - which C code does
    "struct": lambda n: struct.unpack("d", struct.pack("d", n))[0],
    "character": lambda n: ord(chr(n)),
    "hash": hash,
    "lookup": lambda n: {8: 1.0, 4: 2.0}.get(n, 3.0),
    "decimal": lambda n: float(decimal.Decimal(n)),
    "torch.Size": lambda n: torch.Size([n]).numel(),
    "torch.tensor": lambda n: float(torch.tensor(n)),
    "np.sqrt": lambda n: float(np.sqrt(n)),
    "np.float32": lambda n: float(np.float32(n)),
    "np.array": lambda n: float(np.array([n]).sum()),
}


class Sized(nn.Module):
    def __init__(self, read: Callable[[int], float], device: str = "cpu") -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(*sizes, device=device) for sizes in ((4, 8), (8, 3)))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last(hidden * self.read(hidden.shape[1]))


@pytest.mark.parametrize("read", READ)
def test_a_plan_is_compared_before_it_is_called_exact(read):
    torch.manual_seed(0)
    model, x = Sized(READ[read]), torch.randn(5, 4)
    assert not netopt.plan_neurons(model, x, 0.5, progress=False).exact
    assert not netopt.prune_neurons(model, x, 0.5, progress=False).plan.exact


def test_where_nothing_can_be_compared_the_plan_says_so():
    x, scores = torch.randn(5, 4, device="meta"), {"first": torch.arange(8.0)}
    plan = netopt.plan_neurons(Sized(math.log, "meta"), x, 0.5, importance=scores, progress=False)
    assert [row.reason for row in plan.axes] == ["by its rules; not compared"]
    assert "not compared" in str(plan)
    plan = netopt.plan_neurons(Sized(math.log), torch.randn(5, 4), 0.5, verify=False, progress=False)
    assert "not compared" in str(plan)


CHUNKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "joined": lambda h, n: torch.cat([h[:, at : at + 4].tanh() for at in range(0, n, 4)], 1),
    "reversed": lambda h, n: torch.cat([h[:, at : at + 4] for at in reversed(range(0, n, 4))], 1),
    "normalised": lambda h, n: torch.cat([h[:, at : at + 4].softmax(1) for at in range(0, n, 4)], 1),
    "added": lambda h, n: torch.cat([sum(h[:, at : at + 4] for at in range(0, n, 4)) for _ in range(n // 4)], 1),
    "by twos": lambda h, n: torch.cat([h[:, at : at + 1] for start in (0, 1) for at in range(start, n, 2)], 1),
    "one by one": lambda h, n: torch.stack([h[:, at] for at in range(n)], 1),
    "counted": lambda h, n: h / len([*range(0, n, 4)]),
}


class Chunked(nn.Module):
    def __init__(self, chunks: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.chunks = nn.Linear(4, 16), nn.Linear(16, 3), chunks

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.last(self.chunks(hidden, hidden.shape[1]))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_loops_over_a_size_are_followed_or_frozen_with_the_line_or_inexact(chunks):
    torch.manual_seed(0)
    model, x = Chunked(CHUNKS[chunks]), torch.randn(5, 4)
    masked = copy.deepcopy(model)
    try:
        plan = netopt.prune_neurons(model, x, 0.3, importance="magnitude", progress=False).plan
    except NothingToPruneError as error:
        assert "test_unseen_sizes.py" in str(error)  # noqa: PT017 - refused, or carried out
        return
    masking.put(masked, masks_of_indices(masked, plan.tensors))
    assert not plan.exact or torch.allclose(model(-x), masked(-x), atol=1e-6)
    assert plan.exact == (chunks in ("joined", "reversed"))
