"""What criteria need to know about a weight, collected in one pass over the data.

Only what is asked for is collected, and only sums are kept. The model runs in eval mode and is given back as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.batches import Batch, Data
from netopt.errors import ForwardError, InvalidArgumentError, MissingDataError, NonFiniteError, UnknownNameError, quoted
from netopt.importance.inputs import InputWatch, Matrix, Reading
from netopt.model.kernels import Unfused
from netopt.model.parameters import Place, places
from netopt.model.ranks import add_up_all, add_up_numbers
from netopt.model.restore import restored
from netopt.model.writes import CopyOnWrite
from netopt.progress import bar

__all__ = ["NEEDS", "Evidence", "collect", "missing_data", "samples"]

NEEDS = ("grad", "grad_abs", "grad_sq", "output_grad_sq", "input_norm")
OF_LOSS = frozenset({"grad", "grad_abs", "grad_sq"})
OF_SAMPLES = frozenset({"grad_abs", "grad_sq", "output_grad_sq"})
EXACT_OUTPUTS = 64
PROBES = 32


@dataclass(frozen=True)
class Evidence:
    """What is known about one weight; every tensor has its shape, and what no criterion asked for is absent.

    Attributes:
        name: The weight's name.
        weight: Its values, detached; zero where masked.
        grad: Mean gradient of the loss, over samples.
        grad_abs: Mean absolute value, over samples, of the gradient of a sample's loss.
        grad_sq: Mean square, over samples, of the gradient of a sample's loss.
        output_grad_sq: Sum over the main output's entries of their squared gradients, averaged over samples. Exact up
            to 64 entries a sample, above that estimated without bias by 32 random signs vectors.
        input_norm: Euclidean norm, over everything seen, of what each entry was multiplied with.
    """

    name: str
    weight: Tensor
    collected: Mapping[str, Tensor]

    def of(self, weight: Tensor) -> Evidence:
        """The same evidence about other values, or a part of them."""
        return Evidence(self.name, weight, self.collected)

    def __getattr__(self, need: str) -> Tensor:
        collected = self.__dict__.get("collected", {})
        if need in collected:
            return collected[need]
        raise AttributeError(f"{need!r} was not collected; name it in the criterion's needs. Known are {NEEDS}.")


def collect(
    model: nn.Module,
    wanted: Mapping[str, Place] | None = None,
    needs: Collection[str] = (),
    *,
    data: Data | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    named: Collection[str] | None = None,
    progress: bool = False,
) -> dict[str, Evidence]:
    """Collects evidence about weights of ``model``.

    Args:
        model: Run in eval mode, and given back as it was.
        wanted: The weights, as :func:`netopt.model.parameters.places` lists them; by default those pruned by default.
        needs: Names among the attributes of :class:`Evidence`.
        data: Batches, in any form :func:`netopt.batches.iterate` takes; read once, and not at all where nothing is
            needed.
        loss_fn: Of the model's result and a batch's targets; by default the ``loss`` the model itself returns.
        named: Those that evidence is owed of, by default all: others are left out of the result where input norms are
            needed and they were multiplied with nothing.
        progress: Whether to show a progress bar.

    Raises:
        MissingDataError: something is needed that takes data, or a loss, and there is none.
        NonFiniteError: a loss is NaN or infinite.
        InvalidArgumentError: input norms are needed of weights that were multiplied with nothing; all are named.
    """
    if wanted is None:
        wanted = {name: place for name, place in places(model).items() if place.prunable}
    for need in needs:
        if need not in NEEDS:
            raise UnknownNameError.of("kind of evidence", need, NEEDS)
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}
    if needs:
        if data is None:
            raise missing_data("this importance", needs, loss_fn)
        inference = next((name for name, place in wanted.items() if place.parameter.is_inference()), None)
        if inference is not None and set(needs) != {"input_norm"}:
            raise InvalidArgumentError(
                f"{inference!r} was made in inference mode and takes part in no gradient; make the model outside of "
                'torch.inference_mode(), or use importance="magnitude" or "wanda".'
            )
        with restored(model, writes=False) as log:
            seen = _Pass(model, wanted, frozenset(needs), loss_fn, sums)
            log.callback(seen.writes.undo)
            with seen.writes.saving():
                log.enter_context(_ready(model, wanted, needs))
            count = round(add_up_numbers(seen.run(data, progress))[0])
        _over_processes([sums, seen.squares], seen.device)
        if "input_norm" in needs:
            wanted = _read(wanted, seen.squares, wanted if named is None else named)
        for name, place in wanted.items():
            if "input_norm" in needs:
                sums[name]["input_norm"] = _norms(place, seen.squares[name])
            sums[name] = _finished(place, sums[name], frozenset(needs), count)
    return {name: Evidence(name, place.value, sums[name]) for name, place in wanted.items()}


def _over_processes(tables: Sequence[Mapping[str, dict[Any, Tensor]]], device: torch.device | None) -> None:
    """Adds up what all processes have seen, by name and key."""
    for table in tables:
        flat = {(name, key): value for name, row in table.items() for key, value in row.items()}
        for (name, key), value in add_up_all(flat, device).items():
            table[name][key] = value


def missing_data(what: str, needs: Collection[str], loss_fn: Any) -> MissingDataError:
    """Returns the error for a criterion without data, which names all that it lacks."""
    message = f"{what} needs {', '.join(sorted(needs))}; pass data=, batches or a dataset"
    if loss_fn is None and OF_LOSS & set(needs):
        message += (
            ", and loss_fn=, a function of the model's result and the batch's targets, unless the model returns its "
            "own loss"
        )
    return MissingDataError(f"{message}.")


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Any],
    directions: Any = None,
    *,
    retain_graph: bool = True,
) -> tuple[Tensor | None, ...]:
    """The gradients of a model's outputs, ``None`` where there is none.

    Raises:
        ForwardError: The outputs cannot be differentiated.
    """
    try:
        return torch.autograd.grad(outputs, inputs, directions, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise ForwardError(
            f"the outputs of the model cannot be differentiated: {first}\n"
            "Where the forward takes gradients itself, pass create_graph=True there; where it writes in place over "
            "what a gradient needs, copy that first (.clone()); or choose an importance without gradients, 'magnitude'."
        ) from error


def samples(batch: Batch) -> Iterator[Batch]:
    """Yields each sample of a batch as a batch of one; what has no entry a sample is passed on whole."""
    found = [tensor for _, tensor in batches.tensors(batches.split(batch)[0]) if tensor.dim() > 0]
    size = len(found[0]) if found else 1

    def part(value: Any, index: int) -> Any:
        if isinstance(value, Tensor):
            return value[index : index + 1] if value.dim() > 0 and len(value) == size else value
        if isinstance(value, Mapping):
            return {key: part(one, index) for key, one in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(part(one, index) for one in value)
        return value

    for index in range(size):
        yield part(batch, index)


@contextlib.contextmanager
def _ready(model: nn.Module, wanted: Mapping[str, Place], needs: Collection[str]) -> Iterator[None]:
    """Sets flags so that every contraction is seen and only the wanted gradients are computed."""
    batches.set_eval(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    differentiated = any(need != "input_norm" for need in needs)
    for place in wanted.values():
        place.parameter.requires_grad_(differentiated)
    with contextlib.ExitStack() as stack:
        stack.enter_context(Unfused(attention=False))
        stack.enter_context(torch.enable_grad() if differentiated else torch.no_grad())
        yield


class _Pass:
    """One pass over the data, adding to sums."""

    def __init__(
        self,
        model: nn.Module,
        wanted: Mapping[str, Place],
        needs: frozenset[str],
        loss_fn: Callable[[Any, Any], Tensor] | None,
        sums: dict[str, dict[str, Tensor]],
    ) -> None:
        self.model, self.wanted, self.needs, self.loss_fn, self.sums = model, wanted, needs, loss_fn, sums
        self.parameters = [place.parameter for place in wanted.values()]
        self.device = batches.device_of(model)
        self.generator = torch.Generator().manual_seed(0)
        self.squares: dict[str, dict[Matrix, Tensor]] = {name: {} for name in wanted}
        self.alone: bool | None = None
        self.writes = CopyOnWrite(model.parameters())

    def run(self, data: Data, progress: bool) -> int:
        """Returns the number of samples seen."""
        count = 0
        for batch in bar(batches.iterate(data), "importance", shown=progress, total=batches.steps(data)):
            pieces = list(samples(batch))
            if self.needs & OF_SAMPLES and len(pieces) > 1 and not self._runs_alone(pieces[0]):
                pieces = [batch]  # as of a graph, whose nodes lie along the first dimension
            count += len(pieces)
            if self.needs & OF_SAMPLES:
                for piece in pieces:
                    self._see(piece, 1)
            else:
                self._see(batch, len(pieces))
        return count

    def _runs_alone(self, piece: Batch) -> bool:
        """Whether the model takes one entry of a batch by itself; of the first batch this is tried."""
        if self.alone is None:
            try:
                with torch.no_grad(), self.writes.first_run():
                    batches.feed(self.model, piece)
                self.alone = True
            except ForwardError:
                self.alone = False
        return self.alone

    def _see(self, batch: Batch, size: int) -> None:
        watch = InputWatch(self.wanted, self._add_reading) if "input_norm" in self.needs else contextlib.nullcontext()
        with watch, self.writes.first_run():
            result = batches.feed(self.model, batch)
        if "output_grad_sq" in self.needs:
            self._differentiate_outputs(batches.primary(result), retain=bool(self.needs & OF_LOSS))
        if self.needs & OF_LOSS:
            self._differentiate_loss(self._loss(result, batch), size)

    def _loss(self, result: Any, batch: Batch) -> Tensor:
        if self.loss_fn is None:
            loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
            if not isinstance(loss, Tensor):
                raise MissingDataError(
                    f"this importance needs a loss, and {type(self.model).__name__} returns none; pass "
                    "loss_fn=, a function of the model's result and the batch's targets."
                )
        else:
            _, targets = batches.split(batch)
            loss = self.loss_fn(result, targets if self.device is None else batches.move(targets, self.device))
        if not torch.isfinite(loss).all():
            raise NonFiniteError(
                f"the loss is {loss.detach().sum().item()} on a batch; check the data and the weights."
            )
        return loss.sum()

    def _differentiate_loss(self, loss: Tensor, size: int) -> None:
        for name, grad in self._gradients(loss, retain=False):
            for need, value in (("grad", grad * size), ("grad_abs", grad.abs()), ("grad_sq", grad.square())):
                if need in self.needs:
                    self._add(name, need, value)

    def _differentiate_outputs(self, output: Tensor, retain: bool) -> None:
        flat = output.flatten()
        exact = flat.numel() <= EXACT_OUTPUTS
        count = flat.numel() if exact else PROBES
        for index in range(count):
            if exact:
                scalar = flat[index]
            else:
                signs = torch.randint(0, 2, (flat.numel(),), generator=self.generator).to(flat) * 2 - 1
                scalar = flat @ signs
            for name, grad in self._gradients(scalar, retain=retain or index < count - 1):
                self._add(name, "output_grad_sq", grad.square() / (1 if exact else PROBES))

    def _gradients(self, scalar: Tensor, retain: bool) -> Iterator[tuple[str, Tensor]]:
        if not scalar.requires_grad:
            raise InvalidArgumentError(
                "the output does not depend on any of the weights in a differentiable way; "
                "the forward must not run under no_grad, nor detach."
            )
        grads = gradients(scalar, self.parameters, retain_graph=retain)
        for name, grad in zip(self.wanted, grads, strict=True):
            if grad is not None:
                yield name, grad.to(torch.promote_types(grad.dtype, torch.float32))

    def _add_reading(self, reading: Reading) -> None:
        squares = self.squares[reading.name]
        with torch.no_grad():
            found = reading.square_sums()
            squares[reading.matrix] = squares[reading.matrix] + found if reading.matrix in squares else found

    def _add(self, name: str, need: str, value: Tensor) -> None:
        known = self.sums[name].get(need)
        self.sums[name][need] = value.detach() if known is None else known + value.detach()


def _read(
    wanted: Mapping[str, Place], squares: Mapping[str, Mapping[Matrix, Tensor]], named: Collection[str]
) -> dict[str, Place]:
    """The weights that were multiplied with something."""
    missed = [name for name in wanted if not squares[name]]
    owed = [name for name in missed if name in named]
    if owed or len(missed) == len(wanted):
        listed = quoted(owed or missed)
        raise InvalidArgumentError(
            f"{listed} met no inputs in a matrix product, convolution or embedding on this data, "
            f"so the norm of its inputs is unknown; pass exclude=[{listed}], or choose another importance."
        )
    return {name: place for name, place in wanted.items() if squares[name]}


def _norms(place: Place, squares: Mapping[Matrix, Tensor]) -> Tensor:
    """Returns the norm of what each entry of a weight was multiplied with, in whatever matrices it was."""
    like = place.parameter.detach()
    if len(squares) == 1:
        return next(matrix.spread(values.sqrt(), like) for matrix, values in squares.items())
    return torch.stack([matrix.spread(values, like) for matrix, values in squares.items()]).sum(0).sqrt()


def _finished(place: Place, sums: dict[str, Tensor], needs: frozenset[str], count: int) -> dict[str, Tensor]:
    finished: dict[str, Tensor] = {}
    for need in needs:
        if need == "input_norm":
            finished[need] = sums[need]
        elif need in sums:
            finished[need] = sums[need] / count
        else:
            finished[need] = torch.zeros_like(place.parameter.detach())
    return finished
