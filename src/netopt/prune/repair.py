"""What is left works: every weight refitted to what the model put out before neurons were removed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from netopt import batches
from netopt.batches import Batch, Data
from netopt.errors import ArgumentTypeError, InvalidArgumentError, MissingDataError
from netopt.model.signals import UndoLog
from netopt.model.view import ModelView
from netopt.plan import Plan
from netopt.plan.blocks import BlockPlan
from netopt.plan.experts import ExpertPlan
from netopt.reconstruction.refit import Kept, Refit, former_name, refitted
from netopt.surgery.lists import former_prefixes

__all__ = ["RepairReport", "repair"]

AnyPlan: TypeAlias = "Plan | BlockPlan | ExpertPlan"

SAMPLES, BATCHES = 1024, 64
"""So many calibration samples, in at most so many batches, are used."""


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Attributes:
        refits: One entry for each weight that was looked at, in the order of the forward.

    ``str(report)`` is a table: for each weight what its outputs lacked, as a share of what they should be, and how much
    of that was taken away, both of squares and on calibration data the refit was not made from.
    """

    refits: tuple[Refit, ...]

    @property
    def removed(self) -> dict[str, float]:
        """For each weight that was refitted, the share of its outputs' squared error that is gone."""
        return {one.name: one.removed for one in self.refits if one.removed > 0}

    @property
    def left(self) -> dict[str, str]:
        """For each weight that stays as it was, although something it is part of was cut, the reason."""
        return {one.name: one.note for one in self.refits if one.removed <= 0 and one.note}

    def table(self, rows: int | None = None) -> str:
        """The report as text, with the first ``rows`` weights, by default all of them."""
        shown = self.refits[:rows]
        width = max((len(one.name) for one in shown), default=6)
        lines = [
            f"repair: {len(self.removed)} of {len(self.refits)} weights refitted",
            f"  {'weight':<{width}}  {'lacked':>8}  {'removed':>8}",
        ]
        row = "  {0.name:<{width}}  {0.error:8.2%}  {0.removed:8.2%}  {0.note}"
        lines += [row.format(one, width=width).rstrip() for one in shown]
        more = len(self.refits) - len(shown)
        return "\n".join([*lines, *([f"  ... and {more} more"] if more else [])])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, ready for :func:`json.dumps`."""
        return {"refits": [dataclasses.asdict(one) for one in self.refits]}

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<repair: {len(self.removed)} of {len(self.refits)} weights refitted>"


def repair(model: nn.Module, plan: AnyPlan, dense: nn.Module, data: Data, *, progress: bool = True) -> RepairReport:
    r"""Refits the weights of a pruned ``model``, in place, to what ``dense`` puts out; no training, no labels.

    In the order of the forward each weight that a matrix product or convolution reads (linear, fused, grouped,
    depthwise, strided or transposed, experts, attention's projections) is corrected by a regression of what its outputs
    lack on the inputs that the model, cut and repaired so far, brings to it. The constant goes into a bias, or the mean
    of the batch normalisation behind it. The fit is pulled towards the present weights, as strongly as each half of the
    data says the other half needs; a weight that gains nothing on the half it was not fitted to stays as it is. A
    weight used several times in one forward (a recurrent one) is folded from the inputs it has in ``dense``.

    Args:
        model: Pruned; its mode, gradients and buffers but for those refitted are given back as they were.
        plan: What was kept of ``dense``: neurons, blocks or experts.
        dense: The model as it was before, on the same device; it shares no parameters with ``model``.
        data: Calibration batches, at least some hundred samples better; up to 1024 samples are used, labels are not.
        progress: Whether to show a progress bar.

    Returns:
        For each weight what its outputs lacked and how much of that is gone.

    Raises:
        ArgumentTypeError: ``model`` or ``dense`` is no module, or ``plan`` no plan.
        InvalidArgumentError: ``model`` is not what ``plan`` makes of ``dense``.
        MissingDataError: ``data`` holds no batch.

    References:
        SlimGPT (Ling et al., 2024), https://arxiv.org/abs/2412.18110; OSSCAR (Meng et al., 2024),
        https://arxiv.org/abs/2403.12983; ridge regression (Hoerl & Kennard, 1970),
        https://doi.org/10.1080/00401706.1970.10488634

    Example:
        >>> import netopt, torch
        >>> _ = torch.manual_seed(0)
        >>> dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> model, data = copy.deepcopy(dense), [torch.randn(256, 8), torch.randn(256, 8)]
        >>> plan = netopt.plan_neurons(model, data[0], amount=0.5)
        >>> plan.apply(model)
        >>> before = (model(data[0]) - dense(data[0])).square().mean()
        >>> report = repair(model, plan, dense, data, progress=False)
        >>> bool((model(data[0]) - dense(data[0])).square().mean() < 0.5 * before), list(report.removed)
        (True, ['2.weight'])
    """
    for name, module in (("model", model), ("dense", dense)):
        if not isinstance(module, nn.Module):
            raise ArgumentTypeError(f"{name} must be a torch.nn.Module, not {type(module).__name__}.")
    if not isinstance(plan, (Plan, BlockPlan, ExpertPlan)):
        raise ArgumentTypeError(f"plan must be a netopt.Plan, BlockPlan or ExpertPlan, not {type(plan).__name__}.")
    _check_pair(model, plan, dense)
    return repaired(model, plan, dense, data, progress)


def repaired(model: nn.Module, plan: AnyPlan, dense: nn.Module, data: Data | None, progress: bool) -> RepairReport:
    """As :func:`repair`, of what is known to fit."""
    assert data is not None, "there is no copy to repair from without"
    held, kept = calibration(data), _kept(plan, dense)
    return UndoLog().run(lambda log: RepairReport(tuple(refitted(log, model, dense, kept, held, progress=progress))))


def _kept(plan: AnyPlan, dense: nn.Module) -> Kept:
    """What a plan keeps of each tensor, by its name in ``dense``; and the former prefixes of entries of cut lists."""
    if isinstance(plan, Plan):
        return Kept(plan.tensors, {})
    former: dict[str, str] = {}
    if isinstance(plan, BlockPlan):
        for stack in plan.stacks:
            for name in stack.lists:
                former |= former_prefixes(dense.get_submodule(name), name, stack.kept)
        return Kept({}, former)
    tensors: dict[str, dict[int, Tensor]] = {}
    for mixture in plan.mixtures:
        for name, dim in mixture.tensors:
            length = ModelView(dense).tensors[name].shape[dim]
            tensors.setdefault(name, {})[dim] = mixture.indices(length)
        for name in mixture.lists:
            former |= former_prefixes(dense.get_submodule(name), name, mixture.kept)
    return Kept(tensors, former)


def copy_for_repair(model: nn.Module, repair: bool | None, data: Data | None, mode: str) -> nn.Module | None:
    """The model as it is, to repair what becomes of it; ``None`` where nothing is to be repaired.

    Raises:
        MissingDataError: ``repair=True`` without ``data``.
        InvalidArgumentError: ``repair=True`` with masks, or the model cannot be copied.
    """
    if repair is not None and not isinstance(repair, bool):
        raise ArgumentTypeError(f"repair must be True, False or None, not {repair!r}.")
    if repair and data is None:
        raise MissingDataError("repair=True needs data=, calibration batches of inputs.")
    if repair and mode != "remove":
        raise InvalidArgumentError("repair refits what is left after neurons are removed; use mode='remove'.")
    if repair is False or data is None or mode != "remove":
        return None
    return copy_of(model)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of the model.

    Raises:
        InvalidArgumentError: It cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # copying runs code of the user's, which may raise anything
        raise InvalidArgumentError(
            f"repair needs a copy of the model as it was, and copying it failed ({error}); pass repair=False, or a "
            "model that copy.deepcopy can copy."
        ) from error


def calibration(data: Data, samples: int = SAMPLES, at_least: int = 1) -> list[Batch]:
    """The first batches of the data, up to so many samples in at least so many batches, or 64 batches.

    Raises:
        MissingDataError: There is none.
    """
    held, count = [], 0
    for batch in itertools.islice(batches.iterate(data), BATCHES):
        held.append(batch)
        count += samples_of(batch)
        if count >= samples and len(held) >= at_least:
            break
    if not held:
        raise MissingDataError("data holds no batch to repair with.")
    return held


def samples_of(batch: Batch) -> int:
    """How many samples a batch holds."""
    sizes: Sequence[int] = [len(one) for _, one in batches.tensors(batches.split(batch)[0]) if one.dim() > 0]
    return max(sizes, default=1)


def _check_pair(model: nn.Module, plan: AnyPlan, dense: nn.Module) -> None:
    if isinstance(plan, Plan):
        plan.check(dense)
    else:
        plan.prepare(dense)
    own = {id(one) for one in model.parameters()}
    if any(id(one) in own for one in dense.parameters()):
        raise InvalidArgumentError("dense shares parameters with model; pass a copy made before pruning.")
    tensors, former = _kept(plan, dense)
    small = {former_name(name, former): one for name, one in model.named_parameters()}
    for name, one in dense.named_parameters():
        shape = list(one.shape)
        for dim, kept in tensors.get(name, {}).items():
            shape[dim] = len(kept)
        if name in small and list(small[name].shape) != shape:
            raise InvalidArgumentError(
                f"`{name}` has shape {tuple(small[name].shape)}, and the plan makes it {tuple(shape)}: model is not "
                "what this plan makes of dense."
            )
    if not isinstance(plan, Plan) and small.keys() - dict(dense.named_parameters()).keys():
        name = min(small.keys() - dict(dense.named_parameters()).keys())
        raise InvalidArgumentError(f"dense has no `{name}`: model is not what this plan makes of dense.")
