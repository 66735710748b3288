"""A masked weight of another kind of tensor, one that is sharded for example, can be read and not written to.

What is inside such a tensor is its own affair, so that a write to the product of weight and mask could not be followed
to the weight. It is refused instead, before anything has come of it: the product is computed anew at each reading.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from netopt.errors import MaskError
from netopt.model.parameters import effective

__all__ = ["Computed", "guarded_product"]


def guarded_product(weight: Tensor, mask: Tensor) -> Tensor:
    """The product of a weight that is no plain parameter and its mask; writing to it, or to a view of it, raises."""
    with _counted(), torch.set_grad_enabled(torch.is_grad_enabled() and weight.requires_grad):
        value = effective(weight, _beside(weight, mask))
        _guard(value)
        return value


def _beside(weight: Any, mask: Tensor) -> Tensor:
    """The mask, which every process has whole, as what a sharded weight can be multiplied with."""
    if not hasattr(weight, "device_mesh"):
        return mask
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    return DTensor.from_local(mask.view(torch.uint8), mesh, [Replicate()] * mesh.ndim, run_check=False)


class Computed:
    """What is computed when it is read, and becomes no parameter."""

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, _: bool) -> None:
        raise MaskError(
            "a masked weight is computed, and a parameter made of it would share its memory; make one of a copy, "
            "nn.Parameter(module.weight.detach().clone())."
        )


class _Guarded(Computed):
    """What the class of such a product adds: whatever changed its memory, or that of a view of it, is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        if name == "__set__" or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_"):
            raise _refused()
        with torch._C.DisableTorchFunctionSubclass(), _counted():
            found = [one for one in tree_leaves((args, kwargs)) if isinstance(one, _Guarded)]
            before = [one._version for one in found]  # type: ignore[attr-defined]
            out = func(*args, **(kwargs or {}))
            if [one._version for one in found] != before:  # type: ignore[attr-defined]
                raise _refused()
            shares = name in ("detach", "__get__")  # which autograd does not call views
            for one in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(one, Tensor) and all(one is not other for other in found):
                    _guard(one, shares or one._is_view())
        return out


@contextmanager
def _counted() -> Iterator[None]:
    """Lets the versions of tensors be counted, which is not done in inference mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def _refused() -> MaskError:
    return MaskError(
        "a masked weight that is sharded, or no plain tensor for another reason, is computed when it is read, and "
        "cannot be written to; write to the weight below the mask, `module.weight_orig`, or before it is sharded."
    )


def _guard(value: Tensor, shares: bool = True) -> None:
    """Has writes to a tensor refused if it ``shares`` the product's memory; what a tensor makes of it may be alike."""
    guarded = isinstance(value, _Guarded)
    if shares and not guarded and type(value) is not Tensor:
        value.__class__ = _guarded_class(type(value))
        # Torch exchanges no tensor that has a weak reference: to exchange a product would change nothing below it.
        value._guard = weakref.ref(value)  # type: ignore[attr-defined]
    elif guarded and not shares:
        value.__class__ = type(value).__bases__[1]


@cache
def _guarded_class(kind: type[Tensor]) -> type[Tensor]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "__slots__": ()}
    return type(kind.__name__, (_Guarded, kind), names)
