"""What a step does not do: wait for a number, fetch rows or step parameters one by one where it need not."""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from conftest import unchanged
from netopt.distillation import distill
from netopt.distillation.data.loaders import gathers, indexed_loader
from netopt.distillation.data.sources import Sampling, source

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(5, (96,), generator=torch.Generator().manual_seed(2))


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), nn.Linear(6, 5)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class Tokens(nn.Module):
    """Token logits of integer inputs."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, dim), nn.Linear(dim, 11)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


IDS = torch.randint(11, (96, 7), generator=torch.Generator().manual_seed(2))
LABELS = IDS.masked_fill(IDS > 8, -100)
WAITING = {
    "tensors": ((X, Y), {"loss": "kl", "hard": 0.3}),
    "loader": (lambda: DataLoader(TensorDataset(X, Y), 8, shuffle=True), {"loss": "kl", "hard": 0.3}),
    "accumulated": ((X, Y), {"loss": {"kl": 1.0, "mse": 0.1}, "accumulate": 2, "clip": 1.0, "scheduler": "cosine"}),
    "hints": (X, {"hints": {"0": "0"}}),
    "uncached": ((X, Y), {"loss": "dist", "cache": False}),
    "tokens": ({"input_ids": IDS, "labels": LABELS}, {"loss": "kl", "hard": 0.5}),
    "masked loader": (
        lambda: DataLoader([{"input_ids": a, "labels": b} for a, b in zip(IDS, LABELS, strict=True)], 8),
        {"hard": 0.5, "loss": "kl"},
    ),
}


@pytest.mark.parametrize("case", WAITING)
def test_no_number_is_read_off_a_tensor_in_a_step(case):
    """`.item()`, and what is no other by another name, would let every step wait for the device."""
    data, options = WAITING[case]
    counts = []
    for epochs in (2, 3):
        student, teacher = (Tokens(), Tokens(12)) if "input_ids" in str(data) or case == "masked loader" else models()
        if "hints" in options:
            teacher = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
        with Calls() as calls:
            distill(
                student, teacher, data() if callable(data) else data, batch_size=8, epochs=epochs, optimizer=sgd,
                **options, progress=False,
            )  # fmt: skip
        counts.append(calls.counts["_local_scalar_dense"])
    # Once an epoch the sums are read, and a loader draws a seed; an epoch has twelve batches.
    assert counts[1] - counts[0] <= 3


class Own(Dataset):
    """The same rows, one by one."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index):
        return X[index], Y[index]


@pytest.mark.parametrize("kind", ["shuffled", "sampler", "workers", "odd keys"])
def test_rows_taken_at_once_are_the_batches_of_the_loader(kind):
    rows = TensorDataset(X, Y)
    options = {
        "shuffled": {"batch_size": 10, "shuffle": True},
        "sampler": {"batch_sampler": BatchSampler(RandomSampler(rows), 7, drop_last=True)},
        "workers": {"batch_size": 40, "shuffle": True, "num_workers": 1},
        "odd keys": {"batch_size": 10, "sampler": [-1, *range(30)]},
    }[kind]
    loader = DataLoader(rows, **options)
    assert gathers(loader)
    torch.manual_seed(0)
    theirs = [list(loader), list(loader)]
    torch.manual_seed(0)
    copied = indexed_loader(loader, (0, 1))
    ours = [list(copied), list(copied)]
    for epoch, batches in zip(theirs, ours, strict=True):
        assert len(epoch) == len(batches)
        for (x, y), (index, idle, batch) in zip(epoch, batches, strict=True):
            assert type(batch) is list
            assert torch.equal(x, batch[0])
            assert torch.equal(y, batch[1])
            assert not idle
            assert index is None or torch.equal(X[index], x)
    assert (ours[0][0][0] is None) is (kind == "odd keys")


def test_other_loaders_are_read_as_they_are():
    rows = TensorDataset(X, Y)

    class Mine(TensorDataset):
        pass

    for loader in (
        DataLoader(Own(), 4), DataLoader(Mine(X), 4), DataLoader(rows, 4, collate_fn=lambda samples: samples),
        DataLoader(rows, None),
    ):  # fmt: skip
        assert not gathers(loader) or loader.batch_sampler is None
    assert indexed_loader(DataLoader(rows, None), (0, 1)) is None


