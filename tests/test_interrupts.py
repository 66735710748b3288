"""Ctrl-C at any moment: a call that raises has changed nothing, one that returns has done all, once or twice.

A second process sends the signals, after random times, as a person at a keyboard would. ``INTERRUPTS=1000`` makes so
many tries instead of the few of the suite.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._functorch import maybe_current_level  # pyright: ignore[reportMissingModuleSource]
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import netopt
from conftest import random_state, state_of, state_of_optimizer
from netopt import importance, masking, measure
from netopt.axes import find_axes
from netopt.distillation import distill
from netopt.model.signals import UndoLog
from netopt.plan import Plan
from netopt.prune import plan_neurons, prune_neurons, prune_weights, shrink
from netopt.training import GradualPruner

# Ctrl-C inside a callback of the garbage collector, as tools of the tests install, can only be reported by Python.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TRIES = int(os.environ.get("INTERRUPTS", "0")) or 160
TWICE = 0.002
SENDER = """
import os, signal, sys, time
for line in sys.stdin:
    for pause in map(float, line.split()):
        end = time.perf_counter() + pause
        while time.perf_counter() < end:
            pass
        os.kill(os.getppid(), signal.SIGINT)
    print(flush=True)
"""


class Sender:
    """A process that sends Ctrl-C after pauses."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SENDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.attempt(lambda: None, [0.0])

    def attempt(self, call: Callable[[], Any], pauses: list[float]) -> Any:
        """Runs ``call`` with signals after these pauses; what it returned, ``None`` if it raised."""
        process, found = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                process.stdin.write(" ".join(map(str, pauses)) + "\n")
                process.stdin.flush()
                found = call()
            finally:
                signal.signal(signal.SIGINT, ignore)
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGINT, ignore)
        process.stdout.readline()
        return found

    def close(self) -> None:
        self._process.communicate()


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def sender():
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    sys.unraisablehook = ignore  # pytest's own is interrupted too, and fails
    one = Sender()
    yield one
    one.close()
    sys.unraisablehook = hook
    signal.signal(signal.SIGINT, before)


class Net(nn.Module):
    """Something of everything that is set aside, lent or put back."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.n, self.table = 8, 0, None
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.inner, self.drop, self.last = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        if len(x) > self.n:
            self.n, self.table = len(x), torch.ones(len(x), 1)
        h = self.norm(self.first(x)).relu()
        h = self.drop(h + self.inner(h).relu().view(-1, self.width) * self.width**-0.5)
        return self.last(h) * self.table[: len(x)]


X = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


def model_in_use() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model in the middle of something."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.first.weight[:2] = model.first.bias[:2] = 0
        model.norm.weight[:2] = model.norm.bias[:2] = 0
    model.drop.eval()
    model.inner.bias.requires_grad_(False)
    model.last.register_forward_hook(ignore)
    return model, optimizer


def masked() -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = model_in_use()
    masking.put(model, KEEP)
    return model, optimizer


def smaller() -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = model_in_use()
    PLAN["plan"].apply(model)
    return model, optimizer


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(self.norm(x)).relu()


def blocks() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*[Residual() for _ in range(3)]), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    return model, optimizer


class Branched(nn.Module):
    """Two branches, each with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.mixer, self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.down(self.up(self.norm2(x)).relu())


class Mixture(nn.Module):
    """Two of four experts a row."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x):
        gates, chosen = self.router(x).softmax(-1).topk(2)
        made = x
        for place, expert in enumerate(self.experts):
            made = made + (gates * (chosen == place)).sum(-1, keepdim=True) * expert(x)
        return self.last(made)


def branched() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    return stepped(nn.Sequential(Branched(), Branched()))


def mixture() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    return stepped(Mixture())


def stepped(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    return model, optimizer


def with_tokenizer() -> tuple[Any, ...]:
    """A model over words, with the tokenizer that is changed along with it."""
    torch.manual_seed(0)
    tokenizers = pytest.importorskip("tokenizers")
    ids = {word: place for place, word in enumerate(["[UNK]", "a", "b", "c", "##b", "ab", "abc", "##c"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    return model, optimizer, tokenizer


def pruned_gradually(steps: int, *, kind: str = "weights", **options: Any) -> Callable[[], tuple[Any, ...]]:
    """A model in the middle of being pruned gradually, with its optimizer and the pruner."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer, GradualPruner]:
        model, optimizer = model_in_use()
        if kind == "neurons":
            options.update(example_inputs=X, optimizer=optimizer)
        pruner = GradualPruner(model, kind=kind, final=0.5, end=4, **options)
        for _ in range(steps):
            pruner.step()
        return model, optimizer, pruner

    return make


