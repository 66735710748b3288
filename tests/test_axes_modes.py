"""One run is enough where the mode only switches dropout, or has nothing to decide; anywhere else there are two."""

from __future__ import annotations

import functools
import types

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


class ChosenTensor(Base):
    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.linear(x) + (self.extra if self.training else 0.0)


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


class HandedToAFunction(Base):
    def forward(self, x):
        x = added(self.linear(x), x, self.p, self.training)
        return added(x, x, prob=self.p, drop=not self.training)


class HandedToOneThatLooks(Base):
    def forward(self, x):
        return looking(self.linear(x), self.p, self.training)


class HandedToOneThatSetsItAnew(Base):
    def forward(self, x):
        return setting(self.linear(x), drop=self.training)


class HandedAmongOthers(Base):
    def forward(self, x):
        given = (x, self.p)
        return added(self.linear(x), *given, self.training)


class ChosenFlag(Base):
    def forward(self, x):
        flag = self.flag if self.training else False
        return self.linear(x.flip(-1) if flag else x)

    flag = True


class ChosenNumber(Base):
    def forward(self, x):
        times = 1 if self.training else 0
        return self.linear(x) + sum(x for _ in range(times))


class ChosenAndAsked(Base):
    def forward(self, x):
        rate = self.p if self.training else 0.0
        return self.linear(x.flip(-1) if rate > 0 else x)


class CalledByANameOfItsOwn(Base):
    def forward(self, x):
        F = Named()
        return F.dropout(self.linear(x), self.p, self.training)


class Named:
    def dropout(self, x, p, training):
        return x.flip(-1) if training else x


class HandedToOneThatNames(Base):
    def forward(self, x):
        return naming(self.linear(x), self.p, self.training)


class HandedToOneThatLooksAtAllItHas(Base):
    def forward(self, x):
        return looking_at_all(self.linear(x), self.p, self.training)


class DoneBeforeItIsDecided(Base):
    def forward(self, x):
        self.seen = None
        if self.training and self.see(x) and self.p < 0:
            return x
        return self.linear(x) if self.seen is None else self.seen

    def see(self, x):
        self.seen = x
        return True


def naming(x, p, training):
    F = Named()
    return F.dropout(x, p, training)


def looking_at_all(x, p, training):
    y = F.dropout(x, p, training)
    return y.flip(-1) if locals()["training"] else y


def added(x, residual, prob, drop=False):
    """As that of BLOOM: what is dropped, and what it is added to."""
    return residual + F.dropout(x, p=prob, training=drop)


def looking(x, prob, drop):
    y = F.dropout(x, prob, drop)
    return y.flip(-1) if drop else y


def setting(x, *, drop):
    drop = drop and x.mean() > 0
    return F.dropout(x, 0.5, drop)


class Deciding(Base):
    """Asks for its mode together with settings that have decided already, in one mode as in the other."""

    def __init__(self):
        super().__init__()
        self.aux, self.rate, self.settings = False, 0.0, types.SimpleNamespace(kind="plain", extra=None)

    def forward(self, x):
        given = 0
        if self.training and self.aux:
            x = x * 2
        if self.training and self.rate > 0.0:
            x = x * 3
        if not self.training or self.settings.kind == "plain":
            x = x + 1
        if self.training and self.settings.extra is not None and x.mean() > 0:
            x = x * 4
        if self.training and given != 0:
            x = x * 5
        return self.linear(x)


class Undecided(Base):
    """Asks together with something that has not decided."""

    def __init__(self, read):
        super().__init__()
        self.rate, self.reads, self.read = 0.5, 0, read
        vars(self)["held"] = 0

    @property
    def held(self):
        return self.rate

    @property
    def counted(self):
        self.reads += 1
        return 0

    def forward(self, x):
        READINGS[self.read](self)
        return self.linear(x)


READINGS = {
    "a setting that is on": lambda one: one.training and one.rate > 0.0,
    "the other connective": lambda one: one.training or one.rate < 0.0,
    "a negation": lambda one: not one.training and one.rate,
    "a property, which is not run": lambda one: one.training and one.counted,
    "a call": lambda one: one.training and bool(0),
    "numbers that do not compare": lambda one: one.training and one.rate > "0",
    "a chain": lambda one: one.training and 0 < one.rate < 0.1,
    "another flag": lambda one: one.training and one.linear.training,
    "a property over what is held": lambda one: one.training and one.held,
}


@pytest.mark.parametrize("read", READINGS)
def test_a_condition_that_is_not_decided_is_a_question(read):
    model = Undecided(read).eval()
    with modes.modes_watched() as seen:
        model(torch.randn(3, 4))
    assert seen.differ
    assert model.reads == 0


def dropout(x, p, training):
    return x.flip(-1) if training else x


