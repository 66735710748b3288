"""What a forward keeps is put back together: whatever call looked at a model, it then runs as a fresh copy does."""

from __future__ import annotations

import argparse
import copy
import types
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from conftest import bits
from netopt.axes import find_axes
from netopt.distillation import distill
from netopt.model.restore import restored
from netopt.prune import plan_neurons, prune_neurons, prune_weights, shrink


def rows(n: int) -> Tensor:
    """A table that grows with the longest input seen, one row an entry of the batch."""
    return 1 + torch.arange(n, dtype=torch.float32)[:, None] / 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def table_of(self, n: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)) * self.table_of(x.shape[0]))


class Attribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.n = None, 0

    def table_of(self, n):
        if n > self.n:
            self.table, self.n = rows(n), n
        return self.table[:n]


class Length(Attribute):
    def forward(self, x):
        return self.last(torch.relu(self.first(x)) * self.table_of(len(x)))


class ClassDefaults(Attribute):
    table, n = None, 0

    def __init__(self) -> None:
        Net.__init__(self)


class OnTheClass(Net):
    table, n = None, 0

    def table_of(self, n):
        if n > self.n:
            type(self).table, type(self).n = rows(n), n
        return self.table[:n]


class HalfOnTheClass(Attribute):
    def table_of(self, n):
        if n > type(self).longest:
            self.table, type(self).longest = rows(n), n
        return self.table[:n] if self.table is not None else rows(n)

    longest = 0


class CacheOfTheClass(Net):
    cache: ClassVar[dict[int, Any]] = {}

    def table_of(self, n):
        if n not in self.cache:
            self.cache[n] = rows(n)
        return self.cache[n]


class Buffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", rows(1))
        self.n = 1

    def table_of(self, n):
        if n > self.n:
            self.table, self.n = rows(n), n
        return self.table[:n]


class NoBufferAtFirst(Buffer):
    def __init__(self) -> None:
        Net.__init__(self)
        self.register_buffer("table", None, persistent=False)
        self.n = 0


class RegisteredLate(Net):
    n = 0

    def table_of(self, n):
        if n > self.n:
            self.register_buffer("table", rows(n), persistent=False)
            self.n = n
        return self.table[:n]


class Resized(Buffer):
    def table_of(self, n):
        if n > self.n:
            with torch.no_grad():
                self.table.resize_(n, 1).copy_(rows(n))
            self.n = n
        return self.table[:n].clone()


class GivenOtherMemory(Buffer):
    def table_of(self, n):
        if n > self.n:
            self.table.data, self.n = rows(n), n
        return self.table[:n]


