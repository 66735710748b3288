"""Every form of data, batch and output trains the same; what cannot be meant is told in one sentence."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from transformers import BatchEncoding

from conftest import unchanged
from netopt.distillation import Hint, distill
from netopt.errors import (
    ArgumentTypeError,
    EmptyDataError,
    InvalidArgumentError,
    MissingDataError,
    NetoptError,
    ShapeMismatchError,
    UnknownNameError,
)

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(5, (40,), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Returns its output in the form asked for."""

    def __init__(self, width: int = 8, form: str = "tensor") -> None:
        super().__init__()
        self.body, self.head, self.form = nn.Linear(6, width), nn.Linear(width, 5), form

    def forward(self, x):
        y = self.head(self.body(x).tanh())
        return FORMS[self.form](y)


@dataclass
class Output:
    """As Hugging Face returns it."""

    logits: torch.Tensor
    loss: None = None


FORMS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, None),
    "dict": lambda y: {"logits": y, "other": torch.zeros(1)},
    "dataclass": Output,
}


class Infinite(IterableDataset):
    def __iter__(self):
        while True:
            yield X[0]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def weights(model):
    return torch.cat([one.detach().flatten() for one in model.parameters()])


def trained(data, form="tensor", **options):
    """The weights after training on ``data`` from the same start."""
    torch.manual_seed(3)
    student, teacher = Net(form=form), Net(16, form=form)
    distill(student, teacher, data, **{"batch_size": 40, "epochs": 2, "lr": 0.01, "progress": False, **options})
    return weights(student)


DATA = {
    "tensor": lambda: X,
    "pair": lambda: (X, Y),
    "mapping": lambda: {"x": X, "labels": Y},
    "tensor dataset": lambda: TensorDataset(X, Y),
    "dataset": lambda: ROWS,
    "loader": lambda: DataLoader(TensorDataset(X, Y), 40),
    "loader of dicts": lambda: DataLoader(
        [{"x": x, "labels": y, "stranger": y} for x, y in zip(X, Y, strict=True)], 40
    ),
    "list": lambda: [X],
    "list of pairs": lambda: [(X, Y)],
    "list of lists": lambda: [[X, Y]],
    "function": lambda: lambda: iter([X]),
    "named": lambda: [{"x": X, "attention_mask": torch.ones(40)}],
    "encoding": lambda: [BatchEncoding({"x": X, "attention_mask": torch.ones(40)})],
}


class Rows(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index):
        return X[index], int(Y[index])


ROWS = Rows()


