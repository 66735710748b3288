"""Removes whole blocks of a model: look, try, score, select, then do, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from netopt import batches, measure
from netopt.axes import Outputs
from netopt.batches import Batch, Inputs
from netopt.errors import ArgumentTypeError, InvalidArgumentError, NothingToPruneError, UnknownNameError, percent
from netopt.model.view import ModelView
from netopt.plan.blocks import BlockPlan, notes_of_hooks
from netopt.prune.blocks.branches import Branch, find_branches, make_branch_plan
from netopt.prune.blocks.follow import Followers, make_block_plan
from netopt.prune.blocks.scores import BlockImportance, check_importance, ranking
from netopt.prune.blocks.stacks import Block, Stack, find_stacks, name_frozen
from netopt.prune.blocks.trial import Trials
from netopt.prune.look import Where, check_model
from netopt.prune.repair import RepairReport, copy_for_repair, repaired
from netopt.prune.verify import Forward
from netopt.report import PruningReport, Row
from netopt.selectors import Selector, chosen
from netopt.surgery import as_optimizers

__all__ = ["check_real", "plan_blocks", "predicted", "prune_blocks"]

Amount: TypeAlias = "float | Mapping[str, float]"

Kind: TypeAlias = Literal["blocks", "branches"]
"""Whether whole blocks go, or the attention or the feed-forward part alone."""


def prune_blocks(
    model: nn.Module,
    example_inputs: Inputs,
    amount: Amount | None = None,
    *,
    kind: Kind = "blocks",
    max_params: float | None = None,
    max_macs: float | None = None,
    importance: BlockImportance = "influence",
    data: Iterable[Batch] | None = None,
    include: Selector = None,
    exclude: Selector = None,
    outputs: Outputs = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    repair: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> PruningReport:
    """Removes the least important blocks of ``model``, in place: layers of a transformer, residual blocks of a network.

    A block is an entry of a ``ModuleList`` or ``Sequential`` (of several gone through together) that returns what it is
    given with something added. The smaller model computes, bit for bit, what the model with identities in place of
    these blocks does; a block is removed only where a trial shows that. At least one entry stays in every list. Either
    everything is carried out or ``model`` and ``optimizer`` are left as they were.

    Args:
        model: Any module; its forward is run, never parsed. Its train/eval mode is kept.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs, of one forward call.
        amount: Fraction of the blocks that may go, in :math:`[0, 1)`, rounded to the nearest count; or a count;
            or either by name or pattern of stacks (``{"*.encoder.*": 2}``, of each that fits), of which the others stay
            as they are.
        kind: ``"blocks"``, or ``"branches"``: the attention or the feed-forward part alone of a layer that normalises
            before it (its branch from the stream and back), replaced by modules that hold nothing and return zeros.
            The smaller model then computes, bit for bit, what the model whose branches return zeros does.
        max_params: Instead of ``amount``: keep at most this fraction of the model's parameters, in :math:`(0, 1]`.
        max_macs: Instead of ``amount``: keep at most this fraction of its multiply-accumulate operations.
        importance: ``"influence"``, one minus the cosine of what enters and what leaves a block; ``"loss"``, the rise
            of the outputs' divergence when it is skipped, found anew after each removal; a function of a block's name
            and module; or the scores by name. Higher means keep.
        data: Batches to score on; by default ``example_inputs``.
        include: Names, patterns, types, modules, or predicates of blocks, or lists of them, that may go. Those named
            here need no skip connection.
        exclude: The same, that all stay.
        outputs: Which results count; see :func:`netopt.find_axes`.
        optimizer: One or several, which forget the parameters that are removed and their state.
        repair: Refit the weights that are left to what the model put out before, on ``data``, once the smaller model
            has been compared; see :func:`netopt.repair`. It needs a copy of the model meanwhile.
        verify: Compare the smaller model with the one that skips all removed blocks together.
        progress: Whether to show a progress bar on long work.

    Returns:
        Parameters, MACs and bytes before and after, one row a stack, the plan, and what was frozen and why.

    Raises:
        NothingToPruneError: No block may go; the message lists the reasons.
        InvalidArgumentError: An argument is out of range, or not exactly one of the three amounts is given.
        MissingDataError: ``repair=True`` without ``data``.
        OptimizerStateError: An optimizer cannot forget a part of its parameters.
        VerificationError: The smaller model computes something else; everything was put back.

    References:
        ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (Men et al., 2024),
        https://arxiv.org/abs/2403.03853

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> net = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        >>> report = prune_blocks(net, torch.randn(1, 5, 8), amount=0.25, progress=False)
        >>> len(net.layers), report.rows[0].before, report.rows[0].after
        (3, 4, 3)
    """
    optimizers = as_optimizers(optimizer)
    data = list(batches.iterate(data)) if isinstance(data, Iterator) else data  # for scores, and again for repair
    call = _Call(model, example_inputs, _Budget(amount, max_params, max_macs, kind), importance, data, progress)
    dense = copy_for_repair(model, repair or False, data, "remove")
    decision = call.decide(include, exclude, outputs)
    operation = decision.plan.prepare(model, optimizers)
    expected = None
    if verify:
        expected = decision.trials.skipping(decision.removed, decision.trials.outputs)

    def finish() -> PruningReport:
        if expected is not None:
            decision.trials.check(decision.removed, expected)
        outcome = None if dense is None else repaired(model, decision.plan, dense, data, progress)
        return call.report(decision, outcome)

    return operation.run(finish)


def plan_blocks(
    model: nn.Module,
    example_inputs: Inputs,
    amount: Amount | None = None,
    *,
    kind: Kind = "blocks",
    max_params: float | None = None,
    max_macs: float | None = None,
    importance: BlockImportance = "influence",
    data: Iterable[Batch] | None = None,
    include: Selector = None,
    exclude: Selector = None,
    outputs: Outputs = None,
    progress: bool = True,
) -> BlockPlan:
    """Decides what :func:`prune_blocks` would remove, and does not do it.

    The arguments are those of :func:`prune_blocks`. What the smaller model costs is found by carrying the plan out,
    measuring, and putting everything back.

    Returns:
        The plan, with parameters, MACs and bytes before and after in ``plan.predicted``.

    Raises:
        NothingToPruneError: No block may go; the message lists the reasons.
        InvalidArgumentError: An argument is out of range, or not exactly one of the three amounts is given.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> net = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        >>> scores = {f"layers.{place}": place for place in range(4)}
        >>> plan = plan_blocks(net, torch.randn(1, 5, 8), amount=1, importance=scores, progress=False)
        >>> print(plan)
        layers 4 -> 3 (without 0)
        >>> len(net.layers)
        4
    """
    call = _Call(model, example_inputs, _Budget(amount, max_params, max_macs, kind), importance, data, progress)
    plan = call.decide(include, exclude, outputs).plan
    return plan.with_prediction(predicted(call.before, plan.prepare(model).dry_run(call.cost)))


@dataclass(frozen=True)
class _Budget:
    """How much of what is to be removed: exactly one of the first three is given."""

    amount: Amount | None
    max_params: float | None
    max_macs: float | None
    kind: Kind = "blocks"

    def check(self) -> None:
        if self.kind not in ("blocks", "branches"):
            raise UnknownNameError.of("kind of blocks", self.kind, ("blocks", "branches"))
        given = self.given()
        if len(given) != 1:
            got = " and ".join(given) if given else "none"
            raise InvalidArgumentError(f"give exactly one of amount, max_params and max_macs, not {got}.")
        ((name, value),) = given.items()
        if isinstance(value, Mapping) and name == "amount":
            for own in value.values():
                _Budget(own, None, None).check()
            if not value or any(isinstance(own, Mapping) for own in value.values()):
                raise InvalidArgumentError("amount by name needs a number for each name or pattern of a stack.")
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(f"{name} must be a number, not {value!r}.")
        if name != "amount" and not 0 < value <= 1:
            raise InvalidArgumentError(f"{name} must be a fraction of the model's, in (0, 1], not {value}.")
        if name == "amount" and (value < 0 or (isinstance(value, float) and not value < 1)):
            hint = percent(value)
            raise InvalidArgumentError(f"amount must be a fraction in [0, 1) or a count of blocks, not {value}{hint}.")

    def given(self) -> dict[str, Any]:
        """What was given, by name."""
        return {name: value for name, value in vars(self).items() if name != "kind" and value is not None}


@dataclass(frozen=True)
class _Decision:
    """A plan and what it was made from."""

    stacks: Sequence[Stack]
    removed: Sequence[Block]
    scores: Mapping[str, float]
    frozen: Mapping[str, str]
    plan: BlockPlan
    trials: Trials


class _Call:
    """One call: its checked arguments, and what the model cost before."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        budget: _Budget,
        importance: BlockImportance,
        data: Iterable[Batch] | None,
        progress: bool,
    ) -> None:
        budget.check()
        self.view = check_model(model, example_inputs)
        check_real(self.view, "blocks")
        self._budget, self._importance, self._progress = budget, importance, progress
        self._name = check_importance(importance)
        self._inputs, self._data, self._kind = example_inputs, data, budget.kind
        self.before = self.cost()

    def cost(self) -> measure.Cost:
        """What the model costs now."""
        return measure.cost(self.view.model, self._inputs)

    def decide(self, include: Selector, exclude: Selector, outputs: Outputs) -> _Decision:
        """Finds the blocks, tries each, scores them, and selects."""
        model = self.view.model
        forward = Forward(self.view, self._inputs, Where(outputs=outputs).counted)
        wanted = chosen(model, include, exclude)
        named = None if include is None or self._kind == "branches" else wanted
        stacks, frozen = find_stacks(forward, named)
        trials = Trials(self.view, forward, stepping=self._kind == "branches")
        followers: list[Followers] = []
        if self._kind == "branches":
            stacks, without = find_branches(forward, stacks)
            frozen |= without
            self._try_branches(stacks, trials, wanted)
        else:
            followers = self._tried(stacks, trials, wanted)
        frozen |= {block.name: block.frozen for stack in stacks for block in stack.blocks if block.frozen}
        free = [block for stack in stacks for block in stack.free]
        if not free:
            raise NothingToPruneError(_nothing(frozen))
        removed, scores = self._selected(stacks, free, followers, trials)
        plan = self._plan(stacks, followers, removed)
        return _Decision(stacks, removed, scores, name_frozen(stacks, frozen), plan, trials)

    def _tried(self, stacks: Sequence[Stack], trials: Trials, wanted: Callable[[str], bool]) -> list[Followers]:
        """Freezes what may not go, and says what follows each stack; of stacks in one another the inner ones count."""
        followers = []
        inner: list[str] = []
        bar = tqdm(total=sum(len(one.free) for one in stacks), desc="blocks", disable=not self._progress, leave=False)
        with bar:
            for stack in stacks:
                for block in stack.free:
                    if not wanted(block.name):
                        block.frozen = "is excluded"
                    elif any(f"{name}.".startswith(f"{block.name}.") for name in inner):
                        block.frozen = "holds blocks of its own"
                following = Followers.of(self.view, stack) if stack.free else Followers(stack)
                for block in stack.free:
                    block.frozen = trials.settle(block, following)
                    bar.update()
                if stack.free:
                    inner += stack.lists
                followers.append(following)
        return followers

    def _try_branches(self, stacks: Sequence[Stack], trials: Trials, wanted: Callable[[str], bool]) -> None:
        """Freezes branches that may not go."""
        free = [block for stack in stacks for block in stack.free if isinstance(block, Branch)]
        for branch in tqdm(free, desc="branches", disable=not self._progress, leave=False):
            excluded = None if wanted(branch.name) else "is excluded"
            branch.frozen = excluded or trials.settle_branch(branch)

    def _plan(self, stacks: Sequence[Stack], followers: Sequence[Followers], removed: Sequence[Block]) -> BlockPlan:
        if self._kind == "branches":
            return make_branch_plan(self.view, removed)
        return make_block_plan(self.view, followers, _places(stacks, removed))

    def _selected(
        self, stacks: Sequence[Stack], free: Sequence[Block], followers: Sequence[Followers], trials: Trials
    ) -> tuple[list[Block], dict[str, float]]:
        """The blocks that go, and the scores that are known."""
        room = {stack.name: min(len(stack.free), stack.size - 1) for stack in stacks}
        most = sum(room.values())
        if isinstance(self._budget.amount, Mapping):
            room = _counts(stacks, room, self._budget.amount)
        home = {block.name: stack.name for stack in stacks for block in stack.blocks}
        removed: list[Block] = []
        scores: dict[str, float] = {}
        enough = self._enough(stacks, len(free), room, followers)

        def may(block: Block) -> bool:
            return room[home[block.name]] > 0

        for block, score in ranking(self.view.model, free, self._importance, self._batches, trials, may):
            if enough(removed):
                break
            scores[block.name] = score
            if may(block):
                room[home[block.name]] -= 1
                removed.append(block)
        if not enough(removed):
            raise NothingToPruneError(
                f"{self._budget.given()} cannot be met: {most} blocks may go, and that is not enough; prune neurons "
                "besides, or ask for less."
            )
        return removed, scores

    def _enough(
        self, stacks: Sequence[Stack], count: int, room: Mapping[str, int], followers: Sequence[Followers]
    ) -> Callable[[Sequence[Block]], bool]:
        amount, cost, most = self._budget.amount, self.before, sum(room.values())
        if isinstance(amount, Mapping):
            return lambda removed: len(removed) >= most
        if amount is not None:
            target = amount if isinstance(amount, int) else min(round(amount * count), most)
            if target > most:
                raise InvalidArgumentError(f"amount={amount} blocks are to go, and only {most} may{percent(amount)}.")
            return lambda removed: len(removed) >= target

        def met(removed: Sequence[Block]) -> bool:
            plan = self._plan(stacks, followers, removed)
            operation = plan.prepare(self.view.model)
            if self._budget.max_params is not None:
                count_now = operation.dry_run(lambda: measure.count_parameters(self.view.model))
                return count_now <= self._budget.max_params * cost.params
            now = operation.dry_run(lambda: measure.count_macs(self.view.model, self._inputs))
            return now <= (self._budget.max_macs or 1) * (cost.macs or 0)

        return met

    def _batches(self) -> Iterable[Any]:
        if self._data is None:
            inputs = self._inputs
            return [(inputs, None)] if isinstance(inputs, tuple) else [inputs]
        return batches.iterate(self._data)

    def report(self, decision: _Decision, repair: RepairReport | None = None) -> PruningReport:
        """The report, of the model as it is now."""
        after = self.cost()
        settings = {**self._budget.given(), "importance": self._name}
        return PruningReport(
            call="prune_blocks",
            before=self.before,
            after=after,
            rows=tuple(_row(stack, decision) for stack in decision.stacks if stack.free),
            plan=cast("Any", decision.plan.with_prediction(predicted(self.before, after))),
            frozen=decision.frozen,
            settings=settings,
            notes=notes_of_hooks(self.view.model),
            repair=repair,
            subject=self.view.model,
        )


