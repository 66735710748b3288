"""The product of a weight and its mask, which writes to it write through to the weight.

Code that knows nothing of masks reads ``module.weight`` and writes to what it got: an initialisation, a clipped norm,
a merged adapter. What it gets is a tensor whose operations are watched (``__torch_function__``): after one that
changed its memory, the entries that are kept are copied to the weight below, and those that are masked are zero again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from netopt.errors import MaskError
from netopt.masking.guarded import Computed, guarded_product
from netopt.model.dispatch import ThreadDispatchMode
from netopt.model.parameters import effective
from netopt.model.restore import version_of
from netopt.model.writes import WriteWatch

__all__ = ["MaskedWeight", "product"]

PRODUCTS = "_netopt_products"
SAMPLE = 16
READERS = frozenset(
    [F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]
)
"""What layers do with a weight; it writes nothing and returns memory of its own, so that nothing has to be watched."""


@dataclass(eq=False, slots=True)
class _Source:
    """What a product was computed from.

    Attributes:
        weight: The weight below the mask.
        mask: The mask.
        plain: The product, as a tensor that nothing watches.
        state: What tells that neither weight nor mask has been changed since.
    """

    weight: Tensor
    mask: Tensor
    plain: Tensor
    state: tuple[Any, ...]

    def write(self) -> None:
        """Copies the kept entries of the product to the weight, and makes the others zero again.

        Raises:
            MaskError: The product no longer has the weight's form, or the weight has changed since it was read.
        """
        weight, plain = self.weight, self.plain
        state, self.state = self.state, ()  # if it is refused, what was written is no product any more
        if (plain.shape, plain.dtype, plain.device) != (weight.shape, weight.dtype, weight.device):
            raise MaskError(
                f"a masked weight of {tuple(weight.shape)}, {weight.dtype}, cannot become one of {tuple(plain.shape)}, "
                f"{plain.dtype}; take the mask off first, masking.bake(model) or masking.strip(model)."
            )
        if state != _state(weight, self.mask):
            raise MaskError(
                "a masked weight was changed after this tensor was read from its module, so writing here would undo "
                "that; read module.weight again, and write to what it gives."
            )
        keep = self.mask.bool()
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            weight.copy_(torch.where(keep, plain.detach(), weight.detach()))
            plain.detach().masked_fill_(~keep, 0)
        self.state = _state(weight, self.mask)


class MaskedWeight(Computed, Tensor):  # type: ignore[override]
    """A product of weight and mask, or a view of one; a write to it reaches the weight, below the mask."""

    _plain: Tensor
    _source: _Source
    _guard: Any

    @classmethod
    def of(cls, plain: Tensor, source: _Source) -> MaskedWeight:
        """Watches ``plain``, which shares its memory with the product of ``source``."""
        watched = plain.as_subclass(cls)
        watched._plain, watched._source = plain, source
        # Torch exchanges no tensor that has a weak reference: to exchange a product would change nothing below it.
        watched._guard = weakref.ref(watched)
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs ``func`` on the product itself, and writes through what it wrote there."""
        del types
        if torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in READERS and not kwargs:
            return func(*[one._plain if type(one) is MaskedWeight else one for one in args])
        found: list[MaskedWeight] = []
        arguments = _unwrapped(args, found)
        named = _unwrapped(kwargs, found) if kwargs else {}
        if func.__name__ == "__set__":
            return found[0]._set(func, arguments[1])
        if func.__name__ == "__get__" and getattr(func, "__self__", None) is Tensor.grad:
            return found[0]._source.weight.grad
        before = [(one._plain._version, one._source.plain.grad_fn) for one in found]
        out = func(*arguments, **named)
        for one, (version, graph) in zip(found, before, strict=True):
            if one._plain._version != version:
                _check_not_recorded(one._source.plain, graph)
                one._source.write()
        return _wrapped(out, found)

    def _set(self, func: Callable[..., Any], value: Any) -> None:
        """An attribute gets a new value, the values themselves (``.data``) among others."""
        attribute = getattr(func, "__self__", None)
        if attribute is Tensor.requires_grad or attribute is Tensor.grad:
            func(self._source.weight, value)
            return
        plain = self._plain
        if attribute is not Tensor.data or not isinstance(value, Tensor):
            func(plain, value)
            return
        if (value.shape, value.dtype, value.device) != (plain.shape, plain.dtype, plain.device):
            raise MaskError(
                f"the data of a masked weight of {tuple(plain.shape)}, {plain.dtype}, cannot become "
                f"{tuple(value.shape)}, {value.dtype}; masking.bake(model) or masking.strip(model) first."
            )
        with torch.no_grad():
            plain.detach().copy_(value)
        self._source.write()


def _check_not_recorded(plain: Tensor, graph: Any) -> None:
    if plain.grad_fn is not graph:
        raise MaskError(
            "a masked weight is written to in an operation that autograd records; as for any parameter, write to it "
            "under torch.no_grad() or through .data."
        )


