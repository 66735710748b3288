"""The cache changes the time and nothing else: not with shuffling, not with augmentation, not with repeated samples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from netopt.distillation import Cache, distill
from netopt.distillation.data.fingerprints import sample_fingerprints
from netopt.distillation.loss import cache as cache_module
from netopt.distillation.loss import losses
from netopt.errors import InvalidArgumentError


class Counting(nn.Module):
    """A teacher that counts the samples it is asked about."""

    def __init__(self, classes: int = 5, scale: float = 1.0) -> None:
        super().__init__()
        self.body, self.scale = nn.Linear(6, classes), scale
        self.asked = 0

    @property
    def asked(self) -> int:
        return COUNTS.get(id(self), 0)

    @asked.setter
    def asked(self, value: int) -> None:
        COUNTS[id(self)] = value

    def forward(self, x):
        self.asked += len(x)
        return self.body(x) * self.scale


# Of each teacher; one is given back with its attributes as they were.
COUNTS: dict[int, int] = {}


def student(classes: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes))


def weights(model) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


class Noisy(Dataset):
    """Samples with a random augmentation; the first ``calm`` have none."""

    def __init__(self, x, calm: int = 0) -> None:
        self.x, self.calm = x, calm

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + (0.1 * torch.randn(6) if index >= self.calm else 0)


X = torch.randn(70, 6, generator=torch.Generator().manual_seed(1))

FORMS = {
    "tensors": lambda: X,
    "dataset": lambda: Noisy(X, calm=70),
    "shuffled loader": lambda: DataLoader(TensorDataset(X), 16, shuffle=True),
    "loader of dicts": lambda: DataLoader([{"input": row} for row in X], 16, shuffle=True),
    "list of batches": lambda: list(X.split(16)),
    "function": lambda: lambda: iter(X[torch.randperm(70)].split(16)),
}


class Named(Counting):
    """Takes its input by another name."""

    def forward(self, input):  # noqa: A002
        return super().forward(input)


@pytest.mark.parametrize("form", FORMS)
def test_a_cached_run_is_the_uncached_run(form):
    one, teacher = student(), Counting()
    if form == "loader of dicts":
        one, teacher = nn.Sequential(), Named()
        one = Named()
    other = copy.deepcopy(one)
    options = {"epochs": 4, "batch_size": 16, "loss": "kl", "seed": 3, "progress": False}
    cached = distill(one, teacher, FORMS[form](), cache=True, **options)
    asked, teacher.asked = teacher.asked, 0
    distill(other, teacher, FORMS[form](), cache=False, **options)
    # The rehearsal asks about the first batch; from the second epoch on nothing is asked.
    assert asked == 70 + 16
    assert teacher.asked == 4 * 70 + 16
    assert cached.cache["cache hits"] == 3 * 70
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-5, atol=1e-6)


def test_auto_keeps_nothing_that_is_not_used_again():
    report = distill(student(), Counting(), X, progress=False)
    assert report.cache == {}
    assert distill(student(), Counting(), X, epochs=2, progress=False).cache["cache hits"] == 70


@pytest.mark.parametrize("calm", [0, 60])
def test_random_augmentation_is_noticed_and_nothing_stale_is_used(calm):
    one, teacher = student(), Counting()
    other = copy.deepcopy(one)
    options = {"epochs": 3, "seed": 0, "batch_size": 16, "progress": False}
    report = distill(one, teacher, Noisy(X, calm), **options)
    assert "augmentation" in report.notes[0]
    assert len(report.notes) == 1
    distill(other, teacher, Noisy(X, calm), cache=False, **options)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-5, atol=1e-6)


def test_augmentation_is_noticed_without_indices_too():
    def data():
        return iter((X + torch.randn_like(X)).split(16))

    report = distill(student(), Counting(), data, epochs=3, progress=False)
    assert report.cache["cache hits"] == 0
    assert "augmentation" in report.notes[0]


def test_samples_drawn_with_replacement_are_asked_about_once():
    teacher = Counting()
    loader = DataLoader(TensorDataset(X), 1, sampler=WeightedRandomSampler(torch.ones(70), 200))
    report = distill(student(), teacher, loader, cache=True, progress=False)
    assert teacher.asked <= 71
    assert report.cache["misses"] == teacher.asked - 1


def test_what_exceeds_memory_goes_to_a_file_that_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for data in (X, list(X.split(16))):
        one, other, teacher = student(), None, Counting()
        other = copy.deepcopy(one)
        report = distill(one, teacher, data, epochs=3, seed=0, cache=Cache(limit=10), progress=False)
        assert report.cache["kept in"] == "file"
        distill(other, teacher, data, epochs=3, seed=0, cache=False, progress=False)
        torch.testing.assert_close(weights(one), weights(other), rtol=1e-5, atol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_found_again_by_the_same_teacher_only(tmp_path):
    teacher = Counting()
    for repeat in range(2):
        teacher.asked = 0
        distill(student(), teacher, X, epochs=2, cache=Cache(path=tmp_path), progress=False)
        assert teacher.asked == (70 + 64 if repeat == 0 else 2 * 64)
    other = Counting()
    distill(student(), other, X, epochs=2, cache=Cache(path=tmp_path), progress=False)
    assert other.asked == 70 + 64


@pytest.mark.parametrize("scale", [1.0, 1e7])
def test_float16_is_left_where_a_value_exceeds_its_range(scale):
    teacher, one = Counting(2000, scale), student(2000)
    report = distill(one, teacher, X, epochs=2, loss="cosine", seed=0, progress=False)
    assert report.cache["bytes"] == 70 * 2000 * (2 if scale == 1 else 4)
    assert report.loss == report.loss


def test_float16_is_left_where_all_samples_are_nearly_alike():
    """A constant far from zero takes all of float16's digits, and the differences that are learnt have none."""

    class Apart(Counting):
        def forward(self, x):
            return super().forward(x) + 5000

    kept = {}
    for teacher in (Counting(2000), Apart(2000)):
        report = distill(student(2000), teacher, X, epochs=2, loss="cosine", seed=0, progress=False)
        kept[type(teacher)] = report.cache["bytes"]
    assert kept == {Counting: 70 * 2000 * 2, Apart: 70 * 2000 * 4}