SWITCHES = (
    HandedOn,
    HandedOnByPosition,
    ChosenProbability,
    ChosenProbabilityTheOtherWay,
    HandedToAFunction,
    Deciding,
)


@pytest.mark.parametrize("kind", SWITCHES)
def test_a_switch_of_dropout_is_no_other_forward(kind):
    model = kind()
    with modes.modes_watched() as seen:
        model(torch.randn(2, 3, 4))
    assert not seen.differ
    assert not seen.asking


QUESTIONS = (
    Branch,
    BranchBesideDropout,
    ChosenComputation,
    ChosenTensor,
    OwnFunction,
    OwnMethod,
    AlphaDropout,
    Kept,
    HandedToOneThatLooks,
    HandedToOneThatSetsItAnew,
    HandedAmongOthers,
    ChosenFlag,
    ChosenNumber,
    ChosenAndAsked,
    CalledByANameOfItsOwn,
    HandedToOneThatNames,
    HandedToOneThatLooksAtAllItHas,
    DoneBeforeItIsDecided,
)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_any_other_use_of_the_mode_is_a_question(kind):
    model = kind().eval()
    with modes.modes_watched() as seen:
        model(torch.randn(3, 4))
    assert seen.asking == [model]


class Own(nn.Module):
    """A part that asks for its own mode."""

    def __init__(self):
        super().__init__()
        self.history = []
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.history.append(x)
        return self.trained(x) if self.training else x


class Noise(Own):
    def trained(self, x):
        return x * torch.rand(len(x), 1)


class Narrower(Own):
    def trained(self, x):
        return x[:, :4]


class NoZero(Own):
    def trained(self, x):
        return x + torch.rand(len(x), 1)


class Mixing(Own):
    def trained(self, x):
        return x + torch.softmax(x, -1)


class InPlace(Own):
    def trained(self, x):
        return x.mul_(torch.rand(len(x), 1))


class Failing(Own):
    def trained(self, x):
        raise RuntimeError("not in training")


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.seen.add_(1)
        return F.batch_norm(
            x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias, self.training
        )


def runs_of(part: nn.Module) -> tuple[int, nn.Module]:
    """How often the model around ``part`` is run by a trace, and the model."""
    model = nn.Sequential(nn.Linear(5, 8, bias=False), part, nn.Linear(8, 3))
    times = []
    handle = model.register_forward_hook(lambda *_: times.append(1))
    axes = find_axes(model, torch.randn(4, 5))
    handle.remove()
    assert axes["0"].frozen is None
    return len(times), model


@pytest.mark.parametrize("part", [Noise, Norm])
def test_a_part_that_does_the_like_in_training_needs_no_second_run(part):
    times, model = runs_of(part())
    assert times == 1
    assert find_axes(model, torch.randn(4, 5))["0"].exact


@pytest.mark.parametrize("part", [NoZero, Mixing, InPlace, Failing])
def test_a_part_that_does_something_else_does(part):
    times, _ = runs_of(part())
    # The one in training fails half-way where the part does.
    assert times == (1 if part is Failing else 2)


