"""What is left works: every kind of layer refitted after neurons are removed; nothing else of the model changes."""

import copy
import gc
import itertools
import threading

import pytest
import torch
from torch import nn

import netopt
from netopt.errors import InvalidArgumentError, MissingDataError, NetoptError
from netopt.reconstruction.regression import Sums, correction
from test_restore import ByShape, HalfOnTheClass


def mixed(size, count=3, rows=96):
    """Batches whose entries depend on one another, so that what is removed can be told from what stays."""
    generator = torch.Generator().manual_seed(1)
    shape = torch.randn(size[0], size[0], generator=generator) if len(size) == 1 else None
    found = [torch.randn(rows, *size, generator=generator) for _ in range(count)]
    return [one @ shape for one in found] if shape is not None else found


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 24) / 3)
        self.b = nn.Parameter(torch.randn(24) / 3)
        self.v = nn.Parameter(torch.randn(24, 4) / 5)

    def forward(self, x):
        return (x @ self.w + self.b).relu() @ self.v


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 24) / 3)
        self.down = nn.Parameter(torch.randn(3, 24, 4) / 5)

    def forward(self, x):
        hidden = torch.bmm(x.expand(3, *x.shape), self.up).relu()
        return torch.bmm(hidden, self.down).sum(0)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        h = self.first(x)
        h = h + self.down(self.up(self.norm(h)).relu())
        return self.out(h)


class Last(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.out = cell, nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (4, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.o(y.transpose(1, 2).flatten(2)))


MODELS = {
    "linear": lambda: (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), (8,)),
    "no bias": lambda: (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4, bias=False)), (8,)),
    "conv1d": lambda: (
        nn.Sequential(nn.Conv1d(2, 12, 3), nn.ReLU(), nn.Conv1d(12, 4, 3, stride=2), nn.Flatten()),
        (2, 16),
    ),
    "conv2d": lambda: (
        nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3, dilation=2, padding=1), nn.Flatten()),
        (2, 8, 8),
    ),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(1, 8, 2), nn.ReLU(), nn.Conv3d(8, 3, 2), nn.Flatten()), (1, 5, 5, 5)),
    "grouped": lambda: (
        nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1)),
        (2, 8, 8),
    ),
    "depthwise": lambda: (
        nn.Sequential(nn.Conv2d(2, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 3, 1)),
        (2, 8, 8),
    ),
    "transposed": lambda: (
        nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 4, 3, stride=2)),
        (2, 8, 8),
    ),
    "batch norm": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 12, 3),
            nn.ReLU(),
            nn.Conv2d(12, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 3, 1),
        ),
        (2, 8, 8),
    ),
    "product": lambda: (Product(), (8,)),
    "experts": lambda: (Experts(), (8,)),
    "residual": lambda: (Residual(), (8,)),
    "lstm": lambda: (Last(nn.LSTM(5, 16, batch_first=True)), (6, 5)),
    "gru": lambda: (Last(nn.GRU(5, 16, batch_first=True)), (6, 5)),
    "attention": lambda: (Attention(), (7, 16)),
}


def built(name):
    torch.manual_seed(0)
    model, size = MODELS[name]()
    return model.eval(), mixed(size)


def error(model, dense, data):
    with torch.no_grad():
        return sum(float((model(x) - dense(x)).square().mean()) for x in data)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_come_nearer_to_what_they_were_on_other_data(name):
    model, data = built(name)
    dense, bare = copy.deepcopy(model), copy.deepcopy(model)
    arguments = {"amount": 0.4, "importance": "magnitude", "data": data[:2], "progress": False}
    netopt.prune_neurons(bare, data[0][:4], repair=False, **arguments)
    report = netopt.prune_neurons(model, data[0][:4], **arguments)
    assert report.repair is not None
    assert report.repair.removed, report.repair
    assert error(model, dense, data[2:]) < 0.8 * error(bare, dense, data[2:])
    assert [p.shape for p in model.parameters()] == [p.shape for p in bare.parameters()]


def test_repair_false_leaves_what_masking_would():
    model, data = built("linear")
    masked = copy.deepcopy(model)
    report = netopt.prune_neurons(model, data[0], 0.5, importance="magnitude", data=data, repair=False, progress=False)
    assert report.repair is None
    assert report.to_dict()["repair"] is None
    netopt.prune_neurons(masked, data[0], 0.5, importance="magnitude", mode="mask", progress=False)
    torch.testing.assert_close(model(data[1]), masked(data[1]))


def test_without_data_nothing_is_repaired_and_true_needs_them():
    model, data = built("linear")
    report = netopt.prune_neurons(model, data[0], 0.25, importance="magnitude", progress=False)
    assert report.repair is None
    with pytest.raises(MissingDataError, match="repair=True needs data="):
        netopt.prune_neurons(model, data[0], 0.25, importance="magnitude", repair=True, progress=False)
    with pytest.raises(InvalidArgumentError, match="mode='remove'"):
        netopt.prune_neurons(model, data[0], 0.25, data=data, repair=True, mode="mask", progress=False)


