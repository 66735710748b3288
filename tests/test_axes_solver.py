"""Counts tied by arithmetic: what is chosen keeps every tie, is the nearest there is, and is found when it exists."""

from __future__ import annotations

import itertools
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netopt.axes import find_axes
from netopt.axes.layout import Atom, Concat, Product
from netopt.axes.solver import CountSolver
from netopt.symbolic import AttributeRef, Constraints, DimSize, Guard, SymbolicInt

MANY = settings(max_examples=120, deadline=None)


class System:
    """A few axes, a few attributes, and what a forward might say of them."""

    def __init__(self, sizes, attributes=()):
        self.atoms = [Atom(size) for size in sizes]
        self.constraints = Constraints()
        self.places = [AttributeRef(("block", f"n{index}")) for index in range(len(attributes))]
        self.attributes = [
            SymbolicInt(value, place, self.constraints) for value, place in zip(attributes, self.places, strict=True)
        ]
        self.said = []  # the same ties, as functions of counts and attribute values

    def extent(self, index):
        return SymbolicInt(self.atoms[index].size, DimSize(self.atoms[index]), self.constraints)

    def equate(self, number, layout):
        assert int.__int__(number) == layout.size
        self.constraints.equate(number, layout, "view")

    def counts(self):
        self.constraints.close()
        return CountSolver({index: [atom] for index, atom in enumerate(self.atoms)}, self.constraints)


def distance(found, wanted):
    """How far counts are from those wanted: the number of neurons by which they are off, in sum."""
    return sum(abs(found[key] - value) for key, value in wanted.items())


# Ties as a model states them, each with its truth: (what is said of the system, whether counts satisfy it).


def equal_halves(system, a, b):
    system.equate(system.extent(a), system.atoms[b])
    return lambda n: n[a] == n[b]


def multiple_of(number):
    def tie(system, a, b):
        if system.atoms[a].size % number == 0:
            rest = system.extent(a) % number
            _ = rest == 0
            return lambda n: n[a] % number == 0
        return lambda n: True

    return tie


