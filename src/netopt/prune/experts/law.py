"""The law of experts, tried: the smaller model computes what the model does whose scores are minus infinity there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from netopt.batches import Inputs
from netopt.errors import ForwardError, NetoptError, VerificationError
from netopt.model.signals import entered
from netopt.model.view import ModelView
from netopt.plan.blocks import fingerprint_of
from netopt.plan.experts import ExpertCut, ExpertPlan, counted_by_hooks
from netopt.plan.value import shapes_of
from netopt.prune.blocks.trial import described
from netopt.prune.experts.mixtures import Mixture
from netopt.prune.experts.watch import Watch
from netopt.prune.verify import Forward, alike, trains
from netopt.surgery.attributes import Path

__all__ = ["Law", "Removed", "make_plan"]

Removed = Mapping[str, Sequence[int]]
"""Experts that go, by the router's name."""


class Law:
    """Compares smaller models with those whose scores are minus infinity.

    Args:
        view: Of the model.
        forward: How it is run: on the example inputs, and on a variation of them that it takes.
    """

    def __init__(self, view: ModelView, forward: Forward) -> None:
        self._view, self._forward = view, forward
        self._inputs: list[Inputs] = [forward.inputs]
        for inputs in forward.variations:
            try:
                forward.run(inputs)
            except ForwardError:
                continue
            self._inputs.append(inputs)
            break
        self._trains = trains(view.model, forward.inputs)

    def settle(self, mixture: Mixture) -> str | None:
        """Tries to remove one expert of each group; notes which numbers follow, or says why none can go."""
        each = mixture.size // mixture.groups
        removed = {mixture.scores.router: [group * each + each - 1 for group in range(mixture.groups)]}
        try:
            expected = self.expected(removed)
        except NetoptError as error:
            return f"cannot be run without an expert: {described(error)}"
        if not all(one.isfinite().all() for outputs in expected for one in outputs):
            return "gives no finite numbers where a score is minus infinity"
        why = None
        for numbers in _variants(mixture, self._view):
            mixture.numbers = numbers
            plan = make_plan(self._view, [mixture], removed, configured=False)
            try:
                found = plan.prepare(self._forward.model).dry_run(self._outputs)
            except NetoptError as error:
                why = why or f"cannot lose experts: {described(error)}"
                continue
            if _agree(found, expected):
                return None
        return why or "computes something else with fewer experts than with scores of minus infinity"

    def expected(self, removed: Removed) -> list[list[Tensor]]:
        """What the smaller model has to return."""
        with entered(torch.inference_mode(False)):
            return [self._forward.run(inputs, Watch(self._view, removed=removed)) for inputs in self._inputs]

    def check(self, expected: list[list[Tensor]]) -> None:
        """Compares the model as it is now with what it has to return.

        Raises:
            VerificationError: They differ.
        """
        try:
            found = self._outputs()
        except ForwardError as error:
            raise VerificationError(f"the smaller model cannot be run: {error.__cause__}. All was put back.") from error
        if not _agree(found, expected):
            raise VerificationError(
                "the smaller model differs from the one with scores of minus infinity; all was put back. Exclude some "
                "mixtures, and report it, please."
            )

    def _outputs(self) -> list[list[Tensor]]:
        found = [self._forward.run(inputs) for inputs in self._inputs]
        if self._trains and not trains(self._view.model, self._forward.inputs):
            raise VerificationError("without them it does not run in training mode")
        return found


def make_plan(view: ModelView, mixtures: Sequence[Mixture], removed: Removed, *, configured: bool = True) -> ExpertPlan:
    """The plan to remove experts, by routers.

    Args:
        view: Of the model.
        mixtures: Of the model, all of them.
        removed: Experts by router.
        configured: Whether values of a configuration and numbers of modules around follow too.
    """
    cuts: list[ExpertCut] = []
    attributes: dict[Path, int] = {}
    for mixture in mixtures:
        gone = removed.get(mixture.scores.router)
        if gone:
            kept = tuple(place for place in range(mixture.size) if place not in gone)
            tensors = tuple(mixture.tensors.items())
            cuts.append(ExpertCut(mixture.name, mixture.size, kept, tensors, tuple(mixture.lists)))
            attributes |= {path: len(kept) for path in mixture.attributes(view) if path[1] in mixture.numbers}
    plan = ExpertPlan(tuple(cuts), tuple(attributes.items()), fingerprint_of(view.model))
    sizes = {(cut.size, len(cut.kept)) for cut in cuts}
    if not configured or len(sizes) != 1:
        return plan
    shapes = plan.prepare(view.model).dry_run(lambda: shapes_of(view.model))
    paths = counted_by_hooks(view.model, shapes, *next(iter(sizes)))
    more = {path: len(cuts[0].kept) for path in paths}
    return ExpertPlan(plan.mixtures, tuple((attributes | more).items()), plan.fingerprint)


def _variants(mixture: Mixture, view: ModelView) -> Iterator[tuple[str, ...]]:
    """Which numbers may be that of the experts: all first, then fewer; few enough to be tried."""
    names = tuple(dict.fromkeys(path[1] for path in mixture.attributes(view)))
    for count in range(len(names), -1, -1):
        if len(names) <= 5 or count in (len(names), 0):
            yield from combinations(names, count)


def _agree(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> bool:
    return all(alike(one, other) for one, other in zip(found, expected, strict=True))
