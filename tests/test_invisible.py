"""Looking at a model and changing it is invisible to everything else in the process, while it lasts and afterwards."""

from __future__ import annotations

import copy
import functools
import gc
import math
import random
import signal
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

import netopt
from netopt.axes import find_axes
from netopt.errors import NetoptError
from netopt.model.restore import restored
from netopt.model.view import ModelView


class Block(nn.Module):
    """Attention, a recurrent layer and wrappers of torch's, of sizes that a shared configuration holds."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.inside = nn.Linear(6, config.width)
        self.attention = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.recurrent = nn.LSTM(config.width, config.hidden, batch_first=True)
        self.drop, self.last = nn.Dropout(0.1), nn.Linear(config.hidden, 3)

    def forward(self, x):
        x = self.drop(F.gelu(self.inside(x)))
        batch, length, width = x.shape
        x = x + self.attention(x, x, x, need_weights=False)[0]
        q = x.view(batch, length, self.config.heads, width // self.config.heads).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q, scale=0.5).transpose(1, 2).reshape(batch, length, width)
        x, _ = self.recurrent(x / math.sqrt(self.config.width))
        return self.last(F.layer_norm(x, (self.config.hidden,)))


def configured():
    return types.SimpleNamespace(width=8, heads=4, hidden=12, sizes=[8, 12], table={8: "eight", 12: "twelve"})


def block(config=None, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Block(config or configured()).eval()


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


# What is watched.


FILES = (math, torch, torch.functional, torch.nn.functional, torch._tensor, sys.modules[__name__])
CLASSES = (nn.Module, Block, nn.Linear, nn.MultiheadAttention, nn.LSTM, nn.Dropout, torch.Tensor, CheckpointFunction)


def functions() -> list[types.FunctionType]:
    """The functions of the classes and files a trace runs through."""
    found = [one for holder in (*FILES, *CLASSES) for one in vars(holder).values()]
    return [one for one in found if type(one) is types.FunctionType]


FUNCTIONS = functions()


def names() -> list[tuple[int, ...]]:
    """What the files and classes hold, by identity."""
    return [tuple(map(id, vars(holder).values())) for holder in (*FILES, *CLASSES)]


def code() -> list[tuple[int, ...]]:
    """What the functions consist of."""
    return [
        (id(one.__code__), id(one.__defaults__), id(one.__kwdefaults__), *map(id, one.__closure__ or ()))
        for one in FUNCTIONS
    ]


def flags() -> list[object]:
    """The settings of the process and of this thread."""
    backends = torch.backends
    return [
        backends.mha.get_fastpath_enabled(),
        backends.mkldnn.enabled,
        backends.cudnn.enabled,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        warnings.filters[:],
        warnings.showwarning,
        gc.isenabled(),
        gc.get_threshold(),
        gc.get_freeze_count(),
        sys.getrecursionlimit(),
        sys.gettrace(),
        sys.getprofile(),
    ]


def modes() -> list[bool]:
    """What torch's own modes, such as its counter of operations, set for its compiler."""
    modes = torch.utils._python_dispatch
    return [modes.is_in_torch_dispatch_mode(), modes.is_in_any_mode_without_ignore_compile_internals()]


def of_this_thread() -> list[object]:
    """What may be another in each thread."""
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch._guards.TracingContext.try_get(),
        [thread.ident for thread in threading.enumerate()],
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        torch.get_rng_state().tolist(),
        sorted(one.name for one in Path(tempfile.gettempdir()).iterdir() if "netopt" in one.name),
    ]


def hooks_of_all_modules() -> list[int]:
    """How many hooks torch calls for every module of the process."""
    glob = vars(torch.nn.modules.module)
    return [len(glob[name]) for name in glob if name.startswith("_global") and "hooks" in name]


def hooks(model: nn.Module) -> list[object]:
    """The tables of hooks of every module, the same objects with the same entries."""
    held = [
        (id(table), list(table.items()))
        for module in model.modules()
        for name, table in vars(module).items()
        if name.endswith(("_hooks", "_always_called", "_kwargs")) and isinstance(table, dict)
    ]
    return [held, hooks_of_all_modules()]


