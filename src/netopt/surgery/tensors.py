"""How a tensor becomes smaller and stays the same tensor.

A narrowed copy is built beside the original, and the two exchange their contents: every Python reference to the
original (ties, optimizers, lists of flat weights, users' variables) then sees the small one, and exchanging again is
the undo.
"""

from __future__ import annotations

import ast
import functools
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.hooks import RemovableHandle

from netopt.errors import PlanMismatchError, SurgeryError
from netopt.model.attributes import COMMON
from netopt.model.signals import entered
from netopt.model.view import ModelView

Cuts = Mapping[int, Tensor]
"""Kept indices of each narrowed dimension of one tensor, ascending."""

_STEP = re.compile(r"\.?([^.\[\]]+)|\[([^\]]+)\]")

# Where torch keeps the tensor behind ``weight`` once a mask (torch.nn.utils.prune, spectral_norm: ``weight_orig``) or
# a weight norm (``weight_v``) computes it; ``weight`` is then a plain attribute of the same shape.
STORED = ("_orig", "_v")

_LARGE, _BLOCK = 1 << 22, 1 << 18
"""Entries of tensors that are copied some rows at a time, and entries copied at a time."""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of ``model`` by dotted name; a tied tensor appears under each of its names."""
    return ModelView(model).tensors


def step_into(holder: Any, step: Any) -> Any:
    """One step of a path: a member of a module, an item of a container, or an attribute of a configuration.

    A path may come from a file: no step leads to what Python keeps about objects, nor through a class, a function, a
    module of Python or a tensor.

    Raises:
        KeyError, IndexError, AttributeError, StopIteration: There is no such member, item or attribute.
    """
    if not may_step(holder, step):
        raise AttributeError(f"{step!r} of {type(holder).__name__} is nothing that a plan may name")
    if isinstance(holder, nn.Module) and not isinstance(holder, torch.jit.ScriptModule):
        for members in (holder._parameters, holder._buffers, holder._modules):
            if members.get(step) is not None:
                return members[step]
    if isinstance(holder, Mapping):
        return holder[step if step in holder else next(key for key in holder if str(key) == step)]
    if isinstance(holder, (list, tuple)) and isinstance(step, int):
        return holder[step]
    if isinstance(holder, (list, tuple, nn.ModuleList, nn.Sequential)) and str(step).isdigit():
        return holder[int(step)]
    return getattr(holder, str(step))


def may_step(holder: Any, step: Any) -> bool:
    """Whether a path may lead on from ``holder`` by ``step``."""
    if isinstance(step, str) and step.startswith("__"):
        return False
    if isinstance(holder, (type, types.ModuleType, Tensor)):
        return False
    if isinstance(holder, nn.Module) and isinstance(step, str) and step in COMMON:
        return False  # the tables and flags that every module has are no sizes
    return isinstance(holder, (nn.Module, functools.partial)) or not callable(holder)


def steps(name: str) -> Iterator[str | int]:
    """The steps of a dotted name with items: ``"attn.cache['k'][0]"`` is attn, cache, k, 0."""
    for dotted, item in _STEP.findall(name):
        yield dotted or ast.literal_eval(item)


def find_tensor(model: nn.Module, name: str) -> Tensor | None:
    """The tensor of ``model`` called ``name``: a parameter, a buffer, or a tensor at an attribute path; else None."""
    holder: Any = model
    try:
        for step in steps(name):
            holder = step_into(holder, step)
    except (KeyError, IndexError, AttributeError, StopIteration, ValueError, SyntaxError, TypeError):
        return None
    return holder if isinstance(holder, Tensor) else None


def locate(model: nn.Module, name: str, named: Mapping[str, Tensor]) -> tuple[str, Tensor] | None:
    """The stored tensor behind ``name`` and its own name, looking through masks that are on or were on.

    ``"conv.weight"`` finds ``"conv.weight_orig"`` where a mask is on, and the other way round where it is not.
    ``None`` stands for the mask of a tensor that has none now.

    Args:
        model: To be looked through.
        name: Of a tensor, as the model may have been when the plan was made.
        named: Its parameters and buffers; see :func:`named_tensors`.

    Raises:
        PlanMismatchError: The model has no such tensor.
    """
    if name in named and not name.endswith(("_orig", "_mask")):
        return name, named[name]  # what has a mask is no parameter and no buffer
    owner_name, _, leaf = name.rpartition(".")
    prefix = f"{owner_name}." if owner_name else ""
    direct = find_tensor(model, name)
    if isinstance(direct, nn.Parameter) or (direct is not None and find_tensor(model, f"{name}_orig") is None):
        return name, direct
    for stored in STORED:
        behind = find_tensor(model, f"{name}{stored}")
        if isinstance(behind, nn.Parameter):
            return f"{name}{stored}", behind
    if leaf.endswith("_orig") and (bare := find_tensor(model, prefix + leaf.removesuffix("_orig"))) is not None:
        return prefix + leaf.removesuffix("_orig"), bare
    if leaf.endswith("_mask") and find_tensor(model, prefix + leaf.removesuffix("_mask")) is not None:
        return None
    raise PlanMismatchError(f"the plan cuts `{name}`, and this {type(model).__name__} has no tensor of that name")


def companions(model: nn.Module, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What torch keeps beside a computed tensor and must keep its shape: the mask, and the attribute last computed."""
    for stored in STORED:
        if not name.endswith(stored):
            continue
        base = name.removesuffix(stored)
        for beside in (base, f"{base}_mask"):
            found = find_tensor(model, beside)
            if found is not None and found is not tensor and found.shape == tensor.shape:
                yield beside, found