def quotient(system, a, b):
    """``a // b`` is what ``a`` would be split into: ``view(b, a // b)``."""
    n, m = system.atoms[a].size, system.atoms[b].size
    if n % m:
        return lambda n: True
    number = (system.extent(a) // system.extent(b)) * system.extent(b)
    system.equate(number, system.atoms[a])
    return lambda n: n[b] and (n[a] // n[b]) * n[b] == n[a]


def at_least(system, a, b):
    _ = system.extent(a) >= system.extent(b)
    larger = system.atoms[a].size >= system.atoms[b].size
    return lambda n: (n[a] >= n[b]) is larger


def sum_is_even(system, a, b):
    even = (system.atoms[a].size + system.atoms[b].size) % 2 == 0
    _ = (system.extent(a) + system.extent(b)) % 2 == 0
    return lambda n: ((n[a] + n[b]) % 2 == 0) is even


TIES = [equal_halves, multiple_of(2), multiple_of(3), quotient, at_least, sum_is_even]


@st.composite
def systems(draw):
    sizes = draw(st.lists(st.sampled_from([2, 3, 4, 6, 8]), min_size=2, max_size=3))
    system = System(sizes)
    for _ in range(draw(st.integers(1, 4))):
        a, b = draw(st.permutations(range(len(sizes))))[:2]
        tie = draw(st.sampled_from(TIES))
        if tie is equal_halves and sizes[a] != sizes[b]:
            continue
        system.said.append(tie(system, a, b))
    return system


def solutions(system):
    ranges = [range(1, atom.size + 1) for atom in system.atoms]
    return [
        dict(enumerate(values))
        for values in itertools.product(*ranges)
        if all(holds(dict(enumerate(values))) for holds in system.said)
    ]


@MANY
@given(systems(), st.data())
def test_nearest_keeps_every_tie_and_nothing_is_nearer(system, data):
    counts = system.counts()
    possible = solutions(system)
    full = {index: atom.size for index, atom in enumerate(system.atoms)}
    assert full in possible, "what the model is now is a solution"
    wanted = {index: data.draw(st.integers(1, size), label=f"wanted {index}") for index, size in full.items()}
    found = counts.nearest(wanted)
    assert {key: found[key] for key in full} in possible
    if wanted in possible:
        assert found == wanted
    assert distance(found, wanted) == min(distance(one, wanted) for one in possible)


@MANY
@given(systems(), st.data())
def test_axes_that_are_not_named_move_as_little_as_they_can(system, data):
    counts = system.counts()
    full = {index: atom.size for index, atom in enumerate(system.atoms)}
    index = data.draw(st.integers(0, len(full) - 1))
    wanted = {index: data.draw(st.integers(1, full[index]))}
    rest = {key: size for key, size in full.items() if key != index}

    def far(one):
        return distance(one, wanted), distance(one, rest)

    assert far(counts.nearest(wanted)) == min(map(far, solutions(system)))


def test_the_nearest_is_not_the_nearest_of_the_first_axis():
    """A width, heads and their size, one the product of the others: every wish, against all there is."""
    width, heads, size = Atom(24), Atom(4), Atom(6)
    constraints = Constraints()
    constraints.equate(SymbolicInt(24, DimSize(width), constraints), Product((heads, size)), "view")
    constraints.close()
    full = {"width": 24, "heads": 4, "size": 6}
    counts = CountSolver({"width": [width], "heads": [heads], "size": [size]}, constraints)
    for values in itertools.product(range(1, 25, 3), range(1, 5), range(1, 7)):
        wanted = dict(zip(full, values, strict=True))
        nearest = min(
            distance({"width": h * d, "heads": h, "size": d}, wanted) for h in range(1, 5) for d in range(1, 7)
        )
        assert distance(counts.nearest(wanted), wanted) == nearest


def test_an_attribute_taken_apart_evenly_stays_a_multiple():
    """``out_features // heads`` is an entry's size: 7 // 2 would be 3 as well, and no layer is that wide."""
    system = System([3], [6])
    system.equate(system.attributes[0] // 2, system.atoms[0])
    counts = system.counts()
    assert not counts.unshrinkable()
    for wanted in (1, 2):
        found = counts.nearest({0: wanted})
        assert found[0] == wanted
        assert counts.assignments(found) == [(system.places[0], 2 * wanted)]


def test_a_large_component_is_not_searched_for_long():
    """Many axes tied to one another: the first counts found are kept, by a bounded number of steps."""
    sizes = [64] * 40
    system = System(sizes)
    for a, b in itertools.pairwise(range(40)):
        _ = system.extent(a) % 2 == 0
        _ = system.extent(a) >= system.extent(b)
    counts = system.counts()
    found = counts.nearest({index: 33 - index // 2 for index in range(40)})
    assert all(found[a] >= found[b] for a, b in itertools.pairwise(range(40)))
    assert all(found[index] % 2 == 0 for index in range(39))


@MANY
@given(systems())
def test_stuck_axes_have_no_smaller_solution_and_others_have(system):
    unshrinkable = system.counts().unshrinkable()
    possible = solutions(system)
    for index, atom in enumerate(system.atoms):
        smaller = any(one[index] < atom.size for one in possible)
        assert (index in unshrinkable) is (not smaller), f"axis {index} of {atom.size}: {unshrinkable.get(index)}"
        if index in unshrinkable:
            assert "which no smaller one does" in unshrinkable[index]
            assert "test_axes_solver.py:" in unshrinkable[index]


@MANY
@given(systems(), st.data())
def test_asking_for_what_is_possible_again_changes_nothing(system, data):
    counts = system.counts()
    wanted = {index: data.draw(st.integers(1, atom.size)) for index, atom in enumerate(system.atoms)}
    found = counts.nearest(wanted)
    assert counts.nearest(found) == found


# Attributes.


def test_an_attribute_follows_what_it_is_the_size_of():
    system = System([8], [8])
    system.equate(system.attributes[0], system.atoms[0])
    counts = system.counts()
    assert counts.assignments({0: 5}) == [(system.places[0], 5)]
    assert counts.assignments({0: 8}) == []


def test_heads_times_width_is_the_width_of_the_block():
    width, heads, size = Atom(32), Atom(4), Atom(8)
    constraints = Constraints()
    total, number, each = (
        SymbolicInt(32, AttributeRef(("attn", "embed_dim")), constraints),
        SymbolicInt(4, AttributeRef(("attn", "num_heads")), constraints),
        SymbolicInt(8, AttributeRef(("attn", "head_dim")), constraints),
    )
    constraints.equate(total, width, "view")
    constraints.equate(number, heads, "view")
    constraints.equate(total // number, size, "view")
    constraints.equate(each, size, "view")
    constraints.equate(total, Product((heads, size)), "view")
    constraints.close()
    counts = CountSolver({"width": [width], "heads": [heads], "size": [size]}, constraints)
    found = counts.nearest({"width": 16, "heads": 2, "size": 8})
    assert found == {"width": 16, "heads": 2, "size": 8}
    found = counts.nearest({"width": 15})
    assert found["width"] == found["heads"] * found["size"] < 32
    assert dict(counts.assignments(found)) == {
        place: value
        for place, value, old in (
            (AttributeRef(("attn", "embed_dim")), found["width"], 32),
            (AttributeRef(("attn", "num_heads")), found["heads"], 4),
            (AttributeRef(("attn", "head_dim")), found["size"], 8),
        )
        if value != old
    }


def test_an_attribute_read_in_two_places_has_one_value():
    system = System([6, 6], [6])
    for atom in system.atoms:
        system.equate(system.attributes[0], atom)
    counts = system.counts()
    found = counts.nearest({0: 3})
    assert found[0] == found[1] == 3
    assert counts.assignments(found) == [(system.places[0], 3)]


def test_a_group_norm_keeps_a_multiple_of_its_groups():
    system = System([4, 4], [4])
    groups, size = system.atoms
    system.equate(system.attributes[0], groups)
    whole = Product((groups, size))
    _ = SymbolicInt(16, DimSize(whole), system.constraints) % 4 == 0  # a literal number of groups, checked
    counts = system.counts()
    found = counts.nearest({0: 3, 1: 3})
    assert (found[0] * found[1]) % 4 == 0
    assert found[0] < 4 or found[1] < 4


def test_a_sum_of_parts_is_the_whole():
    q, k, whole = Atom(8), Atom(4), Atom(12)
    constraints = Constraints()
    number = SymbolicInt(8, DimSize(q), constraints) + 2 * SymbolicInt(2, DimSize(k), constraints)
    constraints.equate(SymbolicInt(12, DimSize(Concat((q, k))), constraints), whole, "split")
    assert int.__int__(number) == 12
    constraints.close()
    counts = CountSolver({"q": [q], "k": [k], "whole": [whole]}, constraints)
    found = counts.nearest({"q": 5, "k": 2})  # the whole was not asked for, so it follows
    assert found["whole"] == found["q"] + found["k"]
    assert found["whole"] < 12


def test_a_literal_leaves_no_choice():
    system = System([8, 3])
    _ = system.extent(0) == 8
    counts = system.counts()
    assert set(counts.unshrinkable()) == {0}
    assert counts.nearest({0: 4, 1: 2}) == {0: 8, 1: 2}


def test_dividing_by_what_vanishes_is_no_solution():
    system = System([4, 4])
    _ = system.extent(0) // (system.extent(1) - 1) == 1
    found = system.counts().nearest({0: 1, 1: 1})
    assert found[0] // (found[1] - 1) == 1


def test_wishes_are_held_to_what_there_is():
    counts = System([8, 3]).counts()
    assert counts.nearest({0: 100, 1: -5}) == {0: 8, 1: 1}
    assert counts.nearest({}) == {0: 8, 1: 3}


# The law: every equation and guard, evaluated at the present counts, gives the present value.


@pytest.mark.parametrize("state", ["equation", "guard"])
def test_what_is_false_at_the_present_counts_keeps_what_it_is_about(state):
    system = System([12, 8], [11])
    if state == "equation":
        system.constraints.equate(system.attributes[0], system.atoms[0], "slice")  # 11 is not 12
    else:
        system.constraints.guards.append(Guard(operator.lt, system.extent(0), system.attributes[0], True, "m.py:1"))
    counts = system.counts()
    assert set(counts.unshrinkable()) == {0}
    assert "does not follow from the counts of its axes" in counts.unshrinkable()[0]
    found = counts.nearest({0: 6, 1: 4})
    assert (found[0], found[1]) == (12, 4)
    assert counts.assignments(found) == []


class Scattered(nn.Module):
    """A slice of pairs that a permutation scatters, beside a layer of its own."""

    def __init__(self, steps, order):
        super().__init__()
        self.at, self.steps = 11, steps
        self.pairs, self.dense, self.free = nn.Linear(5, 6), nn.Linear(5, 12), nn.Linear(5, 8)
        self.cut, self.out = nn.Linear(11, 2), nn.Linear(8, 3)
        self.register_buffer("order", order)

    def forward(self, x):
        h = self.pairs(x)
        pairs, dense, results = torch.stack([h, h], -1).flatten(-2), self.dense(x), []
        for step in self.steps:
            if step == "permute":
                pairs = pairs[:, self.order]
            elif step == "add":
                pairs = pairs + dense
            elif step == "view":
                results.append(dense.view(-1, 3, 4).sum(1))
            else:
                results.append(self.cut((pairs if step == "slice pairs" else dense)[:, : self.at]))
        return results, self.out(self.free(x).relu())


@pytest.mark.parametrize(
    "steps", list(itertools.permutations(["permute", "add", "slice pairs", "slice", "view"], 3)), ids=", ".join
)
def test_an_attribute_stays_where_only_an_unrelated_axis_is_cut(steps):
    torch.manual_seed(0)
    axes = find_axes(Scattered(steps, torch.randperm(12)), torch.randn(2, 5))
    assert axes["free"].frozen is None
    assert axes.attribute_values({"free": 4}) == []
    for axis in axes.free:
        found = axes.feasible({axis.name: max(axis.size // 2, 1)})
        changed = {one.path[-1] for one in axes.attribute_values(found)}
        assert "at" not in changed or any(found[one.name] < one.size for one in axes.free if one.name != "free")


# As a user meets it.


class Tied(nn.Module):
    """Equal halves, heads times head-dim, and a grouped norm, in one small model."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.inner = nn.Linear(6, 32)
        self.qkv = nn.Linear(16, 48)
        self.norm = nn.GroupNorm(4, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        a, b = self.inner(x).chunk(2, -1)
        h = a * b.sigmoid()
        size = h.shape[-1] // self.heads
        q, k, v = (t.reshape(len(x), self.heads, size) for t in self.qkv(h).chunk(3, -1))
        h = ((q * k).sum(-1, keepdim=True) * v).reshape(len(x), self.heads * size)
        return self.out(self.norm(h))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_wish_becomes_counts_with_which_the_model_runs(data):
    from netopt.plan import Plan

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(5, 6)
    axes = find_axes(model, x)
    assert {axis.size for axis in axes.free} >= {16, 4}
    wanted = {axis.name: data.draw(st.integers(1, axis.size), label=axis.name) for axis in axes.free}
    counts = axes.feasible(wanted)
    assert set(counts) == {axis.name for axis in axes.free}
    kept = {
        axis.name: torch.randperm(axis.size)[: counts[axis.name]].sort().values
        for axis in axes.free
        if counts[axis.name] < axis.size
    }
    attributes = tuple((one.path, one.value) for one in axes.attribute_values(counts))
    Plan(axes.tensor_indices(kept), attributes=attributes, values=axes.values(kept)).apply(model)
    assert model(x).shape == (5, 3)
    assert model.out.in_features == model.norm.num_channels == model.out.weight.shape[1]
    assert model.out.in_features % model.heads == 0


@pytest.mark.parametrize("size", [5, 7, 11])
def test_a_prime_number_of_positions_can_shrink(size):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 2 * size), nn.Linear(size, 2)

        def forward(self, x):
            a, b = self.first(x).chunk(2, -1)
            return self.last(a * b)

    axes = find_axes(Halves(), torch.randn(2, 3))
    assert axes.feasible({"first": size // 2}) == {"first": size // 2}


def test_comparisons_between_axes_keep_their_outcome():
    class Projected(nn.Module):
        """A shortcut is projected only where sizes differ."""

        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Linear(3, 8), nn.Linear(8, 16)
            self.shortcut, self.head = nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, x):
            x = self.stem(x)
            y = self.body(x).relu()
            if x.shape[-1] != y.shape[-1]:
                x = self.shortcut(x)
            return self.head(x + y)

    axes = find_axes(Projected(), torch.randn(2, 3))
    for wanted in range(1, 9):
        counts = axes.feasible({"stem": wanted, axes["body"].name: wanted})
        assert counts["stem"] != counts[axes["body"].name]


def test_every_comparison_keeps_its_operator():
    for compare in (operator.lt, operator.gt, operator.le, operator.ge, operator.ne):
        system = System([4, 6])
        outcome = compare(system.extent(0), system.extent(1))
        found = system.counts().nearest({0: 2, 1: 2})
        assert compare(found[0], found[1]) is outcome
