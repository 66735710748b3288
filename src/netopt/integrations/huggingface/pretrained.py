"""From a folder that ``from_pretrained`` loads to a smaller one that it loads too."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from netopt import masking, measure
from netopt.axes import Outputs
from netopt.batches import Batch, Inputs, call, device_of, move
from netopt.errors import ArgumentTypeError, CheckpointError, ForwardError, InvalidArgumentError, VerificationError
from netopt.importance import Importance, lookup
from netopt.integrations.huggingface.inputs import inputs_of
from netopt.integrations.huggingface.source import Source, import_transformers, model_class, open_source
from netopt.integrations.huggingface.target import appearing, copy_others
from netopt.plan import Plan, PlanSequence, shapes_of, stored
from netopt.plan.blocks import BlockPlan
from netopt.plan.experts import ExpertPlan
from netopt.plan.shards import open_checkpoint
from netopt.prune import prune_neurons
from netopt.prune.candidates import AxisSelector
from netopt.report import PruningReport
from netopt.selection import Amount

__all__ = ["shrink_pretrained"]

RECORD = "netopt.json"
CARD = "README.md"


def shrink_pretrained(
    source: str | os.PathLike[str] | nn.Module,
    target: str | os.PathLike[str],
    *,
    amount: Amount | None = None,
    max_params: float | None = None,
    max_macs: float | None = None,
    importance: Importance | Mapping[str, Tensor] | None = None,
    data: Iterable[Batch] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    include: AxisSelector = None,
    exclude: AxisSelector = None,
    outputs: Outputs = None,
    round_to: int = 1,
    repair: Any = None,
    plan: Plan | BlockPlan | ExpertPlan | PlanSequence | None = None,
    example_inputs: Inputs | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> PruningReport:
    """Writes a smaller model of Hugging Face, which ``from_pretrained`` loads as it loads the large one.

    ``target`` appears whole or not at all, and nothing is overwritten. It has the configuration with the new sizes, the
    weights as safetensors in as many files as before, the tokenizer and all else that lies in ``source`` but for dense
    weights in other formats; besides, ``netopt.json`` with the plan, the report and versions, and a paragraph in the
    model card. A criterion that reads weights alone is computed from the files block by block, and the model is never
    in memory.

    Args:
        source: A folder that ``save_pretrained`` wrote, or a model of transformers, which is left as it is.
        target: A folder that does not exist.
        amount: Fraction of the neurons that may be removed; see :func:`netopt.prune_neurons`.
        max_params: Instead: keep at most this fraction of the parameters, in ``(0, 1]``.
        max_macs: Instead: keep at most this fraction of the multiply-accumulate operations.
        importance: A criterion, its name, or scores; ``"magnitude"`` without data and ``"saliency"`` with it.
        data: Batches for criteria that need gradients or activations; the model is loaded.
        loss_fn: Of the model's result and a batch's targets.
        include: Whose neurons may go; see :func:`netopt.prune_neurons`.
        exclude: Whose neurons all stay.
        outputs: Which results must keep their shape; a width that only other results show may then go.
        round_to: Keep a multiple of this many neurons on every axis that has more.
        repair: As in :func:`netopt.prune_neurons`; the model is loaded.
        plan: What to remove, decided before, of any kind; the model is loaded, and nothing else is asked for.
        example_inputs: Of one forward call; by default made from the configuration.
        dtype: Of the weights written; by default that of the source.
        progress: Whether to show a progress bar.

    Returns:
        What was removed, and the plan; ``report.plan.apply`` removes the same from the large model.

    Raises:
        CheckpointError: A file of the source is missing or damaged, or the target exists or cannot be written.
        InvalidArgumentError: The source is quantised or needs code of its own, or its configuration cannot say what
            the model would become.
        MissingPackageError: transformers or safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(f"{folder}/large")
        ...     report = shrink_pretrained(f"{folder}/large", f"{folder}/small", amount=0.5, include="*intermediate*")
        ...     AutoModel.from_pretrained(f"{folder}/small").config.intermediate_size
        32
    """
    import_transformers()
    if not isinstance(source, (str, os.PathLike, nn.Module)):
        raise ArgumentTypeError(f"source must be a folder or a model of transformers, not {type(source).__name__}.")
    others = (amount, max_params, max_macs, importance, data, loss_fn, include, exclude, outputs, repair)
    if plan is not None and (round_to != 1 or any(one is not None for one in others)):
        raise InvalidArgumentError("plan= says all that is removed; leave out what chooses neurons, data and repair.")
    if plan is not None:
        _check_plan(plan)
    if importance is None:
        importance = "magnitude" if data is None else "saliency"
    arguments = {
        "amount": amount,
        "max_params": max_params,
        "max_macs": max_macs,
        "importance": importance,
        "data": data,
        "loss_fn": loss_fn,
        "include": include,
        "exclude": exclude,
        "outputs": outputs,
        "round_to": round_to,
        "repair": repair,
        "progress": progress,
    }
    job = _Job(arguments, example_inputs, dtype, plan)
    goal = Path(target)
    if not isinstance(source, nn.Module) and goal.resolve().is_relative_to(Path(source).resolve()):
        raise CheckpointError(f"{goal} lies in the source; choose a folder elsewhere")
    with appearing(goal) as folder, tqdm(total=3, desc="read", disable=not progress, leave=False) as bar:
        work = _from_model(source, job) if isinstance(source, nn.Module) else _from_folder(source, job)
        bar.update()
        bar.set_description("prune")
        report = work.prune()
        bar.update()
        bar.set_description("write")
        assert report.plan is not None, "something was removed"
        left_out = work.write(report.plan, folder)
        _check_written(folder)
        _describe(folder, report, work.name, goal.name, left_out)
    return report


@dataclass(frozen=True)
class _Job:
    """What was asked for."""

    arguments: Mapping[str, Any]
    example_inputs: Inputs | None
    dtype: torch.dtype | None
    plan: Any

    @property
    def reads_weights_alone(self) -> bool:
        """Whether the files are enough to decide, and to write."""
        importance = self.arguments["importance"]
        if any(one is not None for one in (self.plan, self.dtype, self.arguments["data"], self.arguments["repair"])):
            return False
        if isinstance(importance, Mapping):
            return True
        found = lookup(importance, of="neurons")
        return found.of == "weights" and not found.needs

    def inputs(self, model: nn.Module) -> Inputs:
        """The example inputs, where the model is."""
        if self.example_inputs is None:
            return inputs_of(model)
        return move(self.example_inputs, device_of(model) or "cpu")

    def runs(self, model: nn.Module) -> bool:
        """Whether a model without values runs; one that looks at what its masks hold needs them."""
        try:
            with torch.no_grad():
                call(model, self.inputs(model))
        except (ForwardError, InvalidArgumentError):
            return False
        return True

    def prune(self, model: nn.Module, **changed: Any) -> PruningReport:
        """Prunes a model such that its configuration builds the smaller one.

        Raises:
            InvalidArgumentError: It cannot.
        """
        inputs = self.inputs(model)
        if self.plan is not None:
            return self._carried_out(model, inputs)
        return prune_neurons(model, inputs, loadable=True, **{**self.arguments, **changed})

    def _carried_out(self, model: nn.Module, inputs: Inputs) -> PruningReport:
        before = measure.cost(model, inputs)
        self.plan.apply(model)
        after = measure.cost(model, inputs_of(model))
        settings = {"plan": str(self.plan)}
        return PruningReport(
            call="shrink_pretrained", before=before, after=after, plan=self.plan, settings=settings, subject=model
        )


@dataclass(frozen=True)
class _Streamed:
    """Work on files: the model is never in memory."""

    source: Source
    names: Mapping[str, str]
    job: _Job

    @property
    def name(self) -> str:
        return self.source.folder.resolve().name

    def prune(self) -> PruningReport:
        importance = self.job.arguments["importance"]
        if not isinstance(importance, Mapping):
            importance = stored(self.source.folder, lookup(importance, of="neurons"), self.names)
        # Without values there is nothing to compare outputs of.
        return self.job.prune(self.source.skeleton, importance=importance, verify=False)

    def write(self, plan: Plan, folder: Path) -> list[str]:
        plan.renamed(self.names).apply_to_checkpoint(self.source.folder, folder)
        return copy_others(self.source.folder, folder, self.source.weights)


@dataclass(frozen=True)
class _Loaded:
    """Work on a model in memory, which is pruned."""

    model: nn.Module
    source: Source | None
    job: _Job

    @property
    def name(self) -> str:
        return type(self.model).__name__ if self.source is None else self.source.folder.resolve().name

    def prune(self) -> PruningReport:
        return self.job.prune(self.model)

    def write(self, plan: Plan, folder: Path) -> list[str]:
        del plan
        model: Any = self.model
        model.save_pretrained(folder)
        if self.source is None:
            return []
        return copy_others(self.source.folder, folder, self.source.weights)


def _from_folder(source: str | os.PathLike[str], job: _Job) -> _Streamed | _Loaded:
    opened = open_source(Path(source))
    if job.reads_weights_alone and opened.names is not None and job.runs(opened.skeleton):
        return _Streamed(opened, opened.names, job)
    return _Loaded(opened.load(job.dtype), opened, job)


def _from_model(source: nn.Module, job: _Job) -> _Loaded:
    kind = type(source)
    if masking.masks(source):
        raise InvalidArgumentError(f"the {kind.__name__} is masked; write the masks first, netopt.finish(model).")
    if model_class([kind.__name__], f"the model {kind.__name__}") is not kind:
        raise InvalidArgumentError(f"{kind.__name__} is no class of transformers; use prune_neurons and save_pruned.")
    model: Any = copy.deepcopy(source)
    if getattr(model, "is_quantized", False):
        raise InvalidArgumentError("the model is quantised, and its weights are codes; shrink it before quantising.")
    return _Loaded(model if job.dtype is None else model.to(job.dtype), None, job)


def _check_plan(plan: Any) -> None:
    if not isinstance(plan, (Plan, BlockPlan, ExpertPlan, PlanSequence)):
        raise ArgumentTypeError(f"plan must be a plan of netopt, not {type(plan).__name__}.")
    steps = plan.steps if isinstance(plan, PlanSequence) else (plan,)
    if not steps:
        raise InvalidArgumentError("plan is a sequence of no plans; nothing would be removed.")
    if any(isinstance(step, BlockPlan) and step.branches for step in steps):
        raise InvalidArgumentError(
            "no configuration can say that branches are gone, and from_pretrained would make them anew; load the large "
            "model, apply the plan, and save its state."
        )


def _check_written(folder: Path) -> None:
    """Builds the model that the new configuration describes, and compares it with the files."""
    written = open_source(folder)
    if written.names is None:
        return
    found, places = shapes_of(written.skeleton), open_checkpoint(folder).places
    for name, shape in found.items():
        shard = places.get(written.names.get(name, name))
        stored = None if shard is None else shard.entries[written.names.get(name, name)].shape
        if stored is not None and stored != shape:
            raise VerificationError(
                f"`{name}` is built with shape {shape} from the new configuration, and has {stored}; nothing was "
                "written"
            )


def _describe(folder: Path, report: PruningReport, source: str, target: str, left_out: list[str]) -> None:
    """Writes the record, and the paragraph of the model card."""
    import netopt

    shown = replace(report, plan=None).to_dict()
    record = {
        "source": source,
        "versions": {
            "netopt": netopt.__version__,
            "torch": torch.__version__,
            "transformers": import_transformers().__version__,
        },
        "left_out": left_out,
        "report": shown,
        "plan": report.to_dict()["plan"],
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    card = folder / CARD
    before = card.read_text(encoding="utf-8", errors="surrogateescape").rstrip() if card.exists() else f"# {target}"
    criterion = report.settings.get("importance")
    what = "a plan was carried out" if criterion is None else f"neurons were removed by the criterion {criterion}"
    share = f"{report.params_after / report.params_before:.1%}".replace("%", " %")
    card.write_text(
        f"{before}\n\n## Pruned\n\n"
        f"This is `{source}` with {report.params_after:,} of its {report.params_before:,} parameters ({share}): "
        f"{what} with netopt {netopt.__version__}. "
        f"It loads with `from_pretrained` and needs no other code. `{RECORD}` has the plan and what became of every "
        "layer; what is said above of quality was measured before.\n",
        encoding="utf-8",
        errors="surrogateescape",
    )
