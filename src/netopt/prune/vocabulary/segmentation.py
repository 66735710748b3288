"""Which tokens a token needs, so that a text made of kept tokens is cut into the same ones afterwards.

- Byte-pair encoding joins neighbours in the order of its merges. A token comes about from its characters, by merges of
  its own alone, so that with the tokens on the way its text is joined as before: of the merges left, the first that
  fits is the one that fitted first.
- WordPiece takes the longest piece that fits, and Unigram the pieces of greatest probability: what is best of all
  stays best of the kept. Unigram values an unknown character by the least likely piece, which therefore stays.

Single characters of a kept token stay too, so that a word whose token went is spelt out and not unknown.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from netopt.errors import InvalidArgumentError

__all__ = ["Segmentation", "segmentation_of"]


class Segmentation(ABC):
    """How a tokenizer cuts words, from the ``model`` of its JSON.

    Attributes:
        ids: Of its tokens.
    """

    ids: Mapping[str, int]

    @abstractmethod
    def needs(self, token: str) -> Iterator[str]:
        """Tokens without which this one would not come about, and those it is spelt out with."""

    @abstractmethod
    def always(self) -> Iterator[str]:
        """Tokens that stay whatever the corpus."""

    @abstractmethod
    def narrowed(self, kept: Mapping[str, int]) -> dict[str, Any]:
        """The same for these tokens alone, under these ids, as JSON."""


def segmentation_of(model: Mapping[str, Any]) -> Segmentation:
    """Reads the ``model`` of a tokenizer's JSON.

    Raises:
        InvalidArgumentError: It is of a kind that is not known.
    """
    kind = model.get("type")
    if kind not in _KINDS:
        raise InvalidArgumentError(
            f"the tokenizer is of kind {kind!r}, and of {', '.join(_KINDS)} it is known which tokens need which."
        )
    return _KINDS[kind](model)


class _Pairs(Segmentation):
    """Byte-pair encoding."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model, self.ids = model, model["vocab"]
        self._merges = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model["merges"]]
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""

    def needs(self, token: str) -> Iterator[str]:
        parts = self._characters(token)
        yield from parts
        while len(parts) > 1:
            pairs = [(self._ranks.get((one, other)), place) for place, (one, other) in enumerate(pairwise(parts))]
            ranked = [(rank, place) for rank, place in pairs if rank is not None]
            if not ranked:
                return
            _, place = min(ranked)
            parts[place : place + 2] = [self._joined(parts[place], parts[place + 1])]
            yield parts[place]

    def always(self) -> Iterator[str]:
        yield from (one for one in self.ids if len(one) == 1 and self._is_byte_level)
        yield from _bytes(self.ids)
        yield from _known(self.ids, self._model.get("unk_token"))

    @property
    def _is_byte_level(self) -> bool:
        """Whether characters stand for bytes, of which there are 256."""
        return sum(len(one) == 1 for one in self.ids) <= 256

    def narrowed(self, kept: Mapping[str, int]) -> dict[str, Any]:
        merges = [
            [one, other]
            for one, other in self._merges
            if one in kept and other in kept and self._joined(one, other) in kept
        ]
        return {**self._model, "vocab": dict(kept), "merges": merges}

    def _characters(self, token: str) -> list[str]:
        text, end = token, ""
        if self._suffix and token.endswith(self._suffix) and token != self._suffix:
            text, end = token.removesuffix(self._suffix), self._suffix
        if not text:
            return []
        first = self._prefix and text.startswith(self._prefix)
        text = text.removeprefix(self._prefix) if first else text
        parts = [f"{self._prefix if first or place else ''}{one}" for place, one in enumerate(text)]
        parts[-1] += end
        return parts

    def _joined(self, one: str, other: str) -> str:
        return one + other.removeprefix(self._prefix)


class _Pieces(Segmentation):
    """WordPiece."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model, self.ids = model, model["vocab"]
        self._prefix = model.get("continuing_subword_prefix") or ""

    def needs(self, token: str) -> Iterator[str]:
        inner = bool(self._prefix) and token.startswith(self._prefix)
        for place, one in enumerate(token.removeprefix(self._prefix) if inner else token):
            yield f"{self._prefix if inner or place else ''}{one}"

    def always(self) -> Iterator[str]:
        yield from _known(self.ids, self._model.get("unk_token"))

    def narrowed(self, kept: Mapping[str, int]) -> dict[str, Any]:
        return {**self._model, "vocab": dict(kept)}


class _Unigram(Segmentation):
    """Pieces with probabilities."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self._scores = dict(model["vocab"])
        self.ids = {piece: place for place, (piece, _) in enumerate(model["vocab"])}

    def needs(self, token: str) -> Iterator[str]:
        yield from token

    def always(self) -> Iterator[str]:
        yield from _bytes(self.ids)
        unknown = self._model.get("unk_id")
        pieces = [piece for piece, place in self.ids.items() if place != unknown]
        yield from [] if unknown is None else [self._model["vocab"][unknown][0]]
        if pieces:
            yield min(pieces, key=self._scores.__getitem__)

    def narrowed(self, kept: Mapping[str, int]) -> dict[str, Any]:
        ordered = sorted(kept, key=kept.__getitem__)
        unknown = self._model.get("unk_id")
        place = None if unknown is None else ordered.index(self._model["vocab"][unknown][0])
        return {**self._model, "vocab": [[piece, self._scores[piece]] for piece in ordered], "unk_id": place}


def _bytes(ids: Mapping[str, int]) -> Iterator[str]:
    """Tokens that stand for a byte, for what no other spells."""
    return (one for one in (f"<0x{byte:02X}>" for byte in range(256)) if one in ids)


def _known(ids: Mapping[str, int], token: str | None) -> Iterator[str]:
    return iter([token] if token is not None and token in ids else [])


_KINDS = {"BPE": _Pairs, "WordPiece": _Pieces, "Unigram": _Unigram}
