"""What neurons cannot be removed from is refused by name, with what to do, before anything is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import unchanged
from netopt import masking, measure
from netopt.axes import find_axes
from netopt.distillation import distill
from netopt.errors import ArgumentTypeError, ForwardError, InvalidArgumentError
from netopt.prune import plan_neurons, prune_neurons, prune_weights, shrink

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))


class Graph(nn.Module):
    """A layer over a graph whose adjacency is a sparse buffer, or parameter."""

    def __init__(self, *, learnt: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)
        adjacency = torch.eye(4).to_sparse()
        if learnt:
            self.adjacency = nn.Parameter(adjacency)
        else:
            self.register_buffer("adjacency", adjacency)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.sparse.mm(self.adjacency, self.first(x).relu()))


def with_inference_statistics() -> nn.Module:
    with torch.inference_mode():
        mean = torch.zeros(10)
    model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3))
    model[1].running_mean = mean
    return model


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return plain()


CALLS = {
    "prune_neurons": lambda model, x, **more: prune_neurons(model, x, 0.5, progress=False, **more),
    "plan_neurons": lambda model, x, **more: plan_neurons(model, x, 0.5, progress=False, **more),
    "shrink": shrink,
}
UNFIT = {
    "lazy": (lambda: nn.Sequential(nn.Linear(6, 3), nn.LazyBatchNorm1d(), nn.Linear(3, 3)), r"'1\.weight' is not init"),
    "sparse buffer": (lambda: Graph(learnt=False), r"'adjacency' is a sparse tensor; .*to_dense"),
    "sparse parameter": (lambda: Graph(learnt=True), r"'adjacency' is a sparse tensor; .*to_dense"),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", UNFIT)
def test_tensors_without_strided_values_are_named(name, call):
    build, message = UNFIT[name]
    with pytest.raises(InvalidArgumentError, match=message):
        CALLS[call](build(), X)


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_decided_on_a_device_without_values(call):
    model = plain()
    with unchanged(model), torch.device("meta"), pytest.raises(InvalidArgumentError, match='default device is "meta"'):
        CALLS[call](model, X)


def test_a_model_without_values_is_pruned():
    with torch.device("meta"):
        model, x = plain(), torch.randn(4, 6)
    assert prune_neurons(model, x, 0.5, importance="random", progress=False).rows[0].after == 5


@pytest.mark.parametrize("inputs", [
    X.to_sparse(),
    torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged),
    {"input": X.to_sparse()},
], ids=["sparse", "nested", "by name"])  # fmt: skip
@pytest.mark.parametrize("call", ["prune_neurons", "plan_neurons"])
def test_inputs_without_strided_values_are_refused(inputs, call):
    with pytest.raises(InvalidArgumentError, match=r"one of example_inputs is a (sparse|nested) tensor"):
        CALLS[call](plain(), inputs)


@pytest.mark.parametrize(("build", "name"), [
    (with_inference_statistics, r"1\.running_mean"),
    (made_in_inference_mode, r"0\.weight"),
])  # fmt: skip
def test_what_was_made_in_inference_mode_has_no_gradients(build, name):
    model = build()
    with pytest.raises(InvalidArgumentError, match=f"(?s)saliency.*'{name}' was made in inference mode.*magnitude"):
        prune_neurons(model, X, 0.5, progress=False)
    report = prune_neurons(model, X, 0.5, importance="magnitude", progress=False)
    assert report.rows[0].after == 5
    assert model(X).shape == (4, 3)


class Compiled(torch.autograd.Function):
    """Fails as the backward of compiled code does when it is run twice."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("This backward function was compiled with non-empty donated buffers")


