"""A masked weight is a property: the stored weight times its mask, computed when it is read.

Torch stores the product of weight and mask on the module when a hook runs. Reading it through a property of the
module's class instead leaves nothing to go stale and nothing that cannot be copied, and reaches the modules whose hook
never runs. The hook that torch looks for is there, holds no tensor, and does nothing.
"""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from netopt.errors import MaskError
from netopt.masking.guarded import guarded_product
from netopt.masking.product import PRODUCTS, is_traced, product
from netopt.masking.saving import SavesDense
from netopt.model.parameters import effective

__all__ = ["HeldMask", "dress", "save_dense", "undress"]


class HeldMask(prune.BasePruningMethod):
    """Tells ``torch.nn.utils.prune`` that a tensor is masked; the mask itself is the module's buffer."""

    # Of type "global", not "unstructured": on a second pruning torch hands an unstructured method only the surviving
    # entries, flattened, and blocks are lost.
    PRUNING_TYPE = "global"

    def __init__(self, name: str) -> None:
        self._tensor_name = name

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Does nothing: the product is computed where the weight is read."""

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Any:
        """Returns ``default_mask``: which entries are kept was decided before."""
        del t
        return default_mask

    def apply_mask(self, module: nn.Module) -> Tensor:
        """Returns the masked tensor of ``module``."""
        return effective(getattr(module, f"{self._tensor_name}_orig"), getattr(module, f"{self._tensor_name}_mask"))

    def remove(self, module: nn.Module) -> None:
        """Makes the mask permanent, as ``torch.nn.utils.prune.remove`` asks for; the order of parameters is kept."""
        orig = getattr(module, f"{self._tensor_name}_orig")
        with torch.no_grad():
            orig.masked_fill_(~getattr(module, f"{self._tensor_name}_mask").bool(), 0)
        # Torch drops the hook itself, after this call.
        undress(module, self._tensor_name, hooks=False)


class MaskedModule:
    """What the class of a module with masked tensors adds: copies, moves and checkpoints that know of the masks."""

    _netopt_base: type
    _netopt_names: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        make, arguments, *rest = reduced
        state = rest.pop(0) if rest else None
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != PRODUCTS}
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self._netopt_base, *arguments[1:])
        return (_rebuild, (make, arguments, self._netopt_names), state, *rest)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.__dict__.pop(PRODUCTS, None)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":
            _warn_of_quantization()
        stored = f"{name}_orig"
        if name in self._netopt_names and isinstance(value, nn.Parameter) and stored in self.__dict__["_parameters"]:
            _replace(self, name, value)  # type: ignore[arg-type]
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self._netopt_names:
            # A dense checkpoint: its values go below the mask, and the mask stays.
            masked = f"{name}_mask" in self._buffers  # type: ignore[attr-defined]
            if masked and prefix + name in state_dict and f"{prefix}{name}_orig" not in state_dict:
                state_dict[f"{prefix}{name}_orig"] = state_dict.pop(prefix + name)
                state_dict[f"{prefix}{name}_mask"] = getattr(self, f"{name}_mask")
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


def _replace(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Puts another parameter below the mask."""
    mask = module._buffers[f"{name}_mask"]
    if mask is not None and mask.shape != value.shape:
        raise MaskError(
            f"{name!r} has a mask of {tuple(mask.shape)} and cannot become a parameter of {tuple(value.shape)}; "
            "take the mask off first, masking.bake(model) or masking.strip(model)."
        )
    module._parameters[f"{name}_orig"] = value
    module.__dict__.pop(PRODUCTS, None)


def _warn_of_quantization() -> None:
    # The same words for every module, so that Python shows them once.
    warnings.warn(
        "quantization goes by the class of a module, and a masked one has a class of its own, so it may be passed "
        "over; write the zeros first, netopt.masking.bake(model), and quantize then.",
        stacklevel=4,
    )


