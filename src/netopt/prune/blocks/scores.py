"""What a block is worth: how far it turns what it is given, or what the model's outputs lose without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div
from torch.utils._pytree import tree_leaves

from netopt import batches
from netopt.errors import ArgumentTypeError, NonFiniteError, UnknownNameError
from netopt.importance.registry import name_of
from netopt.model.restore import restored
from netopt.prune.blocks.branches import Branch
from netopt.prune.blocks.stacks import Block
from netopt.prune.blocks.standins import Forward, Forwards, arguments
from netopt.prune.blocks.trial import Trials
from netopt.surgery import Operation

__all__ = ["BlockImportance", "check_importance", "ranking"]

BlockImportance: TypeAlias = "str | Callable[[str, nn.Module], float] | Mapping[str, float]"
"""``"influence"``, ``"loss"``, a function of a block's name and module, or the scores by name; higher means keep."""
NAMES = ("influence", "loss")

Batches = Callable[[], Iterable[Any]]


def check_importance(importance: Any) -> str:
    """The name of a criterion, for the report.

    Raises:
        UnknownNameError: There is none of this name.
        ArgumentTypeError: It is none.
    """
    others = "a function of a block's name and module, or scores by name"
    return name_of(importance, "importance of blocks", NAMES, others)


def ranking(
    model: nn.Module,
    blocks: Sequence[Block],
    importance: BlockImportance,
    data: Batches,
    trials: Trials,
    may: Callable[[Block], bool],
) -> Iterator[tuple[Block, float]]:
    """The blocks with their scores, what is worth least first; each is meant to be removed before the next is asked.

    Args:
        model: The model.
        blocks: That may go.
        importance: The criterion.
        data: Batches, any number of times.
        trials: Which know what stands in for each block.
        may: Whether a block may still go.
    """
    if importance == "loss":
        yield from _greedy(model, blocks, data, trials, may)
        return
    if importance == "influence":
        scores = influences(model, blocks, data, trials)
    elif isinstance(importance, Mapping):
        scores = {block.name: _given(importance, block.name) for block in blocks}
    else:
        assert callable(importance), "checked before"
        scores = {block.name: _number(importance(block.name, block.entries[0]), block.name) for block in blocks}
    for block in sorted(blocks, key=lambda one: scores[one.name]):
        yield block, scores[block.name]


def influences(model: nn.Module, blocks: Sequence[Block], data: Batches, trials: Trials) -> dict[str, float]:
    """One minus the cosine of what enters a block and what leaves it, meaned over tokens; by the block's name.

    A token is a vector along the last dimension, or a whole sample of more than three dimensions.
    """
    sums = {block.name: [0.0, 0] for block in blocks}
    entered: dict[str, Tensor] = {}

    def first(block: Block) -> Callable[[Forward], Forward]:
        def wrap(own: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                given = _first_float(arguments(args, kwargs).values())
                if given is not None:
                    entered[block.name] = given.detach().clone()
                return own(*args, **kwargs)

            return run

        return wrap

    def last(block: Block) -> Callable[[Forward], Forward]:
        branches = trials.kinds[block.name] == "zeros"

        def wrap(own: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                before = _first_float(arguments(args, kwargs).values()) if branches else None
                before = None if before is None else before.detach().clone()
                before = entered.get(block.name) if isinstance(block, Branch) else before
                result = own(*args, **kwargs)
                made, given = _first_float(tree_leaves(result)), entered.pop(block.name, None)
                if made is not None and before is not None and made.shape == before.shape:
                    made = before + made  # what it returns is added outside
                if given is not None and made is not None and given.shape == made.shape:
                    turned = 1 - cosine_similarity(_tokens(given), _tokens(made), dim=-1)
                    sums[block.name][0] += float(turned.sum())
                    sums[block.name][1] += turned.numel()
                return result

            return run

        return wrap

    changes = [Forwards([(block.modules[0], first(block))]) for block in blocks]
    changes += [Forwards([(block.modules[-1], last(block))]) for block in blocks]
    Operation(model, changes).dry_run(lambda: _run(model, data, lambda _result: None))
    return {name: _number(total / count if count else math.inf, name) for name, (total, count) in sums.items()}


def _greedy(
    model: nn.Module, blocks: Sequence[Block], data: Batches, trials: Trials, may: Callable[[Block], bool]
) -> Iterator[tuple[Block, float]]:
    """By the rise of the outputs' divergence when a block is skipped, found anew after each removal."""
    dense: list[Tensor] = []
    _run(model, data, lambda result: dense.append(_compared(result)))
    gone: list[Block] = []
    left, reached = list(blocks), 0.0
    while left := [block for block in left if may(block)]:
        losses = [trials.skipping([*gone, block], lambda: _divergence(model, data, dense)) for block in left]
        best = min(range(len(left)), key=lambda place: losses[place])
        block = left.pop(best)
        gone.append(block)
        yield block, _number(losses[best] - reached, block.name)
        reached = losses[best]


def _divergence(model: nn.Module, data: Batches, dense: Sequence[Tensor]) -> float:
    """Of the model's outputs from the dense one's: Kullback-Leibler of logits, else the relative squared error."""
    found: list[tuple[float, int]] = []

    def compare(result: Any) -> None:
        before, now = dense[len(found)], _compared(result)
        if _has_logits(result):
            rows = kl_div(now.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            found.append((float(rows.sum()), rows.numel()))
        else:
            size = max(float(before.square().sum()), 1e-12)
            found.append((float((now - before).square().sum()) / size * len(now), len(now)))

    _run(model, data, compare)
    return sum(total for total, _ in found) / max(sum(count for _, count in found), 1)


def _run(model: nn.Module, data: Batches, look: Callable[[Any], None]) -> None:
    with restored(model) as log:
        log.enter_context(torch.no_grad())
        batches.set_eval(model)
        for batch in data():
            look(batches.feed(model, batch))


def _has_logits(result: Any) -> bool:
    return not isinstance(result, Tensor) and batches.primary(result) is getattr(result, "logits", None)


def _compared(result: Any) -> Tensor:
    made = batches.primary(result).detach()
    return (made if made.dim() else made.view(1)).to(torch.promote_types(made.dtype, torch.float32)).clone()


def _tokens(tensor: Tensor) -> Tensor:
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide.flatten(1) if wide.dim() > 3 else wide.reshape(-1, wide.shape[-1])


def _first_float(leaves: Iterable[Any]) -> Tensor | None:
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def _given(scores: Mapping[str, Any], name: str) -> float:
    if name not in scores:
        raise UnknownNameError.of("score of the block", name, scores)
    return _number(scores[name], name)


def _number(score: Any, name: str) -> float:
    try:
        value = float(score)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"the score of `{name}` must be a number, not {type(score).__name__}.") from error
    if math.isnan(value):
        raise NonFiniteError(f"the score of `{name}` is not a number; check the model's activations and the data.")
    return value
