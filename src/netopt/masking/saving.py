"""A masked model that saves itself for others writes the names they will look for.

``state_dict()`` of a masked model has the names of ``torch.nn.utils.prune``, ``weight_orig`` and ``weight_mask``, which
whoever uses torch's masks expects. ``save_pretrained`` writes for ``from_pretrained``, which builds the unmasked model
and would fill what it does not find with random numbers: while it runs, and only then, the names are the unmasked ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from netopt.model.parameters import effective

__all__ = ["SavesDense", "dense", "pairs"]

SAVING = "_netopt_saving"


class SavesDense:
    """What the class of a masked model with a ``save_pretrained`` adds."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Saves under the unmasked names, masked entries as zeros; arguments as the model's own class has them."""
        given = [dense(one) if isinstance(one, Mapping) else one for one in args]
        if isinstance(kwargs.get("state_dict"), Mapping):
            kwargs["state_dict"] = dense(kwargs["state_dict"])
        was, self.__dict__[SAVING] = self.__dict__.get(SAVING, False), True
        try:
            return super().save_pretrained(*given, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__[SAVING] = was

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state under torch's names of masks; under the unmasked ones while ``save_pretrained`` runs."""
        state = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        return dense(state) if self.__dict__.get(SAVING) else state


def dense(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same state under unmasked names, masked entries as zeros; what was one tensor still is."""
    masked = dict(pairs(state))
    hidden = {f"{name}_mask" for name in masked}
    products: dict[tuple[int, int], Tensor] = {}
    found: dict[str, Any] = {}
    for key, value in state.items():
        name = key.removesuffix("_orig")
        if name != key and name in masked:
            mask = masked[name]
            place = value.data_ptr(), mask.data_ptr()
            if place not in products or value.is_meta:
                products[place] = effective(value, mask)
            found[name] = products[place]
        elif key not in hidden:
            found[key] = value
    return found


def pairs(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The unmasked name and the mask of each masked tensor in a state."""
    for key in state:
        name = key.removesuffix("_orig")
        if name != key and isinstance(state.get(f"{name}_mask"), Tensor):
            yield name, state[f"{name}_mask"]
