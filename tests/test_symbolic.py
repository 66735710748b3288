"""Symbolic numbers: everywhere an int, whose arithmetic is recorded for as long as a trace lasts."""

from __future__ import annotations

import copy
import fractions
import functools
import json
import math
import operator
import pickle
import threading
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netopt.axes import find_axes
from netopt.axes.layout import Atom
from netopt.axes.tracing.attributes import symbolic_integers
from netopt.errors import ForwardError
from netopt.model.restore import Snapshot
from netopt.prune import prune_neurons
from netopt.symbolic import (
    AttributeRef,
    Constraints,
    DimSize,
    Expression,
    Shape,
    SymbolicFloat,
    SymbolicInt,
    combine,
    evaluate,
    expression_of,
    leaf,
    leaves,
    plain,
    substitute,
    value_of,
)

WIDTH = AttributeRef(("block", "width"))


def size(value, constraints=None, place=WIDTH):
    return SymbolicInt(value, place, constraints if constraints is not None else Constraints())


# Operators: what is computed is followed to other counts, kept by a guard, or noted as used.

BINARY = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.truediv, operator.pow]
BITWISE = [operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift]
COMPARE = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]

OF_INTEGERS = {
    **{f"n {one.__name__} 3": lambda n, one=one: one(n, 3) for one in (*BINARY, *BITWISE, *COMPARE)},
    **{f"40 {one.__name__} n": lambda n, one=one: one(40, n) for one in (*BINARY[:-1], *BITWISE, *COMPARE)},
    **{f"n {one.__name__} n": lambda n, one=one: one(n, n) for one in (*BINARY[:-1], *BITWISE[:-2], *COMPARE)},
    **{f"n {one.__name__} 0.3": lambda n, one=one: one(n, 0.3) for one in (*BINARY, *COMPARE)},
    **{f"n {one.__name__} True": lambda n, one=one: one(n, True) for one in (*BINARY, *BITWISE, *COMPARE)},
    "2 pow n": lambda n: 2**n,
    "pow of three": lambda n: pow(n, 2, 5),
    "divmod": lambda n: divmod(n, 5),
    "divmod by n": lambda n: divmod(50, n),
    "-n": lambda n: -n,
    "+n": lambda n: +n,
    "~n": lambda n: ~n,
    "abs": abs,
    "round": round,
    "round to tens": lambda n: round(n, -1),
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "bool": bool,
    "not": operator.not_,
    "and": lambda n: n and 2,
    "truth of a rest": lambda n: "even" if not n % 2 else "odd",
    "int": int,
    "float": float,
    "int of a share": lambda n: int(n * 0.66),
    "floor of a share": lambda n: math.floor(n * 0.66),
    "round of a share": lambda n: round(n * 0.66),
    "round to digits": lambda n: round(n / 7, 2),
    "root": lambda n: n**-0.5,
    "bit_length": lambda n: n.bit_length(),
    "bit_count": lambda n: n.bit_count(),
    "power of two": lambda n: n & (n - 1) == 0,
    "str": str,
    "repr": repr,
    "format": lambda n: f"{n} {n:>4d}",
    "str.format": "{:d}".format,
    "percent s": lambda n: "%s" % n,  # noqa: UP031
    "to_bytes": lambda n: n.to_bytes(2, "big"),
    "as_integer_ratio": lambda n: n.as_integer_ratio(),
    "numerator": lambda n: n.numerator,
    "real": lambda n: n.real,
    "conjugate": lambda n: n.conjugate(),
    "complex": complex,
    "times a complex": lambda n: n * 2j,
    "fraction": lambda n: n + fractions.Fraction(1, 3),
    "equals a fraction": lambda n: n == fractions.Fraction(12),
    "repeated list": lambda n: [0] * n,
    "repeated text": lambda n: n * "ab",
    "min": lambda n: min(n, 9),
    "max": lambda n: max((9, n, 2)),
    "sorted": lambda n: sorted([15, n, 9]),
    "sum": lambda n: sum([n, 3, n]),
    "all": lambda n: all(one > 4 for one in (n, 9)),
    "any of sizes": lambda n: any([n - 12, n - 9]),
    "in a list": lambda n: [9, 12].index(n) if n in [9, 12] else None,
    "match": lambda n: "twelve" if n == 12 else "not",
    "prod": lambda n: math.prod((2, n, n)),
    **{
        f"math.{name}": functools.partial(lambda one, n: one(n), getattr(math, name))
        for name in ("sqrt", "exp", "log1p", "cos", "fabs", "hypot", "erf", "degrees", "isfinite")
    },
    "math.pow": lambda n: math.pow(n, 2),
    "math.fsum": lambda n: math.fsum([n, 1]),
    "numpy.prod": lambda n: int(np.prod((2, n))),
    "numpy.sqrt": lambda n: float(np.sqrt(n)),
    "numpy integer": lambda n: int(np.int64(3) * n),
    "numpy compares": lambda n: bool(np.int64(12) == n),
    "array": lambda n: np.array([n, 1]).tolist(),
}
OF_FLOATS = {
    **{f"x {one.__name__} 3": lambda x, one=one: one(x, 3) for one in (*BINARY, *COMPARE)},
    **{f"x {one.__name__} 0.3": lambda x, one=one: one(x, 0.3) for one in (*BINARY, *COMPARE)},
    **{f"3.5 {one.__name__} x": lambda x, one=one: one(3.5, x) for one in (*BINARY, *COMPARE)},
    **{f"3 {one.__name__} x": lambda x, one=one: one(3, x) for one in (*BINARY, *COMPARE)},
    **{f"x {one.__name__} x": lambda x, one=one: one(x, x) for one in (*BINARY[:-1], *COMPARE)},
    "divmod": lambda x: divmod(x, 1),
    "-x": operator.neg,
    "abs": abs,
    "round": round,
    "round to digits": lambda x: round(x, 1),
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "bool": bool,
    "int": int,
    "float": float,
    "is_integer": lambda x: x.is_integer(),
    "as_integer_ratio": lambda x: x.as_integer_ratio(),
    "hex": lambda x: x.hex(),
    "real": lambda x: x.real,
    "str": str,
    "format": lambda x: f"{x:.3f}",
    "math.sqrt": math.sqrt,
    "math.log": math.log,
    "numpy.sqrt": lambda x: float(np.sqrt(x)),
    "array": lambda x: np.array([x]).tolist(),
    "min": lambda x: min(x, 2.0),
    "sum": lambda x: sum([x, x]),
}
UNSEEN = {
    "range": range,
    "index": operator.index,
    "item": lambda n: "abcdefghijklmnopq"[n],
    "math.log": math.log,
    "math.isqrt": math.isqrt,
    "math.gcd": lambda n: math.gcd(n, 8),
    "hex": hex,
    "int.__add__": lambda n: int.__add__(n, 1),
    "literal on the left": lambda n: 0.5 * n,
    "sum after a float": lambda n: sum([0.5, n]),
    "percent d": lambda n: "%d" % n,  # noqa: UP031
    "type": lambda n: type(n) is int,
}
"""C code that reads the digits of an integer without calling a method of it: what differs then, outputs show."""


