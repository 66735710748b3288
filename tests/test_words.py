"""The vocabulary layer: errors, batches, selectors, restore."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from conftest import random_state, state_of, unchanged
from netopt import batches, errors
from netopt.errors import (
    ArgumentTypeError,
    DeviceMismatchError,
    EmptyDataError,
    ForwardError,
    NetoptError,
    SelectorError,
    UnknownNameError,
)
from netopt.model.restore import preserve_random_state, restored
from netopt.selectors import chosen, matches

BUILTINS = (ValueError, TypeError, RuntimeError, ImportError, OSError)
ERRORS = [getattr(errors, name) for name in errors.__all__ if name not in ("NetoptError", "nearest")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_each_error_is_ours_and_a_builtin_and_documented(error):
    assert issubclass(error, NetoptError)
    assert issubclass(error, BUILTINS)
    assert error.__name__ in errors.__doc__
    assert error.__doc__


def test_unknown_names_suggest_the_near_ones():
    error = UnknownNameError.of("importance", "salliency", ["magnitude", "saliency"])
    assert "Did you mean 'saliency'?" in str(error)
    assert "magnitude, saliency" in str(error)
    assert errors.nearest("qqq", ["saliency"]) == ""


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Result:
    loss: torch.Tensor
    states: tuple


@pytest.mark.parametrize("inputs", [X, (X,), {"input": X}], ids=["tensor", "tuple", "dict"])
def test_the_three_forms_of_inputs_are_one(inputs):
    model = nn.Linear(3, 2)
    assert torch.equal(batches.call(model, inputs), model(X))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([X], "tuple for positional inputs"),
        (None, "randn"),
        (np.zeros(3), "from_numpy"),
        (3, "not int"),
        ({1: X}, "1 is not a string"),
        (DataLoader(TensorDataset(X)), "one batch"),
    ],
)
def test_other_inputs_are_refused(inputs, message):
    with pytest.raises(ArgumentTypeError, match=message):
        batches.normalize(inputs)


def test_a_failing_forward_names_what_was_given():
    with pytest.raises(ForwardError, match=r"(?s)input 0: shape \(4, 5\), float32, cpu.*RuntimeError.*mat1") as caught:
        batches.call(nn.Linear(3, 2), torch.zeros(4, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_our_own_errors_pass_through_a_forward():
    class Inner(nn.Module):
        def forward(self, _):
            raise SelectorError("from within")

    with pytest.raises(SelectorError, match="from within"):
        batches.call(Inner(), X)


@pytest.mark.parametrize(("home", "inputs"), [("meta", X), ("cpu", X.to("meta"))])
def test_devices_that_cannot_meet_are_named(home, inputs):
    with pytest.raises(DeviceMismatchError, match=r"is on (meta|cpu)"):
        batches.call(nn.Linear(3, 2, device=home), inputs)


def test_splitting_batches():
    assert batches.split(X)[1] is None
    assert batches.split((X, Y)) == (X, Y)
    assert batches.split([X]) == (X, None)
    assert batches.split([[X, X], Y])[0] == (X, X)
    batch = {"input": X, "labels": Y}
    assert batches.split(batch) == (batch, Y)
    with pytest.raises(ArgumentTypeError, match="3 entries is ambiguous"):
        batches.split((X, X, Y))
    with pytest.raises(ArgumentTypeError, match="not int"):
        batches.split(3)


def test_feeding_filters_a_dict_to_what_the_forward_takes():
    model = nn.Linear(3, 2)
    expected = model(X)
    for batch in (X, (X, Y), [X, Y], {"input": X, "labels": Y}):
        assert torch.equal(batches.feed(model, batch), expected)
    with pytest.raises(ArgumentTypeError, match=r"takes \(input\).*'pixels'"):
        batches.feed(model, {"pixels": X})


def test_feeding_passes_everything_to_a_forward_that_takes_everything():
    class Open(nn.Module):
        def forward(self, **given):
            return sorted(given)

    assert batches.feed(Open(), {"b": X, "a": 1}) == ["a", "b"]


def test_moving_keeps_structure():
    moved = batches.move({"a": [X, 1], "p": Pair(X, "s")}, "meta")
    assert moved["a"][0].is_meta
    assert moved["a"][1] == 1
    assert moved["p"].first.is_meta
    assert moved["p"].second == "s"


def test_tensors_are_reached_with_dotted_paths():
    result = {"a": [X, {"b": Y}], "c": Result(X, (Y, object())), "p": Pair(X, None), "o": object()}
    assert [path for path, _ in batches.tensors(result)] == ["a.0", "a.1.b", "c.loss", "c.states.0", "p.first"]
    assert batches.tensors(X)[0][0] == ""


@pytest.mark.parametrize(
    "result",
    [X, (Y, X), {"out": X, "aux": Y}, OrderedDict(loss=X.sum(), logits=X), Result(X, ()), {"states": (Y, X)}],
)
def test_the_primary_output(result):
    assert batches.primary(result) is X


def test_no_primary_output_is_an_error():
    with pytest.raises(ArgumentTypeError, match="returned a tuple without a floating-point tensor"):
        batches.primary((Y,))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("abc", "not str"),
        (3, "not int"),
        (None, "not NoneType"),
        ({"x": 3}, "not dict"),
        (torch.nn.Linear(2, 2), "not Linear"),
        (torch.tensor(1.0), "not Tensor"),
    ],
)
def test_what_holds_no_batches_is_refused_at_once(data, message):
    with pytest.raises(ArgumentTypeError, match=message):
        batches.iterate(data)


def test_empty_data_is_an_error_and_says_why():
    with pytest.raises(EmptyDataError, match=r"calibration \(list\) yielded no batch"):
        list(batches.iterate([], what="calibration"))
    once = iter([X])
    assert list(batches.iterate(once)) == [X]
    with pytest.raises(EmptyDataError, match="read only once"):
        list(batches.iterate(once))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 3)
        self.again = self.head
        self.tied = nn.Linear(3, 4)
        self.tied.weight = nn.Parameter(torch.randn(4, 3))
        self.copy = nn.Linear(3, 4, bias=False)
        self.copy.weight = self.tied.weight


def selected(selector, model=None):
    model = model or Net()
    if callable(selector) and not isinstance(selector, (type, nn.Module)) and selector.__code__.co_argcount == 1:
        selector = selector(model)
    wanted = matches(selector, model)
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if wanted(name)}


HEAD = {"head.weight", "head.bias", "again.weight", "again.bias"}
STEM = {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"}


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("stem", STEM),
        ("stem.0.bias", {"stem.0.bias"}),
        ("st*", STEM),
        ("*.0.*", {"stem.0.weight", "stem.0.bias"}),
        ("again", HEAD),
        ("tied", {"tied.weight", "tied.bias", "copy.weight"}),
        ("copy", {"tied.weight", "copy.weight"}),
        (nn.BatchNorm1d, {"stem.1.weight", "stem.1.bias"}),
        (lambda model: model.head, HEAD),
        (lambda name, module: isinstance(module, nn.Linear) and name.startswith("head"), HEAD),
        (["stem", "head"], STEM | HEAD),
        (None, set()),
        ((), set()),
    ],
)
def test_selectors(selector, expected):
    assert selected(selector) == expected


def test_the_model_itself_selects_everything():
    assert len(selected(lambda model: model)) == len(list(Net().named_parameters(remove_duplicate=False)))


def test_masked_and_parametrized_tensors_keep_their_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    prune.identity(model[0], "weight")
    parametrizations.weight_norm(model[1])
    wanted = matches(["0.weight", "1.weight"], model)
    assert wanted("0.weight_orig")
    assert wanted("0.weight")
    assert wanted("1.parametrizations.weight.original0")
    assert not wanted("0.bias")


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("steem", "Did you mean 'stem'"),
        ("zzz*", "Its modules are: stem"),
        (nn.Conv2d, "Conv2d, and Net only has BatchNorm1d, Linear"),
        (nn.Linear(1, 1), "not part of Net"),
        (lambda name, module: False, "true for no module"),
    ],
)
def test_a_selector_that_selects_nothing_is_an_error(selector, message):
    with pytest.raises(SelectorError, match=message):
        matches(selector, Net(), what="include")


@pytest.mark.parametrize(
    ("selector", "message"), [(3, "not int"), ([3], "holds 3"), (lambda name: True, "dotted name and a module")]
)
def test_what_is_no_selector_is_refused(selector, message):
    with pytest.raises(ArgumentTypeError, match=message):
        matches(selector, Net(), what="include")


@given(st.sets(st.sampled_from(["stem.0", "stem.1", "head", "tied", "stem"])), st.data())
def test_include_and_exclude_are_set_operations(include, data):
    model = Net()
    exclude = data.draw(st.sets(st.sampled_from(["stem.0.weight", "head.bias", "stem"])))
    names = {name for name, _ in model.named_parameters()}
    wanted = chosen(model, sorted(include) or None, sorted(exclude))
    included = {name for name in names if not include or matches(sorted(include), model)(name)}
    excluded = {name for name in names if matches(sorted(exclude), model)(name)}
    assert {name for name in names if wanted(name)} == included - excluded


def test_an_empty_include_is_an_error():
    with pytest.raises(SelectorError, match="include is empty"):
        chosen(Net(), include=[])


class Messy(nn.Module):
    """Leaves everything behind that a forward can."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, x):
        self.seen += 1
        self.scale = self.scale * 2
        self.register_buffer("cache", x.detach().clone(), persistent=False)
        return self.norm(x) * self.scale + torch.rand(()) + random.random() + np.random.rand()


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_borrowed_is_given_back(fails):
    model = Messy()
    model.norm.weight.grad = torch.full((3,), 7.0)
    model.norm.bias.requires_grad_(False)
    model.norm.eval()
    before, chance = state_of(model), random_state()
    try:
        with restored(model):
            model.train()
            model.norm.bias.requires_grad_(True)
            model(X).sum().backward()
            assert not torch.equal(model.norm.weight.grad, torch.full((3,), 7.0))
            assert state_of(model) != before
            if fails:
                raise KeyError("midway")
    except KeyError:
        assert fails
    assert state_of(model) == before
    assert random_state() == chance