class Fails(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Compiled.apply(super().forward(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_model_that_gives_no_gradients_is_to_be_pruned_before(inner):
    model = nn.Sequential(Fails(*plain()), nn.Linear(3, 2)) if inner else Fails(*plain())
    twin = copy.deepcopy(model)
    (model[0] if inner else model).compile(backend="eager")
    where = "'0'" if inner else "the model"
    with pytest.raises(InvalidArgumentError, match=f"saliency.*{where} is compiled; prune before compiling"):
        prune_neurons(model, X, 0.5, progress=False)
    with pytest.raises(RuntimeError, match="donated buffers"):
        prune_neurons(twin, X, 0.5, progress=False)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_pruned_where_its_backend_lets_it():
    model = torch.compile(plain(), backend="eager")
    assert prune_neurons(model, X, 0.5, progress=False).rows[0].after == 5
    assert model(X).shape == (4, 3)


@pytest.mark.parametrize("call", CALLS)
def test_only_modules(call):
    with pytest.raises(ArgumentTypeError, match=r"torch\.nn\.Module, not str"):
        CALLS[call]("model", X)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(10), nn.ReLU(), nn.Linear(10, 3))


LAZY = {
    "find_axes": lambda: find_axes(lazy(), X),
    "prune_weights": lambda: prune_weights(lazy(), 0.5, progress=False),
    "student": lambda: distill(lazy(), plain(), [X], progress=False),
    "teacher": lambda: distill(plain(), lazy(), [X], progress=False),
    "put": lambda: masking.put(lazy(), {"0.weight": torch.ones(10, 6, dtype=torch.bool)}),
    "cost": lambda: measure.cost(lazy(), X),
    "size_bytes": lambda: measure.size_bytes(lazy()),
}


@pytest.mark.parametrize("call", LAZY)
def test_what_has_no_values_yet_is_named_everywhere(call):
    with pytest.raises(InvalidArgumentError, match=r"'0\.weight' is not initialised yet"):
        LAZY[call]()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_weights_are_not_compared_on_a_device_without_values(pattern):
    model = plain()
    amount = 0.5 if pattern == "unstructured" else None
    with unchanged(model), torch.device("meta"), pytest.raises(InvalidArgumentError, match='default device is "meta"'):
        prune_weights(model, amount, pattern=pattern, progress=False)


def test_nothing_is_trained_on_a_device_without_values():
    student, teacher = plain(), plain()
    with unchanged(student, teacher), torch.device("meta"), pytest.raises(InvalidArgumentError, match='"meta"'):
        distill(student, teacher, [X], progress=False)


class Eighth(nn.Module):
    """A layer whose weight is stored in float8, as after a quantization of weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.to(x.dtype)


def test_float8_is_refused_where_it_is_compared_and_left_alone_elsewhere():
    model = nn.Sequential(Eighth(), *plain())
    for importance in ("saliency", "magnitude"):
        with unchanged(model), pytest.raises(InvalidArgumentError, match=r"'0\.weight' is stored in float8"):
            prune_neurons(model, X, 0.5, importance=importance, progress=False)
    assert "float8" in str(prune_weights(model, 0.5, progress=False))
    assert distill(model, plain(), [X], progress=False).steps == 1


def test_a_sparse_parameter_is_no_students():
    model = Graph(learnt=True)
    with pytest.raises(InvalidArgumentError, match=r"'adjacency' is a sparse tensor.*requires_grad_\(False\)"):
        distill(model, plain(), [X], progress=False)
    model.adjacency.requires_grad_(False)
    assert distill(model, plain(), [X], progress=False).steps == 1
    assert distill(plain(), model, [X], epochs=2, progress=False).steps == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_buffer_is_named():
    model = plain()
    model.register_buffer("rows", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    with pytest.raises(InvalidArgumentError, match=r"'rows' is a nested tensor"):
        find_axes(model, X)


@pytest.mark.parametrize("importance", ["saliency", "fisher"])
def test_weights_made_in_inference_mode_are_named_and_stay(importance):
    model = made_in_inference_mode()
    with unchanged(model), pytest.raises(InvalidArgumentError, match=r"'0\.weight' was made in inference mode"):
        prune_weights(model, 0.5, importance=importance, data=[X], loss_fn=lambda y, _: y.sum(), progress=False)
    assert prune_weights(model, 0.5, importance="wanda", data=[X], progress=False).rows


class InPlace(nn.Module):
    """A partial convolution that writes over what the gradient needs, so that nothing trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(6, 10), nn.Linear(5, 5), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h[:, :5] = self.part(h[:, :5])
        return self.last(h)


def test_a_forward_that_writes_over_what_its_gradient_needs_is_no_students():
    model, teacher = InPlace(), plain()
    with unchanged(model), pytest.raises(ForwardError, match=r"(?s)cannot be trained.*clone"):
        distill(model, teacher, [X], progress=False)
    assert prune_neurons(model, X, 0.5, importance="magnitude", progress=False).rows


class Tree(nn.Module):
    """Seven nodes, each with its parent: the first dimension is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3)
        self.register_buffer("parent", torch.tensor([0, 0, 0, 1, 1, 2, 2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last((h + h[self.parent]).relu())


def test_a_graph_is_run_whole():
    nodes = torch.randn(7, 6)
    assert prune_neurons(Tree(), nodes, 0.5, progress=False).rows[0].after == 5
    assert prune_weights(Tree(), 0.5, importance="saliency", data=[nodes], progress=False).rows