def test_a_loader_is_shuffled_anew_in_every_epoch():
    seen = []
    student, teacher = models()
    handle = student.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].clone())))
    for data in (DataLoader(TensorDataset(X, Y), 96, shuffle=True), DataLoader(Own(), 96, shuffle=True), X):
        seen.clear()
        distill(student, teacher, data, epochs=3, batch_size=96, progress=False)
        # The first of all is the dry run.
        orders = [batch for training, batch in seen if training][1:]
        assert len(orders) == 3
        assert not any(torch.equal(orders[a], orders[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
        assert all(torch.equal(one.sort(0).values, X.sort(0).values) for one in orders)
    handle.remove()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_steps_all_parameters_at_once_where_the_choice_is_left_open(kind):
    """The weights are the same to rounding, and the optimizer is as it was."""
    (student, teacher), seen = models(), []
    twins = [copy.deepcopy(student) for _ in range(2)]

    def watch(optimizer, *_):
        seen.append([group["fused"] for group in optimizer.param_groups])

    steps = kind(student.parameters(), lr=0.01)
    steps.register_step_pre_hook(watch)
    options = {"epochs": 3, "seed": 0, "progress": False}
    distill(student, teacher, X, optimizer=steps, **options)
    assert set(map(tuple, seen)) == {(True,)}
    assert [group["fused"] for group in steps.param_groups] == [None]
    distill(twins[0], teacher, X, optimizer=lambda p: kind(p, lr=0.01, fused=False), **options)
    distill(twins[1], teacher, X, optimizer=lambda p: kind(p, lr=0.01, foreach=True), **options)
    for twin in twins:
        for one, other in zip(student.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # It can be stepped on without it.
    student(X).sum().backward()
    steps.step()


@pytest.mark.parametrize(
    "choice", [{"fused": False}, {"foreach": False}, {"foreach": True}, {"capturable": False, "fused": True}]
)
def test_a_choice_of_the_callers_stays(choice):
    (student, teacher), seen = models(), []
    steps = torch.optim.AdamW(student.parameters(), **choice)
    before = [(group["fused"], group["foreach"]) for group in steps.param_groups]
    steps.register_step_pre_hook(
        lambda optimizer, *_: seen.append([(g["fused"], g["foreach"]) for g in optimizer.param_groups])
    )
    distill(student, teacher, X, optimizer=steps, progress=False)
    assert all(one == before for one in seen)
    assert seen


def test_an_order_depends_on_the_seed_and_the_epoch_and_touches_no_global_state():
    def drawn(seed, number, skip=0):
        found = source((X, Y), Sampling(32, seed, shuffle=True, once=True))
        return [one.identities for one in found.begin(number, skip)]

    torch.manual_seed(0)
    random.seed(0)
    state = torch.get_rng_state(), random.getstate()
    first = drawn(5, 0)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert all(map(torch.equal, first, drawn(5, 0)))
    assert all(map(torch.equal, first[2:], drawn(5, 0, 2)))
    assert not torch.equal(first[0], drawn(5, 1)[0])
    assert not torch.equal(first[0], drawn(6, 0)[0])
    torch.manual_seed(6)
    assert torch.equal(torch.cat(drawn(5, 1)), torch.randperm(96))


def test_ignored_labels_are_looked_for_in_the_data_once_and_in_validation_on_its_own():
    student, teacher = models()
    few = Y.clone()
    few[:90] = -100
    options = {"loss": "kl", "hard": 0.5, "lr": 1e-12, "seed": 0, "progress": False}
    report = distill(student, teacher, (X, Y), validation=(X, few), **options)
    only = distill(student, teacher, (X, Y), validation=(X[90:], Y[90:]), **options)
    assert report.best == pytest.approx(only.best, rel=1e-5)
    assert report.loss != pytest.approx(report.best, rel=1e-3)


def test_a_step_leaves_the_labels_and_the_batch_alone():
    student, teacher = models()
    data = (X.clone(), Y.clone())
    with unchanged(teacher):
        distill(student, teacher, data, hard=0.5, loss="kl", epochs=2, progress=False)
    assert torch.equal(data[0], X)
    assert torch.equal(data[1], Y)