def dress(module: nn.Module, name: str, mask: Tensor) -> None:
    """Puts ``mask`` on the parameter ``name`` of ``module``, or replaces the one that is there."""
    if name in module._parameters:
        _rename(module, name, f"{name}_orig")
    module.__dict__.pop(name, None)
    module.__dict__.pop(PRODUCTS, None)
    module.register_buffer(f"{name}_mask", mask)
    _drop_hooks(module, name)
    module.register_forward_pre_hook(HeldMask(name))
    base, names = _own_class(type(module))
    if name not in names:
        module.__class__ = _masked_class(base, (*names, name))
    module.__dict__.pop("_flat_weights", None)


def undress(module: nn.Module, name: str, hooks: bool = True) -> None:
    """Takes mask, hook and property of ``name`` away, whoever put them there; the stored values stay as they are."""
    base, names = _own_class(type(module))
    if name in names:
        left = tuple(one for one in names if one != name)
        module.__class__ = _masked_class(base, left) if left else base
    if hooks:
        _drop_hooks(module, name)
    module.__dict__.pop(name, None)
    module.__dict__.pop(PRODUCTS, None)
    del module._buffers[f"{name}_mask"]
    module._non_persistent_buffers_set.discard(f"{name}_mask")
    _rename(module, f"{name}_orig", name)
    if isinstance(module, nn.RNNBase) and not isinstance(module, MaskedModule):
        module._init_flat_weights()


def save_dense(module: nn.Module, masked: bool) -> None:
    """Lets a module with a ``save_pretrained`` write unmasked names while there are masks below it, or no longer."""
    base, names = _own_class(type(module))
    if callable(getattr(base, "save_pretrained", None)):
        module.__class__ = _masked_class(base, names) if masked or names else base


def _rename(module: nn.Module, old: str, new: str) -> None:
    # In place and in order: optimizers and checkpoints go by the order of parameters.
    renamed = {new if key == old else key: value for key, value in module._parameters.items()}
    module._parameters.clear()
    module._parameters.update(renamed)


def _drop_hooks(module: nn.Module, name: str) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            del module._forward_pre_hooks[key]


def _own_class(cls: type) -> tuple[type, tuple[str, ...]]:
    # Only the class itself counts: one that a wrapper derived from ours is not ours to exchange.
    return (cls._netopt_base, cls._netopt_names) if "_netopt_base" in cls.__dict__ else (cls, ())


@cache
def _masked_class(base: type, names: tuple[str, ...]) -> type:
    attributes: dict[str, Any] = {name: _property(name) for name in names}
    if issubclass(base, nn.RNNBase):
        attributes["_flat_weights"] = property(_flat_weights, _ignore, _ignore)
    attributes |= {
        "_netopt_base": base,
        "_netopt_names": names,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    saves = (SavesDense,) if callable(getattr(base, "save_pretrained", None)) else ()
    return type(base.__name__, (MaskedModule, *saves, base), attributes)


def _rebuild(make: Callable[..., nn.Module], arguments: tuple[Any, ...], names: tuple[str, ...]) -> nn.Module:
    module = make(*arguments)
    base, _ = _own_class(type(module))
    module.__class__ = _masked_class(base, names)
    return module


def _property(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        return product(module, name)

    def write(module: nn.Module, value: Any) -> None:
        # Torch's own masks, put on top of ours, store the product, which is computed when it is read.
        if is_traced() or _is_product(module, name, value):
            return
        raise MaskError(
            f"{name!r} is masked and cannot be replaced by {_kind(value)}; assign a parameter of its shape, or write "
            f"to it in place, `with torch.no_grad(): module.{name}.copy_(values)`."
        )

    return property(read, write, _ignore)


def _is_product(module: nn.Module, name: str, value: Any) -> bool:
    weight, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    if weight is None or mask is None or type(weight) is Tensor:
        return True
    if type(weight) is not nn.Parameter:
        return type(value) is type(guarded_product(weight, mask))
    if not isinstance(value, Tensor) or value.shape != weight.shape:
        return False
    with torch.no_grad():
        expected = effective(weight, mask)
        return bool(((value == expected) | expected.isnan()).all())


def _kind(value: Any) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _ignore(module: nn.Module, value: Any = None) -> None:
    del module, value


def _flat_weights(module: Any) -> list[Tensor | None]:
    masked = _own_class(type(module))[1]
    names = module._flat_weights_names
    return [product(module, name, watched=False) if name in masked else getattr(module, name, None) for name in names]