def test_what_a_batch_normalisation_takes_away_is_refitted_and_stays():
    model, data = built("batch norm")
    bare, dense = copy.deepcopy(model), copy.deepcopy(model)
    options = {"include": "0", "importance": "magnitude", "data": data, "progress": False}
    netopt.prune_neurons(bare, data[0], 0.5, repair=False, **options)
    netopt.prune_neurons(model, data[0], 0.5, **options)

    def means(net):
        with torch.no_grad():
            return torch.cat([net[:4](x) for x in data]).mean((0, 2, 3))

    assert not torch.equal(model[3].running_mean, bare[3].running_mean)
    assert (means(model) - means(dense)).abs().max() < 0.1 * (means(bare) - means(dense)).abs().max()


class Stop(BaseException):
    """An interruption."""


@pytest.mark.parametrize("where", ["refit", "report"])
@pytest.mark.parametrize("name", ["batch norm", "residual", "lstm"])
def test_what_is_interrupted_has_not_happened(name, where, monkeypatch):
    model, data = built(name)
    before = copy.deepcopy(model.state_dict())
    calls = itertools.count()

    def stop(*args, **kwargs):
        if where == "report" or next(calls) == 1:
            raise Stop
        return correction(*args, **kwargs)

    target = "netopt.reconstruction.refit.correction" if where == "refit" else "netopt.prune.neurons.PruningReport"
    monkeypatch.setattr(target, stop)
    alive = threading.active_count()
    with pytest.raises(Stop):
        netopt.prune_neurons(model, data[0], 0.4, importance="magnitude", data=data, progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert threading.active_count() == alive


@pytest.mark.parametrize("name", ["linear", "batch norm", "residual"])
def test_a_model_pruned_earlier_is_repaired_by_itself(name):
    model, data = built(name)
    dense = copy.deepcopy(model)
    plan = netopt.plan_neurons(model, data[0], 0.4, importance="magnitude", progress=False)
    plan.apply(model)
    model.train()
    kept, bare = copy.deepcopy(dense.state_dict()), error(model, dense, data[2:])
    report = netopt.repair(model, plan, dense, data[:2], progress=False)
    assert model.training
    model.eval()
    assert all(torch.equal(one, kept[key]) for key, one in dense.state_dict().items())
    assert error(model, dense, data[2:]) < bare
    assert "weights refitted" in str(report)
    assert set(report.removed) <= {name for name, _ in model.named_parameters()}


def test_twice_gives_the_same():
    found = []
    for _ in range(2):
        model, data = built("conv2d")
        netopt.prune_neurons(model, data[0], 0.4, importance="reconstruction", data=data, progress=False)
        found.append(model.state_dict())
    assert all(torch.equal(one, found[1][key]) for key, one in found[0].items())


def test_inputs_by_name_and_several_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 32)
            self.a, self.b = nn.Linear(32, 3), nn.Linear(32, 5)

        def forward(self, tokens, attention_mask=None):
            hidden = self.hidden(self.embedding(tokens)).relu()
            return {"a": self.a(hidden), "b": [self.b(hidden)]}

    torch.manual_seed(0)
    model = Two()
    dense = copy.deepcopy(model)
    data = [{"tokens": torch.randint(11, (40, 7)), "attention_mask": torch.ones(40, 7)} for _ in range(3)]
    report = netopt.prune_neurons(model, data[0], 0.5, importance="reconstruction", data=data[:2], progress=False)
    assert {"a.weight", "b.weight"} <= report.repair.removed.keys()
    given, wanted = model(**data[2]), dense(**data[2])
    assert (given["a"] - wanted["a"]).square().mean() < 0.1 * wanted["a"].var()
    assert (given["b"][0] - wanted["b"][0]).square().mean() < 0.1 * wanted["b"][0].var()


