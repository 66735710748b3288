"""Calibration batches from files: what every ``data=`` takes, from lines of text or a folder of pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from netopt.errors import EmptyDataError, InvalidArgumentError, MissingPackageError

__all__ = ["images", "texts"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


def texts(
    tokenizer: Any,
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    samples: int = 128,
    length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Cuts text into windows of ``length`` tokens and draws ``samples`` of them; no padding.

    Args:
        tokenizer: A function from a text to ``{"input_ids": [...]}``, such as a Hugging Face tokenizer.
        source: A file, several files, or lines of text; an entry that is no existing file is a text.
        samples: How many windows; fewer where there is less text.
        length: Tokens a window.
        batch_size: Windows a batch.
        seed: Of the draw.

    Returns:
        Batches ``{"input_ids": (batch, length), "attention_mask": (batch, length)}``, int64.

    Raises:
        InvalidArgumentError: A number is not positive.
        EmptyDataError: The text has fewer than ``length`` tokens.

    Example:
        >>> (batch,) = texts(
        ...     lambda text: {"input_ids": list(text.encode())}, ["a line of text"] * 9, samples=4, length=8
        ... )
        >>> batch["input_ids"].shape
        torch.Size([4, 8])
    """
    _check_positive(samples=samples, length=length, batch_size=batch_size)
    entries = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    tokens = [token for entry in entries for token in tokenizer(_text_of(entry))["input_ids"]]
    count = len(tokens) // length
    if not count:
        raise EmptyDataError(
            f"the text has {len(tokens)} tokens, and a window needs {length}; give more or a shorter length."
        )
    windows = torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)
    drawn = windows[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in drawn.split(batch_size)]


def images(
    folder: str | os.PathLike[str],
    *,
    size: int = 224,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    samples: int = 128,
    batch_size: int = 16,
    seed: int = 0,
) -> list[Tensor]:
    """Reads pictures below a folder: shorter side to ``size``, centre crop, scaled to ``[0, 1]`` and normalised.

    Args:
        folder: Searched with all its sub-folders, in the order of names.
        size: Pixels a side.
        mean: Of each channel, subtracted.
        std: Of each channel, divided by.
        samples: How many pictures are drawn.
        batch_size: Pictures a batch.
        seed: Of the draw.

    Returns:
        Batches ``(batch, 3, size, size)``, float32.

    Raises:
        MissingPackageError: Pillow is not installed.
        InvalidArgumentError: A number is not positive.
        EmptyDataError: The folder has no picture.
    """
    _check_positive(samples=samples, size=size, batch_size=batch_size)
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError("images are read with Pillow, which is not installed; pip install pillow.") from error
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise EmptyDataError(f"{os.fspath(folder)!r} has no picture ({', '.join(sorted(SUFFIXES))}).")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:samples]
    centre, spread = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    found = []
    for index in order.tolist():
        with Image.open(paths[index]) as picture:
            found.append((_cropped(picture.convert("RGB"), size) - centre) / spread)
    return list(torch.stack(found).split(batch_size))


def _cropped(picture: Any, size: int) -> Tensor:
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    cut = picture.resize((width, height)).crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8)
    return pixels.view(size, size, 3).permute(2, 0, 1) / 255


def _text_of(entry: str | os.PathLike[str]) -> str:
    if isinstance(entry, os.PathLike) or (len(entry) < 256 and "\n" not in entry and Path(entry).is_file()):
        return Path(entry).read_text(encoding="utf-8", errors="replace")
    return entry


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InvalidArgumentError(f"{name}={value} must be at least 1.")
