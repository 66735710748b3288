"""Parameters may be views of any kind: a step writes to their entries and to nothing beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import unchanged
from netopt.distillation import distill
from netopt.distillation.loop.optimizing import is_dense, overlaps
from netopt.errors import InvalidArgumentError

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))

# What is left of a larger tensor, for a weight of (16, 8); whether it is dense.
VIEWS = {
    "whole": ((16, 8), lambda big: big, True),
    "rows": ((20, 8), lambda big: big[2:18], True),
    "columns": ((16, 32), lambda big: big[:, 3:11], False),
    "every second entry": ((16, 16), lambda big: big[:, ::2], False),
    "every third row": ((48, 8), lambda big: big[::3], False),
    "transposed": ((8, 16), lambda big: big.t(), True),
    "transposed columns": ((8, 40), lambda big: big[:, 4:20].t(), False),
    "permuted": ((2, 8, 16), lambda big: big.permute(2, 1, 0)[..., 1], True),
    "permuted, with gaps": ((8, 2, 16), lambda big: big.permute(2, 0, 1)[..., 1], False),
    "as strided": ((400,), lambda big: big.as_strided((16, 8), (20, 2), 5), False),
    "as strided, dense": ((400,), lambda big: big.as_strided((16, 8), (1, 16), 5), True),
    "one of several heads": ((16, 3, 8), lambda big: big[:, 1], False),
}
EXPANDED = {
    "one row": ((1, 8), lambda big: big.expand(16, 8)),
    "one number": ((1,), lambda big: big.expand(16, 8)),
    "a window": ((100,), lambda big: big.as_strided((16, 8), (1, 1))),
}


def models():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return student, nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def with_view(student, shape, view):
    """The student with a view for its first weight, the memory it is a view of, and which entries are its own."""
    big, own = torch.randn(shape), torch.zeros(shape, dtype=torch.bool)
    view(big).copy_(student[0].weight.detach())
    view(own).fill_(True)
    student[0].weight = nn.Parameter(view(big))
    return big, own


OPTIMIZERS = {
    "default": None,
    "adam": torch.optim.Adam,
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "several groups": lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}]),
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", VIEWS)
def test_neighbours_stay_and_the_result_is_that_of_plain_memory(case, optimizer):
    shape, view, dense = VIEWS[case]
    student, teacher = models()
    plain = copy.deepcopy(student)
    big, own = with_view(student, shape, view)
    before = big.clone()
    assert is_dense(student[0].weight) is dense
    assert not overlaps(student[0].weight)
    options = {"epochs": 3, "optimizer": OPTIMIZERS[optimizer], "seed": 0, "progress": False}
    distill(student, teacher, X, **options)
    distill(plain, teacher, X, **options)
    assert torch.equal(big[~own], before[~own])
    assert not torch.equal(big[own], before[own])
    assert torch.equal(view(big), student[0].weight)
    for one, other in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", EXPANDED)
def test_entries_that_are_one_number_are_refused_by_name_unless_frozen(case):
    shape, view = EXPANDED[case]
    student, teacher = models()
    big = torch.randn(shape)
    student[0].weight = nn.Parameter(view(big))
    assert overlaps(student[0].weight)
    with unchanged(teacher), pytest.raises(InvalidArgumentError, match=r"'0.weight', of shape \(16, 8\).* \.clone\(\)"):
        distill(student, teacher, X, progress=False)


def test_density_of_odd_shapes():
    assert is_dense(torch.zeros(()))
    assert is_dense(torch.zeros(0, 3))
    assert is_dense(torch.zeros(4, 1, 3)[:, :, :].permute(2, 1, 0))
    assert is_dense(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert not is_dense(torch.zeros(3, 3).to_sparse())
    assert not is_dense(torch.zeros(1).expand(3))
    assert not overlaps(torch.zeros(1, 3).expand(1, 3))
