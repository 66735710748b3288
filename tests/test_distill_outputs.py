"""What is distilled is never guessed among several outputs, and a teacher may be the student's own base."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

from conftest import state_of, unchanged
from netopt.distillation import distill
from netopt.errors import InvalidArgumentError, NetoptError, ShapeMismatchError

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))


class Found(NamedTuple):
    boxes: torch.Tensor
    confidences: torch.Tensor


FORMS = {
    "tuple": (lambda boxes, classes: (boxes, classes), ["'0' (48, 3, 4)", "'1' (48, 3, 5)"]),
    "list": (lambda boxes, classes: [boxes, classes], ["'0'", "'1'"]),
    "nested": (lambda boxes, classes: (boxes, {"deep": [classes]}), ["'0'", "'1.deep.0'"]),
    "dict": (lambda boxes, classes: {"boxes": boxes, "classes": classes}, ["'boxes'", "'classes'"]),
    "named tuple": (Found, ["'boxes'", "'confidences'"]),
}
CLEAR = {
    "tensor": lambda boxes, classes: classes,
    "logits among others": lambda boxes, classes: {"boxes": boxes, "logits": classes},
    "integers beside": lambda boxes, classes: (classes, boxes.long()),
    "a loss beside": lambda boxes, classes: {"loss": boxes.mean(), "scores": classes},
    "a number beside": lambda boxes, classes: (boxes.sum(), classes),
    "hidden states beside": lambda boxes, classes: {"scores": classes, "hidden_states": (boxes, boxes)},
}


class Detector(nn.Module):
    def __init__(self, width, form) -> None:
        super().__init__()
        self.body, self.form = nn.Linear(6, width), form
        self.boxes, self.classes = nn.Linear(width, 12), nn.Linear(width, 15)

    def forward(self, x):
        h = self.body(x).tanh()
        return self.form(self.boxes(h).view(-1, 3, 4), self.classes(h).view(-1, 3, 5))


@pytest.mark.parametrize("form", FORMS)
def test_several_outputs_are_named_and_nothing_is_guessed(form):
    make, names = FORMS[form]
    student, teacher = Detector(8, make), Detector(24, make)
    with unchanged(student, teacher), pytest.raises(InvalidArgumentError) as caught:
        distill(student, teacher, X, loss="kl", progress=False)
    assert all(name in str(caught.value) for name in names)
    assert f"write output={names[0].split()[0]}" in str(caught.value)
    path = names[1].split()[0].strip("'")
    before = copy.deepcopy(student.state_dict())
    distill(student, teacher, X, loss="kl", output=path, progress=False)
    after = student.state_dict()
    assert torch.equal(after["boxes.weight"], before["boxes.weight"])
    assert not torch.equal(after["classes.weight"], before["classes.weight"])


@pytest.mark.parametrize("form", CLEAR)
def test_one_output_needs_no_name(form):
    student, teacher = Detector(8, CLEAR[form]), Detector(24, CLEAR[form])
    before = copy.deepcopy(student.state_dict())
    distill(student, teacher, X, loss="kl", progress=False)
    assert torch.equal(student.state_dict()["boxes.weight"], before["boxes.weight"])
    assert not torch.equal(student.state_dict()["classes.weight"], before["classes.weight"])


class Modal(nn.Module):
    """Answers in training as it does not in evaluation."""

    def __init__(self, in_training) -> None:
        super().__init__()
        self.body, self.norm, self.head, self.in_training = (
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 5),
            in_training,
        )

    def forward(self, x):
        y = self.head(self.norm(self.body(x)).tanh())
        return self.in_training(y) if self.training else y


@pytest.mark.parametrize(
    ("in_training", "kind", "message"),
    [
        (lambda y: (y, y * 2), InvalidArgumentError, "several outputs, '0'"),
        (lambda y: y[:, :3], ShapeMismatchError, r"\(48, 3\)"),
        (lambda y: y[:, None], ShapeMismatchError, r"\(48, 1, 5\)"),
        (lambda y: y.mean(), ShapeMismatchError, "single number"),
        (lambda y: {"loss": y.mean()}, NetoptError, "single number"),
        (lambda y: None, NetoptError, "without a floating-point tensor"),
        (lambda y: y.long(), NetoptError, "torch.int64"),
        (lambda y: y @ y, NetoptError, "forward of Modal failed"),
    ],
)
def test_another_form_of_result_in_training_shows_in_the_dry_run(in_training, kind, message):
    for mode in (True, False):
        student, teacher = Modal(in_training).train(mode), nn.Linear(6, 5)
        with unchanged(student, teacher), pytest.raises(kind, match=message):
            distill(student, teacher, X, progress=False)


def test_a_function_chooses_in_both_modes_and_the_dry_run_leaves_statistics_alone():
    student, teacher = Modal(lambda y: (y, y * 2)), nn.Linear(6, 5)

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    report = distill(student, teacher, X, epochs=2, batch_size=16, validation=X, output=first, progress=False)
    assert report.steps == 6
    assert student.norm.num_batches_tracked.item() == 6


class Adapted(nn.Module):
    """A frozen layer beside a small one that is trained and can be switched off."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.dropout, self.on = nn.Dropout(0.3), True
        self.base.requires_grad_(not frozen)

    def forward(self, x):
        y = self.base(x)
        return y + self.up(self.down(self.dropout(x))) if self.on else y


