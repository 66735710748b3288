"""Removes tokens that a corpus does not need: look, count, select, then do, all or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from netopt import batches, measure
from netopt.axes.find import axes_of
from netopt.batches import Inputs
from netopt.errors import ArgumentTypeError, InvalidArgumentError, NothingToPruneError, VerificationError
from netopt.model.restore import restored
from netopt.model.signals import UndoLog
from netopt.model.view import ModelView
from netopt.plan.hooks import complete
from netopt.prune.look import check_model
from netopt.prune.verify import trains
from netopt.prune.vocabulary.choice import choose
from netopt.prune.vocabulary.tables import find_tables, fixed_ids, make_plan
from netopt.prune.vocabulary.tokenizer import Words
from netopt.report import PruningReport, Row
from netopt.surgery import as_optimizers

__all__ = ["VocabularyReport", "prune_vocabulary"]

LENGTH = 8
"""Tokens of a text that is made up."""

TEXTS = 200
"""So many texts of the corpus are cut by both tokenizers, to compare."""


@dataclass(frozen=True)
class VocabularyReport(PruningReport):
    """What :func:`netopt.prune_vocabulary` did.

    Attributes:
        ids: The new number of each old token, ``-1`` of those that went; ``(old vocabulary,)``.
    """

    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long), repr=False, compare=False)


def prune_vocabulary(
    model: nn.Module,
    tokenizer: Any,
    corpus: Iterable[str],
    *,
    keep: float | None = None,
    coverage: float | None = None,
    always: Iterable[str | int] = (),
    round_to: int = 1,
    example_inputs: Inputs | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    progress: bool = True,
) -> VocabularyReport:
    """Removes tokens that ``corpus`` does not need from ``model`` and from ``tokenizer``, both in place.

    Rows of the embedding, of a tied or separate head and of its bias go, and the tokenizer, ``vocab_size`` and the ids
    of special tokens follow. A text whose tokens all stay is cut into the same ones, its hidden states are the same to
    the bit, and its logits those of the tokens kept. Tokens that a kept one is made of, special and added ones, and
    those that stand for bytes always stay; other texts are spelt with more tokens. Either all is carried out, or model,
    tokenizer and optimizer are left as they were.

    Args:
        model: Any module that looks tokens up in an embedding.
        tokenizer: A fast tokenizer of transformers, or one of ``tokenizers``: byte-pair encoding, WordPiece or Unigram.
        corpus: Texts of the kind that the model will read; read once.
        keep: How many tokens to keep, or as a fraction in ``(0, 1]`` which share of the table: first the most frequent
            of the corpus with what they need, then in the order of their ids. By default those that the corpus needs.
        coverage: Instead: keep the fewest that are this share of the corpus's tokens, in ``(0, 1]``.
        always: Tokens, or their ids, that stay in any case.
        round_to: Keep a multiple of this many, if there are more.
        example_inputs: Of one forward call; by default made from the tokens kept, or from a configuration.
        optimizer: One or several whose state follows.
        progress: Whether to show a progress bar.

    Returns:
        Parameters and bytes before and after, the plan, and ``ids``, from old numbers of tokens to new ones.

    Raises:
        NothingToPruneError: No token would go.
        InvalidArgumentError: An argument is out of range, the model has no table for the tokens, or the tokenizer is of
            an unknown kind.
        ArgumentTypeError: The tokenizer is no fast one, or the corpus holds something else than texts.
        EmptyDataError: The corpus is empty.
        OptimizerStateError: An optimizer cannot follow.
        VerificationError: The smaller model or tokenizer does something else; everything was put back.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = ["[UNK]", "a", "b", "c", "##b", "ab", "abc", "##c"]
        >>> ids = {word: place for place, word in enumerate(words)}
        >>> tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
        >>> report = prune_vocabulary(model, tokenizer, ["ab b a"], progress=False)
        >>> model, tokenizer.get_vocab_size(), report.ids.tolist()
        (Sequential(
          (0): Embedding(5, 4)
          (1): Linear(in_features=4, out_features=5, bias=True)
        ), 5, [0, 1, 2, -1, 3, 4, -1, -1])
    """
    _check(keep, coverage, round_to)
    optimizers = as_optimizers(optimizer)
    words = Words(tokenizer)
    view = check_model(model, () if example_inputs is None else example_inputs)
    texts, corpus = _first(corpus)
    counts = words.counts(corpus, progress)
    inputs = _inputs(model, example_inputs)
    # What the trace says does not depend on which tokens come in.
    axes = axes_of(view, inputs)
    tables = find_tables(view, axes, max(words.ids.values()) + 1)
    fixed = {*words.special, *(fixed_ids(view, tables.size) & {*words.ids.values()}), *_named(always, words)}
    most = int(keep * tables.size) if isinstance(keep, float) else keep
    kept = choose(words, counts, fixed, most=most, coverage=coverage, round_to=round_to)
    if len(kept) == tables.size:
        raise NothingToPruneError("every token stays: the corpus needs all; ask for fewer by keep= or coverage=.")
    plan, notes = complete(model, make_plan(view, axes, tables, kept), axes)
    ids = torch.full((tables.size,), -1).index_copy_(0, kept, torch.arange(len(kept)))
    numbers = {old: new for new, old in enumerate(kept.tolist())}
    small = words.narrowed(numbers)
    words.check(small, numbers, texts)
    trial = _Trial(view, inputs, tables.size, kept)
    operation = plan.prepare(view, optimizers)
    before = measure.cost(model, trial.before)

    def finish() -> VocabularyReport:
        words.put(small)
        trial.check()
        share = sum(count for place, count in counts.items() if place in numbers) / counts.total()
        return VocabularyReport(
            call="prune_vocabulary",
            before=before,
            after=measure.cost(model, trial.after),
            rows=tuple(Row(axis.name, axis.size, len(kept), exact=True) for axis in tables.axes),
            plan=plan,
            notes={name: note.text for name, note in notes.items()},
            settings={"keep": keep, "coverage": coverage, "covers": round(share, 4)},
            subject=model,
            ids=ids,
        )

    def work(log: UndoLog) -> VocabularyReport:
        log.callback(words.put_back, on=BaseException)
        return operation.run(finish)

    return UndoLog(whole=True).run(work)


def _check(keep: Any, coverage: Any, round_to: Any) -> None:
    for name, value in (("keep", keep), ("coverage", coverage)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(f"{name} must be a number, not {value!r}.")
        if not value > 0 or (isinstance(value, float) and not value <= 1) or (name == "coverage" and value > 1):
            raise InvalidArgumentError(f"{name} must be in (0, 1]{' or a count' * (name == 'keep')}, not {value}.")
    if keep is not None and coverage is not None:
        raise InvalidArgumentError("give keep or coverage, not both.")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise InvalidArgumentError(f"round_to must be a count from 1, not {round_to!r}.")


def _first(corpus: Any) -> tuple[list[str], Iterable[str]]:
    """Some texts, and all of them."""
    if isinstance(corpus, str) or not isinstance(corpus, Iterable):
        raise ArgumentTypeError(f"corpus must be texts, such as [text], not {type(corpus).__name__}.")
    left = iter(corpus)
    texts = list(islice(left, TEXTS))
    return [one for one in texts if isinstance(one, str)], chain(texts, left)


def _named(always: Iterable[str | int], words: Words) -> Iterator[int]:
    if isinstance(always, str):
        raise ArgumentTypeError("always must be tokens, not one; write [token].")
    known = {*words.ids.values()}
    for one in always:
        place = words.ids.get(one) if isinstance(one, str) else one
        if place not in known:
            raise InvalidArgumentError(f"always has {one!r}, which is no token of this tokenizer.")
        yield place


def _inputs(model: nn.Module, given: Inputs | None) -> Inputs:
    if given is not None:
        return given
    ids = torch.arange(LENGTH)[None].to(batches.device_of(model) or "cpu")
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return ids
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return {"input_ids": ids, "decoder_input_ids": ids} if both else {"input_ids": ids}


class _Trial:
    """One forward before and one after, on tokens that stay.

    Attributes:
        before: Inputs with old numbers.
        after: The same tokens by their new ones.
    """

    def __init__(self, view: ModelView, inputs: Inputs, size: int, kept: Tensor) -> None:
        self._view, self._size, self._kept = view, size, kept
        # The last ones, whose numbers change most.
        self.after = _with_tokens(inputs, lambda one: len(kept) - 1 - one % len(kept))
        self.before = _with_tokens(self.after, lambda one: kept.to(one.device)[one])
        self._expected = self._run(self.before)
        self._trains = trains(view.model, self.before)

    def check(self) -> None:
        """Compares the results; of dimensions that have shrunk, what is kept."""
        found = self._run(self.after)
        if self._trains and not trains(self._view.model, self.after):
            raise VerificationError("with fewer tokens the model does not run in training mode; all was put back.")
        if all(one.shape == other.shape for one, other in zip(self._expected, found, strict=True)) and any(
            one.dim() and one.shape[-1] == self._size for one in found
        ):
            raise VerificationError(
                f"the outputs have {self._size} entries in their last dimension, as many as the table, and keep them: "
                "what scores the tokens cannot follow; all was put back."
            )
        for one, other in zip(self._expected, found, strict=True):
            wanted = self._left(one, other.shape)
            if wanted.shape != other.shape or not torch.allclose(wanted, other, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise VerificationError(
                    "the model with fewer tokens computes something else, so that numbers of tokens are used in a way "
                    "that is not seen; everything was put back."
                )

    def _left(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        for dim in range(tensor.dim()):
            if tensor.dim() == len(shape) and tensor.shape[dim] != shape[dim]:
                tensor = tensor.index_select(dim, self._kept.to(tensor.device))
        return tensor

    def _run(self, inputs: Inputs) -> list[Tensor]:
        with restored(self._view), torch.no_grad():
            batches.set_eval(self._view.model)
            result = batches.call(self._view.model, inputs)
            leaves = [tensor for _, tensor in batches.tensors(result)]
        return [one.detach().clone() for one in leaves if one.is_floating_point()]


def _with_tokens(inputs: Inputs, change: Any) -> Inputs:
    """The same with other numbers of tokens: integers under a name that ends in ``input_ids``, or without a name."""
    leaves, spec = tree_flatten_with_path(inputs)
    named = isinstance(inputs, Mapping)
    made = []
    for path, leaf in leaves:
        name = str(getattr(path[0], "key", "")) if path else ""
        is_ids = (
            isinstance(leaf, Tensor)
            and leaf.dtype in (torch.int64, torch.int32)
            and (not named or name.endswith("input_ids"))
        )
        made.append(change(leaf) if is_ids else leaf)
    return tree_unflatten(made, spec)
