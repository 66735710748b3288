"""Wrong calls: each is refused with an error that says what, where and what to do, and leaves everything as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import unchanged
from netopt.distillation import distill
from netopt.errors import (
    ArgumentTypeError,
    DeviceMismatchError,
    EmptyDataError,
    ForwardError,
    InvalidArgumentError,
    MissingDataError,
    NetoptError,
    NonFiniteError,
    NothingToPruneError,
    SelectorError,
    ShapeMismatchError,
    UnknownNameError,
)
from netopt.prune import prune_neurons, prune_weights


def build(inputs: int = 6, hidden: int = 8, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


@dataclass
class World:
    """A model in the middle of training: odd flags, a hook, gradients, momenta; and what is needed to call with."""

    model: nn.Module = field(default_factory=build)
    teacher: nn.Module = field(default_factory=lambda: build(hidden=16))
    x: torch.Tensor = field(default_factory=lambda: torch.randn(5, 6))
    four_outputs: nn.Module = field(default_factory=lambda: build(outputs=4))
    seven_inputs: nn.Module = field(default_factory=lambda: build(inputs=7))
    single: nn.Module = field(default_factory=lambda: nn.Linear(6, 3))
    lazy: nn.Module = field(default_factory=lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2)))
    y: torch.Tensor = field(default_factory=lambda: torch.tensor([0, 1, 2, 0, 1]))

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.model(self.x).sum().backward()
        self.optimizer.step()
        self.model[1].eval()
        self.model[4].bias.requires_grad_(False)
        self.model[0].register_forward_hook(lambda *_: None)
        self.batches = [(self.x, self.y)]

    def used_up(self) -> Any:
        batches = iter(self.batches)
        list(batches)
        return batches

    def spoiled(self, value: float) -> nn.Module:
        with torch.no_grad():
            self.model[4].weight[2, 3] = value
        return self.model


@dataclass(frozen=True)
class Wrong:
    """A wrong call, the error it must raise, the builtin a user would catch, and what the message must say."""

    name: str
    call: Callable[[World], Any]
    error: type[NetoptError]
    builtin: type[Exception]
    says: str

    def __str__(self) -> str:
        return self.name


def nan_scores(*args: Any) -> Any:
    scores = args[0].weight if hasattr(args[0], "weight") else args[0]
    return torch.full_like(scores, float("nan"))


NEURONS = [
    Wrong("negative amount", lambda w: prune_neurons(w.model, w.x, -0.1), InvalidArgumentError, ValueError, r"amount.*-0\.1"),
    Wrong("amount of one", lambda w: prune_neurons(w.model, w.x, 1.0), InvalidArgumentError, ValueError, r"amount.*1\.0"),
    Wrong("percent", lambda w: prune_neurons(w.model, w.x, 50.0), InvalidArgumentError, ValueError, r"amount.*50"),
    Wrong("amount nan", lambda w: prune_neurons(w.model, w.x, float("nan")), InvalidArgumentError, ValueError, r"amount.*(?i:nan)"),
    Wrong("more than there are", lambda w: prune_neurons(w.model, w.x, 1000), InvalidArgumentError, ValueError, r"amount.*1000"),
    Wrong("negative count", lambda w: prune_neurons(w.model, w.x, -2), InvalidArgumentError, ValueError, r"amount.*-2"),
    Wrong("bool amount", lambda w: prune_neurons(w.model, w.x, True), ArgumentTypeError, TypeError, r"amount.*(True|bool)"),
    Wrong("string amount", lambda w: prune_neurons(w.model, w.x, "half"), ArgumentTypeError, TypeError, r"amount.*(half|str)"),
    Wrong("no amount", lambda w: prune_neurons(w.model, w.x), InvalidArgumentError, ValueError, r"amount.*threshold"),
    Wrong("amount and threshold", lambda w: prune_neurons(w.model, w.x, 0.5, threshold=0.1), InvalidArgumentError, ValueError, r"amount.*threshold"),
    Wrong("amount and budget", lambda w: prune_neurons(w.model, w.x, 0.5, max_macs=0.5), InvalidArgumentError, ValueError, r"amount.*max_macs"),
    Wrong("threshold nan", lambda w: prune_neurons(w.model, w.x, threshold=float("nan")), InvalidArgumentError, ValueError, r"threshold.*(?i:nan)"),
    Wrong("threshold string", lambda w: prune_neurons(w.model, w.x, threshold="low"), ArgumentTypeError, TypeError, r"threshold.*(low|str)"),
    Wrong("budget of nothing", lambda w: prune_neurons(w.model, w.x, max_params=0.0), InvalidArgumentError, ValueError, r"max_params.*0"),
    Wrong("budget above one", lambda w: prune_neurons(w.model, w.x, max_macs=1.5), InvalidArgumentError, ValueError, r"max_macs.*1\.5"),
    Wrong("nan weights", lambda w: prune_neurons(w.spoiled(float("nan")), w.x, 0.5), NonFiniteError, ValueError, r"4\.weight"),
    Wrong("infinite weights", lambda w: prune_neurons(w.spoiled(float("inf")), w.x, 0.5, importance="magnitude"), NonFiniteError, ValueError, r"4\.weight"),
    Wrong("unknown importance", lambda w: prune_neurons(w.model, w.x, 0.5, importance="salliency"), UnknownNameError, ValueError, r"salliency.*Did you mean 'saliency'"),
    Wrong("importance of no kind", lambda w: prune_neurons(w.model, w.x, 0.5, importance=3), ArgumentTypeError, TypeError, r"importance.*int"),
    Wrong("nan scores", lambda w: prune_neurons(w.model, w.x, 0.5, importance=nan_scores), NonFiniteError, ValueError, r"(?i)score|nan"),
    Wrong("unknown scope", lambda w: prune_neurons(w.model, w.x, 0.5, scope="globel"), UnknownNameError, ValueError, r"scope.*globel.*global"),
    Wrong("unknown mode", lambda w: prune_neurons(w.model, w.x, 0.5, mode="delete"), UnknownNameError, ValueError, r"mode.*delete.*remove"),
    Wrong("include of nothing", lambda w: prune_neurons(w.model, w.x, 0.5, include="encoder.*"), SelectorError, ValueError, r"include.*encoder"),
    Wrong("exclude of nothing", lambda w: prune_neurons(w.model, w.x, 0.5, exclude=nn.Conv2d), SelectorError, ValueError, r"exclude.*Conv2d"),
    Wrong("exclude of no kind", lambda w: prune_neurons(w.model, w.x, 0.5, exclude=3), ArgumentTypeError, TypeError, r"exclude.*int"),
    Wrong("everything excluded", lambda w: prune_neurons(w.model, w.x, 0.5, exclude=w.model), NothingToPruneError, ValueError, r"exclude"),
    Wrong("no parameters", lambda w: prune_neurons(nn.ReLU(), w.x, 0.5), NothingToPruneError, ValueError, r"no parameters"),
    Wrong("all axes frozen", lambda w: prune_neurons(w.single, w.x, 0.5), NothingToPruneError, ValueError, r"(?s)frozen.*output"),
    Wrong("no module", lambda w: prune_neurons(w.x, w.x, 0.5), ArgumentTypeError, TypeError, r"model.*Tensor"),
    Wrong("class as model", lambda w: prune_neurons(nn.Linear, w.x, 0.5), ArgumentTypeError, TypeError, r"model.*Linear"),
    Wrong("list of inputs", lambda w: prune_neurons(w.model, [w.x], 0.5), ArgumentTypeError, TypeError, r"tuple"),
    Wrong("no inputs", lambda w: prune_neurons(w.model, None, 0.5), ArgumentTypeError, TypeError, r"inputs.*None"),
    Wrong("inputs of another shape", lambda w: prune_neurons(w.model, torch.ones(5, 7), 0.5), ForwardError, RuntimeError, r"(?s)shape \(5, 7\)"),
    Wrong("too many inputs", lambda w: prune_neurons(w.model, (w.x, w.x), 0.5), ForwardError, RuntimeError, r"(?s)failed on the inputs"),
    Wrong("inputs on another device", lambda w: prune_neurons(w.model, w.x.to("meta"), 0.5), DeviceMismatchError, ValueError, r"meta.*cpu"),
    Wrong("empty data", lambda w: prune_neurons(w.model, w.x, 0.5, data=[]), EmptyDataError, ValueError, r"data.*no batch"),
    Wrong("data used up", lambda w: prune_neurons(w.model, w.x, 0.5, data=w.used_up()), EmptyDataError, ValueError, r"read only once"),
    Wrong("string as data", lambda w: prune_neurons(w.model, w.x, 0.5, data="train"), ArgumentTypeError, TypeError, r"data.*DataLoader"),
    Wrong("number as data", lambda w: prune_neurons(w.model, w.x, 0.5, data=3), ArgumentTypeError, TypeError, r"data.*int"),
    Wrong("data of another shape", lambda w: prune_neurons(w.model, w.x, 0.5, data=[torch.ones(2, 7)]), ForwardError, RuntimeError, r"shape \(\d, 7\)"),
    Wrong("data missing", lambda w: prune_neurons(w.model, w.x, 0.5, importance="fisher"), MissingDataError, ValueError, r"fisher"),
    Wrong("loss of no kind", lambda w: prune_neurons(w.model, w.x, 0.5, importance="fisher", data=w.batches, loss_fn=3), ArgumentTypeError, TypeError, r"loss_fn.*int"),
    Wrong("round to nothing", lambda w: prune_neurons(w.model, w.x, 0.5, round_to=0), InvalidArgumentError, ValueError, r"round_to.*0"),
    Wrong("round to a fraction", lambda w: prune_neurons(w.model, w.x, 0.5, round_to=1.5), ArgumentTypeError, TypeError, r"round_to.*(1\.5|float)"),
    Wrong("no optimizer", lambda w: prune_neurons(w.model, w.x, 0.5, optimizer="adam"), ArgumentTypeError, TypeError, r"optimizer.*str"),
    Wrong("another model's optimizer", lambda w: prune_neurons(w.model, w.x, 0.5, optimizer=torch.optim.SGD(w.teacher.parameters())), InvalidArgumentError, ValueError, r"optimizer"),
    Wrong("uninitialised model", lambda w: prune_neurons(w.lazy, w.x, 0.5), InvalidArgumentError, ValueError, r"(?i)0\.weight.*initiali"),
]  # fmt: skip

WEIGHTS = [
    Wrong("negative amount", lambda w: prune_weights(w.model, -0.5), InvalidArgumentError, ValueError, r"amount.*-0\.5"),
    Wrong("amount of one", lambda w: prune_weights(w.model, 1.0), InvalidArgumentError, ValueError, r"amount.*1\.0"),
    Wrong("more than there are", lambda w: prune_weights(w.model, 10**6), InvalidArgumentError, ValueError, r"amount.*1,?000,?000"),
    Wrong("bool amount", lambda w: prune_weights(w.model, False), ArgumentTypeError, TypeError, r"amount.*(False|bool)"),
    Wrong("string amount", lambda w: prune_weights(w.model, "0.5"), ArgumentTypeError, TypeError, r"amount.*(0\.5|str)"),
    Wrong("no amount", lambda w: prune_weights(w.model), InvalidArgumentError, ValueError, r"amount.*threshold"),
    Wrong("amount and threshold", lambda w: prune_weights(w.model, 0.5, threshold=0.1), InvalidArgumentError, ValueError, r"amount.*threshold"),
    Wrong("threshold nan", lambda w: prune_weights(w.model, threshold=float("nan")), InvalidArgumentError, ValueError, r"threshold.*(?i:nan)"),
    Wrong("nan weights", lambda w: prune_weights(w.spoiled(float("nan")), 0.5), NonFiniteError, ValueError, r"4\.weight"),
    Wrong("unknown importance", lambda w: prune_weights(w.model, 0.5, importance="magnitud"), UnknownNameError, ValueError, r"magnitud.*Did you mean 'magnitude'"),
    Wrong("importance of no kind", lambda w: prune_weights(w.model, 0.5, importance=3), ArgumentTypeError, TypeError, r"importance.*int"),
    Wrong("scores of another shape", lambda w: prune_weights(w.model, 0.5, importance={name: torch.zeros(2) for name, _ in w.model.named_parameters()}), ShapeMismatchError, ValueError, r"0\.weight.*\(8, 6\)|\(2,\)"),
    Wrong("unknown pattern", lambda w: prune_weights(w.model, 0.5, pattern="banana"), InvalidArgumentError, ValueError, r"pattern.*banana"),
    Wrong("four of two", lambda w: prune_weights(w.model, pattern="4:2"), InvalidArgumentError, ValueError, r"4:2"),
    Wrong("amount and n:m", lambda w: prune_weights(w.model, 0.5, pattern="2:4"), InvalidArgumentError, ValueError, r"(?s)amount.*2:4|2:4.*amount"),
    Wrong("block of nothing", lambda w: prune_weights(w.model, 0.5, pattern=("block", 0, 4)), InvalidArgumentError, ValueError, r"block"),
    Wrong("unknown scope", lambda w: prune_weights(w.model, 0.5, scope="layers"), UnknownNameError, ValueError, r"scope.*layers.*layer"),
    Wrong("include of nothing", lambda w: prune_weights(w.model, 0.5, include="encoder"), SelectorError, ValueError, r"include.*encoder"),
    Wrong("no parameters", lambda w: prune_weights(nn.ReLU(), 0.5), NothingToPruneError, ValueError, r"ReLU|parameters|weights"),
    Wrong("only norms", lambda w: prune_weights(nn.BatchNorm1d(4), 0.5), NothingToPruneError, ValueError, r"include"),
    Wrong("no module", lambda w: prune_weights({}, 0.5), ArgumentTypeError, TypeError, r"model.*dict"),
    Wrong("data missing", lambda w: prune_weights(w.model, 0.5, importance="wanda"), MissingDataError, ValueError, r"importance.*data="),
    Wrong("empty loader", lambda w: prune_weights(w.model, 0.5, importance="wanda", data=DataLoader(TensorDataset(w.x), batch_size=8, drop_last=True)), EmptyDataError, ValueError, r"no batch"),
    Wrong("data used up", lambda w: prune_weights(w.model, 0.5, importance="wanda", data=w.used_up()), EmptyDataError, ValueError, r"read only once"),
    Wrong("data of another shape", lambda w: prune_weights(w.model, 0.5, importance="saliency", data=[torch.ones(2, 7)]), ForwardError, RuntimeError, r"shape \(\d, 7\)"),
    Wrong("loss missing", lambda w: prune_weights(w.model, 0.5, importance="fisher", data=[w.x]), MissingDataError, ValueError, r"fisher|loss_fn|targets"),
]  # fmt: skip


def sick_teacher(world: World) -> nn.Module:
    with torch.no_grad():
        world.teacher[6].bias[0] = float("nan")
    return world.teacher


def stuck(world: World) -> nn.Module:
    return world.model.requires_grad_(False)


DISTILL = [
    Wrong("teacher is student", lambda w: distill(w.model, w.model, w.batches, progress=False), InvalidArgumentError, ValueError, r"(?i)same"),
    Wrong("outputs of another shape", lambda w: distill(w.model, w.four_outputs, w.batches, progress=False), ShapeMismatchError, ValueError, r"(?s)3.*4"),
    Wrong("teacher of another input", lambda w: distill(w.model, w.seven_inputs, w.batches, progress=False), ForwardError, RuntimeError, r"(?s)shape \(5, 6\)"),
    Wrong("non-finite loss", lambda w: distill(w.model, sick_teacher(w), w.batches, progress=False), NonFiniteError, ValueError, r"(?i)step|teacher"),
    Wrong("empty data", lambda w: distill(w.model, w.teacher, [], progress=False), EmptyDataError, ValueError, r"data.*no batch"),
    Wrong("data used up", lambda w: distill(w.model, w.teacher, w.used_up(), progress=False), EmptyDataError, ValueError, r"read only once"),
    Wrong("one pass for two epochs", lambda w: distill(w.model, w.teacher, iter(w.batches), epochs=2, progress=False), InvalidArgumentError, ValueError, r"only once"),
    Wrong("no data", lambda w: distill(w.model, w.teacher, None, progress=False), ArgumentTypeError, TypeError, r"data.*None"),
    Wrong("no epochs", lambda w: distill(w.model, w.teacher, w.batches, epochs=0, progress=False), InvalidArgumentError, ValueError, r"epochs.*0"),
    Wrong("bool epochs", lambda w: distill(w.model, w.teacher, w.batches, epochs=True, progress=False), ArgumentTypeError, TypeError, r"epochs.*(True|bool)"),
    Wrong("another library's importance", lambda w: prune_neurons(w.model, w.x, 0.5, importance="l1"), UnknownNameError, ValueError, r"Did you mean 'magnitude'"),
    Wrong("importance in capitals", lambda w: prune_neurons(w.model, w.x, 0.5, importance="L2"), UnknownNameError, ValueError, r"Did you mean 'l2'"),
    Wrong("another library's scope", lambda w: prune_weights(w.model, 0.5, scope="local"), UnknownNameError, ValueError, r"Did you mean 'layer'"),
    Wrong("a pattern of two numbers", lambda w: prune_weights(w.model, pattern=(2, 4)), InvalidArgumentError, ValueError, r'Did you mean "2:4"'),
    Wrong("a loss in capitals", lambda w: distill(w.model, w.teacher, w.batches, loss="KL", progress=False), UnknownNameError, ValueError, r"Did you mean 'kl'"),
    Wrong("unknown loss", lambda w: distill(w.model, w.teacher, w.batches, loss="kll", progress=False), UnknownNameError, ValueError, r"kll.*Did you mean 'kl'"),
    Wrong("cold", lambda w: distill(w.model, w.teacher, w.batches, loss="kl", temperature=0.0, progress=False), InvalidArgumentError, ValueError, r"temperature.*0"),
    Wrong("too hard", lambda w: distill(w.model, w.teacher, w.batches, hard=1.5, progress=False), InvalidArgumentError, ValueError, r"hard.*1\.5"),
    Wrong("labels missing", lambda w: distill(w.model, w.teacher, [w.x], hard=0.5, progress=False), MissingDataError, ValueError, r"hard.*labels"),
    Wrong("negative rate", lambda w: distill(w.model, w.teacher, w.batches, lr=-1.0, progress=False), InvalidArgumentError, ValueError, r"lr.*-1"),
    Wrong("optimizer of no kind", lambda w: distill(w.model, w.teacher, w.batches, optimizer=3, progress=False), ArgumentTypeError, TypeError, r"optimizer.*int"),
    Wrong("another model's optimizer", lambda w: distill(w.model, w.teacher, w.batches, optimizer=torch.optim.SGD(w.teacher.parameters(), lr=0.1), progress=False), InvalidArgumentError, ValueError, r"optimizer"),
    Wrong("nothing to train", lambda w: distill(stuck(w), w.teacher, w.batches, progress=False), InvalidArgumentError, ValueError, r"requires_grad"),
    Wrong("student is no module", lambda w: distill(w.x, w.teacher, w.batches, progress=False), ArgumentTypeError, TypeError, r"student.*Tensor"),
    Wrong("teacher is no module", lambda w: distill(w.model, "resnet", w.batches, progress=False), ArgumentTypeError, TypeError, r"teacher.*str"),
    Wrong("hint to no layer", lambda w: distill(w.model, w.teacher, w.batches, hints={"9": "0"}, progress=False), InvalidArgumentError, ValueError, r"'9'"),
    Wrong("batch of three", lambda w: distill(w.model, w.teacher, [(w.x, w.x, w.y)], progress=False), ArgumentTypeError, TypeError, r"3 entries"),
]  # fmt: skip


def run(case: Wrong) -> None:
    world = World()
    # What a case changes itself, such as spoiling a weight, is done once before, so that it does not count.
    with pytest.raises(NetoptError):
        case.call(world)
    with unchanged(world.model, world.teacher, world.optimizer), pytest.raises(case.error, match=case.says) as caught:
        case.call(world)
    assert isinstance(caught.value, case.builtin)
    assert isinstance(caught.value, NetoptError)
    assert len(str(caught.value)) > 30, "too short to say what, where and what to do"


@pytest.mark.parametrize("case", NEURONS, ids=str)
def test_prune_neurons_refuses(case):
    run(case)


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_prune_weights_refuses(case):
    run(case)


@pytest.mark.parametrize("case", DISTILL, ids=str)
def test_distill_refuses(case):
    run(case)


def test_the_table_is_long_enough():
    assert len(NEURONS) + len(WEIGHTS) + len(DISTILL) >= 40
    assert min(map(len, (NEURONS, WEIGHTS, DISTILL))) >= 10