def later(result, values):
    """A result, with what is symbolic in it evaluated."""
    if isinstance(result, (list, tuple)):
        return type(result)(later(one, values) for one in result)
    return evaluate(result, values)


def check(compute, start, others):
    """The law of all operators; whether the result was followed."""
    expected = compute(start)
    constraints = Constraints()
    result = compute(size(start, constraints))
    constraints.close()
    assert plain(result) == expected if not isinstance(result, tuple) else tuple(plain(result)) == expected
    assert type(plain(result)) is type(expected) or isinstance(result, (list, tuple))
    if constraints.numbers:
        assert all(line.startswith("test_symbolic.py:") for _, line in constraints.numbers)
        assert any(WIDTH in leaves(number) for number, _ in constraints.numbers)
        return False
    followed = [other for other in others if all(guard.holds({WIDTH: other}) for guard in constraints.guards)]
    for other in followed:
        assert later(result, {WIDTH: other}) == compute(other), other
    return True


@pytest.mark.parametrize("name", OF_INTEGERS)
def test_an_operation_on_an_integer_is_followed_guarded_or_noted(name):
    check(OF_INTEGERS[name], 12, range(1, 40))


@pytest.mark.parametrize("name", OF_FLOATS)
def test_an_operation_on_a_float_is_followed_guarded_or_noted(name):
    check(lambda n: OF_FLOATS[name](n / 4), 13, range(1, 60))


