"""One run is enough where the forward only switches its dropout by the mode; anywhere else there are two."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from tests.zoo.case import Case
from tests.zoo.handmade import HANDMADE
from tests.zoo.language import CASES as FAMILIES
from tests.zoo.laws import told
from torch import nn

from netopt.axes import find_axes, modes


class Base(nn.Module):
    """A layer whose subclasses read the mode, each in another way."""

    def __init__(self):
        super().__init__()
        self.linear, self.p = nn.Linear(4, 4), 0.5
        self.drop = nn.Dropout(0.5)


class HandedOn(Base):
    def forward(self, x):
        return F.dropout(self.linear(x), p=self.p, training=self.training)


class HandedOnByPosition(Base):
    def forward(self, x):
        x = torch.nn.functional.dropout(
            self.linear(x),
            self.p,
            self.training,
        )
        return torch.dropout(x, self.p, self.training)


class ChosenProbability(Base):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=self.p if self.training else 0.0)


class ChosenProbabilityTheOtherWay(Base):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.0 if not self.training else self.drop.p)


class Branch(Base):
    def forward(self, x):
        if self.training:
            x = x * 2
        return self.linear(x)


class BranchBesideDropout(Base):
    def forward(self, x):
        x = F.dropout(x, self.p, self.training)
        return self.linear(x) if self.training else self.linear(x) + 1


class ChosenComputation(Base):
    def forward(self, x):
        return self.linear(x) * (0.0 if self.training else x.mean())


class OwnFunction(Base):
    def forward(self, x):
        return dropout(self.linear(x), self.p, training=self.training)


class OwnMethod(Base):
    def dropout(self, x, training):
        return x[:, :2] if training else x

    def forward(self, x):
        return self.dropout(self.linear(x), training=self.training)


class AlphaDropout(Base):
    def forward(self, x):
        return F.alpha_dropout(self.linear(x), self.p, self.training)


class Kept(Base):
    def forward(self, x):
        flag = self.training
        return F.dropout(self.linear(x), self.p, flag)


def dropout(x, p, training):
    return x.flip(-1) if training else x


@pytest.mark.parametrize("kind", [HandedOn, HandedOnByPosition, ChosenProbability, ChosenProbabilityTheOtherWay])
def test_a_switch_of_dropout_is_no_other_forward(kind):
    model = kind()
    with modes.modes_watched() as seen:
        model(torch.randn(2, 3, 4))
    assert not seen.differ


@pytest.mark.parametrize(
    "kind", [Branch, BranchBesideDropout, ChosenComputation, OwnFunction, OwnMethod, AlphaDropout, Kept]
)
def test_any_other_use_of_the_mode_may_be_another_forward(kind):
    model = kind().eval()
    with modes.modes_watched() as seen:
        model(torch.randn(3, 4))
    assert seen.differ


def test_a_forward_whose_text_is_not_at_hand_may_do_anything():
    names = {"Base": Base, "F": F}
    exec(
        "class Typed(Base):\n"
        "    def forward(self, x):\n"
        "        return F.dropout(self.linear(x), self.p, self.training)\n",
        names,
    )
    model = names["Typed"]()
    with modes.modes_watched() as seen:
        model(torch.randn(3, 4))
    assert seen.differ


class _Both(modes.Modes):
    """Says of every forward that it has two."""

    differ = property(lambda _: True, lambda _, __: None)  # type: ignore[assignment]


# What the function keeps between two calls is what the case is about.
CASES = [case for case in (*HANDMADE, *FAMILIES.values()) if case.name != "cached_by_a_function"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_run_tells_what_two_tell(case: Case, monkeypatch):
    made: list[modes.Modes] = []
    monkeypatch.setattr(modes, "Modes", functools.partial(_noted, made, modes.Modes))
    model, inputs = case.build(), case.inputs()
    found = [told(axis) for axis in find_axes(model, inputs)]
    (seen,) = made
    monkeypatch.setattr(modes, "Modes", _Both)
    assert seen.differ or found == [told(axis) for axis in find_axes(model, inputs)]


def _noted(made, kind):
    made.append(kind())
    return made[-1]
