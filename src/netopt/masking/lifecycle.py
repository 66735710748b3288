"""A mask is put on, made permanent, or taken off again, on whole models.

Everything is checked before anything changes, so that a call that fails leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netopt.errors import ArgumentTypeError, ShapeMismatchError, UnknownNameError
from netopt.masking.method import dress, save_dense, undress
from netopt.masking.table import MaskTable
from netopt.masking.undo import all_or_nothing, write_zeros
from netopt.model.checks import check_values
from netopt.model.parameters import Place, places
from netopt.model.signals import UndoLog
from netopt.tables import html_table

__all__ = ["Sparsity", "adopt", "bake", "masks", "masks_of_indices", "put", "sparsity", "strip"]


def put(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Masks parameters of ``model``, in place, through ``torch.nn.utils.prune``.

    ``weight`` becomes ``weight_orig`` (the same parameter, at the same position) and the buffer ``weight_mask``; every
    tool that knows torch's masks works. A parameter that is masked already keeps one mask: what either of the two
    removes is removed. A parameter that several modules share is masked in all of them.

    Args:
        model: Any module.
        masks: For names of parameters, as in ``named_parameters`` of the unmasked model, a boolean tensor of the
            parameter's shape, ``True`` for what is kept. It is copied.

    Raises:
        UnknownNameError: a name is no parameter's.
        ArgumentTypeError: a mask is no boolean tensor.
        ShapeMismatchError: a mask has another shape than its parameter.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> put(model, {"0.weight": torch.tensor([[True, False], [False, True]])})
        >>> int((model[0].weight == 0).sum())
        2
    """
    check_values(model)
    known = _by_any_name(model)
    joined: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if name not in known:
            raise UnknownNameError.of("parameter", name, known)
        place = known[name]
        fitting = _checked(place, mask)
        joined[place.name] = fitting & joined[place.name] if place.name in joined else fitting
    adopt(model, joined)


def adopt(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Puts masks that fit, and that nobody else holds; ``masks`` is used up. Users call :func:`put`."""
    known = places(model)

    def dress_all(_: UndoLog) -> None:
        for name in list(masks):
            place, mask = known[name], masks.pop(name)
            for module, attribute in place.owners:
                dress(module, attribute, mask)
        _save_dense(model)

    all_or_nothing(model).run(dress_all)


def masks_of_indices(model: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    """Masks that keep what has a kept index along every dimension that is given, for floating-point parameters.

    Where the norm of a whole row is taken, and would be zero, the row stays: its length, a parameter too, is masked.
    """
    found = {}
    for name, place in places(model).items():
        stored = next((one for one in (*place.names, *[f"{one}_orig" for one in place.names]) if one in kept), None)
        if stored is None or not place.parameter.is_floating_point():
            continue
        mask = torch.ones(place.parameter.shape, dtype=torch.bool)
        for dim, indices in kept[stored].items():
            stays = torch.zeros(mask.shape[dim], dtype=torch.bool)
            stays[indices] = True
            fewer = mask & stays.view([-1 if index == dim else 1 for index in range(mask.dim())])
            left = fewer if place.mask is None else fewer & place.mask.bool().cpu()
            if place.computed is None or not place.computed.is_lost(left):
                mask = fewer
        found[name] = mask
    return found


def masks(model: nn.Module) -> MaskTable:
    """Returns the masks that are on ``model``, by the parameters' unmasked names; ``True`` for what is kept."""
    known = places(model).items()
    return MaskTable({name: place.mask.bool() for name, place in known if place.mask is not None})


def bake(model: nn.Module) -> MaskTable:
    """Makes every mask of ``model`` permanent, in place: zeros are written and the masks taken off.

    The parameters stay the same objects, in the same order, tied as they were. A model without masks is left alone.

    Returns:
        The masks that were taken off, a dictionary by name, for :func:`hold` or another :func:`put`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> put(model, {"0.weight": torch.tensor([[True, False]])})
        >>> bake(model)
        1 mask, 50.0 % of 2 entries masked: 0.weight
        >>> list(model.state_dict()), model[0].weight[0, 1].item()
        (['0.weight'], 0.0)
    """
    return _take_off(model, zero=True)


def strip(model: nn.Module) -> MaskTable:
    """Takes every mask off ``model``, in place; the weights below show again, with the values they have now.

    Returns:
        The masks that were taken off. A model without masks is left alone.
    """
    return _take_off(model, zero=False)


def _take_off(model: nn.Module, zero: bool) -> MaskTable:
    masked = {name: place for name, place in places(model).items() if place.mask is not None}
    taken = masks(model)
    dropped = ((place.parameter, ~taken[name]) for name, place in masked.items() if zero)

    def undress_all(log: UndoLog) -> MaskTable:
        write_zeros(log, dropped)
        for place in masked.values():
            for module, attribute in place.owners:
                undress(module, attribute)
        _save_dense(model)
        return taken

    return all_or_nothing(model).run(undress_all)


def _save_dense(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            save_dense(module, any(place.mask is not None for place in places(module).values()))


@dataclass(frozen=True)
class Sparsity:
    """How many of a model's prunable weights are zero.

    Attributes:
        zeros: The number of zeros, by parameter name.
        sizes: The number of entries, by parameter name.
    """

    zeros: Mapping[str, int]
    sizes: Mapping[str, int]

    @property
    def tensors(self) -> dict[str, float]:
        """The fraction of zeros of each tensor, by parameter name."""
        return {name: self.zeros[name] / max(size, 1) for name, size in self.sizes.items()}

    @property
    def total(self) -> float:
        """The fraction of zeros of all these tensors together."""
        return sum(self.zeros.values()) / max(sum(self.sizes.values()), 1)

    def __getitem__(self, name: str) -> float:
        return self.tensors[name]

    def __float__(self) -> float:
        return self.total

    def __str__(self) -> str:
        rows = [*self.tensors.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {fraction:8.4%}" for name, fraction in rows)

    def __repr__(self) -> str:
        zeros, size = sum(self.zeros.values()), sum(self.sizes.values())
        return f"{zeros:,} of {size:,} entries zero ({self.total:.1%}), in {len(self.sizes)} tensors"

    def _repr_html_(self) -> str:
        rows = [[name, f"{self.sizes[name]:,}", f"{share:.2%}"] for name, share in self.tensors.items()]
        return html_table(["tensor", "entries", "zero"], rows) + f"<p>{self!r}</p>"


def sparsity(model: nn.Module) -> Sparsity:
    """Counts the zeros the model computes with, in every masked parameter and every weight pruned by default.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> put(model, {"weight": torch.tensor([[True, False, True, True]])})
        >>> sparsity(model).total
        0.25
    """
    counted = {name: place for name, place in places(model).items() if place.prunable or place.mask is not None}
    zeros = {name: place.parameter.numel() - place.nonzero for name, place in counted.items()}
    return Sparsity(zeros, {name: place.parameter.numel() for name, place in counted.items()})


def _by_any_name(model: nn.Module) -> dict[str, Place]:
    return {name: place for place in places(model).values() for name in place.names}


def _checked(place: Place, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentTypeError(f"the mask of {place.name!r} must be a boolean tensor, True to keep, not {kind}.")
    if mask.shape != place.parameter.shape:
        raise ShapeMismatchError(
            f"the mask of {place.name!r} has shape {tuple(mask.shape)}, "
            f"and the parameter {tuple(place.parameter.shape)}; give a mask of the parameter's shape."
        )
    mask = mask.to(place.parameter.device, copy=True).contiguous()
    return mask if place.mask is None else mask & place.mask.bool()