def test_what_gains_nothing_stays_as_it_was():
    """Removed inputs that nothing kept says anything about cannot be made up for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 4, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
    data = [torch.randn(64, 8) for _ in range(2)]
    weight = model[2].weight.detach().clone()
    report = netopt.prune_neurons(model, data[0], 0.5, importance="magnitude", data=data, progress=False)
    if "2.weight" in report.repair.left:
        assert torch.equal(model[2].weight, weight[:, report.plan.axes[0].kept])
    else:
        assert report.repair.removed["2.weight"] < 0.05


def test_what_cannot_be_refitted_is_listed():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix = nn.Embedding(20, 16), nn.Linear(16, 16)

        def forward(self, tokens):
            return self.mix(self.table(tokens)).relu() @ self.table.weight.T

    torch.manual_seed(0)
    data = [torch.randint(20, (32, 6)) for _ in range(2)]
    report = netopt.prune_neurons(Tied(), data[0], 0.25, importance="magnitude", data=data, progress=False)
    assert report.repair.left["table.weight"] == "is also looked up"


@pytest.mark.parametrize("wrong", ["model", "plan", "dense", "shared", "other", "data"])
def test_wrong_arguments_are_named(wrong):
    model, data = built("linear")
    dense = copy.deepcopy(model)
    plan = netopt.plan_neurons(model, data[0], 0.4, importance="magnitude", progress=False)
    arguments = {"model": model, "plan": plan, "dense": dense, "data": data}
    if wrong != "other":
        plan.apply(model)
    if wrong == "shared":
        dense[0].bias = model[2].bias
    elif wrong == "data":
        arguments["data"] = []
    elif wrong != "other":
        arguments[wrong] = 3
    with pytest.raises(NetoptError):
        netopt.repair(**arguments, progress=False)


def test_a_model_that_cannot_be_copied_is_repaired_on_no_condition():
    model, data = built("linear")
    model.cache = (model[0].weight * 2).sum()
    before = model[0].weight.shape
    with pytest.raises(InvalidArgumentError, match="repair=False"):
        netopt.prune_neurons(model, data[0], 0.5, data=data, progress=False)
    assert model[0].weight.shape == before
    netopt.prune_neurons(model, data[0], 0.5, data=data, repair=False, progress=False)
    assert model[0].weight.shape != before


@pytest.mark.parametrize("name", ["conv2d", "residual", "lstm", "attention"])
def test_repair_takes_at_most_six_forwards_over_the_data(name):
    model, data = built(name)
    dense, runs = copy.deepcopy(model), []
    plan = netopt.plan_neurons(model, data[0], 0.4, importance="magnitude", progress=False)
    plan.apply(model)
    for net in (model, dense):
        net.register_forward_pre_hook(lambda module, inputs: runs.append(len(inputs[0])))
    netopt.repair(model, plan, dense, data, progress=False)
    assert 2 * sum(map(len, data)) <= sum(runs) <= 6 * sum(map(len, data))


def test_rows_that_are_normalised_next_count_alike_however_large():
    class Stream(Residual):
        def __init__(self):
            super().__init__()
            self.last = nn.LayerNorm(8)

        def forward(self, x):
            h = self.first(x)
            return self.out(self.last(h + self.down(self.up(h).relu())))

    torch.manual_seed(0)
    dense = Stream().eval()
    data = [torch.cat([torch.randn(300, 8), 300 * torch.randn(3, 8)]) for _ in range(3)]
    model, bare = copy.deepcopy(dense), copy.deepcopy(dense)
    options = {"importance": "magnitude", "include": "up", "data": data[:2], "progress": False}
    netopt.prune_neurons(bare, data[0], 0.4, repair=False, **options)
    netopt.prune_neurons(model, data[0], 0.4, **options)
    small = [one[:300] for one in data[2:]]
    assert error(model, dense, small) < 0.5 * error(bare, dense, small)


@pytest.mark.parametrize("name", ["conv2d", "residual", "attention"])
def test_scores_and_repair_take_at_most_twenty_five_forwards_over_the_data(name):
    model, data = built(name)
    runs = []
    model.register_forward_pre_hook(lambda module, inputs: runs.append(len(inputs[0])))
    netopt.prune_neurons(model, data[0][:2], 0.4, importance="reconstruction", data=data, progress=False)
    assert sum(runs) <= 25 * sum(map(len, data))


def test_moments_of_one_weight_are_in_memory_at_a_time(monkeypatch):
    alive = []

    def count(*args, **kwargs):
        alive.append(sum(type(one) is Sums for one in gc.get_objects()))
        return correction(*args, **kwargs)

    monkeypatch.setattr("netopt.reconstruction.refit.correction", count)
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 3))
    data = mixed((16,))
    netopt.prune_neurons(model, data[0], 0.4, importance="magnitude", data=data, progress=False)
    assert len(alive) == 7
    assert max(alive) <= 3


def test_forwards_end_with_the_last_weight():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = built("linear")[0]

        def forward(self, x):
            return self.body(x).softmax(-1)

    model, data = Tail(), built("linear")[1]
    dense = copy.deepcopy(model)
    plan = netopt.plan_neurons(model, data[0], 0.4, importance="magnitude", progress=False)
    plan.apply(model)
    ends = []
    for net in (model, dense):
        net.register_forward_hook(lambda *_: ends.append(1))
    assert netopt.repair(model, plan, dense, data, progress=False).removed
    assert len(ends) <= 1  # that of the look at how weights are used


@pytest.mark.parametrize("sizes", [(40, 24), (24, 40), (4, 40, 24, 4)], ids=str)
@pytest.mark.parametrize("kind", [ByShape, HalfOnTheClass], ids=lambda kind: kind.__name__)
def test_batches_in_flight_do_not_see_what_a_model_keeps_of_one_another(kind, sizes):
    torch.manual_seed(0)
    model, data = kind(), [torch.randn(size, 4) for size in sizes]
    report = netopt.prune_neurons(model, data[0], 0.25, importance="magnitude", data=data, progress=False)
    assert report.repair.removed.keys() == {"last.weight"}


def test_padding_does_not_count():
    """What stands where there is no token has no part in a refit."""

    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 24), nn.Linear(24, 3)

        def forward(self, input_ids, attention_mask):
            hidden = self.table(input_ids) + 50 * (1 - attention_mask[..., None])
            return self.down(self.up(hidden).relu()) * attention_mask[..., None]

    torch.manual_seed(0)
    model = Texts()
    mask = (torch.arange(8) < torch.randint(2, 9, (60, 1))).float()
    data = [{"input_ids": torch.randint(9, (60, 8)), "attention_mask": mask} for _ in range(2)]
    left = []
    for known in (True, False):
        net, dense = copy.deepcopy(model), copy.deepcopy(model)
        plan = netopt.plan_neurons(net, data[0], 0.5, importance="magnitude", include="up", progress=False)
        plan.apply(net)
        shown = data if known else [(one["input_ids"], one["attention_mask"]) for one in data]
        shown = shown if known else [(one, None) for one in shown]
        netopt.repair(net, plan, dense, shown, progress=False)
        with torch.no_grad():
            left.append(float((net(**data[0]) - dense(**data[0])).square().mean()))
    assert left[0] < left[1]


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def deep():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *[Deep() for _ in range(5)], nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("places", [[1], [3], [2, 4]])
def test_removed_blocks_are_made_up_for_by_the_weights_behind(places):
    dense, data = deep(), mixed((8,), 5)
    model, scores = copy.deepcopy(dense), {str(place): float(place not in places) for place in range(1, 6)}
    report = netopt.prune_blocks(model, data[0], len(places), importance=scores, progress=False)
    before, kept = error(model, dense, data[3:]), copy.deepcopy(model)
    repaired = netopt.repair(model, report.plan, dense, data[:3], progress=False)
    assert error(model, dense, data[3:]) < 0.5 * before
    assert repaired.removed
    assert all(name.split(".")[0] > str(min(places)) for name in repaired.removed)
    again = copy.deepcopy(dense)
    whole = netopt.prune_blocks(
        again, data[0], len(places), importance=scores, data=data[:3], repair=True, progress=False
    )
    assert whole.repair.removed == repaired.removed
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    assert not all(map(torch.equal, again.parameters(), kept.parameters()))


def test_removed_branches_are_made_up_for():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mixer = nn.LayerNorm(8), nn.Linear(8, 8)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            x = x + self.mixer(self.norm(x))
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    dense, data = nn.Sequential(*[Layer() for _ in range(3)]).eval(), mixed((8,), 5)
    model = copy.deepcopy(dense)
    report = netopt.prune_blocks(model, data[0], 1, kind="branches", include="1.mixer", progress=False)
    before = error(model, dense, data[3:])
    netopt.repair(model, report.plan, dense, data[:3], progress=False)
    assert error(model, dense, data[3:]) < 0.5 * before


def test_a_plan_of_blocks_needs_the_model_it_made():
    dense, data = deep(), mixed((8,), 3)
    plan = netopt.plan_blocks(dense, data[0], 2, progress=False)
    with pytest.raises(InvalidArgumentError, match="shares parameters"):
        netopt.repair(dense, plan, dense, data, progress=False)
    with pytest.raises(InvalidArgumentError, match="not what this plan makes"):
        netopt.repair(nn.Sequential(nn.Linear(8, 4), *[nn.Linear(4, 4) for _ in range(4)]), plan, dense, data)
    with pytest.raises(MissingDataError, match="repair=True needs data"):
        netopt.prune_blocks(dense, data[0], 1, repair=True, progress=False)


def test_what_stands_behind_removed_experts_is_refitted():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 6)
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            gates, chosen = self.router(x).softmax(-1).topk(2)
            made = x
            for place, expert in enumerate(self.experts):
                made = made + (gates * (chosen == place)).sum(-1, keepdim=True) * expert(x)
            return self.head(made)

    torch.manual_seed(0)
    dense, data = Sparse().eval(), mixed((8,), 5)
    model = copy.deepcopy(dense)
    report = netopt.prune_experts(model, data[0], 3, data=data[:3], progress=False)
    before = error(model, dense, data[3:])
    repaired = netopt.repair(model, report.plan, dense, data[:3], progress=False)
    assert "head.weight" in repaired.removed
    assert error(model, dense, data[3:]) < before