@pytest.mark.parametrize("form", DATA)
def test_every_form_of_data_trains_the_same(form):
    # All in one batch, so that the order does not matter.
    torch.testing.assert_close(trained(DATA[form]()), trained([X]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_output_trains_the_same(form):
    torch.testing.assert_close(trained(X, form), trained(X), rtol=1e-4, atol=1e-5)


def test_a_generator_serves_one_epoch_and_an_endless_one_serves_steps():
    report = distill(Net(), Net(16), (x for x in X.split(8)), progress=False)
    assert report.steps == 5
    report = distill(Net(), Net(16), DataLoader(Infinite(), 4), steps=7, progress=False)
    assert (report.steps, report.samples) == (7, 28)


def test_steps_go_on_over_as_many_epochs_as_it_takes():
    report = distill(Net(), Net(16), X, batch_size=16, steps=7, progress=False)
    assert [epoch.steps for epoch in report.history] == [3, 6, 7]


def test_a_reshuffled_loader_teaches_every_sample_its_own_answer():
    """With answers cached by position, a shuffled loader would teach noise."""
    teacher = nn.Linear(6, 5)
    student = nn.Linear(6, 5)
    loader = DataLoader(TensorDataset(X), 8, shuffle=True)
    report = distill(student, teacher, loader, epochs=150, lr=0.03, progress=False)
    assert report.loss < 1e-3


def test_student_and_teacher_may_see_different_inputs_and_outputs():
    class Pair(Net):
        def forward(self, x):
            return {"first": (super().forward(x), 1), "second": super().forward(x) * 0}

    teacher, student = nn.Linear(3, 5), Pair()
    report = distill(
        student,
        teacher,
        X,
        forward=(None, lambda model, batch: model(batch[:, :3])),
        output=("first.0", None),
        epochs=2,
        progress=False,
    )
    assert report.history[1].loss < report.history[0].loss
    other = copy.deepcopy(student)
    distill(other, teacher, X, forward=lambda model, x: model(x[:, :3] if model is teacher else x),
            output=lambda y: y if isinstance(y, torch.Tensor) else y["first"][0], progress=False)  # fmt: skip
    assert not torch.equal(weights(other), weights(student))


def test_labels_may_be_anywhere():
    expected = trained([(X, Y)], loss="kl", hard=0.5)
    for labels, batch in (("target", {"x": X, "target": Y}), (lambda batch: batch["t"][0], {"x": X, "t": [Y]})):
        torch.testing.assert_close(trained([batch], loss="kl", hard=0.5, labels=labels), expected)
    column = trained([(X, Y[:, None])], loss="kl", hard=0.5)
    torch.testing.assert_close(column, expected)
    chances = nn.functional.one_hot(Y, 5).float()
    torch.testing.assert_close(trained([(X, chances)], loss="kl", hard=0.5), expected, rtol=1e-4, atol=1e-6)


def test_a_language_model_reads_labels_one_position_on():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"vocab_size": 31, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    models = [LlamaForCausalLM(LlamaConfig(hidden_size=size, intermediate_size=size, **config)) for size in (8, 16)]
    ids = torch.randint(31, (4, 9))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 5:] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    report = distill(*models, [batch], loss="kl", hard=0.5, lr=1e-12, progress=False)
    with torch.no_grad():
        theirs = models[0].eval()(**batch).loss.item()
    assert report.history[0].terms["labels"] == pytest.approx(theirs, rel=1e-4)


def test_attention_masks_rule_out_padding():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)

        def forward(self, input_ids):
            return self.embed(input_ids)

    student, teacher = Tokens(), Tokens()
    ids, mask = torch.randint(1, 7, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    ids[0, 2:], mask[0, 2:] = 0, 0
    before = student.embed.weight.detach().clone()
    data = [{"input_ids": ids, "attention_mask": mask}]
    distill(student, teacher, data, loss="kl", optimizer=sgd, progress=False)
    assert torch.equal(student.embed.weight[0], before[0])
    assert not torch.equal(student.embed.weight[ids[1, 0]], before[ids[1, 0]])


@pytest.mark.parametrize(
    ("hints", "names"),
    [
        ({"0": "0"}, ["hint 0"]),
        ({"0": Hint("0", "attention", 10.0), "3": Hint("3", "similarity")}, ["attention 0", "similarity 3"]),
        ({"3": Hint("3", "relation")}, ["relation 3"]),
        ({"1": Hint("1", "hint", 0.1), "5": "5"}, ["hint 1", "hint 5"]),
    ],
)
def test_hints_pull_layers_of_other_widths_together(hints, names):
    def net(width, size):
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(size), nn.Flatten(),
            nn.Linear(width * size * size, 2 * width), nn.ReLU(), nn.Linear(2 * width, 5),
        )  # fmt: skip

    student, teacher, x = net(4, 2), net(12, 3), torch.randn(64, 3, 8, 8)
    modules = [str(one) for one in student.modules()]
    with unchanged(teacher):
        report = distill(student, teacher, x, hints=hints, epochs=12, lr=0.01, batch_size=16, progress=False)
    assert [str(one) for one in student.modules()] == modules
    for name in names:
        assert report.history[-1].terms[name] < report.history[0].terms[name]