def test_tensors_kept_in_plain_containers_are_given_back():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache, self.seen, self.last = {"cpu": torch.ones(2)}, [torch.ones(3)], torch.ones(4)
            self.calls = 0

        def train(self, mode=True):
            self.cache = {}
            return super().train(mode)

    model = Caching()
    cache, seen, last = model.cache, list(model.seen), model.last
    with restored(model):
        model.eval()
        model.cache["meta"] = model.last = torch.zeros(1)
        model.seen.append(model.last)
        model.made = model.last
        model.calls += 1
    assert model.cache is cache
    assert list(cache) == ["cpu"]
    assert model.last is last
    assert all(one is other for one, other in zip(model.seen, seen, strict=True))
    assert not hasattr(model, "made")
    assert model.calls == 0  # a number beside a table is put back with it


def test_giving_back_does_not_disturb_a_pending_graph():
    model = nn.BatchNorm1d(3).eval()
    loss = model(X.clone().requires_grad_()).sum()
    with restored(model):
        model(X)
    loss.backward()
    assert model.weight.grad is not None


def test_buffers_made_in_inference_mode_are_given_back():
    with torch.inference_mode():
        model = nn.BatchNorm1d(3)
    before = state_of(model)
    with restored(model), torch.inference_mode():
        model(X)
    assert state_of(model) == before


