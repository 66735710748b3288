"""The law of blocks, tried: the smaller model computes, bit for bit, what the model with identities in place does."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from netopt.batches import Inputs
from netopt.errors import ForwardError, NetoptError, VerificationError
from netopt.model.view import ModelView
from netopt.plan.blocks import BlockPlan
from netopt.prune.blocks.branches import Branch, make_branch_plan
from netopt.prune.blocks.follow import Followers, make_block_plan
from netopt.prune.blocks.stacks import Block
from netopt.prune.blocks.standins import Kind
from netopt.prune.verify import Forward, trains
from netopt.surgery import Operation

__all__ = ["Trials", "same"]

Kinds = dict[str, Kind]


class Trials:
    """Compares smaller models with those that skip the same blocks.

    Args:
        view: Of the model.
        forward: How it is run: on the example inputs, and on a variation of them that it takes.
        stepping: Whether a model that returns its state is run a step further with it.

    Attributes:
        kinds: What stands in for each block that was tried, by its name.
    """

    def __init__(self, view: ModelView, forward: Forward, *, stepping: bool = False) -> None:
        self._view, self._forward = view, forward
        self.inputs: list[Inputs] = [forward.inputs]
        self.kinds: Kinds = {}
        self._accepted = list(inspect.signature(forward.model.forward).parameters)
        self._again: tuple[str, ...] = ()
        for inputs in forward.variations:
            try:
                forward.run(inputs)
            except ForwardError:
                continue
            self.inputs.append(inputs)
            break
        self._trains = trains(view.model, forward.inputs)
        if stepping:
            self._again = self._arguments_again()

    def outputs(self) -> list[list[Tensor]]:
        """What the model returns as it is now, and in a further step."""
        found: list[list[Tensor]] = []
        for inputs in self.inputs:
            outputs, result = self._with_result(inputs)
            found.append(outputs)
            if self._again:
                found.append(self._forward.run(self._following(inputs, result, self._again)))
        return found

    def _with_result(self, inputs: Inputs) -> tuple[list[Tensor], Any]:
        results: list[Any] = []

        def count(result: Any) -> list[Tensor]:
            results.append(result)
            return self._forward.counted(result)

        return replace(self._forward, counted=count).run(inputs), results[0]

    def _arguments_again(self) -> tuple[str, ...]:
        """The arguments that the model takes in a further step beside its state: the first, or all; or none of them."""
        _, result = self._with_result(self.inputs[0])
        names = tuple(self._named(self.inputs[0]))
        for some in (names[:1], names) if self._state(self.inputs[0], result) else ():
            try:
                self._forward.run(self._following(self.inputs[0], result, some))
            except ForwardError:
                continue
            return some
        return ()

    def _following(self, inputs: Inputs, result: Any, names: Sequence[str]) -> Inputs:
        named = self._named(inputs)
        return {name: named[name] for name in names} | self._state(inputs, result)

    def _named(self, inputs: Inputs) -> Mapping[str, Any]:
        if isinstance(inputs, Mapping):
            return inputs
        return dict(zip(self._accepted, inputs if isinstance(inputs, tuple) else [inputs], strict=False))

    def _state(self, inputs: Inputs, result: Any) -> dict[str, Any]:
        """What is returned under the name of an argument that is not given, as a cache is."""
        returned = result if isinstance(result, Mapping) else {}
        names = [name for name in self._accepted if name in returned and name not in self._named(inputs)]
        return {name: returned[name] for name in names}

    def skipping(self, blocks: Sequence[Block], look: Callable[[], Any], kind: Kind | None = None) -> Any:
        """Looks at the model while it goes past some blocks."""
        changes = [block.skip(kind or self.kinds[block.name]) for block in blocks]
        return Operation(self._forward.model, changes, self._view).dry_run(look)

    def settle(self, block: Block, followers: Followers) -> str | None:
        """Tries to remove one block; notes what has to follow and stands in, or says why it cannot go."""
        why = None
        for variant in followers.variants():
            plan = make_block_plan(self._view, [followers], {followers.stack.name: [block.place]}, variant)
            found = self._outputs_of(plan)
            if isinstance(found, str):
                why = why or found
                continue
            for kind in block.standins:
                expected = self._skipped(block, kind)
                if not isinstance(expected, str) and same(found, expected):
                    self.kinds[block.name], followers.chosen = kind, variant
                    return None
                why = why or (expected if isinstance(expected, str) else _fewer(found, expected))
        where = f" ({block.line})" if block.line else ""
        return why or f"does more than change what it is given: without it the forward computes something else{where}"

    def settle_branch(self, branch: Branch) -> str | None:
        """Tries to remove one branch; notes how it goes, or says why it cannot."""
        self.kinds[branch.name] = "zeros"
        expected = self._skipped(branch, "zeros")
        if isinstance(expected, str):
            return expected
        why = f"does more than add to the stream: without it the forward computes something else ({branch.line})"
        for cut in branch.cut.ways():
            branch.cut = cut
            found = self._outputs_of(make_branch_plan(self._view, [branch]), "cannot be cut out")
            if isinstance(found, str):
                why = found
            elif same(found, expected):
                return None
        return why

    def check(self, blocks: Sequence[Block], expected: list[list[Tensor]]) -> None:
        """Compares the model as it is now with what it has to return.

        Raises:
            VerificationError: They differ.
        """
        try:
            found = self._smaller()
        except ForwardError as error:
            raise VerificationError(f"the smaller model cannot be run: {error.__cause__}. All was put back.") from error
        if not same(found, expected):
            raise VerificationError(
                f"without {', '.join(block.name for block in blocks)} together the model differs from the one with "
                "identities in their place; all was put back. Exclude some of them, and report it, please."
            )

    def _outputs_of(self, plan: BlockPlan, why: str = "cannot leave its list") -> list[list[Tensor]] | str:
        try:
            return plan.prepare(self._forward.model).dry_run(self._smaller)
        except NetoptError as error:
            return f"{why}: {described(error)}"

    def _smaller(self) -> list[list[Tensor]]:
        """What a smaller model returns, which runs in training mode too, if the model did."""
        found = self.outputs()
        if self._trains and not trains(self._view.model, self._forward.inputs):
            raise VerificationError("without it the forward does not run in training mode")
        return found

    def _skipped(self, block: Block, kind: Kind) -> list[list[Tensor]] | str:
        try:
            return self.skipping([block], self.outputs, kind)
        except NetoptError as error:
            return f"cannot be skipped: {described(error)}"


def same(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all outputs are equal in number, shape and bits; what is not a number equals itself."""
    return [len(one) for one in found] == [len(one) for one in expected] and all(
        one.shape == other.shape and one.dtype == other.dtype and _equal(one, other)
        for ours, theirs in zip(found, expected, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    )


def _fewer(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> str | None:
    """Says so if outputs are missing."""
    if len(found[0]) == len(expected[0]):
        return None
    return f"gives an output of its own: without it the forward returns {len(found[0])}, not {len(expected[0])}"


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.is_meta:
        return True
    if torch.equal(one, other) or not one.is_floating_point():
        return torch.equal(one, other)
    return bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


def described(error: NetoptError) -> str:
    """An error in one line, with the line of the model's code that it came from."""
    cause = error.__cause__ or error
    frames = [
        frame
        for frame in traceback.extract_tb(cause.__traceback__)
        if not {"torch", "netopt"}.intersection(Path(frame.filename).parts)
    ]
    text = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text