def _row(stack: Stack, decision: _Decision) -> Row:
    gone = [_place(block) for block in decision.removed if block in stack.blocks]
    known = [decision.scores[block.name] for block in stack.blocks if block.name in decision.scores]
    note = f"without {', '.join(map(str, sorted(gone)))}" if gone else ""
    scores = f"scores {min(known):.2g} to {max(known):.2g}" if known else ""
    name, left = stack.name or "the model", stack.size - len(gone)
    return Row(name, stack.size, left, exact=True, note="; ".join(filter(None, (note, scores))))


def _counts(stacks: Sequence[Stack], room: Mapping[str, int], amount: Mapping[str, float]) -> dict[str, int]:
    """How many blocks go, by the stack's name; the first name or pattern that fits counts."""
    found, used = dict.fromkeys(room, 0), set[str]()
    for stack in stacks:
        fits = [key for key in amount if key == stack.name or fnmatchcase(stack.name, key)]
        used.update(fits if stack.free else ())
        if fits and stack.free:
            own, most = amount[fits[0]], room[stack.name]
            if isinstance(own, int) and own > most:
                raise InvalidArgumentError(
                    f"{own} blocks are to go from `{stack.name}`, and only {most} may{percent(own)}."
                )
            found[stack.name] = own if isinstance(own, int) else min(round(own * len(stack.free)), most)
    if set(amount) - used:
        known = ", ".join(stack.name or "''" for stack in stacks if stack.free)
        raise InvalidArgumentError(f"amount names {sorted(set(amount) - used)}, and the stacks are {known}.")
    return found


