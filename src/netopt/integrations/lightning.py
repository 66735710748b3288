"""Lightning's Trainer prunes while it trains, and distils."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from netopt import batches
from netopt.errors import InvalidArgumentError, MissingPackageError
from netopt.integrations.teaching import Teaching
from netopt.masking.saving import dense
from netopt.plan import Plan
from netopt.training import GradualPruner

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingPackageError("this needs Lightning; pip install lightning.") from error

__all__ = ["DistillationModule", "PruningCallback"]

LENT = "on_load_checkpoint"


class PruningCallback(Callback):
    """Prunes the module step by step, with its optimizers following.

    Checkpoints hold unmasked names, masked entries as zeros, so that the module loads them without netopt;
    ``trainer.fit(..., ckpt_path=...)`` goes on from them, with a module as large as it was at first.

    Args:
        end: The optimizer's step at which ``final`` is reached; by default the last one.
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lends the module a hook that runs before its weights are loaded, and so can make it smaller."""
        del trainer, stage
        self._unhook(pl_module)
        own = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._unhook(pl_module)
            self._state = checkpoint.get("callbacks", {}).get(self.state_key) or None
            if self._state is not None and self._state["plan"] is not None:
                Plan.from_dict(self._state["plan"]).apply(pl_module)
            own(checkpoint)

        vars(pl_module)[LENT] = on_load_checkpoint

    def _unhook(self, pl_module: LightningModule) -> None:
        vars(pl_module).pop(LENT, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hook back."""
        del trainer, stage
        self._unhook(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the pruner, or takes it up again where the trainer resumes."""
        self._unhook(pl_module)
        if self._options.get("kind") == "neurons" and trainer.world_size > 1:
            raise InvalidArgumentError("wrapped models cannot lose neurons; use one process, or kind='weights'.")
        end = self._end or trainer.estimated_stepping_batches
        if end == float("inf"):
            raise InvalidArgumentError("training has no last step; pass end=, or max_epochs= or max_steps= to Trainer.")
        self.pruner = GradualPruner(pl_module, end=int(end), optimizer=trainer.optimizers, **self._options)
        if self._state is not None:
            plan = self._state["plan"]
            self.pruner.load_state_dict(self._state | {"plan": None})
            self.pruner.plan = None if plan is None else Plan.from_dict(plan)
            self._state = None

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Prunes where the optimizer has made a step and it is due."""
        del args, kwargs
        assert self.pruner is not None, "training has begun"
        while self.pruner.steps < trainer.global_step:
            self.pruner.step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the pruner."""
        if self.pruner is None:
            return {}
        found = self.pruner.state_dict()
        return found | {"masks": dict(found["masks"])}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes unmasked names."""
        del trainer, pl_module
        checkpoint["state_dict"] = dense(checkpoint["state_dict"])


class DistillationModule(LightningModule):
    """Trains ``student`` on the outputs of ``teacher``; checkpoints hold the student alone.

    Derive from it for another optimizer, schedule or validation.

    Args:
        student: Any module, trained in place.
        teacher: A model or several; left as they are, evaluated without gradients.
        optimizer: Makes the optimizer from the student's parameters; by default ``AdamW`` with its defaults.
        options: ``loss``, ``temperature``, ``hard``, ``labels``, ``output``, ``cache`` as for :func:`netopt.distill`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = AdamW,
        **options: Any,
    ) -> None:
        super().__init__()
        self.student = student
        self._make_optimizer = optimizer
        # Not a part of this module, so that checkpoints and optimizers do not hold the teacher.
        self.teaching = Teaching(student, teacher, **options)
        self._feed = batches.Feeder(student, frozenset({"labels"}))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's forward."""
        return self.student(*args, **kwargs)

    def on_fit_start(self) -> None:
        """Takes the teachers to the device of the student."""
        self.teaching.to(self.device)
        self._feed = batches.Feeder(self.student, frozenset({"labels"}))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        """Returns the loss against the teacher and logs it as ``distillation_loss``."""
        del batch_idx
        loss = self.teaching.loss(self._feed(batch), batch)
        self.log("distillation_loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Optimizer:
        """Of the student's parameters that need a gradient."""
        return self._make_optimizer([one for one in self.student.parameters() if one.requires_grad])
