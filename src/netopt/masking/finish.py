"""The last step before a model leaves for other tools: nothing of masks is left on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from netopt.masking.lifecycle import bake
from netopt.masking.table import MaskTable
from netopt.model.parameters import places
from netopt.model.signals import UndoLog

__all__ = ["Finished", "finish"]


@dataclass(frozen=True)
class Finished:
    """What :func:`finish` did; prints as one line.

    Attributes:
        model: The name of the model's class.
        masks: The masks that were taken off, by parameter name.
        modules: How many modules had masks and have their own class again.
    """

    model: str
    masks: MaskTable
    modules: int

    def __str__(self) -> str:
        if not self.masks:
            return f"{self.model}: no masks on it; nothing changed, ready to export, quantize and save"
        where = f"{self.modules:,} module{'s are' if self.modules > 1 else ' is'}"
        return f"{self.model}: zeros written, {self.masks!r}; {where} plain again, ready to export, quantize and save"

    __repr__ = __str__


def finish(model: nn.Module) -> Finished:
    """Makes ``model``, in place, one of plain modules, which exporters, quantizers and savers know.

    Zeros are written where masks are, and masks, their hooks and the classes they derive are taken off; the
    parameters stay the same objects, so that an optimizer goes on. Masks of ``torch.nn.utils.prune`` are treated
    alike. Removed neurons leave nothing behind, and a model without masks is left alone.

    Args:
        model: Masked or not; left as it was if the call fails.

    Returns:
        What was done, in one line; ``.masks`` has the masks, for :func:`netopt.masking.hold` or
        :func:`netopt.masking.put`.

    Example:
        >>> import netopt
        >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
        >>> _ = netopt.prune_weights(model, 0.5)
        >>> print(netopt.finish(model))
        Sequential: zeros written, 1 mask, 50.0 % of 8 entries masked: 0.weight; 1 module is plain again, ready to
        export, quantize and save
        >>> type(model[0]) is nn.Linear
        True
    """
    owners = {id(module) for place in places(model).values() if place.mask is not None for module, _ in place.owners}
    return UndoLog(whole=True).run(lambda _: Finished(type(model).__name__, bake(model), len(owners)))
