"""Formulas: sizes foretold from the numbers of a configuration, and the numbers solved from sizes."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from tests.test_configuration import FOUND, IDS, SMALL, families, family, halved
from torch import nn

from netopt.integrations.huggingface.meta_build import built, entries, with_changes
from netopt.integrations.huggingface.symbolic_build import drawn
from netopt.plan import shapes_of
from netopt.prune import prune_neurons
from netopt.symbolic.formulas import Ledger, Whole

transformers = pytest.importorskip("transformers")

EXPRESSIONS = {
    "product": lambda width, heads: 3 * width * heads,
    "quotient": lambda width, heads: heads * (width // heads),
    "made whole": lambda width, heads: heads * int(width / heads),
    "sum": lambda width, heads: (width + 2 * heads) - 1,
    "rounded": lambda width, heads: round(width * 0.5) + math.floor(heads / 2) + math.ceil(width / 16) + -heads,
    "rest": lambda width, heads: width % 7 + abs(2 - heads),
    "scale": lambda width, heads: (width // heads) ** -0.5,
    "largest": lambda width, heads: max(width, heads, 2),
}


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_a_formula_has_the_value_that_is_computed(expression):
    ledger = Ledger(100)
    number = expression(ledger.number(48, ("width",)), ledger.number(6, ("heads",)))
    assert number == expression(48, 6)
    for width, heads in [(48, 6), (96, 12), (240, 8)]:
        assert number.formula.at({("width",): width, ("heads",): heads}, {}) == expression(width, heads)


@pytest.mark.parametrize("name", ["product", "quotient", "sum", "scale"])
def test_the_only_unknown_is_solved(name):
    ledger = Ledger(100)
    number = EXPRESSIONS[name](ledger.number(48, ("width",)), ledger.number(6, ("heads",)))
    if name != "quotient":  # heads are there twice
        answer = number.formula.solve(EXPRESSIONS[name](48, 3), {("width",): 48})
        assert (answer.place, answer.value, answer.is_only) == (("heads",), 3, True)
    answer = number.formula.solve(EXPRESSIONS[name](24, 6), {("heads",): 6})
    assert (answer.place, answer.value, answer.is_only) == (("width",), 24, True)


def test_what_no_whole_number_gives_has_no_answer():
    ledger = Ledger(100)
    twice = 2 * ledger.number(48, ("width",))
    assert twice.formula.solve(13, {}).value is None
    assert (ledger.number(48, ("width",)) ** 2 * twice).formula.solve(13, {}) is None


def test_numbers_that_someone_keeps_become_plain():
    ledger = Ledger(100)
    width = ledger.number(48, ("width",))
    assert type(width + 1) is Whole
    assert type(pickle.loads(pickle.dumps(width))) is int
    assert copy.deepcopy([width])[0] is width
    assert f"{width} {width:>3} {[width]}" == "48  48 [48]"
    ledger.close()
    assert type(width + 1) is int


@pytest.mark.parametrize("name", families())
def test_what_is_foretold_is_built(name):
    """Each number of the configuration doubled by itself gives the shapes that its formulas say."""
    model, _ = family(name)
    shapes, checked = shapes_of(model), 0
    # What is smaller is written in the code: kernels, one token, the corners of a box.
    wanted = {name: tuple(size + (size > 7) for size in shape) for name, shape in shapes.items()}
    counts = {len(part._modules) for part in model.modules()}
    drawing = drawn(type(model), model.config, {}, shapes=shapes, wanted=wanted, counts=counts, least=2)
    assert drawing.at({}, shapes) == shapes
    known = dict(entries(model.config))
    for path in sorted(drawing.leaves):
        fresh = built(type(model), with_changes(model.config, {path: 2 * known[path]}))
        if fresh is not None and shapes_of(fresh).keys() == shapes.keys():
            assert drawing.at({path: 2 * known[path]}, shapes) == shapes_of(fresh), path
            checked += 1
    assert checked >= 2


class Counted(transformers.BertModel):
    """Counts how often it is built."""

    count = 0

    def __init__(self, config):
        type(self).count += 1
        super().__init__(config)


@pytest.mark.parametrize(("include", "count"), [(None, 1), ("*intermediate*", 2)])
def test_one_building_refuses_and_two_find(include, count):
    model = Counted(transformers.BertConfig(**SMALL)).eval()
    Counted.count = 0
    report = prune_neurons(model, IDS, 0.5, importance="magnitude", scope="layer", include=include, progress=False)
    assert ("config" in report.settings) is (include is None)
    assert Counted.count == count


def test_building_gives_back_the_default_device():
    model, inputs = family("bert")
    with torch.device("cpu"):
        assert halved(model, inputs, "*intermediate.dense") is None
        assert torch.empty(1).device.type == torch.get_default_device().type == "cpu"
    assert next(model.parameters()).device.type == "cpu"


class Config(SimpleNamespace):
    """What makes a namespace a configuration."""

    def to_dict(self):
        return vars(self)


class Picky(nn.Module):
    """Takes no other widths than a few, so that nothing is learned from building another."""

    def __init__(self, config):
        super().__init__()
        if config.width not in (4, 8):
            raise ValueError("4 or 8")
        self.config = config
        self.up, self.down = nn.Linear(3, config.width), nn.Linear(config.width, 3)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Looping(nn.Module):
    """Computes a table in python."""

    steps = 0

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(3, config.width), nn.Linear(config.width, 3)
        for place in range(config.positions):
            for entry in range(config.width):
                Looping.steps += 1
                place / 10000 ** (entry / config.width)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Adapted(nn.Module):
    """Has another part if a size is given."""

    count = 0

    def __init__(self, config):
        super().__init__()
        Adapted.count += 1
        self.config = config
        self.up, self.down = nn.Linear(3, config.width), nn.Linear(config.width, 3)
        self.adapter = nn.Linear(config.width, config.adapter_dim) if config.adapter_dim else None

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_a_default_that_stands_for_parts_that_are_not_there_is_left_alone():
    model = Adapted(Config(width=8, adapter_dim=None))
    Adapted.count = 0
    report = prune_neurons(model, torch.randn(2, 3), 0.5, importance="magnitude", progress=False)
    assert "config" not in report.settings
    assert (model.config.width, model.config.adapter_dim) == (4, None)
    assert Adapted.count == 3


@pytest.mark.parametrize("kind", [Picky, Looping])
def test_what_cannot_be_learned_is_tried(kind):
    model = kind(Config(width=8, positions=50))
    Looping.steps = 0
    report = prune_neurons(model, torch.randn(2, 3), 0.5, importance="magnitude", progress=False)
    assert "config" not in report.settings
    assert (model.config.width, model.config.positions) == (4, 50)
    assert Looping.steps < 10_000


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2", "mamba", "clip"])
def test_trying_finds_what_is_computed(name, monkeypatch):
    """Nothing is learned from building another model: the same is found, and the same refused."""
    monkeypatch.setattr("netopt.integrations.huggingface.config.drawn", lambda *args, **kwargs: None)
    for include, sizes in FOUND[name]:
        model, inputs = family(name)
        assert halved(model, inputs, include) is None
        for key, value in sizes.items():
            assert functools.reduce(getattr, key.split("."), model.config) == value
    if name in ("bert", "gpt2", "clip"):
        assert "in proportion" in halved(*family(name))


class Fused(nn.Module):
    """Heads of four, however wide it is."""

    def __init__(self, config):
        super().__init__()
        self.config, self.heads = config, config.width // 4
        self.query, self.out = nn.Linear(6, config.width), nn.Linear(config.width, 3)

    def forward(self, x):
        x = self.query(x).unflatten(-1, (self.heads, -1))
        return self.out((x * x.sum(-2, keepdim=True)).flatten(-2))


def test_a_number_of_a_module_that_would_be_another_is_named():
    model = Fused(Config(width=16))
    report = prune_neurons(model, torch.randn(2, 6), 0.5, importance="magnitude", scope="layer", progress=False)
    assert (model.heads, model.query.out_features, model.config.width) == (2, 4, 16)
    assert "`heads` is computed from it, and is to be 2" in report.settings["config"]


class TwoLayers(nn.Module):
    """Two widths, computed by subclasses."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        first, second = self.widths(config)
        self.first, self.second, self.last = nn.Linear(5, first), nn.Linear(first, second), nn.Linear(second, 3)

    def widths(self, config):
        return config.width, config.inner

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


