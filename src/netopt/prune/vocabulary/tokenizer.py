"""A tokenizer as data: what it makes of a corpus, and itself with fewer tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from netopt.errors import (
    ArgumentTypeError,
    EmptyDataError,
    InvalidArgumentError,
    MissingPackageError,
    VerificationError,
)
from netopt.progress import bar
from netopt.prune.vocabulary.segmentation import Segmentation, segmentation_of

__all__ = ["Words"]

TEXTS = 256
"""So many texts are encoded at a time."""


class Words:
    """The tokenizer of a model.

    Args:
        tokenizer: Of ``tokenizers``, or a fast one of transformers, which has such a one.

    Attributes:
        backend: Of ``tokenizers``.
        special: Ids that stay whatever the corpus: added tokens, bytes, the unknown one, those put around or behind.

    Raises:
        ArgumentTypeError: It is none of these.
        InvalidArgumentError: Its kind is not known, parts of it are Python code, or it puts ids that are no tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        library = _tokenizers()
        backend = (
            tokenizer if isinstance(tokenizer, library.Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        )
        if not isinstance(backend, library.Tokenizer):
            raise ArgumentTypeError(
                f"tokenizer must be one of the tokenizers library, or a fast one of transformers, not "
                f"{type(tokenizer).__name__}."
            )
        self.backend: Any = backend
        try:
            self._state = self.backend.to_str()
        except Exception as error:  # the library raises bare exceptions
            raise InvalidArgumentError(f"the tokenizer cannot be written down: {error}") from error
        self._data: dict[str, Any] = json.loads(self._state)
        self._plain = library.Tokenizer.from_str(self._state)
        self._plain.no_padding()
        self._plain.no_truncation()
        self._segmentation: Segmentation = segmentation_of(self._data["model"])
        self.special = {self.ids[one] for one in (*self._segmentation.always(), *self._added) if one in self.ids}
        self.special |= self._put_around()

    @cached_property
    def ids(self) -> dict[str, int]:
        """Of all tokens, added ones among them."""
        return {**self._segmentation.ids, **self._added}

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {place: token for token, place in self.ids.items()}

    @property
    def _added(self) -> dict[str, int]:
        return {one["content"]: one["id"] for one in self._data["added_tokens"]}

    def _put_around(self) -> set[int]:
        """Ids that the post-processor puts around a text, and padding behind it."""
        found = [self._data["padding"]["pad_id"]] if self._data.get("padding") else []
        _renumbered(self._data.get("post_processor"), lambda one: found.append(one) or one)
        lost = {*found} - {*self.ids.values()}
        if lost:
            raise InvalidArgumentError(
                f"the tokenizer's post-processor or padding puts the ids {sorted(lost)}, which are no tokens of it; "
                f"correct tokenizer.post_processor, or enable_padding(pad_id=...)."
            )
        return {*found}

    def counts(self, corpus: Iterable[str], progress: bool) -> Counter[int]:
        """How often the corpus has each token.

        Raises:
            ArgumentTypeError: The corpus holds something else than texts.
            EmptyDataError: There is no token in it.
        """
        found: Counter[int] = Counter()
        for encoded in self._encoded(corpus, progress):
            found.update(encoded)
        if not found:
            raise EmptyDataError("the corpus has no token; give texts of the kind that the model will read.")
        return found

    def _encoded(self, corpus: Iterable[str], progress: bool) -> Iterator[list[int]]:
        texts = iter(bar(corpus, "corpus", shown=progress, unit="text"))
        while some := list(islice(texts, TEXTS)):
            wrong = next((one for one in some if not isinstance(one, str)), None)
            if wrong is not None:
                raise ArgumentTypeError(f"corpus must be texts, not {type(wrong).__name__}.")
            for encoding in self._plain.encode_batch(some, add_special_tokens=False):
                yield encoding.ids

    def closed(self, wanted: Iterable[int]) -> list[int]:
        """Those ids and the ones that they need, each once."""
        found: dict[int, None] = {}
        for place in wanted:
            if place in found:
                continue
            found[place] = None
            token = self._tokens[place]
            if place in self.special and token not in self._segmentation.ids:
                continue
            found.update(dict.fromkeys(self.ids[one] for one in self._segmentation.needs(token) if one in self.ids))
        return list(found)

    def narrowed(self, ids: Mapping[int, int]) -> str:
        """Its JSON with these ids alone, each under its new number.

        Raises:
            InvalidArgumentError: The tokenizer cannot be read again.
        """
        kept = {token: ids[place] for token, place in self._segmentation.ids.items() if place in ids}
        data = {**self._data, "model": self._segmentation.narrowed(kept)}
        data["added_tokens"] = [{**one, "id": ids[one["id"]]} for one in self._data["added_tokens"]]
        data["post_processor"] = _renumbered(self._data.get("post_processor"), ids.__getitem__)
        if data.get("padding"):
            data["padding"] = {**data["padding"], "pad_id": ids[data["padding"]["pad_id"]]}
        text = json.dumps(data, ensure_ascii=False)
        try:
            _tokenizers().Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare exceptions
            raise InvalidArgumentError(f"the tokenizer cannot be made smaller: {error}") from error
        return text

    def check(self, text: str, ids: Mapping[int, int], texts: Sequence[str]) -> None:
        """Compares what both make of texts whose tokens all stay.

        Raises:
            VerificationError: They differ.
        """
        small = _tokenizers().Tokenizer.from_str(text)
        small.no_padding()
        small.no_truncation()
        for one in texts:
            for special in (False, True):
                before = self._plain.encode(one, add_special_tokens=special).ids
                after = small.encode(one, add_special_tokens=special).ids
                if all(place in ids for place in before) and [ids[place] for place in before] != after:
                    raise VerificationError(f"the smaller tokenizer cuts {one[:60]!r} otherwise; nothing was changed")

    def put(self, text: str) -> None:
        """Makes the tokenizer what the JSON says, in place."""
        self.backend.__setstate__(text.encode())

    def put_back(self) -> None:
        """Makes the tokenizer what it was."""
        self.put(self._state)


def _renumbered(part: Any, number: Callable[[int], int]) -> Any:
    """A post-processor with new numbers: of ``{"ids": [...]}`` and of pairs of a token and its id."""
    if isinstance(part, dict):
        return {
            key: [*map(number, value)] if key == "ids" else _renumbered(value, number) for key, value in part.items()
        }
    if isinstance(part, list):
        if [type(one) for one in part] == [str, int]:
            return [part[0], number(part[1])]
        return [_renumbered(one, number) for one in part]
    return part


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingPackageError(
            "vocabularies are pruned with tokenizers, which is not installed; pip install tokenizers."
        ) from error
    return tokenizers