def narrow(tensor: Tensor, cuts: Cuts) -> Tensor:
    """A detached copy of ``tensor`` with only the kept indices of each cut dimension, its memory laid out alike."""
    whole = tensor.detach()
    if not cuts:
        kept = whole.clone()
    elif len(cuts) > 1 and 0 in cuts and whole.numel() > _LARGE and whole.is_cpu and type(whole) is Tensor:
        kept = _by_rows(whole, cuts)
    else:
        kept = _selected(whole, cuts)
    return kept if whole.is_contiguous() else like_layout(kept, whole)


def _selected(tensor: Tensor, cuts: Cuts) -> Tensor:
    shape = tensor.shape
    # The dimension that loses most goes first, so that the copies in between are small.
    order = cuts if len(cuts) < 2 else sorted(cuts, key=lambda dim: cuts[dim].shape[0] / max(shape[dim], 1))
    here = tensor.is_cpu and type(tensor) is Tensor
    for dim in order:
        tensor = tensor.index_select(dim, cuts[dim] if here else _beside(cuts[dim], tensor))
    return tensor


def _by_rows(tensor: Tensor, cuts: Cuts) -> Tensor:
    """A large tensor some rows at a time: memory for the copies in between would be new, and new memory is slow."""
    kept = tensor.new_empty([cuts[dim].shape[0] if dim in cuts else size for dim, size in enumerate(tensor.shape)])
    step = max(1, _BLOCK * tensor.shape[0] // tensor.numel())
    for start in range(0, kept.shape[0], step):
        rows = slice(start, start + step)
        kept[rows] = _selected(tensor, {**cuts, 0: cuts[0][rows]})
    return kept


def _beside(indices: Tensor, tensor: Tensor) -> Tensor:
    """``indices`` where ``tensor`` is; a fake tensor wants fake indices."""
    if isinstance(tensor, FakeTensor):
        return tensor.fake_mode.from_tensor(indices).to(tensor.device)
    return indices if tensor.device == indices.device else indices.to(tensor.device)


def like_layout(tensor: Tensor, original: Tensor) -> Tensor:
    """``tensor`` with its dimensions in memory in the order of ``original`` (channels_last stays channels_last)."""
    if original.is_contiguous() or tensor.layout is not torch.strided or 0 in original.stride():
        return tensor
    order = sorted(range(original.dim()), key=lambda dim: (-original.stride(dim), dim))
    back = [order.index(dim) for dim in range(len(order))]
    return tensor.permute(order).contiguous().permute(back)


def successor(tensor: Tensor, cuts: Cuts, alias: Tensor | None = None) -> Tensor:
    """What ``tensor`` will hold: narrowed, with its gradient narrowed, its flag and its hooks.

    Args:
        tensor: A parameter, a buffer, or any tensor a module holds.
        cuts: Kept indices of each narrowed dimension.
        alias: Already narrowed values to share memory with, for tensors that share memory now.
    """
    new = narrow(tensor, cuts) if alias is None else alias.detach()
    if not tensor.is_leaf:
        return new
    if tensor.requires_grad:
        new.requires_grad_(True)
    if tensor.grad is not None:
        new.grad = narrow(tensor.grad, cuts)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        registered = getattr(tensor, hooks, None)
        if registered:
            setattr(new, hooks, registered)
    return new


def exchange(first: Tensor, second: Tensor) -> None:
    """Gives each tensor the contents of the other; the Python objects stay where they are.

    ``torch.utils.swap_tensors`` does the same behind two checks that would refuse ordinary models: it allows no weak
    reference (every ``nn.LSTM`` keeps some to its weights), and it poisons the gradient accumulator of a graph that is
    still alive (a ``loss`` left over from training), which an undo could not take back. See :func:`retire`.
    """
    try:
        torch._C._swap_tensor_impl(first, second)  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError as error:
        raise SurgeryError(
            f"a tensor of shape {tuple(first.shape)} cannot be exchanged because something outside Python refers to it "
            f"weakly (a captured graph?); prune before compiling or capturing the model"
        ) from error


class Swap:
    """One tensor gets new contents; doing and undoing may be interrupted anywhere and be called again."""

    def __init__(self, tensor: Tensor, new: Tensor) -> None:
        self.tensor = tensor
        self.new = new
        self._before = tensor._cdata

    def do(self) -> None:
        """Puts the new contents in."""
        if self.tensor._cdata == self._before:
            exchange(self.tensor, self.new)

    def undo(self) -> None:
        """Puts the old contents back, if they are out."""
        if self.tensor._cdata != self._before:
            exchange(self.tensor, self.new)


def _refuse_gradient(_: tuple[Tensor, ...]) -> None:
    raise RuntimeError(
        "this graph was recorded before neurons were removed, and its gradients no longer fit the parameters; "
        "run the forward pass again"
    )


def retire(old: Tensor) -> RemovableHandle | None:
    """Makes a backward pass through a graph older than the surgery fail instead of filling a tensor nobody sees.

    Returns:
        What takes that back, where there is such a graph.
    """
    held = old._use_count()  # pyright: ignore[reportAttributeAccessIssue]
    if not (held > 1 and old.is_leaf and old.requires_grad):
        return None
    with entered(torch.inference_mode(False)):
        node = torch.autograd.graph.get_gradient_edge(old).node
    return node.register_prehook(_refuse_gradient)  # pyright: ignore[reportArgumentType]
