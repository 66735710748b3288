"""The contract of one call: the loss is the one promised, the student learns, and nothing is left behind."""

from __future__ import annotations

import copy
import json
import signal
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import random_state, state_of, unchanged
from netopt.distillation import DistillationReport, distill
from netopt.errors import NonFiniteError

DOUBLE = torch.float64


def net(width: int = 16, classes: int = 5, dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, classes)
    return nn.Sequential(*layers).to(dtype)


def mlp(width: int = 8, classes: int = 5, dtype: torch.dtype = DOUBLE) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, classes)).to(dtype)


@pytest.fixture(name="x")
def inputs():
    return torch.randn(96, 6)


def by_hand(student, batches, loss, lr=0.1):
    """One plain SGD step a batch."""
    optimizer = torch.optim.SGD(student.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        loss(student, batch).backward()
        optimizer.step()
    return student


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def same(a: nn.Module, b: nn.Module, **tolerance) -> None:
    for (name, one), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def base_loss(teacher):
    return lambda student, x: ((student(x) - teacher(x).detach()) ** 2).sum(1).mean()


def test_the_base_loss_is_the_sum_over_outputs_and_the_mean_over_samples():
    teacher, student = mlp(32), mlp()
    batches = list(torch.randn(100, 6, dtype=DOUBLE).split(32))  # the last is smaller
    expected = by_hand(copy.deepcopy(student), batches, base_loss(teacher))
    distill(student, teacher, batches, optimizer=sgd, progress=False)
    same(student, expected, rtol=1e-12, atol=1e-14)


def test_labels_are_mixed_in_and_t_squared_stays_at_hard_zero():
    teacher, student = mlp(32), mlp()
    x, y = torch.randn(64, 6, dtype=DOUBLE), torch.randint(5, (64,))
    for hard in (0.0, 0.3):

        def loss(model, batch, hard=hard):
            x, y = batch
            soft = F.kl_div((model(x) / 3).log_softmax(1), (teacher(x).detach() / 3).softmax(1), reduction="batchmean")
            return (1 - hard) * 9 * soft + hard * F.cross_entropy(model(x), y)

        expected = by_hand(copy.deepcopy(student), [(x, y)] * 3, loss)
        ours = copy.deepcopy(student)
        distill(ours, teacher, [(x, y)] * 3, loss="kl", temperature=3.0, hard=hard, optimizer=sgd, progress=False)
        same(ours, expected, rtol=1e-10, atol=1e-12)


def test_the_teacher_is_bit_for_bit_unchanged_and_was_in_eval_mode(x):
    teacher, student = net(32), net()
    teacher.train()
    teacher[1].eval()
    teacher[0].weight.requires_grad_(False)
    teacher[4].bias.grad = torch.ones(5)
    modes = []
    handle = teacher[3].register_forward_hook(lambda module, *_: modes.append(module.training))
    with unchanged(teacher):
        distill(student, teacher, x, epochs=2, progress=False)
    handle.remove()
    assert modes
    assert not any(modes)


def test_the_student_trains_in_every_epoch_whatever_mode_it_came_in(x):
    for prepare in (nn.Module.train, nn.Module.eval):
        student = prepare(net())
        modes = []
        handle = student[3].register_forward_hook(lambda module, *_, modes=modes: modes.append(module.training))
        flag = student.training
        distill(student, net(32), [x] * 2, epochs=3, validation=[x], progress=False)
        handle.remove()
        trained = [mode for mode in modes if mode]
        # The dry run is in training mode, too.
        assert len(trained) == 1 + 6
        assert all(part.training is flag for part in student.modules())


def test_a_frozen_batch_norm_stays_frozen(x):
    student = net()
    student[1].eval()
    student[0].weight.requires_grad_(False)
    before = state_of(student)
    distill(student, net(32), x, epochs=2, progress=False)
    after = state_of(student)
    for key in ("1.running_mean [bits]", "1.num_batches_tracked [bits]", "0.weight [bits]", "0.weight [identity]"):
        assert before[key] == after[key]
    assert before["1 [training]"] == after["1 [training]"]
    assert before["4.weight [bits]"] != after["4.weight [bits]"]


def test_only_the_students_values_change(x):
    student, teacher, y = net(), net(32), torch.randint(5, (96,))
    student[0].weight.grad = torch.ones_like(student[0].weight)
    before, random = state_of(student), random_state()
    distill(student, teacher, (x, y), hard=0.5, hints={"2": "2"}, progress=False)
    after = state_of(student)
    changed = {key for key in before if before[key] != after[key]}
    assert set(before) == set(after)
    assert random_state() == random
    assert changed
    assert all(key.endswith("[bits]") for key in changed)


def test_a_seed_makes_the_call_reproducible_and_none_follows_the_global_state(x):
    teacher, student = net(32), net()

    def run(seed, shift=0):
        torch.manual_seed(7 + shift)
        ours = copy.deepcopy(student)
        distill(ours, teacher, DataLoader(TensorDataset(x), 16, shuffle=True), seed=seed, progress=False)
        return {key: value for key, value in state_of(ours).items() if "[bits]" in key}

    assert run(3) == run(3, shift=1)
    assert run(3) != run(4)
    assert run(None) == run(None)
    assert run(None) != run(None, shift=1)


def test_schedulers_and_optimizers_may_be_classes_and_gradients_may_be_off_outside(x):
    student, teacher = net(), net(32)
    before = student[0].weight.detach().clone()
    with torch.no_grad():
        distill(
            student,
            teacher,
            x,
            optimizer=torch.optim.SGD,
            scheduler=torch.optim.lr_scheduler.ConstantLR,
            progress=False,
        )
    assert not torch.equal(student[0].weight, before)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5])
