"""A cache that is found again is believed only as far as it is proven: nobody is ever taught another's answers."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from netopt.distillation import Cache, distill

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(48, 6, generator=torch.Generator().manual_seed(2))
ORDER = torch.randperm(48, generator=torch.Generator().manual_seed(3))


class Rows(Dataset):
    def __init__(self, x) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


class Pair(nn.Module):
    """Two outputs, of which one is chosen by ``output=``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 5)

    def forward(self, x):
        return self.body(x), self.body(x).tanh() * 3


def models():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), teacher


FORMS = {
    "tensors": lambda x: x,
    "loader": lambda x: DataLoader(TensorDataset(x), 8, shuffle=True),
    "dataset": Rows,
    "list": lambda x: list(x.split(8)),
}


def weights(model) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def trained(teacher, data, cache, **options):
    """The weights after training from the same start, and the report."""
    student, _ = models()
    report = distill(
        student, teacher, data, **{"epochs": 2, "batch_size": 8, "seed": 3, "lr": 0.01, "progress": False, **options},
        cache=cache,
    )  # fmt: skip
    return weights(student), report


def assert_own_answers(teacher, data, folder, **options) -> dict:
    """Trains on what lies in ``folder``, and without; both must be the same."""
    cached, report = trained(teacher, data(), Cache(path=folder), **options)
    plain, _ = trained(teacher, data(), False, **options)
    torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-6)
    return report.cache


@pytest.mark.parametrize("form", FORMS)
def test_the_same_call_finds_what_it_kept(form, tmp_path):
    _, teacher = models()
    for repeat in range(2):
        facts = assert_own_answers(teacher, lambda: FORMS[form](X), tmp_path)
        # Of 48 samples a first batch of eight is asked about again, which proves the others.
        assert facts["misses"] == (8 if repeat else 48)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["other data", "permuted rows", "one row"])
def test_other_samples_get_answers_of_their_own(form, change, tmp_path):
    _, teacher = models()
    one = X.clone()
    one[40] += 1
    later = {"other data": OTHER, "permuted rows": X[ORDER], "one row": one}[change]
    assert_own_answers(teacher, lambda: FORMS[form](X), tmp_path)
    assert_own_answers(teacher, lambda: FORMS[form](later), tmp_path)
    # And what was replaced by them is not taken for the first samples' again.
    assert_own_answers(teacher, lambda: FORMS[form](X), tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_another_teacher_gives_answers_of_its_own(form, tmp_path):
    _, teacher = models()
    assert_own_answers(teacher, lambda: FORMS[form](X), tmp_path)
    other = copy.deepcopy(teacher)
    other[2].bias.data[0] += 1
    steeper = copy.deepcopy(teacher)
    steeper[1] = nn.ELU()
    hidden = copy.deepcopy(teacher)
    hidden.register_forward_hook(lambda _module, _inputs, result: result * 2)
    for one in (other, steeper):
        assert_own_answers(one, lambda: FORMS[form](X), tmp_path)
    # They are kept side by side.
    assert trained(teacher, FORMS[form](X), Cache(path=tmp_path))[1].cache["misses"] == 8
    # What a fingerprint of layers and weights does not show, the first batch does.
    assert_own_answers(hidden, lambda: FORMS[form](X), tmp_path)


def test_another_output_or_forward_of_the_same_teacher_is_another_answer(tmp_path):
    teacher = Pair()
    for output in ("0", "1", lambda result: result[0], lambda result: result[1]):
        assert_own_answers(teacher, lambda: X, tmp_path, output=(None, output))
    for sign in (1, -1):

        def forward(model, x, sign=sign):
            result = model(x)
            return sign * (result[0] if isinstance(result, tuple) else result)

        assert_own_answers(teacher, lambda: X, tmp_path, forward=(None, forward))


def damaged(content: bytes, seed: int) -> bytes:
    """The file cut, emptied, lengthened, or with a byte flipped."""
    dice = random.Random(seed)
    kind = seed % 8
    if kind == 0:
        return content[: dice.randrange(len(content))]
    if kind == 1:
        return b"" if dice.random() < 0.3 else content + bytes(dice.randrange(1, 99))
    if kind == 2:
        return bytes(len(content))
    # Half of the flips go into the header, the others anywhere.
    place = dice.randrange(900) if kind < 5 else dice.randrange(4096, len(content))
    flipped = bytearray(content)
    flipped[place] ^= 1 << dice.randrange(8)
    return bytes(flipped)


@pytest.mark.parametrize("form", FORMS)
def test_of_damaged_files_no_wrong_answer_is_taught(form, tmp_path):
    _, teacher = models()
    trained(teacher, FORMS[form](X), Cache(path=tmp_path))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    plain, _ = trained(teacher, FORMS[form](X), False)
    wrong = []
    for seed in range(60):
        path.write_bytes(damaged(content, seed))
        cached, _ = trained(teacher, FORMS[form](X), Cache(path=tmp_path))
        if not torch.allclose(cached, plain, rtol=1e-5, atol=1e-6):
            wrong.append(seed)
    assert wrong == []
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_stranger_among_the_files_is_replaced_and_a_folder_that_is_none_is_an_error(tmp_path):
    _, teacher = models()
    assert_own_answers(teacher, lambda: X, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text("something else")
    assert_own_answers(teacher, lambda: X, tmp_path)
    student, _ = models()
    before = weights(student)
    with pytest.raises(OSError, match="cannot be opened"):
        distill(student, teacher, X, epochs=2, cache=Cache(path=path), progress=False)
    assert torch.equal(weights(student), before)


def test_two_runs_may_share_a_folder(tmp_path):
    """The second one, begun in the midst of the first, does not disturb it, whatever its data."""
    _, teacher = models()
    for form in ("tensors", "list"):
        for later in (X, OTHER, X[ORDER]):

            def begin(_student, epoch, form=form, later=later):
                if epoch.epoch == 1:
                    assert_own_answers(teacher, lambda: FORMS[form](later), tmp_path / form)

            cached, _ = trained(teacher, FORMS[form](X), Cache(path=tmp_path / form), epochs=3, callbacks=[begin])
            plain, _ = trained(teacher, FORMS[form](X), False, epochs=3)
            torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-6)