class Around(Own):
    """Asks, and then runs a part that asks for itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.extra = Noise(), nn.Parameter(torch.randn(8))

    def forward(self, x):
        scale = self.extra if self.training else None
        x = self.inner(x)
        return x if scale is None else x + scale


def test_a_part_inside_one_that_asks_does_not_answer_for_it():
    model = nn.Sequential(nn.Linear(5, 8), Around(), nn.Linear(8, 3))
    members = {str(member.tensor) for member in find_axes(model, torch.randn(4, 5))["0"].members}
    assert members == {"0.weight", "0.bias", "1.extra", "2.weight"}


class ByItsForward(nn.Module):
    """Calls the forward of a part that asks."""

    def __init__(self):
        super().__init__()
        self.part = Around()

    def forward(self, x):
        return self.part.forward(x)


def test_a_part_that_is_not_called_as_a_module_is_seen_in_both_modes():
    model = nn.Sequential(nn.Linear(5, 8), ByItsForward(), nn.Linear(8, 3))
    members = {str(member.tensor) for member in find_axes(model, torch.randn(4, 5))["0"].members}
    assert members == {"0.weight", "0.bias", "1.part.extra", "2.weight"}


def test_a_part_that_gives_another_shape_is_run_twice_and_stays():
    model = nn.Sequential(nn.Linear(5, 8), Narrower())
    times = []
    model.register_forward_hook(lambda *_: times.append(1))
    find_axes(model, torch.randn(4, 5))
    assert len(times) == 2


def test_a_tensor_met_in_training_alone_shrinks_too():
    model = nn.Sequential(ChosenTensor(), nn.Linear(4, 3))
    members = {str(member.tensor) for member in find_axes(model, torch.randn(2, 4))["0.linear"].members}
    assert members == {"0.linear.weight", "0.linear.bias", "0.extra", "1.weight"}


def test_what_a_part_keeps_is_as_it_was():
    part = Noise()
    model = nn.Sequential(nn.Linear(5, 8), part, nn.Linear(8, 3))
    lengths = []
    model.register_forward_hook(lambda *_: lengths.append((len(part.history), part.calls)))
    find_axes(model, torch.randn(4, 5))
    # Run again within the trace, it leaves what one run leaves; after the trace, nothing.
    assert lengths == [(1, 1)]
    assert (part.history, part.calls, part.training) == ([], 0, True)


def test_a_use_whose_text_is_not_at_hand_is_one_too():
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
    assert seen.asking == [model]


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


class Switched(nn.Module):
    """Adds a vector in training, where a switch is on."""

    def __init__(self, switch):
        super().__init__()
        self.extra, self.switch = nn.Parameter(torch.randn(8)), switch

    def is_on(self, given):
        return self.switch

    def forward(self, x, given=None):
        return x + self.extra if self.training and self.is_on(given) else x


class SwitchedByABuffer(Switched):
    def __init__(self, switch):
        super().__init__(None)
        self.register_buffer("value", torch.tensor(float(switch)))

    def is_on(self, given):
        return self.value.item() > 0


class SwitchedByAKind(Switched):
    def __init__(self, switch):
        super().__init__(3 if switch else 2)

    def is_on(self, given):
        return (None, None, False, True)[self.switch]


class SwitchedByWhatItIsGiven(Switched):
    def is_on(self, given):
        return given.switch


class InRows(nn.Module):
    """Two of a kind, the first switched off."""

    def __init__(self, kind, *, one_object=False):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.off, self.on, self.one_object = kind(False), kind(True), one_object

    def forward(self, x):
        given = types.SimpleNamespace(switch=False)
        x = self.off(self.first(x), given)
        given = given if self.one_object else types.SimpleNamespace()
        given.switch = True
        return self.last(self.on(x * 1.0, given)) + 0 * (self.on.extra.sum() + self.off.extra.sum())


@pytest.mark.parametrize("kind", [Switched, SwitchedByABuffer, SwitchedByAKind, SwitchedByWhatItIsGiven])
@pytest.mark.parametrize("one_object", [False, True])
def test_what_tells_parts_of_a_kind_apart_is_seen(kind, one_object):
    axes = find_axes(InRows(kind, one_object=one_object).eval(), torch.randn(4, 5))
    assert "on.extra:0" in map(str, axes["first"].members)


class TiedBefore(nn.Module):
    """Two of a kind; what the first adds in training is added to its input in any mode."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.one, self.other = Switched(True), Switched(True)

    def forward(self, x):
        x = self.one(self.first(x) + self.one.extra)
        x = self.other(self.middle(x))
        return self.last(x) + 0 * self.other.extra.sum()


def test_what_is_tied_already_tells_nothing_of_others():
    axes = find_axes(TiedBefore().eval(), torch.randn(4, 5))
    assert "other.extra:0" in map(str, axes["middle"].members)


class AddedNoise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class NoisyTwice(nn.Module):
    """Noise is added to what is not zero where it is masked, and then to what is."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.one, self.other = AddedNoise(), AddedNoise()

    def forward(self, x):
        x = self.other(self.middle(self.one(self.first(x).sigmoid())))
        return self.last(x) + x.square().sum(-1, keepdim=True)


def test_noise_on_what_is_zero_is_another_thing():
    assert not find_axes(NoisyTwice().eval(), torch.randn(4, 5))["middle"].exact


class WithATrainOfItsOwn(nn.Module):
    """Has another attribute for its mode, and merges a weight for evaluation."""

    def __init__(self, refuses=False):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.extra, self.merged, self.refuses = nn.Parameter(torch.randn(8)), False, refuses

    def train(self, mode=True):
        if mode and self.refuses:
            raise RuntimeError("is not to be trained")
        if self.merged is mode:
            self.first.bias.data += -self.extra.data if mode else self.extra.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        x = self.first(x)
        return self.last(x if self.merged else x + self.extra) + 0 * self.extra.sum()


@pytest.mark.parametrize("training", [True, False])
def test_a_train_of_its_own_is_run_and_undone(training):
    model = WithATrainOfItsOwn().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    axes = find_axes(model, torch.randn(4, 5))
    assert "extra:0" in map(str, axes["first"].members)
    assert model.merged is not training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_that_refuses_to_be_trained_is_evaluated():
    model = WithATrainOfItsOwn(refuses=True).eval()
    assert find_axes(model, torch.randn(4, 5))["first"].frozen is None
    assert model.merged
