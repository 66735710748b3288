"""What every test may rely on: no network, seeded randomness, and a proof that nothing was left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# The wheel of torchvision on the package index looks for CUDA kernels; with a CPU build of torch its import fails
# unless these two operators, which no model here runs, are declared first. The object must live on.
TORCHVISION_OPERATORS: list[torch.library.Library] = []


def declare_torchvision_operators() -> None:
    """Declares the operators that torchvision's import expects, unless it has been imported already."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    TORCHVISION_OPERATORS.append(library)


if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    declare_torchvision_operators()


def bits(tensor: Tensor | None) -> object:
    """Returns something equal exactly for tensors of the same dtype, shape and bits."""
    if tensor is None:
        return None
    if tensor.is_meta:
        return str(tensor.dtype), tuple(tensor.shape)
    dense = tensor.detach().cpu().contiguous()
    return str(dense.dtype), tuple(dense.shape), dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def state_of(module: nn.Module) -> dict[str, object]:
    """Everything observable of a module: values, identities, gradients, hooks and flags, by name."""
    state: dict[str, object] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        state[f"{name} [class]"] = type(part), id(part)
        state[f"{name} [training]"] = part.training
        state[f"{name} [hooks]"] = {
            kind: [(key, id(hook)) for key, hook in value.items()]
            for kind, value in vars(part).items()
            if "hooks" in kind and isinstance(value, dict)
        }
        state[f"{name} [plain]"] = {
            key: value for key, value in vars(part).items() if isinstance(value, (bool, int, float, str, tuple))
        }
        state[f"{name} [keys]"] = list(part._parameters), list(part._buffers), sorted(part._non_persistent_buffers_set)
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            path = f"{name}.{key}"
            state[f"{path} [bits]"] = bits(tensor)
            if tensor is not None:
                state[f"{path} [identity]"] = id(tensor), tensor.requires_grad
                state[f"{path} [grad]"] = (id(tensor.grad), bits(tensor.grad)) if tensor.is_leaf else None
    return state


def state_of_optimizer(optimizer: Optimizer) -> dict[str, object]:
    """Everything observable of an optimizer: groups, the parameters in them, and each one's state."""
    state: dict[str, object] = {}
    for index, group in enumerate(optimizer.param_groups):
        state[f"group {index}"] = {key: value for key, value in group.items() if key != "params"}
        state[f"group {index} [params]"] = [id(parameter) for parameter in group["params"]]
    for index, (parameter, values) in enumerate(optimizer.state.items()):
        state[f"state {index}"] = (
            id(parameter),
            {key: bits(value) if isinstance(value, Tensor) else value for key, value in values.items()},
        )
    return state


def random_state() -> dict[str, object]:
    """The state of every global random generator."""
    name, keys, *rest = np.random.get_state()
    return {"torch": bits(torch.get_rng_state()), "python": random.getstate(), "numpy": (name, keys.tobytes(), *rest)}


@contextlib.contextmanager
def unchanged(*observed: nn.Module | Optimizer | None) -> Iterator[None]:
    """Asserts that modules, optimizers and the global random state are bit for bit the same afterwards.

    The check is also made when the block is left by an exception, so that it may wrap, or be wrapped by,
    ``pytest.raises``.
    """

    def snapshot() -> list[dict[str, object]]:
        taken = [random_state()]
        for one in observed:
            if one is not None:
                taken.append(state_of(one) if isinstance(one, nn.Module) else state_of_optimizer(one))
        return taken

    before = snapshot()
    try:
        yield
    finally:
        for old, new in zip(before, snapshot(), strict=True):
            changed = [key for key in {**old, **new} if old.get(key, "absent") != new.get(key, "absent")]
            assert not changed, f"changed: {', '.join(changed)}"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Helpers of the tests have no doctests, and are imported once, by the tests that use them."""
    helper = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if helper and collection_path.is_relative_to(Path(__file__).parent) else None


@pytest.fixture(name="unchanged")
def unchanged_fixture():
    """The context manager :func:`unchanged`, for tests that would rather not import it."""
    return unchanged


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler of Ctrl-C, which a process started in the background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