PLAN: dict[str, Plan] = {}
KEEP = {"first.weight": torch.eye(8, 4, dtype=torch.bool), "last.weight": torch.eye(3, 8, dtype=torch.bool)}
# Called with plain arguments: behind ``**options`` an interruption comes between the return and what is done with it.
CALLS: dict[str, Callable[..., Any]] = {
    "find_axes": lambda model, _: find_axes(model, X),
    "plan_neurons": lambda model, _: plan_neurons(model, X, 0.5, progress=False),
    "prune_neurons": lambda model, optimizer: prune_neurons(model, X, 0.5, optimizer=optimizer, progress=False),
    "prune_neurons by magnitude": lambda model, _: prune_neurons(model, X, 0.5, importance="magnitude", progress=False),
    "prune_neurons by masks": lambda model, _: prune_neurons(model, X, 0.5, mode="mask", progress=False),
    "apply": lambda model, optimizer: PLAN["plan"].apply(model, optimizer) or True,
    "shrink": lambda model, optimizer: shrink(model, X, optimizer),
    "prune_weights": lambda model, _: prune_weights(model, 0.5, progress=False),
    "prune_weights wanda": lambda model, _: prune_weights(model, 0.5, importance="wanda", data=[X], progress=False),
    "prune_weights sparsegpt": lambda model, _: prune_weights(
        model, 0.5, importance="sparsegpt", data=[X], progress=False
    ),
    "scores": lambda model, _: importance.scores(model, [X], "saliency"),
    "count_macs": lambda model, _: measure.count_macs(model, X),
    "distill": lambda model, _: distill(model, TEACHER, [X, X], epochs=3, validation=[X], progress=False),
    "put": lambda model, _: masking.put(model, KEEP) or True,
    "bake": lambda model, _: masking.bake(model),
    "strip": lambda model, _: masking.strip(model),
    "finish": lambda model, _: netopt.finish(model),
    "rewind": lambda model, _: netopt.rewind(model, REWOUND) or True,
    "sensitivity": lambda model, _: netopt.sensitivity(model, X, measured, progress=False),
    "prune_neurons and repair": lambda model, optimizer: prune_neurons(
        model, X, 0.5, optimizer=optimizer, data=[X, -X], progress=False
    ),
    "repair": lambda model, _: netopt.repair(model, PLAN["plan"], DENSE, [X, -X], progress=False),
    "prune_blocks": lambda model, optimizer: netopt.prune_blocks(model, X, 1, optimizer=optimizer, progress=False),
    "prune_blocks branches": lambda model, optimizer: netopt.prune_blocks(
        model, X, 1, kind="branches", optimizer=optimizer, progress=False
    ),
    "prune_experts": lambda model, optimizer: netopt.prune_experts(model, X, 1, optimizer=optimizer, progress=False),
    "prune_vocabulary": lambda model, optimizer, tokenizer: netopt.prune_vocabulary(
        model, tokenizer, ["ab b a"], optimizer=optimizer, progress=False
    ),
    "step of weights": lambda model, optimizer, pruner: pruner.step(),
    "step with regrowth": lambda model, optimizer, pruner: pruner.step(),
    "step of masked neurons": lambda model, optimizer, pruner: pruner.step(),
    "step of removed neurons": lambda model, optimizer, pruner: pruner.step(),
    "last step of neurons": lambda model, optimizer, pruner: pruner.step(),
    "state of weights": lambda model, optimizer, pruner: pruner.load_state_dict(STATES["weights"]) or True,
    "state of neurons": lambda model, optimizer, pruner: pruner.load_state_dict(STATES["neurons"]) or True,
}
torch.manual_seed(3)
TEACHER = Net()
DENSE = model_in_use()[0]
REWOUND = {name: one + 1 for name, one in DENSE.state_dict().items()}
STATES = {kind: pruned_gradually(4, kind=kind)()[2].state_dict() for kind in ("weights", "neurons")}
PLAN["plan"] = plan_neurons(DENSE, X, 0.5, progress=False)
MAKE: dict[str, Callable[[], tuple[Any, ...]]] = {
    **dict.fromkeys(("bake", "strip", "finish", "rewind"), masked),
    "repair": smaller,
    "prune_blocks": blocks,
    "prune_blocks branches": branched,
    "prune_experts": mixture,
    "prune_vocabulary": with_tokenizer,
    "step of weights": pruned_gradually(2),
    "step with regrowth": pruned_gradually(2, regrow=True),
    "step of masked neurons": pruned_gradually(2, kind="neurons"),
    "step of removed neurons": pruned_gradually(2, kind="neurons", physical=True),
    "last step of neurons": pruned_gradually(3, kind="neurons"),
    "state of weights": pruned_gradually(0),
    "state of neurons": pruned_gradually(0, kind="neurons"),
}


def measured(model: nn.Module) -> float:
    return float(model(X).sum())


def state_of_all(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Any = None) -> Any:
    """The state of what a call is given, apart from the model's; a pruner's, or a tokenizer's."""
    if pruner is None:
        return state_of_optimizer(optimizer)
    if not isinstance(pruner, GradualPruner):
        return state_of_optimizer(optimizer), pruner.to_str()
    plan = None if pruner.plan is None else pruner.plan.to_dict()
    return state_of_optimizer(optimizer), pruner.steps, [*pruner.history], pruner._total, str(plan)