class Off(nn.Module):
    """The same modules with adapters switched off."""

    def __init__(self, model, graded: bool) -> None:
        super().__init__()
        self.model, self.graded = model, graded

    def forward(self, x):
        self.model.on = False
        try:
            with torch.set_grad_enabled(self.graded):
                return self.model(x)
        finally:
            self.model.on = True


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("optimizer", ["default", "adapters alone"])
def test_the_students_own_base_is_a_teacher_with_adapters_off(graded, cache, optimizer):
    torch.manual_seed(0)
    student = Adapted(frozen=optimizer == "default")
    teacher, modes = Off(student, graded), []
    adapters = [student.down.weight, student.up.weight]
    options = {"optimizer": None if optimizer == "default" else torch.optim.AdamW(adapters, 0.01)}
    expected, base = teacher(X).detach().clone(), copy.deepcopy(student.base.state_dict())
    student.dropout.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    flags = {key: value for key, value in state_of(student).items() if "training" in key or "identity" in key}
    report = distill(student, teacher, X, epochs=10, cache=cache, **options, progress=False)
    assert report.history[-1].loss < report.history[0].loss
    assert torch.equal(teacher(X), expected)
    assert all(torch.equal(one, base[name]) for name, one in student.base.state_dict().items())
    assert {key: value for key, value in state_of(student).items() if key in flags} == flags
    # The student trains in training mode, dropout and all, although its modules are the teacher's too.
    assert modes
    assert all(modes)


def test_a_shared_tensor_that_is_trained_and_read_is_named():
    student = Adapted(frozen=False)
    with (
        unchanged(student),
        pytest.raises(InvalidArgumentError, match=r"'base.weight' and the teacher's 'model.base.w"),
    ):
        distill(student, Off(student, True), X, progress=False)
    on = Adapted()
    other = nn.Sequential(on)
    with unchanged(on), pytest.raises(InvalidArgumentError, match=r"'down\.weight' and the teacher's '0\.down\.w"):
        distill(on, other, X, progress=False)


def test_statistics_that_training_updates_are_not_shared_either():
    student = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False))
    teacher = nn.Sequential(nn.Linear(6, 5), student[1])
    with unchanged(student, teacher), pytest.raises(InvalidArgumentError, match=r"'1.running_mean'"):
        distill(student, teacher, X, progress=False)
    student[1].eval()
    distill(student, teacher, X, progress=False)
    assert student[1].num_batches_tracked.item() == 0
