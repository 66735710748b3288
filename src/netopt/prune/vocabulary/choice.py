"""Which tokens stay: those that always do, then the most frequent of a corpus, each with what it needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from netopt.errors import InvalidArgumentError
from netopt.prune.vocabulary.tokenizer import Words

__all__ = ["choose"]


def choose(
    words: Words, counts: Counter[int], fixed: set[int], *, most: int | None, coverage: float | None, round_to: int
) -> Tensor:
    """Numbers of the tokens that stay, ascending.

    Args:
        words: The tokenizer.
        counts: How often a corpus has each token.
        fixed: Tokens that stay in any case.
        most: Keep so many, where there are as many; by default those that the corpus needs.
        coverage: Of the corpus's tokens, the share that counts.
        round_to: Keep a multiple of this many.

    Raises:
        InvalidArgumentError: More than ``most`` stay in any case.
    """
    wanted = _covering(counts, 1.0 if coverage is None else coverage)
    rest = sorted({*words.ids.values()} - {*wanted})
    kept = {*words.closed(sorted(fixed))}
    if most is None:
        kept.update(words.closed(wanted))
        return _filled(words, kept, rest, len(kept) + -len(kept) % round_to)
    if len(kept) > most:
        raise InvalidArgumentError(
            f"keep is {most} tokens, and {len(kept)} stay in any case: special, added and byte tokens; keep more."
        )
    return _filled(words, kept, [*wanted, *rest], most // round_to * round_to or most)


def _covering(counts: Counter[int], coverage: float) -> list[int]:
    """The fewest tokens that are this share of all, the most frequent first."""
    needed, passed, found = math.ceil(coverage * counts.total() - 1e-9), 0, []
    for place, count in sorted(counts.items(), key=lambda one: (-one[1], one[0])):
        if passed >= needed:
            break
        found.append(place)
        passed += count
    return found


def _filled(words: Words, kept: set[int], order: Iterable[int], most: int) -> Tensor:
    for place in order:
        if len(kept) >= most:
            break
        more = {*words.closed([place])} - kept
        if len(kept) + len(more) <= most:
            kept |= more
    return torch.tensor(sorted(kept))