def test_accumulated_batches_equal_one_larger_batch(accumulate):
    teacher, student = mlp(32), mlp()
    x, y = torch.randn(60, 6, dtype=DOUBLE), torch.randint(5, (60,))
    large = [(a, b) for a, b in zip(x.split(accumulate * 4), y.split(accumulate * 4), strict=True)]
    small = [(a, b) for a, b in zip(x.split(4), y.split(4), strict=True)]
    one, many = copy.deepcopy(student), copy.deepcopy(student)
    options = {"loss": "kl", "hard": 0.4, "optimizer": sgd, "epochs": 2, "progress": False}
    first = distill(one, teacher, large, **options)
    second = distill(many, teacher, small, accumulate=accumulate, **options)
    same(one, many, rtol=1e-10, atol=1e-12)
    assert first.steps == second.steps
    assert first.loss == pytest.approx(second.loss, rel=1e-9)


class Tokens(nn.Module):
    """Token logits of integer inputs."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, dim, dtype=DOUBLE), nn.Linear(dim, 11, dtype=DOUBLE)

    def forward(self, input_ids):
        return {"logits": self.head(self.embed(input_ids).tanh())}


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_a_token_weighs_the_same_in_whichever_batch_it_lies(loss):
    """Of a step with 3 and 17 tokens that count, neither batch weighs more than its tokens."""
    teacher, student = Tokens(12), Tokens()
    ids = torch.randint(11, (2, 20))
    labels = torch.randint(11, (2, 20))
    labels[0, 3:] = -100
    labels[1, 17:] = -100
    rows = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(2)]
    together, apart = copy.deepcopy(student), copy.deepcopy(student)
    options = {"loss": loss, "hard": 0.5, "optimizer": sgd, "progress": False}
    distill(together, teacher, [{"input_ids": ids, "labels": labels}], **options)
    distill(apart, teacher, rows, accumulate=2, **options)
    same(together, apart, rtol=1e-10, atol=1e-12)
    # Masked positions have no say: other inputs there change nothing.
    other = ids.clone()
    other[labels == -100] = 0
    third = copy.deepcopy(student)
    distill(third, teacher, [{"input_ids": other, "labels": labels}], **options)
    same(together, third, rtol=1e-10, atol=1e-12)


def test_one_answer_of_the_teacher_is_held_at_a_time():
    """However many micro-batches a step has: where the logits are large, accumulation is there to save memory."""
    student, teacher = Tokens(), Tokens(12)
    answers, most = [], []

    def watch(_module, _inputs, output):
        answers.append(weakref.ref(output["logits"]))
        most.append(sum(one() is not None for one in answers))

    handle = teacher.register_forward_hook(watch)
    ids = torch.randint(11, (12, 5))
    distill(student, teacher, [{"input_ids": one, "labels": one} for one in ids.split(2)], accumulate=3, progress=False)
    handle.remove()
    assert len(most) == 7
    assert max(most) <= 2


def test_several_teachers_average_by_weight():
    teachers, student = [mlp(32), mlp(16)], mlp()
    x = torch.randn(32, 6, dtype=DOUBLE)

    def loss(model, x):
        return sum(w * base_loss(teacher)(model, x) for w, teacher in zip((0.25, 0.75), teachers, strict=True))

    expected = by_hand(copy.deepcopy(student), [x] * 2, loss)
    distill(student, teachers, [x] * 2, teacher_weights=[1, 3], optimizer=sgd, progress=False)
    same(student, expected, rtol=1e-10, atol=1e-12)


def test_the_optimizer_scheduler_and_clip_are_used():
    teacher, student = mlp(32), mlp()
    x = torch.randn(32, 6, dtype=DOUBLE)
    expected = copy.deepcopy(student)
    theirs = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    plan = torch.optim.lr_scheduler.StepLR(theirs, 1, 0.5)
    for _ in range(4):
        theirs.zero_grad()
        base_loss(teacher)(expected, x).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.7)
        theirs.step()
        plan.step()
    ours = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    distill(
        student,
        teacher,
        [x],
        steps=4,
        optimizer=ours,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        clip=0.7,
        progress=False,
    )
    same(student, expected, rtol=1e-10, atol=1e-12)
    assert ours.param_groups[0]["lr"] == pytest.approx(0.1 / 16)
    assert len(ours.state) == 4


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_finishes_the_step_and_leaves_a_usable_student(x):
    student, handler = net(), signal.getsignal(signal.SIGINT)
    seen = []

    def interrupt(_module, _inputs):
        if student.training:
            seen.append(len(seen))
            if len(seen) == 1 + 3:  # the dry run, and three steps
                signal.raise_signal(signal.SIGINT)

    handle = student.register_forward_pre_hook(interrupt)
    report = distill(student, net(32), [x] * 10, epochs=2, validation=[x], progress=False)
    handle.remove()
    assert (report.stopped, report.steps, len(seen)) == ("interrupted", 3, 4)
    assert len(report.history) == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert all(torch.isfinite(one).all() for one in student.state_dict().values())


def test_an_interrupt_from_elsewhere_still_gives_a_report(x):
    def callback(_student, epoch):
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    student = net()
    report = distill(student, net(32), [x] * 3, epochs=5, callbacks=[callback], progress=False)
    assert (report.stopped, report.steps, len(report.history)) == ("interrupted", 6, 2)


@pytest.mark.parametrize("where", [0, 3])
def test_a_non_finite_loss_raises_with_step_and_terms_and_undoes_everything(x, where):
    student, teacher = net(), net(32)
    optimizer = torch.optim.AdamW(student.parameters())
    batches = [x] * where + [x * float("nan")] + [x]
    with unchanged(student, teacher, optimizer), pytest.raises(NonFiniteError, match=rf"step {where + 1} .*mse nan"):
        distill(student, teacher, batches, optimizer=optimizer, progress=False)


def test_an_error_of_the_callers_own_leaves_no_hook_and_no_flag(x):
    class Broken(Exception):
        pass

    def data():
        yield x
        raise Broken

    student, teacher = net(), net(32)
    before = state_of(student)
    with unchanged(teacher), pytest.raises(Broken):
        distill(student, teacher, data, hints={"0": "0"}, progress=False)
    after = state_of(student)
    assert {key for key in before if before[key] != after[key]} <= {key for key in before if key.endswith("[bits]")}


def test_patience_stops_and_the_best_weights_are_put_back(x):
    student, teacher = net(), net(32)
    scores, kept = iter([0.1, 0.5, 0.3, 0.2, 0.9]), []

    def judge(model):
        kept.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    report = distill(student, teacher, x, epochs=9, validation=judge, patience=2, progress=False)
    assert (report.stopped, report.best, report.best_epoch, report.kept_best) == ("patience", 0.5, 2, True)
    for name, value in student.state_dict().items():
        assert torch.equal(value, kept[1][name])


def test_validation_by_loss_accuracy_and_function(x):
    y = torch.randint(5, (96,))
    for metric in (None, "accuracy", lambda output, y: (output.argmax(1) == y).float()):
        student = net()
        report = distill(student, net(32), (x, y), epochs=2, validation=(x, y), metric=metric, progress=False)
        scores = [epoch.validation for epoch in report.history]
        assert report.best == (min(scores) if metric is None else max(scores))
        if metric is not None:
            with torch.no_grad():
                right = (student.eval()(x).argmax(1) == y).float().mean().item()
            assert right == pytest.approx(report.best)


def test_callbacks_are_called_and_may_stop(x):
    seen = []

    def callback(model, epoch):
        seen.append((model, epoch.epoch))
        return epoch.epoch == 2

    student = net()
    report = distill(student, net(32), x, epochs=5, callbacks=[callback], progress=False)
    assert report.stopped == "callback"
    assert seen == [(student, 1), (student, 2)]


def test_the_report_tells_all(x, tmp_path):
    data = x, torch.randint(5, (96,))
    report = distill(net(), net(32), data, loss="kl", hard=0.5, epochs=3, validation=data, progress=False)
    assert isinstance(report, DistillationReport)
    plain = report.to_dict()
    assert [row["epoch"] for row in plain["history"]] == [1, 2, 3]
    assert set(plain["history"][0]["terms"]) == {"kl", "labels"}
    assert report.samples == 288
    assert 0 < report.teacher_share < 1
    assert plain["teacher_share"] == report.teacher_share
    assert 0 < report.teacher_seconds < report.seconds
    assert sum(one.seconds for one in report.history) <= report.seconds
    assert [row["steps"] for row in plain["history"]] == [2, 4, 6]
    assert report.cache["cache hits"] == plain["cache"]["cache hits"] == 192
    assert "cache hits 192" in str(report)
    assert (plain["best"], plain["best_epoch"]) == (report.best, report.best_epoch)
    assert report.best == min(row["validation"] for row in plain["history"])
    assert json.loads(json.dumps(plain)) == plain
    first = report.history[0]
    assert first.loss == pytest.approx(0.5 * first.terms["kl"] + 0.5 * first.terms["labels"])
    assert "validation loss" in str(report)
    assert report._repr_html_().count("<tr>") == 4
    drawn = report.plot()
    drawn.savefig(tmp_path / "report.png")
    assert drawn.axes[1].get_ylabel() == "validation loss, on validation data"


def test_half_precision_trains_and_losses_stay_in_float32(x):
    seen = []

    def loss(student, teacher):
        seen.append((student.dtype, teacher.dtype))
        return (student - teacher).square().sum(1)

    student = net()
    before = copy.deepcopy(student.state_dict())
    distill(student, net(32), x, loss=loss, amp="bf16", progress=False)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert not torch.equal(before["0.weight"], student.state_dict()["0.weight"])
    assert student[0].weight.dtype == torch.float32
