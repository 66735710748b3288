"""Integers that remember: everywhere an int, with an origin that arithmetic keeps, for as long as the trace lasts."""

from __future__ import annotations

import copy
import functools
import json
import math
import operator
import pickle
import threading
import types
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netopt.axes import find_axes
from netopt.axes.layout import Atom
from netopt.axes.tracing.attributes import symbolic_integers
from netopt.model.attributes import Attributes
from netopt.symbolic.number import (
    AttributeRef,
    Constraints,
    DimSize,
    Shape,
    SymbolicFloat,
    SymbolicInt,
    evaluate,
    leaves,
)

BINARY = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.mod,
    operator.truediv,
    operator.pow,
]
COMPARE = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
WIDTH = AttributeRef(("block", "width"))


def size(value, constraints=None, place=WIDTH):
    return SymbolicInt(value, place, constraints if constraints is not None else Constraints())


def plain(value):
    if isinstance(value, int):
        return int.__int__(value)
    return float.__float__(value)


# Arithmetic.


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BINARY), st.integers(2, 40), st.integers(1, 6) | st.floats(0.5, 4.0), st.integers(2, 40))
def test_arithmetic_is_that_of_integers_and_can_be_done_again(operation, left, right, later):
    known = size(left)
    cases = [
        (operation(known, right), lambda value: operation(value, right)),
        (operation(known, known), lambda value: operation(value, value)),
    ]
    if isinstance(right, int):  # a plain float on the left computes by itself, and asks no one
        cases.append((operation(right, known), lambda value: operation(right, value)))
    for result, again in cases:
        expected = again(left)
        assert isinstance(result, (SymbolicInt, SymbolicFloat))
        assert plain(result) == expected
        assert type(plain(result)) is type(expected)
        assert evaluate(result, {}, {}) == expected
        assert evaluate(result, {}, {WIDTH: later}) == again(later)
        assert set(leaves(result)) == {WIDTH}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_long_computations_keep_what_they_came_from(data):
    constraints = Constraints()
    start = {AttributeRef(("a", "x")): 12, AttributeRef(("b", "y")): 5}
    later = {place: data.draw(st.integers(1, 30)) for place in start}
    terms = [(size(value, constraints, place), value, later[place], {place}) for place, value in start.items()]
    for _ in range(data.draw(st.integers(1, 8))):
        operation = data.draw(st.sampled_from([operator.add, operator.mul, operator.sub]))
        a, b = data.draw(st.sampled_from(terms)), data.draw(st.sampled_from(terms))
        terms.append((operation(a[0], b[0]), operation(a[1], b[1]), operation(a[2], b[2]), a[3] | b[3]))
    for term, now, then, places in terms:
        assert plain(term) == now == evaluate(term, {}, {})
        assert evaluate(term, {}, later) == then
        assert set(leaves(term)) == places


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BINARY), st.integers(2, 40), st.floats(0.5, 4.0), st.integers(2, 40))
def test_numbers_with_a_fraction_keep_their_origin_on_either_side(operation, left, right, later):
    half = size(left) / 2
    for result, again in (
        (operation(half, right), lambda value: operation(value / 2, right)),
        (operation(right, half), lambda value: operation(right, value / 2)),
    ):
        assert type(result) is SymbolicFloat
        assert plain(result) == again(left)
        assert evaluate(result, {}, {WIDTH: later}) == again(later)


def test_an_extent_follows_the_count_of_its_layout():
    atom = Atom(12)
    number = SymbolicInt(12, DimSize(atom), Constraints())
    half = number // 2 + 1
    assert half == 7
    assert evaluate(half, {atom: 6}, {}) == 4


def test_functions_of_numbers():
    known = size(12)
    assert divmod(known, 5) == (2, 2)
    assert -known == -12
    assert plain(-known) == -12
    assert +known is known
    assert abs(known) == 12
    assert round(known / 5) == 2
    assert math.floor(known / 5) == 2
    assert math.ceil(known / 5) == 3
    assert evaluate(math.ceil(known / 5), {}, {WIDTH: 21}) == 5
    assert max(known, 7) is known
    assert range(known)[-1] == 11
    assert "ab" * known == "ab" * 12
    assert [0] * known == [0] * 12
    assert [*range(20)][known] == 12
    assert f"{known} {known:>4d} {known!r}" == "12   12 12"


