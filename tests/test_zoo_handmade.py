"""The laws of the zoo, on the hand-made models."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
from tests.zoo.case import Case
from tests.zoo.handmade import HANDMADE
from tests.zoo.laws import LAWS


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("case", HANDMADE, ids=str)
def test_law(case: Case, law: Callable[[Case], None]) -> None:
    with warnings.catch_warnings():
        if case.warns:
            warnings.filterwarnings("ignore", message=f".*{case.warns}")
        law(case)


def test_there_are_enough_cases() -> None:
    assert len(HANDMADE) >= 60
    assert len({case.name for case in HANDMADE}) == len(HANDMADE)
