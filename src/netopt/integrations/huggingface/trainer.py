"""The Trainer of transformers prunes while it trains, and distils."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netopt.errors import CheckpointError, InvalidArgumentError, MissingPackageError
from netopt.integrations.teaching import Teaching
from netopt.plan import Plan
from netopt.training import GradualPruner

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise MissingPackageError(
        "this needs transformers with its Trainer; pip install transformers accelerate."
    ) from error

__all__ = ["DistillationTrainer", "PruningCallback"]

STATE = "netopt_pruner.pt"


class PruningCallback(TrainerCallback):
    """Prunes the Trainer's model step by step, with the optimizer following.

    Checkpoints hold unmasked names, masked entries as zeros, so that ``from_pretrained`` loads them; beside the weights
    lies the pruner's state, from which ``trainer.train(resume_from_checkpoint=...)`` goes on. After neurons were
    removed, call :meth:`resume` first, on a model as large as it was at first.

    Args:
        end: The step at which ``final`` is reached; by default the last one.
        options: Further arguments of :class:`netopt.GradualPruner`: ``final``, ``begin``, ``every``, ``kind``, ...

    Attributes:
        pruner: The :class:`netopt.GradualPruner` at work, once training has begun.
    """

    def __init__(self, *, end: int | None = None, **options: Any) -> None:
        if options.get("regrow"):
            raise InvalidArgumentError("checkpoints hold zeros where masks are, so regrow=True could not be resumed.")
        self.pruner: GradualPruner | None = None
        self._end, self._options = end, options
        self._state: dict[str, Any] | None = None

    def resume(self, model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
        """Removes from ``model`` what was removed when ``checkpoint`` was written, and goes on from there.

        Raises:
            CheckpointError: The folder holds no state of a pruner.
        """
        self._state = _read(Path(checkpoint))
        if self._state["plan"] is not None:
            Plan.from_dict(self._state["plan"]).apply(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the pruner, or takes it up again where the Trainer resumes."""
        del control
        model: Any = kwargs["model"]
        if not callable(getattr(model, "save_pretrained", None)):
            raise InvalidArgumentError(f"{type(model).__name__} has no save_pretrained; use netopt.GradualPruner.")
        if self._options.get("kind") == "neurons" and args.world_size > 1:
            raise InvalidArgumentError("wrapped models cannot lose neurons; use one process, or kind='weights'.")
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.pruner = GradualPruner(model, end=self._end or state.max_steps, optimizer=optimizer, **self._options)
        if state.global_step and self._state is None:
            self._state = _read(Path(args.output_dir, f"checkpoint-{state.global_step}"))
        if self._state is not None:
            plan = self._state["plan"]
            self.pruner.load_state_dict(self._state | {"plan": None})
            self.pruner.plan = None if plan is None else Plan.from_dict(plan)
            self._state = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prunes where it is due."""
        del args, control, kwargs
        assert self.pruner is not None, "training has begun"
        while self.pruner.steps < state.global_step:
            self.pruner.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the pruner's state beside the weights."""
        del control, kwargs
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if self.pruner is not None and state.is_world_process_zero and folder.is_dir():
            found = self.pruner.state_dict()
            torch.save(found | {"masks": dict(found["masks"])}, folder / STATE)


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / STATE).is_file():
        raise CheckpointError(f"{folder} has no {STATE}; call resume(model, folder) with one that this callback wrote.")
    return torch.load(folder / STATE, weights_only=True)


class DistillationTrainer(Trainer):
    """A Trainer whose model learns from a teacher; evaluation gives the model's own loss.

    Each micro-batch's loss is a mean over the positions that count, labels of -100 left out.

    Args:
        args: As for ``transformers.Trainer``.
        teacher: A model or several, in the place where batches are; left as they are, evaluated without gradients.
        loss: As for :func:`netopt.distill`: a name, a function, or a mapping of these to weights.
        temperature: Softening of the losses that have one.
        hard: Weight of the labels, in ``[0, 1]``.
        output: Where the output to distil is in a model's result.
        cache: ``True`` or a :class:`netopt.distillation.Cache` keeps the teacher's outputs, by the batches' contents.
        kwargs: As for ``transformers.Trainer``.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        loss: Any = "kl",
        temperature: float = 4.0,
        hard: float = 0.0,
        output: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        self.teaching = Teaching(
            model, teacher, loss=loss, temperature=temperature, hard=hard, output=output, cache=cache
        )
        self.teaching.to(self.args.device)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss against the teacher while training, the model's own while evaluating."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        loss = self.teaching.loss(outputs, inputs)
        return (loss, outputs) if return_outputs else loss
