"""Checkpoints of masked models, without the doubling, and models of either kind from checkpoints of either kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netopt.errors import MaskError, ShapeMismatchError
from netopt.masking.lifecycle import adopt, strip
from netopt.masking.lifecycle import masks as masks_of
from netopt.masking.saving import dense, pairs
from netopt.masking.table import MaskTable
from netopt.masking.undo import all_or_nothing, note_values
from netopt.model.parameters import places
from netopt.model.signals import UndoLog

__all__ = ["load_state_dict", "state_dict"]

BITS = "_mask_bits"


def state_dict(model: nn.Module, *, bits: bool = False) -> dict[str, Any]:
    """Returns the state of ``model`` under its unmasked names, masked entries as zeros.

    Any model of the same architecture loads it, masked or not; it takes no more memory than an unmasked one's.

    Args:
        model: Masked or not; left alone.
        bits: Whether to add each mask, eight entries a byte, as ``"<name>_mask_bits"``, for
            :func:`load_state_dict`. Without them masks can be told from the zeros.

    Example:
        >>> from netopt import masking
        >>> model = nn.Linear(4, 2)
        >>> masking.put(model, {"weight": torch.eye(2, 4, dtype=torch.bool)})
        >>> list(state_dict(model)), list(state_dict(model, bits=True))
        (['weight', 'bias'], ['weight', 'bias', 'weight_mask_bits'])
    """
    full = model.state_dict()
    packed = {name + BITS: _packed(mask.bool()) for name, mask in pairs(full)} if bits else {}
    return dense(full) | packed


def load_state_dict(
    model: nn.Module, state: Mapping[str, Any], *, strict: bool = True, derive: bool = False
) -> MaskTable:
    """Loads a checkpoint of a masked or an unmasked model into a masked or an unmasked model.

    Masks in the checkpoint (torch's ``weight_orig`` and ``weight_mask``, or the bits of :func:`state_dict`) replace
    those on the model. A checkpoint without masks leaves the model's masks where they are.

    Args:
        model: Changed in place; left as it was if the checkpoint does not fit.
        state: The checkpoint.
        strict: Whether every name must be there, and no other.
        derive: Whether a weight without a mask in the checkpoint gets one from its zeros; only weights that are pruned
            by default, and that hold a zero and something else.

    Returns:
        The masks that are on the model now.

    Raises:
        MaskError: names are missing or unexpected; or a mask lacks its weight.
        ShapeMismatchError: a tensor has another shape than the model's.
    """
    plain, found = _opened(state)
    known = places(model)
    aliases = {alias: name for name, place in known.items() for alias in place.names}
    _check_names(model, plain, found, aliases, strict)
    own = masks_of(model)
    for name, place in known.items():
        value = next((plain[alias] for alias in place.names if alias in plain), None)
        mask = next((found[alias] for alias in place.names if alias in found), None)
        if derive and mask is None and isinstance(value, Tensor) and place.prunable:
            mask = _from_zeros(value)
        if mask is not None:
            own[name] = mask.view(place.parameter.shape).to(place.parameter.device)

    def load(log: UndoLog) -> MaskTable:
        note_values(log, model.state_dict(keep_vars=True))
        strip(model)
        model.load_state_dict(plain, strict=False)
        adopt(model, dict(own))
        return own

    return all_or_nothing(model).run(load)


def _opened(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Splits a checkpoint into unmasked names and masks."""
    plain: dict[str, Any] = {}
    masks: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(BITS):
            name = key.removesuffix(BITS)
            if name not in state:
                raise MaskError(f"the checkpoint has {key!r} and no {name!r}; save it with masking.state_dict.")
            masks[name] = _unpacked(value, state[name])
        elif key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in state:
            masks[key.removesuffix("_mask")] = value.bool()
        elif key.endswith("_orig") and f"{key.removesuffix('_orig')}_mask" in state:
            plain[key.removesuffix("_orig")] = value
        else:
            plain[key] = value
    return plain, masks


def _check_names(
    model: nn.Module, plain: Mapping[str, Any], masks: Mapping[str, Tensor], aliases: Mapping[str, str], strict: bool
) -> None:
    expected = state_dict(model)
    missing = [name for name in expected if name not in plain]
    unexpected = [name for name in plain if name not in expected]
    if strict and (missing or unexpected):
        parts = [
            f"{what}: {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
            for what, names in (("missing are", missing), ("not in the model are", unexpected))
            if names
        ]
        raise MaskError(
            f"the checkpoint does not fit {type(model).__name__}; {'; '.join(parts)}. "
            "Pass strict=False to load what fits."
        )
    for name, value in expected.items():
        given = plain.get(name)
        if isinstance(value, Tensor) and isinstance(given, Tensor) and value.shape != given.shape:
            raise ShapeMismatchError(
                f"{name!r} has shape {tuple(given.shape)} in the checkpoint and {tuple(value.shape)} in the model; "
                "build the model with the sizes it was saved with."
            )
    strangers = [name for name in masks if name not in aliases]
    if strangers and strict:
        raise MaskError(f"the checkpoint masks {strangers[0]!r}, which is no parameter of {type(model).__name__}.")


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def _unpacked(bits: Tensor, like: Tensor) -> Tensor:
    if bits.numel() != -(-like.numel() // 8):
        raise ShapeMismatchError(f"{bits.numel()} bytes of mask do not fit {tuple(like.shape)} entries.")
    flags = np.unpackbits(bits.cpu().numpy(), count=like.numel())
    return torch.from_numpy(flags.astype(np.bool_)).view(like.shape)


def _from_zeros(value: Tensor) -> Tensor | None:
    mask = value != 0
    count = int(torch.count_nonzero(mask))
    return mask if 0 < count < mask.numel() else None
