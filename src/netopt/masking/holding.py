"""Zeros that stay zero while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from netopt.errors import ArgumentTypeError, MaskError, ShapeMismatchError, UnknownNameError
from netopt.masking.lifecycle import masks as masks_of
from netopt.masking.undo import write_zeros
from netopt.model.parameters import Place, places
from netopt.model.signals import UndoLog

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Hold", "hold"]


class Hold:
    """Keeps zeros at zero after every step of an optimizer, until released; also a context manager."""

    def __init__(self, dropped: list[tuple[nn.Parameter, Tensor]], optimizer: Optimizer) -> None:
        self._dropped = dropped

        def begin(log: UndoLog) -> RemovableHandle:
            write_zeros(log, ((parameter, gone.to(parameter.device)) for parameter, gone in dropped))
            log.callback(self._forget, optimizer, on=BaseException)
            return optimizer.register_step_post_hook(self._after_step)

        self._handle = UndoLog().run(begin)

    @torch.no_grad()
    def zero(self) -> None:
        """Writes the zeros now."""
        for index, (parameter, dropped) in enumerate(self._dropped):
            if dropped.device != parameter.device:
                self._dropped[index] = parameter, dropped.to(parameter.device)
            parameter.masked_fill_(self._dropped[index][1], 0)

    def release(self) -> None:
        """Lets the weights go."""
        self._handle.remove()

    def _forget(self, optimizer: Optimizer) -> None:
        hooks = optimizer._optimizer_step_post_hooks
        for key in [key for key, hook in hooks.items() if hook == self._after_step]:
            del hooks[key]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self.zero()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def hold(model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor] | None = None) -> Hold:
    """Keeps masked weights at zero while ``optimizer`` trains them, with no mask on the model.

    Momentum, weight decay and adaptive steps all move a weight whose gradient is zero; the zeros are written again
    after every step. On a model with masks on it this is not needed for what it computes, and keeps the values below
    the masks at zero too.

    Args:
        model: The model, its masks baked or still on.
        optimizer: Whose steps are followed; it must hold the parameters.
        masks: What to hold, ``True`` for what may change, as :func:`bake` returns it. By default the masks on the
            model, and the zeros of every weight that is pruned by default and not zero altogether.

    Returns:
        A handle: ``release()`` ends it, and so does leaving it as a context.

    Raises:
        MaskError: there is nothing to hold, or the optimizer holds none of it.

    Example:
        >>> from netopt import masking
        >>> model = nn.Linear(4, 2)
        >>> masking.put(model, {"weight": torch.eye(2, 4, dtype=torch.bool)})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        >>> with hold(model, optimizer, masking.bake(model)):
        ...     for _ in range(3):
        ...         model(torch.randn(8, 4)).sum().backward()
        ...         optimizer.step()
        >>> masking.sparsity(model).total
        0.75
    """
    if not isinstance(optimizer, Optimizer):
        raise ArgumentTypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    known = places(model)
    chosen = _zeros(known) | masks_of(model) if masks is None else _checked(known, masks)
    if not chosen:
        raise MaskError("there is nothing to hold: the model has neither masks nor zeros; prune it first.")
    # Wrappers of optimizers step the one inside.
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    if not any(id(known[name].parameter) in held for name in chosen):
        raise MaskError("the optimizer holds none of the masked parameters; build it from this model's parameters.")
    return Hold([(known[name].parameter, ~mask) for name, mask in chosen.items()], inner)


def _zeros(known: Mapping[str, Place]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, place in known.items():
        if place.prunable:
            mask = place.parameter.detach() != 0
            count = int(torch.count_nonzero(mask))
            if 0 < count < mask.numel():
                found[name] = mask
    return found


def _checked(known: Mapping[str, Place], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    aliases = {alias: place for place in known.values() for alias in place.names}
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if name not in aliases:
            raise UnknownNameError.of("parameter", name, aliases)
        place = aliases[name]
        if mask.shape != place.parameter.shape:
            raise ShapeMismatchError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(place.parameter.shape)}."
            )
        found[place.name] = mask.bool()
    return found