def test_roots_by_powers_are_remembered():
    known = size(16)
    assert type(known**0.5) is SymbolicFloat
    assert evaluate(known**-0.5, {}, {WIDTH: 25}) == 25**-0.5


# Everywhere an int.


@pytest.mark.parametrize("known", [size(12), SymbolicFloat(0.5, WIDTH, Constraints())], ids=["size", "scalar"])
def test_what_is_written_out_is_a_plain_number(known):
    loaded = pickle.loads(pickle.dumps(known))
    assert loaded == known
    assert type(loaded) in (int, float)
    assert json.loads(json.dumps({"n": known})) == {"n": plain(known)}


def test_a_copied_configuration_still_remembers_within_the_trace():
    known = size(12)
    assert copy.deepcopy({"n": [known]})["n"][0].origin == WIDTH
    assert copy.copy(known).origin == WIDTH


def test_torch_takes_it_for_an_int():
    known = size(4)
    assert torch.zeros(known, known + 1).shape == (4, 5)
    assert torch.arange(12).view(known, -1).shape == (4, 3)
    assert torch.equal(torch.ones(3) * known, torch.full((3,), 4.0))
    assert torch.equal(known - torch.ones(3), torch.full((3,), 3.0))
    assert nn.Linear(known, 2).in_features == 4


def test_other_types_keep_their_own_rules():
    known = size(3)
    assert (known == "3") is False
    assert known != "3"
    with pytest.raises(TypeError):
        _ = known + "3"
    assert known + (1 + 2j) == 4 + 2j
    assert known & 1 == 1


# What a ledger learns.


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(COMPARE), st.integers(2, 5), st.integers(2, 5))
def test_a_comparison_is_a_condition_with_its_outcome(compare, left, right):
    constraints = Constraints()
    outcome = compare(size(left, constraints), right)
    assert outcome is compare(left, right)
    (condition,) = constraints.guards
    assert condition.outcome is outcome
    assert {plain(condition.left), plain(condition.right)} == {left, right}
    assert condition.where[0] == __file__


def test_an_equation_remembers_the_line_that_stated_it():
    constraints, atom = Constraints(), Atom(12)
    constraints.equate(size(12, constraints), atom, "view")
    (equation,) = constraints.equations
    assert str(equation).startswith("view (test_axes_sizes.py:")
    constraints.equate(size(1, constraints), Atom(1), "view")
    assert len(constraints.equations) == 1  # a dimension of one has nothing to say


def test_a_size_made_a_number_is_noted():
    constraints = Constraints()
    assert float(size(12, constraints)) == 12.0
    assert [(plain(number), where.partition(":")[0]) for number, where in constraints.numbers] == [
        (12, "test_axes_sizes.py")
    ]