def test_float16_is_used_where_the_exact_outputs_would_take_much_room(monkeypatch):
    report = distill(student(), Counting(), X, epochs=2, progress=False)
    assert report.cache["bytes"] == 70 * 5 * 4
    monkeypatch.setattr(cache_module, "EXACT", 70 * 5 * 4 - 1)
    one, other, teacher = student(), student(), Counting()
    other.load_state_dict(one.state_dict())
    options = {"epochs": 3, "loss": "kl", "seed": 0, "progress": False}
    report = distill(one, teacher, X, **options)
    assert report.cache["bytes"] == 70 * 5 * 2
    distill(other, teacher, X, cache=False, **options)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-3, atol=1e-4)


class Sure(Counting):
    """Believes in a few words of its vocabulary, as language models do."""

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__(1500)
        torch.nn.init.normal_(self.body.weight, std=scale)


def test_of_a_vocabulary_the_largest_logits_are_kept_where_they_say_it_all():
    torch.manual_seed(0)
    sure, unsure, one = Sure(), Sure(0.1), student(1500)
    options = {"epochs": 8, "temperature": 2.0, "lr": 0.03, "seed": 0, "progress": False}
    dense, few = 70 * 1500 * 2, 70 * (64 * (4 + 4) + 4)

    def bytes_of(teacher, loss="kl", **cache):
        settings = {"cache": Cache(**cache)} if cache else {}
        return distill(copy.deepcopy(one), teacher, X, loss=loss, **options, **settings).cache["bytes"]

    assert bytes_of(sure) == few
    # Not where much would be lost, not for losses that need more, and not where it is not wanted.
    assert bytes_of(unsure) == dense
    assert bytes_of(sure, {"kl": 1.0, "mse": 1.0}) == dense
    assert bytes_of(sure, losses.kl.using(standardize=True)) == dense
    assert bytes_of(sure, topk=None) == dense
    cached, asked = copy.deepcopy(one), copy.deepcopy(one)
    first = distill(cached, sure, X, loss="kl", **options)
    second = distill(asked, sure, X, loss="kl", cache=False, **options)
    assert first.loss == pytest.approx(second.loss, rel=0.01)
    before, after = ((losses.kl(z(X), sure.body(X), temperature=2.0).mean().item()) for z in (one, cached))
    assert after == pytest.approx(losses.kl(asked(X), sure.body(X), temperature=2.0).mean().item(), rel=0.01)
    assert after < 0.8 * before


