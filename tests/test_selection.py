"""Selection: the amount asked for goes, what scores highest stays, budgets are met tightly."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netopt.errors import (
    ArgumentTypeError,
    InvalidArgumentError,
    NonFiniteError,
    NothingToPruneError,
    SelectorError,
    UnknownNameError,
)
from netopt.selection import NORMALIZATIONS, Limits, Ranking, grouped, normalized, select, select_within

TABLES = st.lists(st.integers(1, 9), min_size=1, max_size=4)
GROUPS = ([None] * 4, ["a", "b", "a", None])
"""Kinds of axes that are ranked one by one, and together."""


def table(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"axis{place}": torch.rand(size, generator=generator) + 0.1 for place, size in enumerate(sizes)}


@given(TABLES, st.floats(0, 0.99), st.sampled_from([None, *GROUPS]), st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_the_amount_asked_for_goes_and_the_best_stay(sizes, amount, kinds, seed):
    scores = table(sizes, seed)
    groups = None if kinds is None else grouped(kinds[: len(sizes)], scores)
    kept = select(scores, amount, ranking=Ranking(groups))
    for names in groups or [list(scores)]:
        total, left = sum(len(scores[name]) for name in names), sum(len(kept[name]) for name in names)
        assert total - left == min(int(amount * total + 0.5), total - len(names))
    for name, one in scores.items():
        assert len(kept[name]) >= 1
        assert torch.equal(kept[name], kept[name].sort().values)
        gone = [place for place in range(len(one)) if place not in kept[name]]
        assert not gone or float(one[gone].max()) <= float(one[kept[name]].min())


@given(TABLES, st.floats(0, 0.98), st.floats(0, 0.01), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_a_larger_amount_removes_a_superset(sizes, amount, more, seed):
    scores = table(sizes, seed)
    few, many = select(scores, amount), select(scores, amount + more)
    assert all(set(many[name].tolist()) <= set(few[name].tolist()) for name in scores)


def test_a_count_removes_so_many():
    kept = select(table([5, 5]), 3)
    assert sum(len(one) for one in kept.values()) == 7
    assert [len(one) for one in select(table([5, 4]), 3, ranking=Ranking([["axis0"], ["axis1"]])).values()] == [2, 1]


def test_a_threshold_removes_what_scores_below():
    kept = select({"a": torch.tensor([0.1, 0.5, 0.4]), "b": torch.tensor([0.0, 0.1])}, threshold=0.4)
    assert kept["a"].tolist() == [1, 2]
    assert kept["b"].tolist() == [1]


def test_amounts_by_name_and_pattern():
    scores = table([4, 4, 4])
    kept = select(scores, {"axis0": 0.5, "axis[01]": 0.25})
    assert [len(one) for one in kept.values()] == [2, 3, 4]
    with pytest.raises(SelectorError, match=r"'axi0', which fits no axis. Did you mean 'axis0'"):
        select(scores, {"axi0": 0.5})


@given(TABLES, st.floats(0, 0.99), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_counts_are_multiples_where_there_is_room(sizes, amount, step):
    kept = select(table(sizes), amount, limits=Limits(round_to=step))
    for size, one in zip(sizes, kept.values(), strict=True):
        assert len(one) % step == 0 or len(one) == size


def test_equations_between_counts_have_the_last_word():
    def equal(counts):
        return dict.fromkeys(counts, min(counts.values()))

    kept = select(table([5, 7]), 0.5, ranking=Ranking([["axis0"], ["axis1"]]), limits=Limits(feasible=equal))
    assert {len(one) for one in kept.values()} == {2}


def test_global_ranking_ignores_the_scale_of_an_axis():
    scores = table([6, 6])
    scaled = {"axis0": scores["axis0"] * 1000, "axis1": scores["axis1"]}
    for name, one in select(scores, 0.5).items():
        assert torch.equal(one, select(scaled, 0.5)[name])


@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_normalizing_keeps_the_order_within_an_axis(how):
    one = torch.rand(9)
    assert torch.equal(normalized(one, how).argsort(stable=True), one.argsort(stable=True))
    assert torch.equal(normalized(torch.zeros(3), how), torch.zeros(3))


def test_the_last_neuron_of_an_axis_is_worth_the_axis():
    torch.testing.assert_close(normalized(torch.tensor([1.0, 2.0, 3.0]), "left"), torch.tensor([1 / 6, 2 / 5, 1.0]))


def product_cost(kept):
    """Parameters of a chain of linear layers without biases, 3 inputs and 2 outputs."""
    widths = [3, *(len(one) for one in kept.values()), 2]
    return sum(first * second for first, second in itertools.pairwise(widths))


def unit_costs(sizes):
    full = {f"axis{place}": torch.arange(size) for place, size in enumerate(sizes)}
    return {name: (product_cost(full) - product_cost({**full, name: one[:-1]})) or 1 for name, one in full.items()}


@given(st.lists(st.integers(2, 6), min_size=2, max_size=3), st.floats(0.3, 1.0), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_budgets_are_met_and_one_neuron_more_would_break_them(sizes, share, seed):
    scores = table(sizes, seed)
    whole = product_cost({name: torch.arange(len(one)) for name, one in scores.items()})
    smallest = product_cost({name: torch.arange(1) for name in scores})
    limit = max(int(share * whole), smallest)
    kept = select_within(scores, product_cost, limit, ranking=Ranking(unit_costs=unit_costs(sizes)))
    assert product_cost(kept) <= limit
    if any(len(kept[name]) < len(scores[name]) for name in scores):
        more = [
            product_cost({**kept, name: torch.arange(len(kept[name]) + 1)})
            for name in scores
            if len(kept[name]) < len(scores[name])
        ]
        assert max(more) > limit


@given(st.lists(st.integers(2, 40), min_size=1, max_size=4), st.floats(0.05, 1.0), st.integers(1, 5))
@settings(deadline=None, max_examples=80)
def test_a_budget_by_layer_takes_the_same_share_of_every_axis_and_no_more_than_needed(sizes, share, step):
    scores = table(sizes)
    whole = product_cost({name: torch.arange(len(one)) for name, one in scores.items()})
    smallest = product_cost({name: torch.arange(min(step, len(one))) for name, one in scores.items()})
    limit = max(int(share * whole), smallest)
    alone = Ranking([[name] for name in scores])
    kept = select_within(scores, product_cost, limit, ranking=alone, limits=Limits(round_to=step))
    assert product_cost(kept) <= limit
    if step == 1:
        # Some share gives just these counts, and the next smaller share that gives others costs too much.
        shares = sorted({(gone - 0.5) / size for size in sizes for gone in range(1, size)})
        counts = [{f"axis{place}": max(1, size - int(one * size + 0.5 + 1e-9)) for place, size in enumerate(sizes)}
                  for one in [0.0, *shares]]  # fmt: skip
        at = counts.index({name: len(one) for name, one in kept.items()})
        less = {name: torch.arange(count) for name, count in counts[max(at - 1, 0)].items()}
        assert at == 0 or product_cost(less) > limit


@given(st.lists(st.integers(2, 9), min_size=3, max_size=3), st.floats(0.1, 1.0), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_a_budget_by_groups_takes_the_same_share_of_each_and_the_lowest_within(sizes, share, seed):
    scores, groups, costs = table(sizes, seed), [["axis0", "axis2"], ["axis1"]], dict.fromkeys(table(sizes), 1.0)
    limit = max(int(share * sum(sizes)), 3)

    def count(kept):
        return sum(len(one) for one in kept.values())

    kept = select_within(scores, count, limit, ranking=Ranking(groups, unit_costs=costs))
    assert limit >= count(kept) > limit - 2 or count(kept) == sum(sizes)
    for names in groups:
        size, own = sum(len(scores[name]) for name in names), {name: scores[name] for name in names}
        gone = size - sum(len(kept[name]) for name in names)
        assert all(torch.equal(one, kept[name]) for name, one in select(own, gone).items())


def test_the_greedy_choice_keeps_nearly_the_best_score_there_is():
    shares = []
    for seed in range(30):
        sizes = [4, 5]
        scores = {name: normalized(one) for name, one in table(sizes, seed).items()}
        limit = 25

        def value(kept, scores=scores):
            return float(sum(scores[name][one].sum() for name, one in kept.items()))

        choices = [
            {name: scores[name].topk(count).indices for name, count in zip(scores, counts, strict=True)}
            for counts in itertools.product(*(range(1, size + 1) for size in sizes))
        ]
        optimum = max(value(kept) for kept in choices if product_cost(kept) <= limit)
        greedy = value(select_within(scores, product_cost, limit, ranking=Ranking(unit_costs=unit_costs(sizes))))
        assert greedy <= optimum + 1e-6
        shares.append(greedy / optimum)
    assert min(shares) > 0.8
    assert sum(shares) / len(shares) > 0.95


def test_a_budget_below_the_smallest_model_is_refused():
    with pytest.raises(NothingToPruneError, match="allows 1, and with one neuron left"):
        select_within(table([3, 3]), product_cost, 1, ranking=Ranking(unit_costs={"axis0": 1, "axis1": 1}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, InvalidArgumentError, "exactly one"),
        ({"amount": 0.5, "threshold": 1.0}, InvalidArgumentError, "exactly one"),
        ({"amount": 1.0}, InvalidArgumentError, r"fraction in \[0, 1\), got 1.0; for a count write 1"),
        ({"amount": 50.0}, InvalidArgumentError, "50 percent is 0.5"),
        ({"amount": -0.1}, InvalidArgumentError, "got -0.1"),
        ({"amount": -1}, InvalidArgumentError, "0 or more"),
        ({"amount": 99}, InvalidArgumentError, "asks for 99 neurons and 4 can go"),
        ({"amount": True}, ArgumentTypeError, "got True"),
        ({"amount": "half"}, ArgumentTypeError, "got 'half'"),
        ({"amount": float("nan")}, InvalidArgumentError, "nan"),
        ({"amount": {}}, InvalidArgumentError, "empty mapping"),
        ({"amount": {"axis0": {}}}, ArgumentTypeError, "inside a mapping"),
        ({"threshold": float("nan")}, InvalidArgumentError, "NaN"),
        ({"threshold": "low"}, ArgumentTypeError, "threshold must be a number"),
    ],
)
def test_wrong_calls_say_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        select(table([3, 3]), **arguments)


def test_scores_that_rank_nothing_are_refused():
    with pytest.raises(NonFiniteError, match="axis `a`"):
        select({"a": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(InvalidArgumentError, match="one score a neuron"):
        select({"a": torch.ones(2, 2)}, 0.5)
    with pytest.raises(NothingToPruneError, match="no axis"):
        select({}, 0.5)
    with pytest.raises(UnknownNameError, match="normalization"):
        normalized(torch.ones(2), "meen")


@pytest.mark.parametrize(
    ("step", "error"), [(0, InvalidArgumentError), (1.5, ArgumentTypeError), (True, ArgumentTypeError)]
)
def test_multiples_must_be_whole(step, error):
    with pytest.raises(error, match="round_to"):
        Limits(round_to=step)
