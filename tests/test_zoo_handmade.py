"""The laws of the zoo, on the hand-made models."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from tests.zoo.case import Case
from tests.zoo.handmade import HANDMADE
from tests.zoo.laws import LAWS, told
from tests.zoo.order import check_order_does_not_matter
from torch.utils._pytree import tree_map

from netopt.axes import find_axes

ALL = {**LAWS, "order_does_not_matter": check_order_does_not_matter}


@pytest.mark.parametrize("law", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("case", HANDMADE, ids=str)
def test_law(case: Case, law: Callable[[Case], None]) -> None:
    with warnings.catch_warnings():
        if case.warns:
            warnings.filterwarnings("ignore", message=f".*{case.warns}")
        law(case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("case", HANDMADE, ids=str)
def test_axes_are_the_same_on_an_accelerator(case: Case) -> None:
    def moved(value: object) -> object:
        return value.cuda() if isinstance(value, torch.Tensor) else value

    expected = [told(axis) for axis in find_axes(case.build(), case.inputs())]
    found = [told(axis) for axis in find_axes(case.build().cuda(), tree_map(moved, case.inputs()))]
    assert found == expected


def test_there_are_enough_cases() -> None:
    assert len(HANDMADE) >= 200
    assert len({case.name for case in HANDMADE}) == len(HANDMADE)
