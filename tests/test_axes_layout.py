"""The algebra of layouts: whatever is stated, the indices of dimensions stated to be one agree for every choice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netopt.axes.indices import indices, labels
from netopt.axes.layout import (
    Atom,
    Concat,
    Product,
    atoms,
    bind,
    concat,
    count,
    freeze,
    mark_inexact,
    product,
    resolve,
    shatter,
    split_concat,
    split_product,
    unify,
)

MANY = settings(max_examples=80, deadline=None)


def choice(layouts, data):
    """Positions to keep of every atom that is not frozen: any, but not none of them."""
    kept = {}
    for layout in layouts:
        for atom in atoms(layout):
            if atom.frozen is None and atom.size > 1 and atom not in kept:
                stay = data.draw(st.sets(st.integers(0, atom.size - 1), min_size=1), label=f"kept of {atom}")
                kept[atom] = torch.tensor(sorted(stay))
    return kept


def divisors(size):
    return [one for one in range(1, size + 1) if size % one == 0]


def some_layout(data, pool, size, depth=2):
    """A layout of the given size, made of fresh atoms and of layouts there already."""
    fitting = [one for one in pool if one.size == size]
    kinds = ["atom"] + (["old"] if fitting else [])
    if depth and size > 1:
        kinds.append("concat")
        if len(divisors(size)) > 2:
            kinds.append("product")
    kind = data.draw(st.sampled_from(kinds))
    if kind == "old":
        return data.draw(st.sampled_from(fitting))
    if kind == "atom":
        return Atom(size)
    if kind == "product":
        head = data.draw(st.sampled_from(divisors(size)[1:-1]))
        return product([some_layout(data, pool, part, depth - 1) for part in (head, size // head)])
    first = data.draw(st.integers(1, size - 1))
    return concat([some_layout(data, pool, part, depth - 1) for part in (first, size - first)])


@MANY
@given(st.data())
def test_whatever_is_stated_holds_for_every_choice_of_what_is_kept(data):
    pool = []
    equal = []  # pairs of layouts that were stated to be one dimension
    for _ in range(data.draw(st.integers(2, 7), label="statements")):
        layout = some_layout(data, pool, data.draw(st.sampled_from([2, 4, 5, 6, 8, 12]), label="size"))
        pool.append(layout)
        do = data.draw(st.sampled_from(["unify", "split_product", "split_concat"]))
        if do == "unify":
            other = some_layout(data, pool, layout.size)
            pool.append(other)
            unify(layout, other)
            equal.append((layout, other))
        elif do == "split_product":
            halves = split_product(layout, data.draw(st.sampled_from(divisors(layout.size))))
            if halves is not None:
                equal.append((layout, Product(halves)))
                pool.extend(halves)
        else:
            halves = split_concat(layout, data.draw(st.integers(1, layout.size - 1)))
            if halves is not None:
                equal.append((layout, Concat(halves)))
                pool.extend(halves)
    kept = choice(pool, data)
    counts = {atom: len(positions) for atom, positions in kept.items()}
    for left, right in equal:
        found = indices(left, kept)
        assert torch.equal(found, indices(right, kept)), f"{resolve(left)} is not {resolve(right)}"
        assert len(found) == count(left, counts) == count(right, counts)
        assert left.size == resolve(left).size == sum(1 for _ in indices(left, {}))


class Traced:
    """A tensor of indices and its layouts; its recipe makes it again from narrowed sources."""

    def __init__(self, value, dims, recipe):
        assert tuple(value.shape) == tuple(dim.size for dim in dims)
        self.value, self.dims, self.recipe = value, dims, recipe


def source(shape, number):
    dims = [Atom(size) for size in shape]
    value = torch.arange(math.prod(shape)).view(shape) + 1000 * number
    return Traced(value, dims, lambda narrowed, counts: narrowed[number])


def viewed(one, sizes):
    """The view, or None where a boundary forbids it (then the operation would freeze)."""
    whole = product(one.dims)
    dims, rest = [], whole
    for size in sizes[:-1]:
        halves = split_product(rest, size)
        if halves is None:
            freeze(whole, "is split across its parts")
            return None
        dims.append(halves[0])
        rest = halves[1]
    dims.append(rest)
    return Traced(
        one.value.reshape(sizes),
        dims,
        lambda narrowed, counts: one.recipe(narrowed, counts).reshape([count(dim, counts) for dim in dims]),
    )


def permuted(one, order):
    dims = [one.dims[index] for index in order]
    return Traced(one.value.permute(order), dims, lambda narrowed, counts: one.recipe(narrowed, counts).permute(order))


def sliced(one, dim, start, stop):
    before, inside = None, one.dims[dim]
    if start:
        halves = split_concat(inside, start)
        if halves is None:
            freeze(one.dims[dim], "is cut across its parts")
            return None
        before, inside = halves
    if stop - start < inside.size:
        halves = split_concat(inside, stop - start)
        if halves is None:
            freeze(one.dims[dim], "is cut across its parts")
            return None
        inside = halves[0]

    def again(narrowed, counts):
        skipped = 0 if before is None else count(before, counts)
        return one.recipe(narrowed, counts).narrow(dim, skipped, count(inside, counts))

    dims = [*one.dims[:dim], inside, *one.dims[dim + 1 :]]
    return Traced(one.value.narrow(dim, start, stop - start), dims, again)


def joined(one, other, dim):
    dims = []
    for index, (left, right) in enumerate(zip(one.dims, other.dims, strict=True)):
        if index == dim:
            dims.append(concat([left, right]))
        else:
            unify(left, right)
            dims.append(left)
    return Traced(
        torch.cat([one.value, other.value], dim),
        dims,
        lambda narrowed, counts: torch.cat([one.recipe(narrowed, counts), other.recipe(narrowed, counts)], dim),
    )


def added(one, other):
    for left, right in zip(one.dims, other.dims, strict=True):
        unify(left, right)
    return Traced(
        one.value + other.value,
        one.dims,
        lambda narrowed, counts: one.recipe(narrowed, counts) + other.recipe(narrowed, counts),
    )


def step(data, pool, limit=96):
    """One operation on tensors of the pool, or None where it cannot be stated."""
    one = data.draw(st.sampled_from(pool), label="operand")
    rank = one.value.dim()
    what = data.draw(st.sampled_from(["view", "permute", "slice", "cat", "add"]))
    if what == "view":
        sizes, rest = [], one.value.numel()
        while rest > 1 and len(sizes) < 3:
            sizes.append(data.draw(st.sampled_from(divisors(rest)[1:])))
            rest //= sizes[-1]
        return viewed(one, [*sizes, rest] if rest > 1 or not sizes else sizes)
    if what == "permute":
        return permuted(one, data.draw(st.permutations(range(rank))))
    dim = data.draw(st.integers(0, rank - 1))
    size = one.value.shape[dim]
    if what == "slice":
        start = data.draw(st.integers(0, size - 1))
        return sliced(one, dim, start, data.draw(st.integers(start + 1, size)))
    fitting = [other for other in pool if other.value.dim() == rank]
    if what == "cat":
        others = [
            other
            for other in fitting
            if all(a == b for i, (a, b) in enumerate(zip(one.value.shape, other.value.shape, strict=True)) if i != dim)
        ]
        other = data.draw(st.sampled_from(others))
        return joined(one, other, dim) if one.value.numel() + other.value.numel() <= limit else None
    return added(one, data.draw(st.sampled_from([other for other in fitting if other.value.shape == one.value.shape])))


@MANY
@given(st.data())
def test_operations_on_narrowed_tensors_give_the_narrowed_result(data):
    shapes = data.draw(
        st.lists(st.sampled_from([(4,), (6,), (2, 6), (6, 2), (4, 3), (2, 2, 3), (12,)]), min_size=1, max_size=2)
    )
    pool = [source(shape, number) for number, shape in enumerate(shapes)]
    sources = list(pool)
    for _ in range(data.draw(st.integers(1, 6), label="operations")):
        made = step(data, pool)
        if made is not None:
            pool.append(made)
    kept = choice([dim for one in pool for dim in one.dims], data)
    counts = {atom: len(positions) for atom, positions in kept.items()}

    def narrow(one):
        value = one.value
        for dim, layout in enumerate(one.dims):
            value = value.index_select(dim, indices(layout, kept))
        return value

    narrowed = [narrow(one) for one in sources]
    for one in pool:
        assert torch.equal(one.recipe(narrowed, counts), narrow(one)), f"{[resolve(dim) for dim in one.dims]}"


@MANY
@given(st.data())
def test_labels_say_which_position_stands_where(data):
    pool = []
    layout = some_layout(data, pool, data.draw(st.sampled_from([4, 6, 8, 12])), depth=3)
    kept = choice([layout], data)
    found = indices(layout, kept)
    stays = torch.ones(layout.size, dtype=torch.bool)
    for atom in dict.fromkeys(atoms(layout)):
        alive = torch.zeros(atom.size, dtype=torch.bool)
        alive[kept[atom] if atom in kept else torch.arange(atom.size)] = True
        for label in labels(layout, [atom]):
            assert label.shape == (layout.size,)
            assert int(label.min()) >= -1
            assert int(label.max()) < atom.size
            stays &= alive[label] | (label < 0)
    assert torch.equal(stays.nonzero().flatten(), found)


def test_a_product_of_three_is_row_major():
    heads, groups, width = Atom(2), Atom(3), Atom(4)
    kept = {heads: torch.tensor([1]), groups: torch.tensor([0, 2]), width: torch.tensor([3])}
    whole = torch.arange(24).view(2, 3, 4)
    expected = whole[1:2][:, [0, 2]][:, :, [3]].flatten()
    assert torch.equal(indices(product([heads, groups, width]), kept), expected)


def test_heads_times_width_meets_a_fused_projection():
    q, k, v = Atom(8), Atom(8), Atom(8)
    fused = Atom(24)
    assert unify(fused, concat([q, k, v]))
    first, rest = split_product(fused, 3)
    assert first.size == 3
    heads, width = Atom(2), Atom(4)
    assert unify(rest, Product((heads, width)))
    kept = {resolve(heads): torch.tensor([1]), resolve(width): torch.tensor([0, 3])}
    assert indices(q, kept).tolist() == [4, 7]
    assert indices(fused, kept).tolist() == [4, 7, 12, 15, 20, 23]


def test_boundaries_are_refined_until_they_meet():
    left, right = Concat((a := Atom(2), b := Atom(6))), Concat((c := Atom(5), d := Atom(3)))
    assert unify(left, right)
    assert [atom.size for atom in atoms(a)] == [2]
    assert [atom.size for atom in atoms(b)] == [3, 3]
    assert [atom.size for atom in atoms(c)] == [2, 3]
    assert list(atoms(d)) == list(atoms(b))[1:]


CONFLICTS = {
    "factors with no common boundary": lambda: (Product((Atom(2), Atom(3))), Product((Atom(3), Atom(2)))),
    "rows cut in the middle": lambda: (Product((Atom(2), Atom(3))), Concat((Atom(2), Atom(4)))),
    "sizes that differ": lambda: (Atom(4), Atom(5)),
}


@pytest.mark.parametrize("make", CONFLICTS.values(), ids=CONFLICTS)
def test_what_cannot_be_aligned_is_frozen_with_the_reason(make):
    left, right = make()
    assert not unify(left, right, lambda: "meets itself in two ways")
    for layout in (left, right):
        assert {atom.frozen for atom in atoms(layout)} == {"meets itself in two ways"}


def test_a_conflict_in_one_summand_leaves_the_others_free():
    good, other = Atom(4), Atom(4)
    bad = Product((Atom(2), Atom(3))), Product((Atom(3), Atom(2)))
    assert not unify(Concat((good, bad[0])), Concat((other, bad[1])), lambda: "no boundary")
    assert resolve(good) is resolve(other)
    assert resolve(good).frozen is None
    assert all(atom.frozen == "no boundary" for atom in (*atoms(bad[0]), *atoms(bad[1])))


def test_the_reason_is_only_asked_for_when_needed():
    def never():
        raise AssertionError

    assert unify(Atom(3), Atom(3), never)
    assert unify(Atom(6), Product((Atom(2), Atom(3))), never)


def test_what_is_known_of_an_atom_goes_to_what_it_is_bound_to():
    atom = Atom(6, "is an input")
    mark_inexact(atom, "is normalised")
    bind(atom, Product((head := Atom(2), tail := Atom(3))))
    assert head.frozen == tail.frozen == "is an input"
    assert head.inexact == tail.inexact == "is normalised"
    freeze(atom, "another reason")
    assert head.frozen == "is an input"  # the first stays


@MANY
@given(st.permutations(range(5)))
def test_a_permutation_is_stated_position_by_position(order):
    first, second = Atom(5), Atom(5)
    positions = shatter(first)
    assert unify(second, concat([positions[index] for index in order]))
    units = [resolve(one) for one in positions]
    gone = units[3]
    kept = {gone: torch.arange(0)}
    assert indices(first, kept).tolist() == [0, 1, 2, 4]
    assert indices(second, kept).tolist() == [at for at, index in enumerate(order) if index != 3]
    assert torch.equal(torch.cat(labels(first, units)), torch.arange(5))


def test_shattering_a_product_gives_its_cells_row_major():
    whole = product([rows := Atom(2), columns := Atom(3)])
    cells = shatter(whole)
    assert len(cells) == 6
    upper, left = shatter(rows)[0], shatter(columns)[0]
    assert indices(whole, {resolve(upper): torch.arange(0)}).tolist() == [3, 4, 5]
    assert indices(whole, {resolve(left): torch.arange(0)}).tolist() == [1, 2, 4, 5]


def test_sizes_of_one_are_no_factors_but_are_summands():
    atom = Atom(4)
    assert product([Atom(1), atom, Atom(1)]) is atom
    assert product([Atom(1)]).size == 1
    assert len(concat([Atom(1), atom]).parts) == 2


@MANY
@given(st.integers(2, 60), st.data())
def test_splitting_an_atom_and_putting_it_together_again_is_the_atom(size, data):
    rows = data.draw(st.sampled_from(divisors(size)))
    atom = Atom(size)
    halves = split_product(atom, rows)
    assert [half.size for half in halves] == [rows, size // rows]
    assert unify(product(halves), atom)
    assert indices(atom, {}).tolist() == list(range(size))


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_cut_outside_is_no_cut(size):
    assert split_concat(Atom(7), size) is None


@pytest.mark.parametrize("layout", [Atom(7), Product((Atom(3), Atom(2))), Concat((Atom(3), Atom(2)))])
def test_rows_that_do_not_divide_are_no_rows(layout):
    assert split_product(layout, 4) is None