def test_a_folder_says_in_which_form_it_keeps_outputs(tmp_path):
    """Whoever comes later, with a first batch that would suggest another form, reads what is there."""
    steep = X.clone()
    steep[60:] *= 1e6  # beyond the range of float16

    teacher = Counting(2000)

    def found(data):
        teacher.asked = 0
        report = distill(
            student(2000), teacher, data, loss="cosine", cache=Cache(path=tmp_path), epochs=2, progress=False
        )
        return teacher.asked, report

    def ordered(rows):
        return DataLoader(TensorDataset(steep), 10, sampler=rows)

    asked, first = found(ordered(list(range(60))))
    again, second = found(ordered(list(range(60, 70)) + list(range(60))))
    assert first.cache["bytes"] == second.cache["bytes"] == 70 * 2000 * 2
    # What float16 cannot hold is asked for each time, the first batch found is asked about to prove it, and the rest
    # is found.
    assert (asked, again) == (60 + 10, 10 + 2 * 10 + 10)
    assert second.loss == second.loss


def test_top_k_keeps_the_probability_of_the_rest():
    teacher, one = Counting(200, 3.0), student(200)
    other = copy.deepcopy(one)
    options = {"epochs": 3, "loss": "kl", "temperature": 2.0, "seed": 0, "progress": False}
    report = distill(one, teacher, X, cache=Cache(topk=199), **options)
    distill(other, teacher, X, cache=False, **options)
    # With all but one kept the last one is known from the rest.
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-4, atol=1e-5)
    few = distill(copy.deepcopy(other), teacher, X, cache=Cache(topk=8), **options)
    assert few.cache["bytes"] < report.cache["bytes"] / 10


def test_hints_are_kept_with_the_outputs():
    teacher = nn.Sequential(nn.Linear(6, 8), Counting())
    teacher[1].body = nn.Linear(8, 5)
    one = student()
    other = copy.deepcopy(one)
    options = {"epochs": 3, "hints": {"0": "0"}, "seed": 0, "progress": False}
    distill(one, teacher, X, **options)
    assert teacher[1].asked == 70 + 64
    distill(other, teacher, X, cache=False, **options)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-5, atol=1e-6)


def test_fingerprints_tell_samples_apart():
    x = torch.randn(1000, 3)
    prints = sample_fingerprints(x)
    assert len({tuple(row) for row in prints.tolist()}) == 1000
    changed = x.clone()
    changed[::2, 1] = torch.nextafter(changed[::2, 1], torch.tensor(9.0))
    different = (sample_fingerprints(changed) != prints).any(1)
    assert different[::2].all()
    assert not different[1::2].any()
    for dtype in (torch.uint8, torch.int64, torch.float16, torch.bool, torch.float64):
        assert sample_fingerprints(x.to(dtype)).shape == (1000, 2)


def test_wrong_settings_are_told():
    for topk in (0, True, "all", 2.5):
        with pytest.raises(InvalidArgumentError, match="topk must be at least 1, None or 'auto'"):
            Cache(topk=topk)
    with pytest.raises(InvalidArgumentError, match="dtype must be a floating-point one"):
        Cache(dtype=torch.int8)
    with pytest.raises(InvalidArgumentError, match="cache must be"):
        distill(student(), Counting(), X, cache=3, progress=False)
