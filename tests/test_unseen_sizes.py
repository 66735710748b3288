"""Sizes that C code reads out of an integer leave no trace; a plan of such a forward is compared, and not exact."""

from __future__ import annotations

import decimal
import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import netopt

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
