"""A folder that transformers saved: the class and the configuration of its model, and what its files have to hold.

The model is built from the configuration without memory and compared with the headers of the files, so that a damaged
folder is found before a weight is read.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netopt.errors import CheckpointError, InvalidArgumentError, MissingPackageError
from netopt.integrations.huggingface.meta_build import build
from netopt.plan.checkpoint import CONFIG
from netopt.plan.shards import INDEX, Stored, open_checkpoint, read_mapping

__all__ = ["Source", "import_transformers", "open_source"]


@dataclass(frozen=True)
class Source:
    """A folder with a model that ``from_pretrained`` loads.

    Attributes:
        folder: Where it is.
        kind: The class of the model.
        config: Its configuration.
        skeleton: The model, without memory and in the type of the files.
        stored: The headers of the files.
        names: The name in the files of each tensor of the model; None where tensors of the model are made of several.
    """

    folder: Path
    kind: type[nn.Module]
    config: Any
    skeleton: nn.Module
    stored: Stored
    names: Mapping[str, str] | None = field(repr=False)

    @property
    def weights(self) -> set[str]:
        """The names of the files of the weights, and of their index."""
        return {INDEX, *(str(shard.name) for shard in self.stored.shards)}

    def load(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model with its weights, in the type of the files unless another is given.

        Raises:
            CheckpointError: The files do not hold what the model has.
        """
        kind: Any = self.kind
        dtype = dtype or _dtype(self.stored)
        try:
            model, info = kind.from_pretrained(
                self.folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder} cannot be loaded as {kind.__name__}: {_first_line(error)}") from error
        missing = sorted(map(str, info["missing_keys"]))
        if missing:
            raise CheckpointError(_lacks(self.folder, missing[0], self.kind))
        return model.eval()


def import_transformers() -> Any:
    """The package transformers.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        import safetensors  # noqa: F401 - transformers writes with it
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            "models of Hugging Face need transformers and safetensors; pip install 'netopt[integrations]'."
        ) from error
    return transformers


def open_source(folder: Path) -> Source:
    """Reads a folder as far as the headers of its files, and checks that they hold what the model has.

    Raises:
        CheckpointError: A file is missing or damaged, or lacks a tensor, or holds one of another shape.
        InvalidArgumentError: The model is quantised, or needs code of its own.
    """
    described = _described(folder)
    _check_plain(described, folder)
    kind = model_class(described.get("architectures"), folder)
    config = _config(described, folder)
    stored = open_checkpoint(folder)
    skeleton = build(kind, copy.deepcopy(config))
    if skeleton is None:
        raise CheckpointError(f"{folder / CONFIG} builds no {kind.__name__}; its sizes contradict each other")
    skeleton = skeleton.eval().to(_dtype(stored))
    return Source(folder, kind, config, skeleton, stored, _names(skeleton, stored, folder))


def model_class(architectures: Any, where: Any) -> type[nn.Module]:
    """The class of transformers that a configuration names."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        raise InvalidArgumentError(f"{where} names no class in `architectures`; save the model with save_pretrained.")
    kind = getattr(import_transformers(), name, None)
    if not (isinstance(kind, type) and hasattr(kind, "from_pretrained")):
        raise InvalidArgumentError(f"{where} is a {name}, which this transformers does not have; a newer one may.")
    return kind


def _described(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}, which tells what model it is")
    return read_mapping(path)


def _check_plain(described: Mapping[str, Any], where: Any) -> None:
    """Refuses what cannot be narrowed, or not loaded without foreign code."""
    if described.get("quantization_config"):
        raise InvalidArgumentError(f"{where} is quantised, and its weights are codes; shrink it before quantising.")
    known = import_transformers().models.auto.configuration_auto.CONFIG_MAPPING
    kind = described.get("model_type")
    if kind not in known:
        why = "needs code of its own (`auto_map`), which is not run" if described.get("auto_map") else "is unknown here"
        raise InvalidArgumentError(f"{where} is of the type {kind!r}, which {why}; load it and use prune_neurons.")


def _config(described: Mapping[str, Any], folder: Path) -> Any:
    transformers = import_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a configuration may refuse a value by any exception
        kind = described.get("model_type")
        raise CheckpointError(
            f"{folder / CONFIG} is no configuration of the type {kind!r}: {_first_line(error)}"
        ) from error


def _dtype(stored: Stored) -> torch.dtype:
    """The type that most numbers of the files have."""
    counts: Counter[torch.dtype] = Counter()
    for shard in stored.shards:
        for name, entry in shard.entries.items():
            if (dtype := shard.dtype(name)).is_floating_point:
                counts[dtype] += entry.stop - entry.start
    return counts.most_common(1)[0][0] if counts else torch.float32


def _names(model: nn.Module, stored: Stored, folder: Path) -> dict[str, str] | None:
    """The name in the files of each tensor of the model that is saved."""
    own = model.state_dict()
    originals = {id(tensor): name for name, tensor in own.items()}
    saved = _as_saved(model, own)
    entries = {name: shard.entries[name] for shard in stored.shards for name in shard.entries}
    rename = _prefix(saved, entries, getattr(model, "base_model_prefix", ""))
    found = {rename(name): tensor for name, tensor in saved.items()}
    for name, tensor in found.items():
        if name in entries and tuple(tensor.shape) != entries[name].shape:
            raise CheckpointError(
                f"`{name}` has shape {entries[name].shape} in {folder}, and its {CONFIG} says {tuple(tensor.shape)}"
            )
    if any(id(tensor) not in originals for tensor in found.values()):
        return None
    names = {originals[id(tensor)]: name for name, tensor in found.items() if name in entries}
    return _with_ties(model, names)


def _as_saved(model: nn.Module, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model under the names that ``save_pretrained`` writes them with."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 models had the names of their files
        return own
    with torch.device("meta"):
        return revert_weight_conversion(model, own)  # pyright: ignore[reportArgumentType]


def _prefix(saved: Mapping[str, Any], entries: Mapping[str, Any], prefix: str) -> Any:
    """How names become those of files that a model with a head, or without, was saved to."""
    ways = (str, lambda name: name.removeprefix(f"{prefix}."), lambda name: f"{prefix}.{name}")
    return max(ways, key=lambda way: sum(way(name) in entries for name in saved))


def _with_ties(model: nn.Module, names: dict[str, str]) -> dict[str, str] | None:
    """The names with those of tied parameters added; None if a tensor has none."""
    several: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        several.setdefault(id(tensor), []).append(name)
    for tied in several.values():
        known = next((names[name] for name in tied if name in names), None)
        if known is None:
            return None
        names.update({name: known for name in tied if name not in names})
    return names


def _lacks(folder: Path, name: str, kind: type) -> str:
    return f"{folder} lacks `{name}`, which a {kind.__name__} has"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
