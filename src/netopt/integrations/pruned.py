"""A pruned model of any constructor as a folder: its plan beside its weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from netopt import masking
from netopt.errors import CheckpointError, InvalidArgumentError, MissingPackageError, PlanMismatchError
from netopt.integrations.huggingface.target import appearing
from netopt.plan import Plan, shapes_of
from netopt.plan.shards import open_checkpoint

__all__ = ["load_pruned", "save_pruned"]

PLAN, WEIGHTS = "plan.json", "model.safetensors"
Model = TypeVar("Model", bound=nn.Module)


def save_pruned(model: nn.Module, plan: Plan, directory: str | os.PathLike[str]) -> Path:
    """Writes a pruned model that has no configuration: its plan, and its weights as a safetensors file.

    Args:
        model: After the pruning, and after any training that followed.
        plan: That was carried out: ``report.plan``, or several joined by :meth:`netopt.Plan.then`.
        directory: A folder that does not exist; it appears whole or not at all.

    Returns:
        The folder.

    Raises:
        PlanMismatchError: The model does not have the sizes that the plan leaves.
        InvalidArgumentError: The model is masked.
        CheckpointError: The folder exists or cannot be written.
        MissingPackageError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> build = lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> model, plan = build(), Plan({"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "2.weight": {1: [0, 2]}})
        >>> plan.apply(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_pruned(model, plan, f"{folder}/small")
        ...     load_pruned(build, f"{folder}/small")[0].out_features
        2
    """
    found = shapes_of(model)
    masked = next(iter(masking.masks(model)), None)
    if masked is not None:
        raise InvalidArgumentError(
            f"`{masked}` is masked, and the model that is built to load this has no masks; write them into the weights "
            "first: netopt.finish(model)."
        )
    plan = plan.without_masks()
    for name, shape in plan.shapes_after.items():
        if name in found and found[name] != shape:
            raise PlanMismatchError(f"`{name}` has shape {found[name]}, and the plan leaves {shape}; which is older?")
    with appearing(Path(directory)) as folder:
        try:
            _safetensors().save_model(model, str(folder / WEIGHTS))
        except RuntimeError as error:  # of tensors that are parts of one another
            why = " ".join(str(error).split())
            raise CheckpointError(f"the weights of {type(model).__name__} cannot be written: {why}") from error
        plan.save(folder / PLAN)
    return Path(directory)


def load_pruned(constructor: Callable[[], Model], directory: str | os.PathLike[str]) -> Model:
    """Builds a model, carries the plan out on it and loads the weights, all of them.

    Args:
        constructor: Of the dense model, without arguments: ``lambda: timm.create_model("resnet18")``.
        directory: That :func:`save_pruned` wrote.

    Returns:
        The model, in the mode in which the constructor leaves it.

    Raises:
        CheckpointError: A file is missing or damaged, or its tensors are not those of the model.
        InvalidArgumentError: The plan is damaged.
        PlanMismatchError: The constructor builds another model than the plan was made for.
    """
    folder, load = Path(directory), _safetensors().load_model
    plan = Plan.load(folder / PLAN)
    open_checkpoint(folder / WEIGHTS)
    model = constructor()
    plan.apply(model)
    try:
        load(model, str(folder / WEIGHTS), strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{folder / WEIGHTS} does not fit {type(model).__name__}: {why}") from error
    return model


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError("weights are kept as safetensors; pip install safetensors.") from error
    return safetensors.torch