@pytest.mark.parametrize("name", UNSEEN)
def test_what_c_code_reads_is_as_of_the_plain_integer(name):
    known = size(12)
    assert UNSEEN[name](known) == (UNSEEN[name](12) if name != "type" else False)
    assert not known.constraints.numbers
    assert not known.constraints.guards


@pytest.mark.parametrize(("kind", "base"), [(SymbolicInt, int), (SymbolicFloat, float)])
def test_every_method_of_a_number_is_its_own(kind, base):
    """None is inherited that computes."""
    harmless = set(dir(object)) | {"__index__", "__getnewargs__", "__getformat__", "from_bytes", "fromhex"}
    harmless |= {"imag", "denominator", "from_number", *(["is_integer"] if base is int else [])}
    inherited = {name for name in dir(base) if getattr(kind, name) is getattr(base, name, None)}
    inherited |= {name for name in dir(base) if name not in vars(kind)}
    assert inherited - harmless == set()


@pytest.mark.parametrize("operation", [*BINARY[:3], operator.mod])
@pytest.mark.parametrize("left", [True, 5, 2.5])
def test_two_symbolic_numbers_record_both(operation, left):
    constraints, other = Constraints(), AttributeRef(("block", "heads"))
    result = operation(size(12, constraints), size(5, constraints, other) * left)
    assert leaves(result) == {WIDTH, other}
    assert evaluate(result, {WIDTH: 20, other: 7}) == operation(20, 7 * left)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_long_computations_keep_what_they_came_from(data):
    constraints = Constraints()
    start = {AttributeRef(("a", "x")): 12, AttributeRef(("b", "y")): 5}
    others = {place: data.draw(st.integers(1, 30)) for place in start}
    terms = [(size(value, constraints, place), value, others[place], {place}) for place, value in start.items()]
    for _ in range(data.draw(st.integers(1, 8))):
        operation = data.draw(st.sampled_from([operator.add, operator.mul, operator.sub]))
        a, b = data.draw(st.sampled_from(terms)), data.draw(st.sampled_from(terms))
        terms.append((operation(a[0], b[0]), operation(a[1], b[1]), operation(a[2], b[2]), a[3] | b[3]))
    for term, now, then, places in terms:
        assert plain(term) == now == evaluate(term, {})
        assert evaluate(term, others) == then
        assert leaves(term) == places
        simple = substitute(expression_of(term), lambda one: one)
        assert value_of(simple) == now
        assert (simple.at(others) if isinstance(simple, Expression) else simple) == then


def test_a_number_counted_up_in_a_long_loop_is_noted():
    constraints = Constraints()
    known = total = size(12, constraints)
    for _ in range(5000):
        total = total + known
    assert total == 12 * 5001
    assert expression_of(total).depth < 1000  # what is nested deeply cannot be evaluated by recursion
    assert {leaves(number) for number, _ in constraints.numbers} == {frozenset([WIDTH])}


def test_a_dimension_size_follows_the_count_of_its_layout():
    atom = Atom(12)
    half = SymbolicInt(12, DimSize(atom), Constraints()) // 2 + 1
    assert half == 7
    assert evaluate(half, {DimSize(atom): 6}) == 4


# Expressions.