def _unwrapped(value: Any, found: list[MaskedWeight]) -> Any:
    """The arguments with products that nothing watches; those watched are added to ``found``."""
    kind = type(value)
    if kind is MaskedWeight:
        found.append(value)
        return value._plain
    if kind is tuple or kind is list:
        return kind(_unwrapped(one, found) for one in value)
    return {key: _unwrapped(one, found) for key, one in value.items()} if kind is dict else value


def _wrapped(out: Any, found: list[MaskedWeight]) -> Any:
    """A result; what shares memory with a product is watched in its turn."""
    if isinstance(out, Tensor):
        for one in found:
            if out is one._plain:
                return one
            if type(out) is Tensor and torch._C._is_alias_of(out, one._plain):  # type: ignore[attr-defined]
                return MaskedWeight.of(out, one._source)
        return out
    if isinstance(out, (tuple, list)) and any(isinstance(one, Tensor) for one in out):
        parts = [_wrapped(one, found) for one in out]
        return type(out)(parts) if type(out) in (tuple, list) else out
    if isinstance(out, np.ndarray) and any(_lies_in(out, one._plain) for one in found):
        # Writing to the array would reach the product alone.
        out.flags.writeable = False
    return out


def _lies_in(array: np.ndarray, plain: Tensor) -> bool:
    return plain.device.type == "cpu" and array.__array_interface__["data"][0] == plain.data_ptr()


@dataclass(frozen=True)
class _Kept:
    """A product computed before.

    Attributes:
        value: The product, watched.
        seen: Some entries of the weight where they lie, or ``None`` where looking there would cost.
        sample: What they were.
    """

    value: MaskedWeight
    seen: np.ndarray | None
    sample: bytes

    def holds(self, weight: Tensor, mask: Tensor) -> bool:
        """Whether it still is the product of ``weight`` and ``mask``."""
        source = self.value._source
        if source.weight is not weight or source.mask is not mask or source.state != _state(weight, mask):
            return False
        # Writing through `.data` leaves no trace in the version. Where looking costs no synchronization, a few entries
        # are compared, which finds the exchange of a whole tensor (averaged weights swapped in, for example).
        return self.seen is None or self.seen.tobytes() == self.sample


class _Products(dict[str, _Kept]):
    """Those of one module; a copy of the module computes its own, whatever way it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Products:
        return _Products()

    def __reduce__(self) -> Any:
        return _Products, ()


def product(module: nn.Module, name: str, watched: bool = True) -> Tensor:
    """The masked tensor ``name`` of ``module``: the one computed before, while nothing changed.

    Args:
        module: One with a mask on ``name``.
        name: The tensor's unmasked name.
        watched: Whether writes to it are to be seen; whoever passes no promises to write nothing.
    """
    parameters = module._parameters
    weight = parameters.get(f"{name}_orig")
    mask = module._buffers.get(f"{name}_mask")
    if weight is None or mask is None:
        # By whatever else stands for them: a parametrization, or a plain weight where no mask is.
        if name in parameters:
            return parameters[name]  # type: ignore[return-value]
        weight, mask = getattr(module, f"{name}_orig"), getattr(module, f"{name}_mask")
    if is_traced() or (torch._C._len_torch_dispatch_stack() and not _users_modes()):
        return effective(weight, mask)
    if type(weight) is not nn.Parameter:
        return guarded_product(weight, mask)
    products = module.__dict__.setdefault(PRODUCTS, _Products())
    known = products.get(name)
    if torch.is_grad_enabled() and weight.requires_grad:
        products.pop(name, None)
        value = effective(weight, mask)
        return MaskedWeight.of(value, _Source(weight, mask, value, _state(weight, mask))) if watched else value
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        # A mode that wants to see every operation sees this one too.
        return _compute(weight, mask).value
    if known is None or not known.holds(weight, mask):
        known = _compute(weight, mask)
        if not weight.is_inference():  # whose changes nothing counts
            products[name] = known
    return known.value if watched else known.value._plain


def is_traced() -> bool:
    """Whether torch follows the operations to write them down, and no write to a weight can be meant."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _users_modes() -> bool:
    """Whether all modes that see operations are a user's, under which tensors are what they are otherwise."""
    return not any(
        (isinstance(mode, ThreadDispatchMode) and not isinstance(mode, WriteWatch))
        or getattr(mode, "_mode_key", None) is not None
        for mode in _get_current_dispatch_mode_stack()
    )


def _compute(weight: Tensor, mask: Tensor) -> _Kept:
    with torch.inference_mode(False), torch.no_grad():
        plain, seen = effective(weight, mask), _some(weight)
        value = MaskedWeight.of(plain, _Source(weight, mask, plain, _state(weight, mask)))
    return _Kept(value, seen, b"" if seen is None else seen.tobytes())


def _state(weight: Tensor, mask: Tensor) -> tuple[Any, ...]:
    return version_of(weight), version_of(mask), weight.data_ptr(), weight.dtype, weight.device


def _some(weight: Tensor) -> np.ndarray | None:
    """Returns a few entries of ``weight`` where they lie in memory, evenly apart."""
    if weight.device.type != "cpu" or not weight.is_contiguous() or weight.numel() == 0:
        return None
    flat = weight.detach().view(-1).view(torch.uint8).view(-1, weight.element_size())
    return flat[:: max(len(flat) // SAMPLE, 1)].numpy()