class WrittenInPlace(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept, self.n = [torch.zeros(32, 1)], 0

    def table_of(self, n):
        if n > self.n:
            self.kept[0][:n] = rows(n)
            self.n = n
        return self.kept[0][:n].clone()


class ByShape(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, Tensor] = {}
        self.latest = torch.Size([])

    def forward(self, x):
        if self.latest != x.shape:
            self.latest, self.cache[x.shape] = x.shape, rows(len(x))
        return self.last(torch.relu(self.first(x)) * self.cache[self.latest])


class Anchors(Net):
    """As a YOLO makes its grid at the first forward and whenever the size changes."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.anchors, self.strides = None, torch.empty(0), torch.empty(0)

    def table_of(self, n):
        if self.shape != n:
            self.shape, self.anchors, self.strides = n, rows(n) / 2, torch.full((n, 1), 2.0)
        return self.anchors * self.strides


class Rotary(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inverse", torch.ones(1), persistent=False)
        self.grow(2)

    def grow(self, n):
        self.max_seq_len_cached = n
        self.register_buffer("cos_cached", rows(n) * self.inverse, persistent=False)

    def table_of(self, n):
        if n > self.max_seq_len_cached:
            self.grow(n)
        return self.cos_cached[:n]


class Nested(Net):
    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {"of": [{"table": None, "n": 0}], "pair": (None, 0)}

    def table_of(self, n):
        own = self.state["of"][0]
        if n > own["n"]:
            own["table"], own["n"] = rows(n), n
            self.state["pair"] = (own["table"], n)
        return self.state["pair"][0][:n]


class Lists(Net):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Tensor] = []
        self.sizes: set[int] = set()
        self.recent: deque[int] = deque(maxlen=2)

    def table_of(self, n):
        if n not in self.sizes:
            self.sizes.add(int(n))
            self.tables.append(rows(n))
        self.recent.append(int(n))
        return next(one for one in self.tables if len(one) == n)


class Recent(Net):
    """Keeps the two tables used last."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = OrderedDict([(1, rows(1)), (2, rows(2))])

    def table_of(self, n):
        n = int(n)
        if n not in self.cache:
            self.cache[n] = rows(n)
        self.cache.move_to_end(n)
        while len(self.cache) > 2:
            self.cache.popitem(last=False)
        return self.cache[n]


@dataclass
class Config:
    n: int = 0
    table: Any = None
    width: int = 8


class Slots:
    __slots__ = ("n", "table")

    def __init__(self) -> None:
        self.n, self.table = 0, None


class Grower:
    """A helper of the model's, with a table of its own."""

    def __init__(self) -> None:
        self.n, self.table = 0, None

    def __call__(self, n):
        if n > self.n:
            self.table, self.n = rows(n), n
        return self.table[:n]


class Configured(Net):
    def __init__(self, holder: Any = None) -> None:
        super().__init__()
        self.config = Config() if holder is None else holder

    def table_of(self, n):
        if n > self.config.n:
            self.config.n, self.config.table = n, rows(n)
        return self.config.table[:n]


class ConfiguredByHalf(Net):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.table = types.SimpleNamespace(n=0), None

    def table_of(self, n):
        if n > self.config.n:
            self.config.n, self.table = n, rows(n)
        return self.table[:n]


class Helped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.helpers = {"rows": Grower()}

    def table_of(self, n):
        return self.helpers["rows"](n)


class Hidden(Net):
    """A module that is none of the model's own, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.other = [Attribute()]

    def table_of(self, n):
        return self.other[0].table_of(n)


class Inside(Net):
    """One module keeps the number, another the table."""

    def __init__(self) -> None:
        super().__init__()
        self.holder, self.n = nn.Module(), 0
        self.holder.table = None

    def table_of(self, n):
        if n > self.n:
            self.holder.table, self.n = rows(n), n
        return self.holder.table[:n]


class Drawn(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.calls = torch.Generator().manual_seed(0), 0

    def table_of(self, n):
        self.calls += 1
        return 1 + torch.rand(n, 1, generator=self.generator)


KINDS: dict[str, Any] = {
    one.__name__: one
    for one in (
        *(Attribute, Length, ClassDefaults, OnTheClass, HalfOnTheClass, CacheOfTheClass, Buffer, NoBufferAtFirst),
        *(RegisteredLate, Resized, GivenOtherMemory, WrittenInPlace, ByShape, Anchors, Rotary, Nested, Lists, Recent),
        *(Configured, ConfiguredByHalf, Helped, Hidden, Inside, Drawn),
    )
}
KINDS |= {
    "a namespace": lambda: Configured(types.SimpleNamespace(n=0, table=None)),
    "parsed arguments": lambda: Configured(argparse.Namespace(n=0, table=None)),
    "slots": lambda: Configured(Slots()),
}

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
DATA = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (3, 7)]
INPUTS = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (2, 9, 4)]
CALLS: dict[str, Any] = {
    "find_axes": lambda model: find_axes(model, X),
    "plan_neurons": lambda model: plan_neurons(model, X, 0.25, progress=False),
    "prune_neurons": lambda model: prune_neurons(model, X, 0.25, progress=False),
    "prune_neurons by data": lambda model: prune_neurons(model, X, 0.25, data=DATA, repair=False, progress=False),
    "prune_neurons to a budget": lambda model: prune_neurons(model, X, max_macs=0.8, progress=False),
    "prune_weights wanda": lambda model: prune_weights(model, 0.5, importance="wanda", data=DATA, progress=False),
    "prune_weights saliency": lambda model: prune_weights(model, 0.5, importance="saliency", data=DATA, progress=False),
    "prune_weights sparsegpt": lambda model: prune_weights(
        model, 0.5, importance="sparsegpt", data=DATA, progress=False
    ),
    "shrink": lambda model: shrink(model, X),
    "distill from": lambda model: distill(nn.Linear(4, 3), model, DATA, epochs=2, validation=DATA, progress=False),
}


def described(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """What a value is made of, with the identity of everything that has one; layers are left out."""
    if id(value) in seen or isinstance(value, nn.Linear):
        return id(value)
    seen = (*seen, id(value))
    if isinstance(value, Tensor):
        return id(value), bits(value.clone())  # what numpy looks at can never be resized again
    if isinstance(value, torch.Generator):
        return id(value), bits(value.get_state())
    if isinstance(value, dict):
        return id(value), [(described(key, seen), described(one, seen)) for key, one in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return type(value), [described(one, seen) for one in value]
    if isinstance(value, set):
        return id(value), sorted(value)
    if isinstance(value, Slots):
        return id(value), value.n, described(value.table, seen)
    if hasattr(value, "__dict__") and not isinstance(value, (type, types.FunctionType)):
        return id(value), [(key, described(one, seen)) for key, one in vars(value).items() if "hook" not in key]
    return type(value), repr(value) if isinstance(value, (int, float, str, type(None))) else id(value)


def attributes(model: nn.Module) -> Any:
    own = [{key: one for key, one in vars(kind).items() if key[:2] != "__"} for kind in type(model).__mro__[:-2]]
    return described(vars(model)), [[(key, described(one)) for key, one in names.items()] for names in own]


@pytest.fixture(autouse=True)
def fresh_classes():
    """Tables kept on classes are of this test alone."""
    yield
    OnTheClass.table, OnTheClass.n, HalfOnTheClass.longest = None, 0, 0
    CacheOfTheClass.cache.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("has_run", [False, True], ids=["new", "has run"])
def test_a_model_runs_afterwards_as_a_fresh_copy_does(kind, call, has_run):
    torch.manual_seed(0)
    model = KINDS[kind]()
    if has_run:
        model(DATA[0][:2])
    before, fresh = attributes(model), copy.deepcopy(model)
    report = CALLS[call](model)
    assert attributes(model) == before
    plan = getattr(report, "plan", None)
    if call.startswith("prune_neurons"):
        plan.apply(fresh)
    elif call.startswith("prune_weights"):
        fresh.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            fresh.first.weight.copy_(model.first.weight)
            fresh.last.weight.copy_(model.last.weight)
            fresh.last.bias.copy_(model.last.bias)
    longest = HalfOnTheClass.longest
    found = [model(x) for x in INPUTS]
    HalfOnTheClass.longest = longest  # which the other instance would believe
    assert all(torch.equal(one, fresh(x)) for one, x in zip(found, INPUTS, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_runs_afterwards_as_a_fresh_copy_does(kind):
    torch.manual_seed(0)
    student, teacher = KINDS[kind](), nn.Linear(4, 3)
    distill(student, teacher, DATA, epochs=2, validation=DATA, keep_best=True, progress=False)
    fresh = KINDS[kind]()
    with torch.no_grad():
        for one, other in zip(fresh.parameters(), student.parameters(), strict=True):
            one.copy_(other)
    for n in (2, 9, 4):
        x = torch.randn(n, 4)
        found = student(x)
        assert found.shape == (n, 3)
        assert kind == "Drawn" or torch.equal(found, fresh(x)), n


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_as_it_was_after_an_error(kind):
    torch.manual_seed(0)
    student = KINDS[kind]()
    before = attributes(student), [bits(one) for one in student.parameters()]
    with pytest.raises(ValueError, match="not finite"):
        distill(student, nn.Linear(4, 3), [*DATA, DATA[0] * float("nan")], progress=False)
    assert (attributes(student), [bits(one) for one in student.parameters()]) == before


def test_what_has_not_changed_is_not_written_to():
    class Watched(dict):
        def __delitem__(self, key):
            raise AssertionError

        def update(self, *_, **__):
            raise AssertionError

    model = nn.BatchNorm1d(2)
    model.table, model.seen = Watched(a=torch.ones(3, 3)), [torch.ones(2, 2)]
    versions = [one._version for one in (model.table["a"], model.seen[0], model.running_mean)]
    with restored(model):
        model.eval()
    assert [one._version for one in (model.table["a"], model.seen[0], model.running_mean)] == versions


class Normalised(nn.Module):
    """Its forward gives its parameter other values, in its own memory or in other."""

    def __init__(self, *, other_memory: bool) -> None:
        super().__init__()
        self.first, self.last, self.other_memory = nn.Linear(4, 8), nn.Linear(8, 3), other_memory

    def forward(self, x):
        weight = self.first.weight
        with torch.no_grad():
            scaled = weight / (weight.norm() + 1)
        if self.other_memory:
            weight.data = scaled
        else:
            weight.data.copy_(scaled)
        return self.last(self.first(x).relu())


WRITING = {
    "find_axes": lambda model: find_axes(model, DATA[0]),
    "distill from it": lambda model: distill(nn.Linear(4, 3), model, DATA, epochs=2, progress=False),
}


@pytest.mark.parametrize("other_memory", [False, True], ids=["in place", "other memory"])
@pytest.mark.parametrize("call", WRITING)
def test_what_a_forward_writes_into_parameters_is_undone(call, other_memory):
    torch.manual_seed(0)
    model = Normalised(other_memory=other_memory)
    before, place = bits(model.first.weight), model.first.weight.data_ptr()
    WRITING[call](model)
    assert bits(model.first.weight) == before
    assert model.first.weight.data_ptr() == place


def test_values_assigned_as_data_are_followed():
    class Softened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            self.first.weight.data = self.first.weight.data.softmax(0)
            return self.last(self.first(x))

    assert not find_axes(Softened(), torch.randn(2, 4))["first"].exact
