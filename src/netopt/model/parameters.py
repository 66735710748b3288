"""Every parameter under the name it had before a mask was put on it.

``torch.nn.utils.prune`` renames ``weight`` to ``weight_orig``. Here a parameter keeps one name, the first it has in
the unmasked model, whatever else holds it too; and a weight is seen as a matrix of one row an output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from netopt.model.signals import entered
from netopt.model.view import ModelView

__all__ = ["Orientation", "Place", "count_nonzero", "effective", "places"]

CHUNK = 1 << 16
_SMALL = 1 << 12
_HALVES = (torch.float16, torch.bfloat16)
_PLAIN = frozenset([*_HALVES, torch.float32, torch.float64])

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Orientation:
    """How a weight reads as a matrix: one row an output, its inputs along the row.

    A convolution's row runs over the kernel and, innermost, over the input channels: the order in which hardware that
    skips zeros reads it, and in which the members of an n:m group are neighbours.

    Attributes:
        inputs: The dimension of the inputs, or ``None`` where the weight is read as it lies, last dimension along rows.
        groups: Groups of a transposed convolution, whose first dimension lists the inputs of every group.
    """

    inputs: int | None = None
    groups: int = 1

    def rows(self, tensor: Tensor) -> Tensor:
        """Returns ``tensor`` as ``(rows, columns)``; a view where memory allows.

        Example:
            >>> import torch
            >>> Orientation(inputs=1).rows(torch.zeros(8, 3, 5, 5)).shape
            torch.Size([8, 75])
        """
        if tensor.dim() < 2:
            return tensor.reshape(1, -1)
        if self.inputs is None:
            return tensor.flatten(0, -2)
        if self.inputs == 1:
            return tensor.movedim(1, -1).flatten(1)
        return tensor.unflatten(0, (self.groups, -1)).movedim(1, -1).flatten(0, 1).flatten(1)

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """Returns what :meth:`rows` made of a tensor of the shape of ``like``, in that shape again."""
        shape = like.shape
        if like.dim() < 2 or self.inputs is None:
            return rows.reshape(shape)
        if self.inputs == 1:
            return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        split = rows.reshape(self.groups, shape[1], *shape[2:], shape[0] // self.groups)
        return split.movedim(-1, 1).reshape(shape)


@dataclass(frozen=True, eq=False)
class Place:
    """One parameter: its name, where it hangs, and its mask if it has one.

    Attributes:
        name: The dotted name in the unmasked model; the first one, of a parameter that several modules hold.
        parameter: The parameter itself, under a mask the unmasked values.
        mask: ``True`` where an entry is kept, or ``None``.
        names: Every dotted name it has in the unmasked model.
        owners: The modules that hold it, each with the attribute's unmasked name.
    """

    name: str
    parameter: nn.Parameter
    mask: Tensor | None
    names: list[str] = field(default_factory=list)
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)
    computed: Computed | None = None
    """What is computed from it, where a layer does not hold it itself: a normalised weight, for example."""

    @property
    def weight(self) -> Tensor:
        """The values below the mask, detached, as the layer computes with them: normalised, under a weight norm."""
        if self.prunable and self.computed is not None:
            return self.computed.value(self.parameter)
        return self.parameter.detach()

    @property
    def value(self) -> Tensor:
        """The values the model computes with, detached: zero where masked."""
        return self.weight if self.mask is None else effective(self.weight, self.mask)

    @property
    def nonzero(self) -> int:
        """The number of entries the model computes with that are not zero."""
        return count_nonzero(self.parameter.detach(), self.mask)

    @property
    def layer(self) -> nn.Module:
        """The module that computes with it; the first, of a parameter that several hold."""
        return self.owners[0][0] if self.computed is None else self.computed.layer

    @property
    def orientation(self) -> Orientation:
        """How the parameter reads as a matrix, by the kind of module that computes with it."""
        module = self.layer
        if isinstance(module, _ConvTransposeNd):
            return Orientation(inputs=0, groups=module.groups)
        if _is_conv1d_of_transformers(module):
            return Orientation(inputs=0)
        return Orientation(inputs=1 if isinstance(module, _ConvNd) else None)

    @cached_property
    def prunable(self) -> bool:
        """Whether it is a weight that is pruned by default.

        That is the weight of a linear, convolutional, recurrent or attention layer, also behind a weight norm; or
        several matrices in one, as of fused experts: of three dimensions or more, none of them one.
        """
        if self.unsupported is not None or any(isinstance(module, (*EMBEDDINGS, *NORMS)) for module, _ in self.owners):
            return False
        if self.computed is not None:
            return _is_layer_weight(self.computed.layer, self.computed.attribute) and (
                self.mask is not None or self.computed.keeps_zeros(self.parameter)
            )
        return any(
            _is_layer_weight(module, name) or _is_batched(module, self.parameter) for module, name in self.owners
        )

    @property
    def unsupported(self) -> str | None:
        """Why its entries cannot be masked, or ``None``."""
        parameter = self.parameter
        if nn.parameter.is_lazy(parameter):
            return "has no values yet"
        if parameter.is_nested or parameter.layout is not torch.strided:
            return f"is no dense tensor ({'nested' if parameter.is_nested else parameter.layout})"
        if parameter.dtype not in _PLAIN:
            return f"is of {parameter.dtype}"
        return None


@dataclass(frozen=True)
class Computed:
    """A layer's weight that is computed from a parameter: parametrized, or by a hook.

    Attributes:
        layer: The layer.
        attribute: The name of its weight.
        holder: The module that holds the parameter.
        stored: The parameter's name there, without a mask.
        length: What the norm of each part is set to, of a weight norm; of size 1 where the norm is taken.
    """

    layer: nn.Module
    attribute: str
    holder: nn.Module
    stored: str
    length: Tensor | None = None

    def best(self, scores: Tensor) -> Tensor:
        """Where the highest score of each part lies whose norm is taken: without any entry it would have none."""
        if self.length is None:
            return torch.zeros_like(scores, dtype=torch.bool)
        return scores == scores.amax(self._normed(scores), keepdim=True)

    def is_lost(self, mask: Tensor) -> bool:
        """Whether a mask leaves a part whose norm is taken without any entry."""
        return self.length is not None and not bool(mask.float().amax(self._normed(mask), keepdim=True).all())

    def _normed(self, like: Tensor) -> tuple[int, ...]:
        sizes = self.length.shape if self.length is not None and self.length.dim() == like.dim() else (1,) * like.dim()
        return tuple(dim for dim, size in enumerate(sizes) if size == 1)

    def value(self, parameter: Tensor) -> Tensor:
        """The weight computed from ``parameter``, detached; nothing of the layer changes."""
        with entered(torch.no_grad()):
            if self.holder is self.layer:
                return self._by_hook(parameter)
            # On copies: in training, a spectral norm goes on with its estimate.
            held = {name: one.detach().clone() for name, one in _named_tensors(self.holder)}
            held = {name: one for name, one in held.items() if name.removesuffix("_orig") != self.stored}
            return torch.func.functional_call(self.holder, held | {self._key: parameter.detach().clone()}, ()).detach()

    def keeps_zeros(self, parameter: Tensor) -> bool:
        """Whether a zero of the parameter is one of the weight, at the same place; found by trying."""
        if parameter.is_meta or parameter.numel() == 0:
            return False
        # One entry of each row and column, so that nothing whose length is normalised has none.
        places = torch.meshgrid([torch.arange(size) for size in parameter.shape], indexing="ij")
        kept = (torch.stack(places).sum(0) % max(parameter.shape) != 0).to(parameter.device)
        try:
            found = self.value(parameter.detach() * kept)
        except Exception:  # a parametrization is the user's code and may raise anything
            return False
        return found.shape == parameter.shape and torch.equal(found != 0, (parameter != 0) & kept)

    @property
    def _key(self) -> str:
        return self.stored if self.stored in self.holder._parameters else f"{self.stored}_orig"

    def _by_hook(self, parameter: Tensor) -> Tensor:
        if self.stored.endswith("_v"):
            scale = self.layer._parameters[f"{self.attribute}_g"]
            hooks: list[Any] = list(self.layer._forward_pre_hooks.values())
            dim = next((hook.dim for hook in hooks if getattr(hook, "name", "") == self.attribute), 0)
            return torch._weight_norm(parameter.detach(), cast("Tensor", scale).detach(), dim)  # type: ignore[attr-defined]
        return parameter.detach()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _computed(view: ModelView, owner: str, attribute: str) -> Computed | None:
    """The weight that a layer computes from the parameter ``attribute`` of the module called ``owner``."""
    module = view.modules[owner]
    head, found, weight = owner.rpartition("parametrizations.")
    layer = view.modules.get(head.rstrip("."))
    if found and "." not in weight and layer is not None and getattr(layer, "parametrizations", None) is not None:
        # Of a weight norm the first is the length of each row, the second its direction.
        length = _stored(module, "original0") if attribute == "original1" else None
        is_length = attribute != "original1" and any(name.startswith("original1") for name in module._parameters)
        return Computed(layer, "" if is_length else weight, module, attribute, length)
    base, _, kind = attribute.rpartition("_")
    names = {name.removesuffix("_orig") for name in module._parameters} | {*module._parameters}
    if kind in ("g", "v") and {f"{base}_g", f"{base}_v"} <= names:
        length = _stored(module, f"{base}_g")
        return Computed(module, base if kind == "v" else "", module, attribute, length if kind == "v" else None)
    if kind == "orig" and f"{base}_u" in module._buffers:
        return Computed(module, base, module, attribute)
    return None


def _stored(module: nn.Module, name: str) -> Tensor | None:
    """The parameter of this name, masked or not."""
    return module._parameters.get(name, module._parameters.get(f"{name}_orig"))


def effective(weight: Tensor, mask: Tensor) -> Tensor:
    """Returns ``weight`` with zeros where ``mask`` is ``False``, in the dtype of ``weight``; differentiable."""
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined]
    if mask.dtype == torch.bool and not traced:
        # Read as bytes, which torch.jit and ONNX cannot follow, it takes a third of the time it takes with booleans.
        return weight * mask.view(torch.uint8)
    return weight * mask.to(weight.dtype)


def count_nonzero(weight: Tensor, mask: Tensor | None = None) -> int:
    """Counts the entries that are not zero, and not masked if a mask is given; exact for every dtype.

    On a CPU a large weight is read in cache-sized pieces, and no second tensor of its size is made.
    """
    if weight.is_meta:
        return 0
    if weight.is_nested:
        return sum(count_nonzero(part) for part in weight.detach().unbind())
    if weight.layout is not torch.strided or (weight.is_floating_point() and weight.dtype.itemsize == 1):
        return int(torch.count_nonzero(weight.detach().to_dense().float()))
    if mask is None and weight.numel() < _SMALL:
        return int(torch.count_nonzero(weight))
    plain = type(weight) is Tensor and weight.is_cpu and weight.is_contiguous() and weight.dtype in _PLAIN
    if not plain:
        return int(torch.count_nonzero(weight if mask is None else (weight != 0) & mask.bool()))
    is_half = weight.dtype in _HALVES
    values = weight.detach().reshape(-1)
    entries = (values.view(torch.int16) if is_half else values).numpy()
    kept_by_mask = None if mask is None else mask.reshape(-1).bool().numpy()
    flags = np.empty(min(CHUNK, len(entries)), np.bool_)
    total = 0
    for start in range(0, len(entries), CHUNK):
        part = entries[start : start + CHUNK]
        here = flags[: len(part)]
        # As integers, halves have the same zeros but for the sign bit, shifted out.
        np.not_equal(part << 1 if is_half else part, 0, out=here)
        if kept_by_mask is not None:
            np.logical_and(here, kept_by_mask[start : start + CHUNK], out=here)
        total += int(np.count_nonzero(here))
    return total


def places(model: nn.Module | ModelView) -> dict[str, Place]:
    """Lists every parameter of ``model`` once, by its unmasked name, in the order of ``named_parameters``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> list(places(model))
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    view = ModelView.of(model)
    found: dict[int, Place] = {}
    for full, parameter in view.parameters.items():
        owner, _, attribute = full.rpartition(".")
        mask, name = view.mask_of(full), full
        if mask is not None:
            name, attribute = full.removesuffix("_orig"), attribute.removesuffix("_orig")
        place = found.get(id(parameter))
        if place is None:
            computed = _computed(view, owner, attribute)
            place = found[id(parameter)] = Place(name, cast("nn.Parameter", parameter), mask, computed=computed)
        place.names.append(name)
        module = view.modules[owner]
        if not any(one is module and other == attribute for one, other in place.owners):
            place.owners.append((module, attribute))
    return {place.name: place for place in found.values()}


def _is_layer_weight(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, (nn.Linear, _ConvNd)) or _is_conv1d_of_transformers(module):
        return attribute == "weight"
    if isinstance(module, nn.MultiheadAttention):
        return attribute.endswith("proj_weight")
    return isinstance(module, RECURRENT) and attribute.startswith("weight_")


def _is_batched(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter is several matrices in one, used without a layer or by a bilinear one."""
    if parameter.dim() < 3 or min(parameter.shape) < 2:
        return False
    own = type(module).__module__.startswith("torch.")
    return not own or isinstance(module, (nn.Bilinear, nn.ParameterList, nn.ParameterDict))


def _is_conv1d_of_transformers(module: Any) -> bool:
    # By name, as transformers is not imported: its Conv1D is a linear layer that keeps its weight as (in, out).
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")