def test_after_the_trace_nothing_is_noted_and_numbers_are_plain():
    constraints = Constraints()
    known = size(12, constraints)
    third = known / 3
    constraints.is_recording = False
    assert type(known + 1) is int
    assert type(known // 5) is int
    assert type(known / 5) is float
    assert type(third * 2) is float
    assert type(2 - third) is float
    assert known == 12
    assert third < 5
    assert float(known) == 12.0
    assert float(third) == 4.0
    assert not constraints.guards
    assert not constraints.numbers


def test_another_thread_sees_plain_integers():
    constraints = Constraints()
    known = size(12, constraints)
    seen = []

    def look():
        seen.extend([type(known + 1), type(known / 5), known == 12, float(known), hash(known), {12: "found"}[known]])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [int, float, True, 12.0, hash(12), "found"]
    assert not constraints.guards
    assert not constraints.numbers


def test_a_cache_of_plain_integers_is_missed_by_symbolic_ones():
    calls = []

    @functools.lru_cache
    def double(n):
        calls.append(n)
        return 2 * n

    constraints = Constraints()
    known = size(12, constraints)
    assert double(12) == 24
    assert type(double(known)) is type(double(known)) is SymbolicInt
    assert len(calls) == 2
    constraints.is_recording = False
    assert hash(known) == hash(12)
    assert type(double(12)) is int


class Tables(nn.Module):
    """Looks tensors up by a size, in dicts of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scales = {8: 0.5, 3: 2.0}
        self.cache = {}

    def forward(self, x):
        x = self.first(x)
        width = x.shape[-1]
        if width not in self.cache:
            self.cache[width] = torch.ones(width)
        return self.last(x * self.scales[width] * self.scales.get(width, 1.0) * self.cache[width])


def test_a_dict_of_the_models_own_is_looked_up_by_value():
    model, x = Tables(), torch.randn(2, 4)
    model(x)
    axes = find_axes(model, x)
    assert axes["first"].frozen is not None  # the width is a key
    assert list(model.scales) == [8, 3]
    assert list(model.cache) == [8]
    assert all(type(key) is int for key in (*model.scales, *model.cache))
    assert type(model.scales) is dict


def test_ledgers_know_their_own():
    constraints = Constraints()
    assert constraints.knows(size(12, constraints))
    assert not constraints.knows(size(12))
    assert not constraints.knows(12)


# The integers of a model, lent and given back.


@dataclass
class Settings:
    width: int = 8
    heads: tuple = (2, 4)
    inner: types.SimpleNamespace = field(default_factory=lambda: types.SimpleNamespace(depth=3))


def scaled(x, times=8):
    return x * times


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.settings = Settings()
        self.sizes = [8, (4, 2), {"k": 16}]
        self.flag, self.rate, self.text = True, 0.5, "8"
        self.one, self.function = 1, scaled
        self.partial = functools.partial(scaled, times=16)
        self.layer = nn.Linear(8, 8)


def numbers(value, path=(), seen=None):
    """Every integer reached from a value, with its path and type."""
    seen = set() if seen is None else seen
    if isinstance(value, int):
        return {path: (type(value), plain(value))}
    if id(value) in seen or isinstance(value, (torch.Tensor, type)):
        return {}
    seen.add(id(value))
    found = {}
    if isinstance(value, dict):
        for key, one in value.items():
            found.update(numbers(one, (*path, key), seen))
    elif isinstance(value, (list, tuple, set)):
        for index, one in enumerate(value):
            found.update(numbers(one, (*path, index), seen))
    elif isinstance(value, functools.partial):
        found.update(numbers(value.keywords, (*path, "keywords"), seen))
    elif isinstance(value, types.FunctionType):
        found.update(numbers(value.__defaults__, (*path, "__defaults__"), seen))
    elif hasattr(value, "__dict__"):
        found.update(numbers(vars(value), path, seen))
    return found


def test_every_integer_is_lent_with_its_place_and_given_back():
    model, constraints = Holder(), Constraints()
    before = numbers(model)
    parts = list(model.named_modules())
    attributes = Attributes(parts)
    with attributes.in_mode(model, training=False), symbolic_integers(parts, attributes, constraints):
        lent = {
            one.origin.path
            for one in (
                model.settings.width,
                model.settings.heads[1],
                model.settings.inner.depth,
                model.sizes[0],
                model.sizes[1][0],
                model.sizes[2]["k"],
                model.partial.keywords["times"],
                model.layer.in_features,
            )
        }
        assert lent == {
            ("", "settings", "width"),
            ("", "settings", "heads", 1),
            ("", "settings", "inner", "depth"),
            ("", "sizes", 0),
            ("", "sizes", 1, 0),
            ("", "sizes", 2, "k"),
            ("", "partial", "keywords", "times"),
            ("layer", "in_features"),
        }
        assert type(model.flag) is bool
        assert type(model.one) is int  # a one can neither shrink nor split
        assert type(model.rate) is float
    assert numbers(model) == before
    assert all(kind in (int, bool) for kind, _ in numbers(model).values())
    assert scaled.__defaults__ == (8,)


def test_integers_are_given_back_after_an_error():
    model = Holder()
    before = numbers(model)
    parts = list(model.named_modules())
    attributes = Attributes(parts)
    with (
        pytest.raises(KeyError),
        attributes.in_mode(model, training=False),
        symbolic_integers(parts, attributes, Constraints()),
    ):
        raise KeyError
    assert numbers(model) == before


class Leaking(nn.Module):
    """Leaves what it sees everywhere it can."""

    def __init__(self):
        super().__init__()
        self.settings = Settings()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.cache, self.seen, self.nested = {}, [], {"a": [1], "b": ({},)}
        self.object = types.SimpleNamespace(items=[])
        self.register_buffer("mask", torch.ones(3), persistent=False)

    def forward(self, x):
        h = self.first(x)
        n = h.shape[-1]
        self.now = n
        self.cache[n] = n
        self.seen.append(n)
        self.nested["a"].append(n)
        self.nested["b"][0]["n"] = n
        self.object.items.append(h)
        self.object.n = n
        self.settings.width = n
        self.settings.latest = (n, n + 1)
        self.register_buffer("made", h)
        self.mask = torch.ones(n)
        return self.last(h.relu())


def test_nothing_the_forward_leaves_stays():
    model = Leaking()
    before, mask = numbers(model), model.mask
    attributes = set(vars(model))
    axes = find_axes(model, torch.randn(2, 4))
    assert [axis.name for axis in axes.free] == ["first"]
    assert numbers(model) == before
    assert all(kind in (int, bool) for kind, _ in numbers(model).values())
    assert set(vars(model)) == attributes
    assert not model.cache
    assert not model.seen
    assert not model.object.items
    assert vars(model.settings).keys() == {"width", "heads", "inner"}
    assert model.mask is mask
    assert set(dict(model.named_buffers())) == {"mask"}


class Popping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.widths = nn.Linear(4, 8), [8, 8, 8]

    def forward(self, x):
        return self.layer(x)[:, : self.widths.pop()]


def test_a_forward_may_empty_its_lists():
    model = Popping()
    find_axes(model, torch.randn(2, 4))
    assert model.widths == [8, 8, 8]
    assert {type(one) for one in model.widths} == {int}


def test_values_kept_outside_the_model_are_plain_when_used():
    kept = []

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def forward(self, x):
            kept.append(x.shape[-1])
            return self.layer(x).sum(-1)

    find_axes(Outside(), torch.randn(2, 4))
    assert kept
    assert all(type(one + 0) is int for one in kept)
    assert all(type(pickle.loads(pickle.dumps(one))) is int for one in kept)
    assert all(type(copy.deepcopy([one])[0]) is int for one in kept)


# Shapes.


def test_a_shape_is_a_torch_size_that_remembers():
    constraints = Constraints()
    n = SymbolicInt(3, AttributeRef(("", "n")), constraints)
    shape = Shape((2, n, 4))
    assert isinstance(shape, torch.Size)
    assert shape == torch.Size([2, 3, 4])
    assert repr(shape) == "torch.Size([2, 3, 4])"
    for part, entries in (
        (shape[1:], 12),
        (shape[:2] + shape[2:], 24),
        (operator.add((2, 5), shape[1:]), 120),
        (shape[1:2] * 2, 9),
    ):
        assert type(part) is Shape
        assert part.numel() == entries
        later = evaluate(part.numel(), {}, {AttributeRef(("", "n")): 6})
        assert later == (36 if entries == 9 else 2 * entries)
    assert torch.zeros(shape).shape == torch.zeros(24).view(shape).shape == torch.Size([2, 3, 4])
    assert type(copy.deepcopy(shape)) is torch.Size
    assert type(pickle.loads(pickle.dumps(shape))) is torch.Size


class Strided(nn.Module):
    """A stride, a padding or a dilation that is computed from a number of channels."""

    def __init__(self, name):
        super().__init__()
        self.first, self.name = nn.Conv2d(5, 8, 1), name
        self.weight, self.last = nn.Parameter(torch.randn(6, 8, 3, 3)), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        number = x.shape[1] // 4
        if self.name == "stride":
            x = nn.functional.conv2d(x, self.weight, None, number)
        else:
            x = nn.functional.conv2d(x, self.weight, **{self.name: number})
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_what_says_where_a_convolution_looks_stays(name):
    axes = find_axes(Strided(name), torch.randn(2, 5, 8, 8))
    assert [axis.name for axis in axes.free] == ["weight"]


class OfOne(nn.Module):
    """Heads of a single entry, and as many as there are channels in a fourth of them."""

    def __init__(self):
        super().__init__()
        self.first, self.query, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.query(x).unflatten(-1, (4, x.shape[-1] // 4)).flatten(-2))


def test_a_quotient_that_is_one_must_not_become_nothing():
    axes = find_axes(OfOne(), torch.randn(2, 5))
    assert axes.feasible({axis.name: 2 for axis in axes.free}) == {axis.name: axis.size for axis in axes.free}