class AtLeast(TwoLayers):
    def widths(self, config):
        return config.width, max(config.width // 2, config.inner)


class Shifted(TwoLayers):
    def widths(self, config):
        return config.width, config.width >> 1


class Powers(TwoLayers):
    def widths(self, config):
        return 2**config.width, 2**config.width


def pruned(model, include=None):
    report = prune_neurons(
        model, torch.randn(4, 5), 0.5, importance="magnitude", scope="layer", include=include, progress=False
    )
    return report.settings.get("config")


@pytest.mark.parametrize(
    ("kind", "sizes", "include", "after"),
    [
        (AtLeast, {"width": 16, "inner": 8}, "first", {"width": 8, "inner": 8}),
        (Shifted, {"width": 16}, None, {"width": 8}),
        (Powers, {"width": 4}, None, {"width": 3}),
    ],
)
def test_what_a_comparison_a_shift_or_a_power_makes_is_found(kind, sizes, include, after):
    model = kind(Config(**sizes))
    assert pruned(model, include) is None
    assert vars(model.config) == after
    assert shapes_of(kind(model.config)) == shapes_of(model)


class Stubborn(Config):
    """Takes multiples of four and nothing else."""

    def __setattr__(self, name, value):
        if value % 4:
            raise ValueError(f"{name} must be a multiple of 4")
        super().__setattr__(name, value)


def test_a_configuration_may_refuse_a_value():
    model = TwoLayers(Stubborn(width=16, inner=12))
    assert "`second.weight` has shape (6, 8)" in pruned(model)
    assert vars(model.config) == {"width": 16, "inner": 12}


class Choosing(TwoLayers):
    """What it is, and what it holds, depend on its width."""

    def __init__(self, config):
        super().__init__(config)
        self.wide = config.width > 12 if config.by == "flag" else None
        self.between = nn.Tanh() if config.by == "part" and config.width <= 12 else nn.ReLU()
        self.mode = "plain"

    def forward(self, x):
        x = self.between(self.first(x))
        return self.last(self.second(x if self.wide is None or self.wide else -x).relu())


@pytest.mark.parametrize(("by", "name"), [("flag", "wide"), ("part", "between")])
def test_what_would_be_chosen_otherwise_is_named(by, name):
    model = Choosing(Config(width=16, inner=16, by=by))
    assert f"`{name}` is chosen by it, and stays" in pruned(model)
    assert model.config.width == 16


def test_what_someone_has_set_since_is_no_choice():
    model = Choosing(Config(width=16, inner=16, by="none"))
    model.mode = "another"
    assert pruned(model) is None
    assert (model.config.width, model.mode) == (8, "another")


class OfDoubles(TwoLayers):
    """Changes the default type, and leaves it so where it fails."""

    def __init__(self, config):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        if config.width not in (4, 8):
            raise ValueError("4 or 8")
        torch.set_default_dtype(before)
        super().__init__(config)


def test_building_gives_back_the_default_type():
    model = OfDoubles(Config(width=8, inner=8))
    pruned(model)
    assert torch.get_default_dtype() is torch.float32