def test_hints_of_tokens_project_the_last_dimension_and_skip_padding():
    class Tokens(nn.Module):
        def __init__(self, width) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, width), nn.Linear(width, 7)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    student, teacher = Tokens(4), Tokens(10)
    ids, labels = torch.randint(1, 7, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    ids[0, 2:], labels[0, 2:] = 0, -100
    before = student.embed.weight.detach().clone()
    batch = {"input_ids": ids, "labels": labels}
    report = distill(student, teacher, [batch], hints={"embed": "embed"}, optimizer=sgd, progress=False)
    assert torch.equal(student.embed.weight[0], before[0])
    assert set(report.history[0].terms) == {"mse", "hint embed"}


class FakePlan:
    """Which indices of each tensor's dimensions were kept, as a plan has it."""

    def __init__(self, tensors) -> None:
        self.tensors = tensors


def test_a_plan_pairs_each_pruned_layer_with_the_teachers_kept_neurons():
    teacher = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
    kept = torch.tensor([1, 4, 7])
    student = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 5))
    student[0].load_state_dict({"weight": teacher[0].weight[kept], "bias": teacher[0].bias[kept]})
    student[2].load_state_dict({"weight": teacher[2].weight[:, kept], "bias": teacher[2].bias})
    plan = FakePlan({"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}})
    report = distill(student, teacher, X, hints=plan, lr=1e-12, progress=False)
    # A neuron that was kept says what it said, before anything is trained.
    assert report.history[0].terms["hint 0"] == pytest.approx(0, abs=1e-10)
    assert set(report.history[0].terms) == {"mse", "hint 0"}
    with pytest.raises(InvalidArgumentError, match="pass the unpruned model as teacher"):
        distill(student, teacher, X, hints=FakePlan({}), progress=False)


class Wrong(nn.Module):
    """Returns what cannot be distilled."""

    def __init__(self, result) -> None:
        super().__init__()
        self.body, self.result = nn.Linear(6, 5), result

    def forward(self, x):
        return self.result(self.body(x))


def shared():
    student = Net()
    teacher = Net(16)
    teacher.head.bias = student.head.bias
    return student, teacher


# Made beforehand, so that the calls below draw nothing at random.
SHARED, FOUR = shared(), nn.Linear(6, 4)
WRONG = {
    "longer": Wrong(lambda y: y[:, None]),
    "loss": Wrong(torch.mean),
    "integers": Wrong(torch.Tensor.long),
    "nothing": Wrong(lambda y: None),
}
BAD = {
    "teacher is student": (lambda s, t: distill(s, s, X), InvalidArgumentError, "the same model"),
    "shared parameter": (lambda s, t: distill(*SHARED, X), InvalidArgumentError, "'head.bias' and .* one tensor"),
    "student no module": (lambda s, t: distill(len, t, X), ArgumentTypeError, "student must be a torch.nn.Module"),
    "teacher no module": (lambda s, t: distill(s, "resnet", X), ArgumentTypeError, "a module or a list"),
    "no teacher": (lambda s, t: distill(s, [], X), InvalidArgumentError, "empty list"),
    "teacher weights": (lambda s, t: distill(s, [t], X, teacher_weights=[1, 2]), InvalidArgumentError, "1 weights"),
    "nothing to train": (lambda s, t: distill(nn.ReLU(), t, X), InvalidArgumentError, "no parameters to train"),
    "all frozen": (
        lambda s, t: distill(copy.deepcopy(s).requires_grad_(False), t, X), InvalidArgumentError, "is frozen",
    ),
    "other classes": (
        lambda s, t: distill(FOUR, t, X), ShapeMismatchError, r"shape \(40, 4\) .* \(40, 5\).* vocabularies",
    ),
    "other shape": (lambda s, t: distill(WRONG["longer"], t, X), ShapeMismatchError, r"\(40, 1, 5\)"),
    "returns a loss": (lambda s, t: distill(WRONG["loss"], t, X), ShapeMismatchError, "single number"),
    "returns integers": (lambda s, t: distill(WRONG["integers"], t, X), ArgumentTypeError, "torch.int64 tensor"),
    "returns nothing": (lambda s, t: distill(WRONG["nothing"], t, X), ArgumentTypeError, "without a floating-point"),
    "wrong output": (lambda s, t: distill(s, t, X, output="logit"), InvalidArgumentError, "output='logit' is not in"),
    "empty list": (lambda s, t: distill(s, t, []), EmptyDataError, "yielded no batch"),
    "empty tensor": (lambda s, t: distill(s, t, X[:0]), EmptyDataError, "no sample"),
    "empty dataset": (lambda s, t: distill(s, t, DataLoader(TensorDataset(X[:0]), 4)), EmptyDataError, "no batch"),
    "used generator": (lambda s, t: distill(s, t, iter([])), EmptyDataError, "read only once"),
    "generator twice": (lambda s, t: distill(s, t, iter([X]), epochs=2), InvalidArgumentError, "read only once"),
    "lengths": (lambda s, t: distill(s, t, (X, Y[:3])), ShapeMismatchError, "3 and 40 samples"),
    "a number as data": (lambda s, t: distill(s, t, 3), ArgumentTypeError, "data must be a DataLoader"),
    "a model as data": (lambda s, t: distill(s, t, t), ArgumentTypeError, "data must be a DataLoader"),
    "input shape": (lambda s, t: distill(s, t, X[:, :4]), NetoptError, "forward of Net failed"),
    "no labels": (lambda s, t: distill(s, t, X, hard=0.5), MissingDataError, "hard=0.5 needs labels"),
    "labels' key": (lambda s, t: distill(s, t, [{"x": X}], hard=0.5, labels="y"), InvalidArgumentError, "no key of"),
    "labels' shape": (lambda s, t: distill(s, t, (X, Y[:, None, None]), hard=0.5), ShapeMismatchError, "positions"),
    "epochs": (lambda s, t: distill(s, t, X, epochs=0), InvalidArgumentError, "epochs must be positive"),
    "epochs' type": (lambda s, t: distill(s, t, X, epochs=1.5), ArgumentTypeError, "epochs must be an int"),
    "a bool": (lambda s, t: distill(s, t, X, steps=True), ArgumentTypeError, "steps must be an int"),
    "hard": (lambda s, t: distill(s, t, (X, Y), hard=1.5), InvalidArgumentError, r"hard must lie in \[0, 1\]"),
    "temperature": (lambda s, t: distill(s, t, X, temperature=0), InvalidArgumentError, "temperature must be positive"),
    "lr": (lambda s, t: distill(s, t, X, lr=float("nan")), InvalidArgumentError, "lr must be positive and finite"),
    "seed": (lambda s, t: distill(s, t, X, seed="x"), ArgumentTypeError, "seed must be an int"),
    "loss": (lambda s, t: distill(s, t, X, loss="kll"), UnknownNameError, "Did you mean 'kl'"),
    "amp": (lambda s, t: distill(s, t, X, amp="half"), InvalidArgumentError, "amp must be"),
    "optimizer": (lambda s, t: distill(s, t, X, optimizer="adam"), ArgumentTypeError, "optimizer must be"),
    "optimizer and lr": (
        lambda s, t: distill(s, t, X, optimizer=torch.optim.SGD(s.parameters(), 0.1), lr=0.1),
        InvalidArgumentError, "both optimizer and lr",
    ),
    "the teacher's optimizer": (
        lambda s, t: distill(s, t, X, optimizer=torch.optim.SGD(t.parameters(), 0.1)),
        InvalidArgumentError, "parameters of the teacher",
    ),
    "another's optimizer": (
        lambda s, t: distill(s, t, X, optimizer=torch.optim.SGD(FOUR.parameters(), 0.1)),
        InvalidArgumentError, "no trainable parameter of the student",
    ),
    "scheduler": (lambda s, t: distill(s, t, X, scheduler="step"), InvalidArgumentError, "write 'cosine'"),
    "endless cosine": (
        lambda s, t: distill(s, t, lambda: [X], scheduler="cosine"), InvalidArgumentError, "number of steps",
    ),
    "hint's layer": (lambda s, t: distill(s, t, X, hints={"bdy": "body"}), UnknownNameError, "Did you mean 'body'"),
    "hint's type": (lambda s, t: distill(s, t, X, hints={"body": 3}), ArgumentTypeError, "a layer's name or a Hint"),
    "hints' type": (lambda s, t: distill(s, t, X, hints=3), ArgumentTypeError, "hints must map"),
    "metric alone": (lambda s, t: distill(s, t, X, metric="accuracy"), InvalidArgumentError, "needs validation="),
    "metric": (lambda s, t: distill(s, t, X, validation=X, metric="f1"), InvalidArgumentError, "metric must be"),
    "patience alone": (lambda s, t: distill(s, t, X, patience=1), InvalidArgumentError, "need validation="),
    "validation without labels": (
        lambda s, t: distill(s, t, X, validation=X, metric="accuracy"), MissingDataError, "needs targets",
    ),
    "validation's score": (lambda s, t: distill(s, t, X, validation=lambda s: "good"), ArgumentTypeError, "a number"),
    "validation is NaN": (lambda s, t: distill(s, t, X, validation=lambda s: float("nan")), NetoptError, "gave nan"),
    "non-finite input": (lambda s, t: distill(s, t, X / 0), NetoptError, "not finite at step 1"),
    "divergence": (lambda s, t: distill(s, t, X, lr=1e30, epochs=5), NetoptError, "not finite|holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_call_is_told_and_undone(case):
    call, kind, message = BAD[case]
    student, teacher = Net(), Net(16)
    student.head.bias.grad = torch.ones(5)
    with unchanged(student, teacher), pytest.raises(kind, match=message) as caught:
        call(student, teacher)
    assert isinstance(caught.value, NetoptError)
    assert isinstance(caught.value, (ValueError, TypeError, RuntimeError))


def test_a_frozen_shared_parameter_is_fine():
    student, teacher = Net(), Net(8)
    student.body = teacher.body.requires_grad_(False)
    distill(student, teacher, X, progress=False)
    assert student.body is teacher.body