def test_a_model_without_values_is_given_back():
    with FakeTensorMode():
        model = nn.BatchNorm1d(3)
        buffers = dict(model.named_buffers())
        with restored(model):
            model(torch.randn(4, 3))
        assert all(buffers[name] is buffer for name, buffer in model.named_buffers())


def test_random_states_may_be_left_alone():
    model = nn.Linear(3, 2)
    before = random_state()
    with restored(model, rng=False):
        torch.rand(())
    assert random_state()["torch"] != before["torch"]
    with preserve_random_state():
        expected = torch.rand(())
    assert torch.equal(torch.rand(()), expected)


def test_unchanged_notices_every_kind_of_change():
    changes = {
        "value": lambda m: m.weight.data.add_(1),
        "replaced": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().clone())),
        "grad": lambda m: setattr(m.weight, "grad", torch.zeros(3)),
        "flag": lambda m: m.eval(),
        "requires_grad": lambda m: m.weight.requires_grad_(False),
        "hook": lambda m: m.register_forward_hook(lambda *_: None),
        "buffer": lambda m: m.running_mean.add_(1),
        "attribute": lambda m: setattr(m, "num_features", 5),
        "random": lambda m: torch.rand(()),
    }
    for kind, change in changes.items():
        model = nn.BatchNorm1d(3)
        with pytest.raises(AssertionError, match="changed"), unchanged(model):
            change(model)
        assert kind


def test_unchanged_looks_into_an_optimizer():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    with unchanged(model, optimizer):
        pass
    with pytest.raises(AssertionError, match="state 0"), unchanged(optimizer):
        optimizer.state[model.weight]["exp_avg"].add_(1)