def process_state() -> dict[str, Any]:
    """What belongs to the process or the thread, and not to the models handed in."""
    backends = torch.backends
    return {
        **random_state(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "stacks": (len(_get_current_dispatch_mode_stack()), _get_current_function_mode_stack()),
        "levels": (
            maybe_current_level(),
            torch._C._vmapmode_increment_nesting(),
            torch._C._vmapmode_decrement_nesting(),
        ),
        "kernels": (
            backends.mha.get_fastpath_enabled(),
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.mkldnn.enabled,
            backends.cudnn.enabled,
        ),
        "math": dict(vars(math)),
        "module": dict(vars(nn.Module)),
        "functional": dict(vars(torch.nn.functional)),
        "code": [one.__code__ for one in vars(Net).values() if hasattr(one, "__code__")],
        "warnings": list(warnings.filters),
        "gc": gc.isenabled(),
        "handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "threads": threading.active_count(),
        "files": sorted(path.name for path in Path(tempfile.gettempdir()).glob("*netopt*")),
    }


def weights_left_out(state: dict[str, Any]) -> dict[str, Any]:
    """A trained student has other weights and buffers, and may keep longer tables."""
    return {key: one for key, one in state.items() if not key.endswith(("[bits]", "[plain]"))}


def interrupted(name: str, sender: Sender, tries: int, twice: bool) -> dict[str, int]:
    """Interrupts a call at random moments; counts what came of it."""
    call, rng = CALLS[name], random.Random(f"{name} {twice}")
    pristine = MAKE.get(name, model_in_use)()
    held = copy.deepcopy(pristine)
    begin = time.perf_counter()
    call(*held)
    lasts = time.perf_counter() - begin
    done, after_all = values(held[0]), state_of_all(*held)[1:] if len(held) > 2 else ()
    counts = {"raised": 0, "returned": 0}
    held = copy.deepcopy(pristine)
    for _ in range(tries):
        torch.manual_seed(7)
        before = state_of(held[0]), state_of_all(*held), state_of(TEACHER), process_state()
        pauses = [rng.uniform(0, 1.1 * lasts), *([rng.uniform(0, TWICE)] if twice else [])]
        found = sender.attempt(bound(call, held), pauses)
        after = state_of(held[0]), state_of_all(*held), state_of(TEACHER), process_state()
        assert after[2] == before[2], "the teacher has changed"
        changed = [key for key, one in before[3].items() if after[3][key] != one]
        assert not changed, f"of the process have changed {changed}"
        if found is None:
            counts["raised"] += 1
            differing = [key for key in before[0] | after[0] if before[0].get(key) != after[0].get(key)]
            assert not differing, f"the call raised, and the model has changed: {differing[:5]}"
            assert after[1] == before[1], "the call raised, and the optimizer, the pruner or the tokenizer has changed"
            continue
        counts["returned"] += 1
        if name == "distill":
            assert weights_left_out(after[0]) == weights_left_out(before[0])
        else:
            assert values(held[0]).keys() == done.keys()
            assert all(torch.equal(one, done[key]) for key, one in values(held[0]).items())
            assert not after_all or after[1][1:] == after_all
        held = copy.deepcopy(pristine)
    assert call(*copy.deepcopy(pristine)) is not None  # nothing is left that the next call stumbles over
    return counts


def bound(call: Callable[..., Any], held: tuple[Any, ...]) -> Callable[[], Any]:
    """The call with its arguments, written out: behind ``*held`` an interruption comes before what it returned."""
    if len(held) == 2:
        model, optimizer = held
        return lambda: call(model, optimizer)
    model, optimizer, pruner = held
    return lambda: call(model, optimizer, pruner)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach() for name, one in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c_at_any_moment(name, twice, sender):
    counts = interrupted(name, sender, -(-TRIES // (2 * len(CALLS))), twice)
    assert sum(counts.values()) > 0


@pytest.mark.parametrize("where", ["__enter__", "__exit__"])
@pytest.mark.parametrize("event", ["call", "line"])
def test_an_interruption_in_inference_mode_leaves_gradients_on(where, event):
    """Whose guard gives the mode back that there was when it is forgotten, with the error."""
    code = getattr(torch.inference_mode, where).__code__

    def interrupt(frame, what, _):
        if frame.f_code is code and what == event:
            sys.settrace(None)
            raise KeyboardInterrupt
        return interrupt

    def work(_: UndoLog) -> None:
        with torch.no_grad():
            sys.settrace(interrupt)
            with torch.inference_mode(False):
                pass

    before = sys.gettrace()
    try:
        UndoLog().run(work)
    except KeyboardInterrupt:
        sys.settrace(before)
    gc.collect()
    assert torch.is_grad_enabled()