def _place(block: Block) -> int | str:
    return block.name if isinstance(block, Branch) else block.place


def _places(stacks: Sequence[Stack], removed: Sequence[Block]) -> dict[str, list[int]]:
    return {stack.name: [block.place for block in removed if block in stack.blocks] for stack in stacks}


def check_real(view: ModelView, what: str) -> None:
    """What is removed is judged by running it, eagerly and with values."""
    if any(tensor.is_meta for tensor in view.tensors.values()):
        raise InvalidArgumentError(
            "the model is on the meta device, where nothing can be compared; plan on a real one, and apply the plan."
        )
    for name, module in view.modules.items():
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            raise InvalidArgumentError(f"{name or 'the model'!r} is compiled; remove {what} before compiling.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in [view.model]):
        raise InvalidArgumentError("the model is scripted, and its lists cannot change; prune before scripting.")


def _nothing(frozen: Mapping[str, str]) -> str:
    if not frozen:
        return (
            "this model has no ModuleList or Sequential of several blocks, so there is none to remove; prune_neurons "
            "makes any layer smaller."
        )
    lines = [f"  {name}  {reason}" for name, reason in list(frozen.items())[:20]]
    return "\n".join(["no block of this model may be removed:", *lines])


def predicted(before: measure.Cost, after: measure.Cost) -> dict[str, int]:
    """What a plan says of the cost before and after."""
    found = {}
    for kind in ("params", "macs", "bytes"):
        found[f"{kind}_before"], found[f"{kind}_after"] = getattr(before, kind), getattr(after, kind)
    return found