FORMULAS = {
    "product": lambda width, heads: 3 * width * heads,
    "quotient": lambda width, heads: heads * (width // heads),
    "sum": lambda width, heads: (width + 2 * heads) - 1,
    "scale": lambda width, heads: (width // heads) ** -0.5,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_only_unknown_is_solved(name):
    constraints = Constraints()
    number = FORMULAS[name](SymbolicInt(48, "width", constraints), SymbolicInt(6, "heads", constraints))
    if name != "quotient":  # heads are in it twice
        solution = number.expression.solve(FORMULAS[name](48, 3), {"width": 48})
        assert (solution.key, solution.value, solution.is_unique) == ("heads", 3, True)
    solution = number.expression.solve(FORMULAS[name](24, 6), {"heads": 6})
    assert (solution.key, solution.value, solution.is_unique) == ("width", 24, True)


def test_what_no_integer_gives_has_no_solution():
    width = SymbolicInt(48, "width", Constraints())
    assert (2 * width).expression.solve(13, {}).value is None
    assert (width**2 * (2 * width)).expression.solve(13, {}) is None


def test_equal_computations_are_equal_and_types_are_told_apart():
    one, other = size(12), size(12)
    assert (one * 2 + 1).expression == (other * 2 + 1).expression
    assert hash((one * 2).expression) == hash((other * 2).expression)
    assert (one * 2).expression != (one * 2.0).expression
    ordered, turned = (combine(operator.mul, [2, leaf("a", 3), leaf("b", 5), 4][::step]) for step in (1, -1))
    assert ordered == turned
    assert ordered.value == 120


def test_an_undefined_value_is_none_and_keeps_no_guard():
    constraints = Constraints()
    quotient = 12 // (size(12, constraints) - 1)
    assert evaluate(quotient, {WIDTH: 1}) is None
    assert quotient == 1
    assert [guard.holds({WIDTH: 13}) for guard in constraints.guards] == [True]
    assert [guard.holds({WIDTH: 1}) for guard in constraints.guards] == [False]


# Everywhere an int.


@pytest.mark.parametrize("known", [size(12), SymbolicFloat(0.5, WIDTH, Constraints())], ids=["int", "float"])
def test_what_is_written_out_is_a_plain_number(known):
    loaded = pickle.loads(pickle.dumps(known))
    assert loaded == known
    assert type(loaded) in (int, float)
    assert json.loads(json.dumps({"n": known})) == {"n": plain(known)}


def test_a_copied_configuration_still_records_within_the_trace():
    known = size(12)
    assert copy.deepcopy({"n": [known]})["n"][0].expression.key == WIDTH
    assert copy.copy(known).expression.key == WIDTH


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
    assert known != None  # noqa: E711 - the comparison itself
    assert not known.constraints.numbers
    with pytest.raises(TypeError):
        _ = known + "3"


# What constraints record.


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(COMPARE), st.integers(2, 5), st.integers(2, 5))
def test_a_comparison_is_a_guard_with_its_outcome(compare, left, right):
    constraints = Constraints()
    outcome = compare(size(left, constraints), right)
    assert outcome is compare(left, right)
    (guard,) = constraints.guards
    assert guard.outcome is outcome
    assert {value_of(guard.left), value_of(guard.right)} == {left, right}
    assert guard.where.startswith("test_symbolic.py:")
    assert guard.holds({WIDTH: left})


def test_an_equation_names_the_line_that_stated_it():
    constraints, atom = Constraints(), Atom(12)
    constraints.equate(size(12, constraints), atom, "view")
    (equation,) = constraints.equations
    assert str(equation).startswith("view at test_symbolic.py:")
    constraints.equate(size(1, constraints), Atom(1), "view")
    assert len(constraints.equations) == 1  # a dimension of one states nothing


def test_a_float_that_only_c_code_reads_is_noted_at_the_end():
    constraints = Constraints()
    ratio = size(12, constraints) / 5
    assert math.sqrt(ratio) == math.sqrt(2.4)
    assert not constraints.numbers
    constraints.close()
    assert [number for number, _ in constraints.numbers] == [ratio]


def test_after_the_trace_nothing_is_noted_and_numbers_are_plain():
    constraints = Constraints()
    known = size(12, constraints)
    third = known / 3
    constraints.close()
    noted = len(constraints.numbers)
    for result, kind in (
        (known + 1, int),
        (known // 5, int),
        (known / 5, float),
        (third * 2, float),
        (2 - third, float),
    ):
        assert type(result) is kind
    assert known == 12
    assert third < 5
    assert float(known) == 12.0
    assert float(third) == 4.0
    assert f"{known}" == "12"
    assert type(copy.deepcopy([known])[0]) is int
    assert not constraints.guards
    assert len(constraints.numbers) == noted


def test_a_number_of_an_earlier_trace_is_a_constant():
    earlier, constraints = size(5), Constraints()
    earlier.constraints.close()
    for result in (earlier + size(12, constraints), size(12, constraints) + earlier):
        assert evaluate(result, {WIDTH: 20}) == 25
    assert not earlier > size(12, constraints)
    assert [guard.holds({WIDTH: 4}) for guard in constraints.guards] == [False]


def test_constraints_know_their_own_numbers():
    constraints = Constraints()
    assert constraints.knows(size(12, constraints))
    assert not constraints.knows(size(12))
    assert not constraints.knows(12)
    assert leaves(size(5, constraints) + size(12)) == {WIDTH}
    assert type(expression_of(size(5, constraints) + size(12)).operands[1]) is int  # of another trace: a constant


# The integers of a model, lent and given back.


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
    constraints.close()
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
    attributes = Snapshot(model)
    with attributes.in_mode(model, training=False), symbolic_integers(parts, attributes, constraints):
        lent = {
            one.expression.key.path
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
    attributes = Snapshot(model)
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
        later = evaluate(part.numel(), {AttributeRef(("", "n")): 6})
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


# Sizes that a forward uses in other ways.


class Using(nn.Module):
    """Uses the size of a hidden layer, or an integer of its own."""

    def __init__(self, use):
        super().__init__()
        self.first, self.last, self.k, self.use = nn.Linear(5, 12), nn.Linear(12, 3), 12, use

    def forward(self, x):
        return self.last(self.use(self, self.first(x).relu()))


EXACT = {
    "truth of a rest": lambda m, h: h * 2 if h.shape[-1] % 5 else h,
    "all of a shape": lambda m, h: h * 2 if all(n > 4 for n in h.shape[1:]) else h,
    "any": lambda m, h: h if not any(n == 3 for n in h.shape) else h * 2,
    "shape in a message": lambda m, h: h if str(h.shape) else h * 2,
    "rounded to itself": lambda m, h: h.reshape(len(h), math.floor(abs(round(h.shape[-1])) * 1)),
    "divmod": lambda m, h: h.reshape(len(h), divmod(h.shape[-1] * 2, 2)[0]),
}
INEXACT = {
    "bits": lambda m, h: h * ((h.shape[-1] & 7) + 1),
    "shift": lambda m, h: h * (h.shape[-1] >> 1),
    "bit_length": lambda m, h: h * h.shape[-1].bit_length(),
    "text": lambda m, h: h * float(str(h.shape[-1])),
    "format": lambda m, h: h * float(f"{h.shape[-1]}"),
    "abs": lambda m, h: h * abs(h.shape[-1]),
    "max": lambda m, h: h * max(h.shape),
    "root": lambda m, h: h / math.sqrt(h.shape[-1]),
    "root of a float": lambda m, h: h / math.sqrt(h.shape[-1] / 2),
    "numpy": lambda m, h: h * int(np.prod(h.shape[1:])),
    "numpy of a list": lambda m, h: h * int(np.prod([h.shape[1]])),
    "rest": lambda m, h: h * divmod(h.shape[-1], 5)[1],
    "type of an attribute": lambda m, h: h * (1 if type(m.k) is int else m.k[0]),
    "type of a size": lambda m, h: h * (1 if type(h.shape[-1]) is int else h.shape[-1][0]),
}
FROZEN = {
    "view by numpy": lambda m, h: h.reshape(len(h), int(np.prod(h.shape[1:]))),
    "list": lambda m, h: h * torch.tensor([1.0] * h.shape[-1]),
    "share": lambda m, h: torch.cat([h[:, : int(h.shape[-1] * 0.66)], h[:, int(h.shape[-1] * 0.66) :]], 1),
}


@pytest.mark.parametrize("name", [*EXACT, *INEXACT, *FROZEN])
def test_every_use_of_a_size_is_followed_or_named(name):
    model, x = Using({**EXACT, **INEXACT, **FROZEN}[name]), torch.randn(6, 5)
    axes = find_axes(model, x).made_by("first")
    assert any(axis.frozen is not None for axis in axes) is (name in FROZEN)
    for axis in axes:
        assert (axis.frozen is None and axis.exact) is (name in EXACT)
        why = axis.frozen or axis.inexact or ""
        assert name in EXACT or "test_symbolic.py:" in why or "plain integers" in why


@pytest.mark.parametrize("name", EXACT)
def test_what_is_followed_is_computed_with_the_smaller_size(name):
    model, x = Using(EXACT[name]), torch.randn(6, 5)
    prune_neurons(model, x, 5, importance="magnitude", include="first", progress=False)
    assert model.first.out_features == 7


def test_a_forward_that_fails_fails_with_plain_integers_too():
    with pytest.raises(ForwardError, match="only here"):
        find_axes(Using(lambda m, h: {}["only here"]), torch.randn(6, 5))
