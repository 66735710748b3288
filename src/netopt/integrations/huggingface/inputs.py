"""Inputs of one forward call, made from a model's configuration."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netopt.batches import Inputs, call, device_of
from netopt.errors import CheckpointError, EmptyDataError, ForwardError, InvalidArgumentError
from netopt.integrations.huggingface.source import import_transformers

__all__ = ["TextBatches", "inputs_of"]

TOKENS = 16
"""Length of a text that is made up, and of what a decoder begins with."""
LENGTH, ROWS = 128, 8
"""Tokens of a row of a batch of texts, and its rows."""


def inputs_of(model: nn.Module) -> Inputs:
    """Inputs that the model runs on: tokens or pixels of the sizes that its configuration names.

    Raises:
        InvalidArgumentError: No inputs could be made that it runs on.
    """
    known = dict(_known(model))
    main = getattr(model, "main_input_name", "input_ids")
    least = {name: known[name] for name in (main, "decoder_input_ids") if name in known}
    if _runs(model, least):
        return least
    if _runs(model, known):
        return known
    raise InvalidArgumentError(
        f"no inputs for {type(model).__name__} could be made from its configuration; pass example_inputs=."
    )


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        with torch.no_grad():
            call(model, inputs)
    except ForwardError:
        return False
    return True


def _known(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The inputs of a forward whose shapes a configuration tells."""
    config: Any = model.config
    device = device_of(model) or torch.device("cpu")
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    taken = inspect.signature(model.forward).parameters
    for name, shape in _shapes(config).items():
        if name in taken and (name != "decoder_input_ids" or getattr(config, "is_encoder_decoder", False)):
            if name.endswith("_ids"):
                yield name, (torch.arange(TOKENS)[None] % _size(config, "vocab_size", default=TOKENS)).to(device)
            else:
                # Any values will do, the same each time and without a draw from the caller's generator.
                yield name, torch.linspace(-1, 1, shape.numel()).view(shape).to(device, dtype)


def _shapes(config: Any) -> dict[str, torch.Size]:
    height, width = _pair(_size(config, "image_size", default=224))
    channels = _size(config, "num_channels", default=3)
    frames = 2 * _size(config, "max_source_positions", default=1500)
    return {
        "input_ids": torch.Size([1, TOKENS]),
        "decoder_input_ids": torch.Size([1, TOKENS]),
        "pixel_values": torch.Size([1, channels, height, width]),
        "input_features": torch.Size([1, _size(config, "num_mel_bins", default=80), frames]),
        "input_values": torch.Size([1, 16000]),
    }


def _size(config: Any, name: str, default: Any) -> Any:
    """A number of a configuration, or of the first of its parts that has it."""
    parts = [config, *(one for one in vars(config).values() if hasattr(one, "to_dict"))]
    found = (getattr(part, name, None) for part in parts)
    return next((one for one in found if one is not None), default)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)  # pyright: ignore[reportReturnType]


class TextBatches:
    """A file of texts as batches of tokens, in rows of equal length, read again each time it is iterated.

    Args:
        folder: With a tokenizer.
        file: UTF-8 text.

    Raises:
        CheckpointError: There is no tokenizer.
        EmptyDataError: The file holds no text, or cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
        try:
            tokenizer = import_transformers().AutoTokenizer.from_pretrained(Path(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} has no tokenizer for the texts of {file}") from error
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise EmptyDataError(f"{file} cannot be read as text: {error}") from error
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        length = min(LENGTH, tokenizer.model_max_length, len(tokens))
        if not length:
            raise EmptyDataError(f"{file} holds no text")
        self._rows = tokens[: len(tokens) // length * length].view(-1, length)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"input_ids": rows} for rows in self._rows.split(ROWS))
