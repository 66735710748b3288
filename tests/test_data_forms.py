"""``data`` means the same in every call: one table of forms for `distill`, `prune_neurons` and `prune_weights`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import netopt
from conftest import unchanged
from netopt import batches
from netopt.errors import ArgumentTypeError, EmptyDataError, MissingDataError, NetoptError, ShapeMismatchError

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(5, (48,), generator=torch.Generator().manual_seed(2))


class Rows(Dataset):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X.split(16), Y.split(16), strict=True))


class Net(nn.Module):
    """Takes its input by name, so that a mapping serves as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).relu())


def generator():
    yield from zip(X.split(16), Y.split(16), strict=True)


FORMS = {
    "pair of tensors": lambda: (X, Y),
    "mapping of tensors": lambda: {"x": X, "labels": Y},
    "tensor dataset": lambda: TensorDataset(X, Y),
    "dataset": Rows,
    "loader": lambda: DataLoader(TensorDataset(X, Y), 16),
    "loader of a dataset": lambda: DataLoader(Rows(), 16),
    "loader of a stream": lambda: DataLoader(Stream(), None),
    "list of pairs": lambda: list(generator()),
    "list of lists": lambda: [list(one) for one in generator()],
    "list of mappings": lambda: [{"x": x, "labels": y} for x, y in generator()],
    "one batch": lambda: [(X, Y)],
    "function": lambda: generator,
    "function that makes a list": lambda: lambda: list(generator()),
    "generator": generator,
}
UNLABELLED = {"tensor": lambda: X, "list of tensors": lambda: list(X.split(16)), "tuple of one": lambda: (X,)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def distilled(data):
    student, teacher = net(), net()
    nn.init.normal_(teacher.head.weight)
    # In one step, so that the order in which a form is shuffled does not matter.
    accumulate = 1 if len(list(batches.iterate(data(), batch_size=48))) == 1 else 3
    netopt.distill(
        student, teacher, data(), steps=1, batch_size=48, accumulate=accumulate, lr=0.1, progress=False, cache=False
    )
    return student


def cut(data, importance="fisher", loss_fn=F.cross_entropy):
    model = net()
    how = {"importance": importance, "loss_fn": loss_fn, "repair": False, "verify": False, "progress": False}
    netopt.prune_neurons(model, X[:2], amount=0.5, data=data(), **how)
    return model


def masked(data, importance="fisher", loss_fn=F.cross_entropy):
    model = net()
    netopt.prune_weights(model, amount=0.5, data=data(), importance=importance, loss_fn=loss_fn, progress=False)
    return model


CALLS = {
    "distill": distilled,
    "prune_neurons": cut,
    "prune_neurons, saliency": lambda data: cut(data, "saliency", None),
    "prune_weights": masked,
    "prune_weights, wanda": lambda data: masked(data, "wanda", None),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", [*FORMS, *UNLABELLED])
def test_every_form_is_the_same_data_in_every_call(call, form):
    needs_labels = call in ("prune_neurons", "prune_weights")
    if form in UNLABELLED and needs_labels:
        pytest.skip("the loss needs labels")
    found = CALLS[call](({**FORMS, **UNLABELLED})[form])
    expected = CALLS[call](FORMS["list of pairs"])
    for (name, one), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


WRONG = {
    "a number": (lambda: 3, ArgumentTypeError, "data must be a DataLoader, a Dataset, tensors"),
    "a string": (lambda: "train", ArgumentTypeError, "not str"),
    "a model": (net, ArgumentTypeError, "not Net"),
    "a class": (lambda: Rows, ArgumentTypeError, "not type"),
    "lengths": (lambda: (X, Y[:3]), ShapeMismatchError, "3 and 48 samples"),
    "empty tensors": (lambda: (X[:0], Y[:0]), EmptyDataError, "no sample"),
    "empty list": (list, EmptyDataError, "yielded no batch"),
    "empty loader": (lambda: DataLoader(TensorDataset(X[:0], Y[:0]), 4), EmptyDataError, "yielded no batch"),
    "three tensors": (lambda: (X, X, Y), ArgumentTypeError, "a batch of 3 entries is ambiguous"),
}


@pytest.mark.parametrize("form", [*FORMS, *UNLABELLED])
def test_a_refitted_layer_takes_every_form(form):
    """Which batches there are decides what is told from halves of the data, so that results differ a little."""
    model = masked(({**FORMS, **UNLABELLED})[form], "sparsegpt", None)
    assert 0.45 < float((model.body.weight == 0).float().mean()) < 0.55


def begin(call, model, data, **options):
    """One of the three calls, with a criterion that needs data and a loss."""
    if call == "distill":
        return netopt.distill(model, net(), data, progress=False)
    options = {"amount": 0.5, "importance": "fisher", "data": data, "progress": False, **options}
    if call == "prune_neurons":
        return netopt.prune_neurons(model, X[:2], **options)
    return netopt.prune_weights(model, **options)


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("call", ["distill", "prune_neurons", "prune_weights"])
def test_what_is_no_data_is_refused_alike_and_leaves_the_model(call, case):
    data, kind, message = WRONG[case]
    model, options = net(), {} if call == "distill" else {"loss_fn": F.cross_entropy}
    with unchanged(model), pytest.raises(kind, match=message) as caught:
        begin(call, model, data(), **options)
    assert isinstance(caught.value, NetoptError)


def test_a_batch_size_cuts_what_is_not_cut_and_leaves_what_is():
    sizes = {
        form: [len(batches.split(one)[0]) for one in batches.iterate(make(), batch_size=20)]
        for form, make in FORMS.items()
        if "mapping" not in form
    }
    made = {"pair of tensors", "tensor dataset", "dataset"}
    assert all(
        sizes[form] == ([20, 20, 8] if form in made else [48] if form == "one batch" else [16] * 3) for form in sizes
    )


def test_tensors_are_cut_in_their_order_whatever_they_are_nested_in():
    nested = {"a": (X, {"b": Y}), "c": X}
    cut = list(batches.iterate(nested, batch_size=20))
    assert torch.equal(torch.cat([one["a"][1]["b"] for one in cut]), Y)
    assert torch.equal(torch.cat([one["c"] for one in cut]), X)


@pytest.mark.parametrize("call", ["prune_neurons", "prune_weights"])
def test_what_is_missing_is_named_at_once(call):
    model = net()
    with (
        unchanged(model),
        pytest.raises(MissingDataError, match=r"needs grad_sq; pass data=.* and loss_fn=, a function"),
    ):
        begin(call, model, None)
    with unchanged(model), pytest.raises(MissingDataError, match=r"pass data=, batches or a dataset\.$"):
        begin(call, model, None, loss_fn=F.cross_entropy)
