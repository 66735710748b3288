"""Exactly as many entries are removed as asked for, ties in order, whatever the values, dtypes and chunks."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netopt.errors import ArgumentTypeError, InvalidArgumentError, NonFiniteError
from netopt.masking import patterns, quantile
from netopt.masking.patterns import Shape, expand_blocks, keep_n_of_m, keep_per_row, mean_of_blocks, parse
from netopt.masking.quantile import Scores, keep_above, keep_best
from netopt.model import parameters
from netopt.model.parameters import count_nonzero

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 1e-30, float("inf"), -float("inf")])
ANY = st.floats(width=32, allow_nan=False)


def removed_by_sorting(values, remove):
    """The specification: sorted by score, and among equals the later first, the first ``remove`` go."""
    order = sorted(range(len(values)), key=lambda index: (values[index], -index))
    keep = np.ones(len(values), bool)
    keep[order[:remove]] = False
    return keep


@st.composite
def populations(draw):
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        values = draw(st.lists(draw(st.sampled_from([FEW, ANY])), max_size=40))
        tensors.append(torch.tensor(values).to(draw(st.sampled_from(DTYPES))))
    size = sum(tensor.numel() for tensor in tensors)
    alive = [
        torch.tensor(draw(st.lists(st.booleans(), min_size=len(t), max_size=len(t))), dtype=torch.bool) for t in tensors
    ]
    return (
        tensors,
        alive if draw(st.booleans()) else [None] * len(tensors),
        draw(st.integers(0, size)),
        draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(populations(), st.sampled_from([(1 << 18, 1 << 16), (8, 4), (16, 3), (4, 1000)]))
def test_as_many_as_asked_and_the_lowest(population, sizes):
    tensors, alive, remove, magnitude = population
    values = torch.cat([tensor.double() for tensor in tensors])
    values = values.abs() if magnitude else values
    lived = torch.cat([torch.ones(len(t)).bool() if a is None else a for t, a in zip(tensors, alive, strict=True)])
    # Removed entries rank below minus infinity.
    ranks = [(float(value), 1) if live else (-float("inf"), 0) for value, live in zip(values, lived, strict=True)]
    lowest = float(torch.finfo(torch.float32).min)
    ranks = [(max(value, lowest), 1) if live and alive[0] is not None else (value, live) for value, live in ranks]
    before = quantile.SAMPLE, quantile.CHUNK
    quantile.SAMPLE, quantile.CHUNK = sizes
    try:
        masks = keep_best([Scores(t, magnitude, a) for t, a in zip(tensors, alive, strict=True)], remove)
    finally:
        quantile.SAMPLE, quantile.CHUNK = before
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]
    assert np.array_equal(torch.cat(masks).numpy(), removed_by_sorting(ranks, remove))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(FEW, ANY, st.just(float("nan"))), max_size=50), st.data())
def test_zeros_are_counted_exactly(values, data):
    tensor = torch.tensor(values).to(data.draw(st.sampled_from(DTYPES)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))).bool()
    for small, chunk in ((1 << 12, 1 << 16), (0, 1 << 16), (0, 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parameters, "_SMALL", small)
            patch.setattr(parameters, "CHUNK", chunk)
            assert count_nonzero(tensor) == int((tensor != 0).sum())
    assert count_nonzero(tensor, mask) == int(((tensor != 0) & mask).sum())
    assert count_nonzero(tensor[::2], mask[::2]) == int(((tensor != 0) & mask)[::2].sum())


def worst_cases(size):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(size, generator=generator)
    stride = (size // quantile.SAMPLE) | 1
    treacherous = normal.clone()
    treacherous[::stride] *= 1e-3
    return {
        "normal": normal,
        "sorted": normal.sort().values,
        "reversed": normal.sort(descending=True).values,
        "constant": torch.full((size,), 0.5),
        "two values": (normal > 0).float(),
        "mostly zero": normal * (torch.rand(size, generator=generator) > 0.6),
        "periodic": torch.arange(size).remainder(63).float(),
        "sampled entries lie": treacherous,
        "huge and tiny": normal * 10.0 ** torch.randint(-30, 30, (size,), generator=generator),
    }


WORST = worst_cases((1 << 19) + 13)


@pytest.mark.parametrize("amount", [0.001, 0.5, 0.9])
@pytest.mark.parametrize("case", WORST)
def test_worst_cases_are_exact(case, amount):
    values = WORST[case]
    remove = round(amount * len(values))
    masks = keep_best([Scores(part, True) for part in values.split(200_000)], remove)
    keep = torch.cat(masks)
    order = values.abs().flip(0).argsort(stable=True)
    expected = torch.ones_like(keep)
    expected[len(values) - 1 - order[:remove]] = False
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("amount", [0.3, 0.9])
@pytest.mark.parametrize("case", ["sampled entries lie", "constant", "normal"])
def test_the_number_of_passes_is_bounded(case, amount, monkeypatch):
    passes = []
    original = quantile._Population.chunks
    monkeypatch.setattr(quantile._Population, "chunks", lambda self: (passes.append(1), original(self))[1])
    keep_best([Scores(WORST[case], True)], round(amount * len(WORST[case])))
    assert len(passes) <= {"normal": 1, "constant": 2, "sampled entries lie": 34}[case]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_chunks_do_not_matter(threads, monkeypatch):
    values = WORST["mostly zero"].view(-1, 1)
    expected = keep_best([Scores(values, True)], 400_000)[0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(quantile, "CHUNK", 777)
    try:
        assert torch.equal(keep_best([Scores(values, True)], 400_000)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_memory_order_does_not_matter():
    values = torch.randint(0, 4, (8, 6, 5, 5)).float()
    expected = keep_best([Scores(values)], 700)[0]
    for other in (values.to(memory_format=torch.channels_last), values.mT.contiguous().mT):
        assert not other.is_contiguous()
        assert torch.equal(keep_best([Scores(other)], 700)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("remove", [0, 1, 3])
def test_nan_is_refused_by_name(dtype, remove):
    values = torch.tensor([1.0, float("nan"), 2.0], dtype=dtype)
    with pytest.raises(NonFiniteError, match=r"layer\.weight"):
        keep_best([Scores(values, name="layer.weight")], remove)
    with pytest.raises(NonFiniteError, match=r"layer\.weight"):
        keep_above([Scores(values, name="layer.weight")], 0.0)


def test_threshold_keeps_what_is_equal():
    assert keep_above([Scores(torch.tensor([-2.0, 1.0, 2.0, 0.5]), True)], 1.0)[0].tolist() == [True, True, True, False]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_n_of_m_keeps_the_best_of_each_group(data):
    m = data.draw(st.sampled_from([2, 3, 4, 5, 8, 16, 33, 40]))
    n = data.draw(st.integers(1, m - 1))
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 50))
    size = rows * columns
    magnitude = data.draw(st.booleans())
    values = data.draw(st.lists(st.one_of(FEW, ANY), min_size=size, max_size=size))
    scores = torch.tensor(values).view(rows, columns).to(data.draw(st.sampled_from(DTYPES)))
    before = patterns.CHUNK
    patterns.CHUNK = data.draw(st.sampled_from([1 << 16, 2 * m, 7]))
    try:
        keep = keep_n_of_m(scores, n, m, magnitude)
    finally:
        patterns.CHUNK = before
    ranked = (scores.abs() if magnitude else scores).double()
    for row, kept in zip(ranked, keep, strict=True):
        for start in range(0, columns, m):
            group = row[start : start + m].tolist()
            best = sorted(range(len(group)), key=lambda index: (-group[index], index))[:n]
            assert sorted(best) == kept[start : start + m].nonzero().flatten().tolist()


def test_n_of_m_refuses_nan():
    for m in (4, 40):
        with pytest.raises(NonFiniteError, match="NaN"):
            keep_n_of_m(torch.full((1, 2 * m), float("nan")), 2, m)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_each_row_loses_the_same_number(data):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    values = data.draw(st.lists(st.one_of(FEW, ANY), min_size=rows * columns, max_size=rows * columns))
    scores, remove = torch.tensor(values).view(rows, columns), data.draw(st.integers(0, columns))
    keep = keep_per_row(scores, remove)
    for row, kept in zip(scores.tolist(), keep.numpy(), strict=True):
        assert np.array_equal(kept, removed_by_sorting(row, remove))


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 1), (3, 2)])
def test_blocks_average_what_they_cover(shape):
    scores = torch.randn(shape)
    means = mean_of_blocks(scores, 2, 3)
    for i in range(means.shape[0]):
        for j in range(means.shape[1]):
            torch.testing.assert_close(means[i, j], scores[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean())
    spread = expand_blocks(means, 2, 3, shape)
    assert spread.shape == shape
    torch.testing.assert_close(mean_of_blocks(spread, 2, 3), means)


def test_patterns_are_read():
    assert parse("unstructured") == Shape("unstructured")
    assert parse("1:16") == Shape("n:m", 1, 16)
    assert parse(("block", 4, 1)) == Shape("block", 4, 1)
    assert [str(parse(one)) for one in ("2:4", "unstructured", ("block", 2, 3))] == [
        "2:4",
        "unstructured",
        "blocks of 2 x 3",
    ]


@pytest.mark.parametrize("wrong", ["2:4:6", "4:4", "0:4", "structured", ("block", 2), ("block", 0, 1), ("tile", 2, 2)])
def test_other_patterns_are_refused(wrong):
    with pytest.raises(InvalidArgumentError, match=re.escape(repr(wrong))):
        parse(wrong)
    with pytest.raises(ArgumentTypeError, match=r"pattern.*int"):
        parse(24)