@contextmanager
def watched(take) -> Iterator[None]:
    """Samples all through the time inside, in another thread; no sample may differ from the first."""
    before, different, done = take(), [], threading.Event()

    def watch():
        while not done.is_set():
            if take() != before:
                different.append(1)

    thread = threading.Thread(target=watch)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not different


@contextmanager
def everything_as_before(*models: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the process is the same afterwards."""

    def all_of_it():
        return [names(), code(), flags(), modes(), of_this_thread(), [hooks(model) for model in models]]

    before = all_of_it()
    yield
    for one, other in zip(before, all_of_it(), strict=True):
        assert one == other


# The laws.


def test_no_other_thread_ever_sees_a_difference():
    model = block()
    find_axes(model, X)
    with watched(lambda: [names(), code(), flags(), modes()]):
        for _ in range(10):
            find_axes(model, X)


@pytest.mark.parametrize("call", ["cost", "plan", "prune", "weights", "wanda"])
def test_no_other_thread_ever_sees_a_difference_during(call):
    model = block()
    CALLS[call](model)
    model = block()
    with watched(lambda: [names(), code(), flags(), modes(), hooks_of_all_modules()]):
        CALLS[call](model)


def test_another_instance_with_the_same_configuration_computes_as_before():
    config = configured()
    traced, other = block(config), block(config, seed=1)
    with torch.no_grad():
        expected = other(X)
    failed, runs, done = [], [], threading.Event()

    def run():
        while not done.is_set():
            try:
                with torch.no_grad():
                    same = torch.equal(other(X), expected)
                looked = config.table[config.width], {8: "eight"}[config.width], config.width in {8, 9}
                runs.append(1)
                if not same or looked != ("eight", "eight", True):
                    failed.append("differs")
            except Exception as error:
                failed.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    found = []
    for _ in range(200):
        found.append([(axis.name, axis.size, axis.members) for axis in find_axes(traced, X)])
    done.set()
    thread.join()
    assert runs
    assert not failed
    assert all(axes == found[0] for axes in found)
    assert type(config.width) is int
    assert type(config.table) is dict


def test_a_part_of_a_traced_model_runs_in_another_thread_as_part_of_another():
    shared = nn.Linear(6, 8)
    handle = shared.register_forward_hook(lambda module, args, result: None)
    table = shared._forward_hooks
    traced, other = (nn.Sequential(shared, nn.ReLU(), nn.Linear(8, 3)).eval() for _ in range(2))
    expected, failed, done = other(X), [], threading.Event()

    def run():
        while not done.is_set():
            try:
                if not torch.equal(other(X), expected):
                    failed.append("differs")
            except Exception as error:
                failed.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(50):
        assert find_axes(traced, X)["0"].size == 8
    done.set()
    thread.join()
    assert not failed
    assert shared._forward_hooks is table
    handle.remove()
    assert not shared._forward_hooks


def test_threads_that_prune_models_of_their_own_end_as_one_after_the_other():
    def pruned(model):
        netopt.prune_neurons(model, X, 0.5, importance="magnitude", progress=False)
        return model.state_dict()

    models = [block(seed=seed) for seed in range(4)]  # the random state, which builds them, is one for all threads
    expected = [pruned(copy.deepcopy(model)) for model in models]
    found: dict[int, object] = {}

    def work(seed):
        try:
            found[seed] = pruned(models[seed])
        except Exception as error:
            found[seed] = error

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    before = names(), code(), flags()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (names(), code(), flags()) == before
    for seed, state in enumerate(expected):
        assert isinstance(found[seed], dict), found[seed]
        assert found[seed].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(found[seed][name], value), name


SHARING = {
    "a module": lambda: (nn.Sequential(part := nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), nn.Sequential(part)),
    "a parameter": lambda: tied(nn.Linear(6, 8), nn.Linear(6, 8)),
    "a configuration": lambda: (block(config := configured()), block(config, seed=1)),
}


def tied(first, second):
    second.weight = first.weight
    return first, second


LOOKS = {
    "find": lambda model: [(axis.name, axis.size, axis.members) for axis in find_axes(model, X)],
    "cost": lambda model: netopt.measure.cost(model, X),
}


@pytest.mark.parametrize("looks", [("find", "find"), ("find", "cost"), ("cost", "cost")], ids="-".join)
@pytest.mark.parametrize("what", SHARING)
def test_threads_look_in_turn_at_models_that_share(what, looks):
    models = [model.train() for model in SHARING[what]()]
    for model in models:
        model(X).sum().backward()
    grads = [parameter.grad for model in models for parameter in model.parameters()]
    expected = [LOOKS[look](model) for look, model in zip(looks, models, strict=True)]
    before = [hooks(model) for model in models], attributes(*models)
    found: list[object] = []

    def work(look, model, result):
        try:
            found.extend(LOOKS[look](model) == result for _ in range(15))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=work, args=one) for one in zip(looks, models, expected, strict=True)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert found == [True] * 30
    assert ([hooks(model) for model in models], attributes(*models)) == before
    after = [parameter.grad for model in models for parameter in model.parameters()]
    assert all(one is other for one, other in zip(after, grads, strict=True))


def test_random_states_are_as_before_where_threads_overlap():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    states = (random.getstate, lambda: [*np.random.get_state()[1]], lambda: torch.get_rng_state().tolist())
    before, stages = [state() for state in states], [threading.Event() for _ in range(3)]

    def first():
        with restored(model):
            torch.rand(3), random.random(), np.random.rand()
            stages[0].set()
            stages[1].wait()
        stages[2].set()

    def second():
        stages[0].wait()
        with restored(nn.Linear(2, 2)):
            torch.rand(3), random.random(), np.random.rand()
            stages[1].set()
            stages[2].wait()

    threads = [threading.Thread(target=one) for one in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [state() for state in states] == before


def attributes(*models):
    """Flags and integers of modules and of their configurations, with their types."""
    holders = [part for model in models for part in model.modules()]
    holders += [part.config for part in holders if hasattr(part, "config")]
    return [(name, type(one), one) for holder in holders for name, one in vars(holder).items() if isinstance(one, int)]


def test_a_thread_that_waits_may_be_interrupted_and_keeps_nobody_waiting():
    model, entered, go_on = nn.Linear(6, 8), threading.Event(), threading.Event()

    def forward(x):
        entered.set()
        go_on.wait()
        return nn.functional.linear(x, model.weight)

    model.forward = forward
    other = threading.Thread(target=netopt.measure.cost, args=(model, X))
    other.start()
    entered.wait()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            find_axes(model, X)
    finally:
        signal.signal(signal.SIGALRM, before)
    go_on.set()
    other.join()
    assert netopt.measure.cost(model, X).macs == 2 * 5 * 6 * 8


DATA = [(X, torch.zeros(2, 5, 3))]
CALLS = {
    "find": lambda model: find_axes(model, X),
    "cost": lambda model: netopt.measure.cost(model, X),
    "plan": lambda model: netopt.plan_neurons(model, X, 0.5, progress=False),
    "prune": lambda model: netopt.prune_neurons(model, X, 0.5, importance="magnitude", progress=False),
    "weights": lambda model: netopt.prune_weights(model, 0.5, progress=False),
    "wanda": lambda model: netopt.prune_weights(model, 0.5, importance="wanda", data=[X], progress=False),
    "sparsegpt": lambda model: netopt.prune_weights(model, 0.5, importance="sparsegpt", data=[X], progress=False),
    "distill": lambda model: netopt.distill(model, block(seed=2), DATA, epochs=1, progress=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_process_is_as_before(name):
    CALLS[name](block())  # what torch and its parts load at first use
    model = block()
    with everything_as_before(*([] if name in ("weights", "wanda", "sparsegpt") else [model])):
        CALLS[name](model)


class Refusing(Block):
    """Fails half-way, in a module inside."""

    def forward(self, x):
        self.recurrent(self.inside(x))
        raise RuntimeError("half-way")


@pytest.mark.parametrize("name", CALLS)
def test_the_process_is_as_before_after_a_failure(name):
    if name == "weights":
        pytest.skip("runs no forward")
    model = Refusing(configured()).eval()
    with pytest.raises(NetoptError):
        CALLS[name](copy.deepcopy(model))
    with everything_as_before(model), pytest.raises((NetoptError, RuntimeError)):
        CALLS[name](model)


def test_a_compiled_part_is_compiled_after_it_was_traced():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model = nn.Sequential(nn.Linear(6, 8), torch.compile(body, backend=backend), nn.Linear(8, 3))
    assert find_axes(model, X)["0"].frozen is None
    assert not graphs
    with torch.no_grad():
        model(X)
    assert len(graphs) == 1
    torch._dynamo.reset()


# The wrappers of torch run through.


WRAPPED = {
    "split": lambda x: x.split(2, -1),
    "unflatten": lambda x: x.unflatten(-1, (2, 3)),
    "einsum": lambda x: torch.einsum("bti,bsi->bts", [x, x]),
    "norm": lambda x: (x.norm(), torch.norm(x, dim=-1)),
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "max_pool1d, indices": lambda x: F.max_pool1d(x, 2, return_indices=True),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[0, 1], indexing="ij"),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "multi-head": lambda x: block().attention(F.pad(x, (0, 2)), F.pad(x, (0, 2)), F.pad(x, (0, 2)))[0],
    "comparison": lambda x: (x == None, x != 1, len(x), 2 - x, 1 / (1 + x * x), x**2, 2**x),  # noqa: E711
    "iteration": list,
    "unique": lambda x: torch.unique(x.round(), return_counts=True),
    "stft": lambda x: torch.stft(x.flatten(), 8, window=torch.ones(8), return_complex=True),
    "loss": lambda x: F.cross_entropy(x, torch.zeros(2, 6, dtype=torch.long)),
    "gumbel": lambda x: F.gumbel_softmax(x, hard=True).shape,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_that_is_run_through_computes_the_same(name):
    from netopt.model.wrappers import TorchCalls

    seen = []

    class Seen(TorchCalls):
        def run_call(self, function, args, kwargs):
            seen.append(function)
            return super().run_call(function, args, kwargs)

    expected = WRAPPED[name](X)
    with Seen():
        found = WRAPPED[name](X)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert seen
    wrappers = [
        one for one in seen if getattr(one, "__module__", "") == "torch.nn.functional" and hasattr(one, "__code__")
    ]
    assert not wrappers


FUSED = {
    "lstm": lambda: nn.LSTM(6, 4, num_layers=2, bidirectional=True, proj_size=3),
    "lstm, batch first": lambda: nn.LSTM(6, 4, batch_first=True, bias=False),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_the_steps_of_a_recurrent_layer_compute_the_same(name, packed):
    from netopt.model.kernels import Unfused

    layer = FUSED[name]().eval()
    x = X if not packed else nn.utils.rnn.pack_padded_sequence(X, torch.tensor([5, 3]), batch_first=True)
    expected = layer(x)
    with Unfused():
        found = layer(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5).tril().bool(), torch.randn(5, 5)], ids=["", "bool", "float"])
@pytest.mark.parametrize("how", [{}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
def test_the_steps_of_attention_compute_the_same(mask, how):
    from netopt.model.kernels import Unfused

    q = torch.randn(2, 4, 5, 8)
    k = q[:, :2] if "enable_gqa" in how else q
    attend = functools.partial(F.scaled_dot_product_attention, q, k, k, mask, **how)
    expected = attend()
    with Unfused():
        found = attend()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("importance", ["magnitude", "saliency", "activation"])
def test_a_model_is_listed_once_a_call(importance, monkeypatch):
    listed: list[nn.Module] = []
    plain = ModelView.__init__
    monkeypatch.setattr(ModelView, "__init__", lambda view, model: (listed.append(model), plain(view, model))[1])
    model = block()
    netopt.prune_neurons(model, X, 0.5, importance=importance, progress=False)
    assert listed == [model]
