"""How example inputs, batches and outputs meet a model.

The rest of the library never looks inside a batch: here alone is decided what is an input, what is a target, what a
forward accepts and which tensor of a result is the output.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from netopt.errors import (
    ArgumentTypeError,
    DeviceMismatchError,
    EmptyDataError,
    ForwardError,
    InvalidArgumentError,
    NetoptError,
    ShapeMismatchError,
)

__all__ = [
    "Batch",
    "Data",
    "Feeder",
    "Inputs",
    "call",
    "count_samples",
    "device_of",
    "feed",
    "is_batches",
    "is_dataset",
    "is_factory",
    "is_samples",
    "iterate",
    "move",
    "normalize",
    "primary",
    "set_eval",
    "split",
    "tensors",
]

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Example inputs of one forward call: a tensor, a tuple of positional inputs, or a mapping of keyword inputs."""

Batch: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""One batch: a tensor, ``(inputs, targets)``, or a mapping as Hugging Face gives it, targets under ``"labels"``."""

Data: TypeAlias = Tensor | Iterable[Any] | Mapping[str, Any] | Dataset[Any] | Callable[[], Iterable[Any]]
"""Batches, or what they are made of, in any form :func:`iterate` takes."""

PRIMARY_NAMES = ("logits", "out", "last_hidden_state")


def normalize(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns ``inputs`` as positional and keyword arguments of one forward call.

    Raises:
        ArgumentTypeError: ``inputs`` is neither a tensor, nor a tuple, nor a mapping with names as keys.

    Example:
        >>> normalize({"x": 1})
        ((), {'x': 1})
        >>> normalize((1, 2))
        ((1, 2), {})
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        strangers = [key for key in inputs if not isinstance(key, str)]
        if strangers:
            raise ArgumentTypeError(f"keyword inputs need names as keys, and {strangers[0]!r} is not a string.")
        return (), dict(inputs)
    hints = {
        "list": "write a tuple for positional inputs, (x, y), or ([x, y],) for one input that is a list",
        "ndarray": "convert it with torch.from_numpy(...)",
        "NoneType": "pass what the model's forward takes, such as torch.randn(1, 3, 224, 224)",
        "DataLoader": "pass one batch of inputs, not the loader",
    }
    hint = hints.get(type(inputs).__name__, "pass what the model's forward takes")
    raise ArgumentTypeError(
        "example inputs must be a tensor, a tuple of positional inputs or a dict of keyword inputs, "
        f"not {type(inputs).__name__}; {hint}."
    )


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Runs ``model`` once on ``inputs`` and returns its result.

    Raises:
        ArgumentTypeError: ``inputs`` cannot be arguments, see :func:`normalize`.
        DeviceMismatchError: inputs and parameters live on different devices.
        ForwardError: the forward failed; its exception is chained, the message names shapes, dtypes and devices.
    """
    args, kwargs = normalize(inputs)
    _check_meta(model, (args, kwargs))
    try:
        return model(*args, **kwargs)
    except NetoptError:
        raise
    except Exception as error:  # a forward is the user's, and may raise anything
        raise _forward_error(model, args, kwargs, error) from error


def set_eval(model: nn.Module) -> nn.Module:
    """Puts ``model`` in evaluation mode by its own ``eval``, whatever that returns, and returns it.

    Raises:
        ForwardError: its ``train`` or ``eval`` failed.
    """
    try:
        model.eval()
    except NetoptError:
        raise
    except Exception as error:  # a model's own may raise anything
        raise ForwardError(f"eval() of {type(model).__name__} failed; see the chained exception.") from error
    return model


def split(batch: Batch) -> tuple[Inputs, Any]:
    """Returns the inputs and the targets, ``None`` if there are none, of one batch.

    A tensor, or a sequence of one entry, is inputs alone. A sequence of two is ``(inputs, targets)``; inputs that are
    themselves a list become a tuple of positional inputs. Of a mapping, ``"labels"`` is the targets and stays among the
    inputs too, as Hugging Face models want it.

    Raises:
        ArgumentTypeError: the batch is none of these.

    Example:
        >>> split(([1, 2], 3))
        ((1, 2), 3)
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)):
        if len(batch) == 1:
            return _positional(batch[0]), None
        if len(batch) == 2:
            return _positional(batch[0]), batch[1]
        raise ArgumentTypeError(
            f"a batch of {len(batch)} entries is ambiguous; yield ((input, input, ...), targets), or a dict."
        )
    if isinstance(batch, Mapping):
        return batch, batch.get("labels")
    raise ArgumentTypeError(
        f"a batch must be a tensor, (inputs, targets) or a dict, not {type(batch).__name__}; "
        "let the data yield one of these."
    )


def feed(model: nn.Module, batch: Batch, device: torch.device | str | None = None) -> Any:
    """Runs ``model`` on the inputs of ``batch`` and returns its result.

    The inputs are moved to ``device``, by default the model's own; of a mapping, only what the forward accepts is
    passed on.

    Raises:
        ArgumentTypeError: the batch is of no known form, or the forward accepts none of its names.
        ForwardError: the forward failed.
    """
    inputs, _ = split(batch)
    if isinstance(inputs, Mapping):
        inputs = _accepted(model, inputs)
    device = device_of(model) if device is None else device
    return call(model, inputs if device is None else move(inputs, device))


class Feeder:
    """:func:`feed` for many batches: what does not change from one to the next is looked up once.

    Args:
        model: Whose forward is run; it stays on its device meanwhile.
        without: Names that are never passed on.
    """

    def __init__(self, model: nn.Module, without: frozenset[str] = frozenset()) -> None:
        self.model, self.without = model, without
        self.device = device_of(model)
        self._accepted: dict[tuple[str, ...], tuple[str, ...]] = {}

    def __call__(self, batch: Batch) -> Any:
        """Runs the model on the inputs of ``batch`` and returns its result; raises what :func:`feed` raises."""
        inputs = split(batch)[0]
        if isinstance(inputs, Tensor):
            args, kwargs = (inputs if self.device is None else inputs.to(self.device),), {}
        else:
            args, kwargs = self._arguments(inputs)
        try:
            return self.model(*args, **kwargs)
        except NetoptError:
            raise
        except Exception as error:  # a forward is the user's, and may raise anything
            raise _forward_error(self.model, args, kwargs, error) from error

    def _arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(inputs, Mapping):
            names = tuple(inputs)
            if names not in self._accepted:
                wanted = {name: value for name, value in inputs.items() if name not in self.without}
                self._accepted[names] = tuple(_accepted(self.model, wanted))
            inputs = {name: inputs[name] for name in self._accepted[names]}
        return normalize(inputs if self.device is None else move(inputs, self.device))


def device_of(model: nn.Module) -> torch.device | None:
    """Returns the device of the model's first parameter or buffer, or ``None`` if it has neither."""
    for tensor in model.parameters():
        return tensor.device
    for tensor in model.buffers():
        return tensor.device
    return None


def move(value: Any, device: torch.device | str) -> Any:
    """Returns ``value`` with every tensor in its tuples, lists and mappings on ``device``; the rest is passed on."""
    return _mapped(value, operator.methodcaller("to", device))


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Returns ``value`` with ``function`` applied to every tensor in its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and getattr(value, "_fields", None):
        return type(value)(*(_mapped(one, function) for one in value))
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(one, function) for one in value])
    if isinstance(value, Mapping):
        return {key: _mapped(one, function) for key, one in value.items()}
    return value


def tensors(result: Any) -> list[tuple[str, Tensor]]:
    """Lists the tensors of a result with their dotted paths, through tuples, lists, mappings and dataclasses.

    Objects of any other kind are opaque and skipped.

    Example:
        >>> [path for path, _ in tensors({"logits": torch.zeros(1), "states": (torch.zeros(1), None)})]
        ['logits', 'states.0']
    """
    return list(_tensors_below(result, ()))


# No function inside ``tensors``: one that calls itself is a cycle, and would keep a graph alive with what it found.
def _tensors_below(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield ".".join(path), value
        return
    for name, one in _entries(value):
        yield from _tensors_below(one, (*path, name))


def primary(result: Any) -> Tensor:
    """Returns the main output: the tensor itself, ``logits``, ``out``, ``last_hidden_state``, or the first float.

    Raises:
        ArgumentTypeError: the result holds no floating tensor.
    """
    if isinstance(result, Tensor):
        return result
    for name in PRIMARY_NAMES:
        value = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
        if isinstance(value, Tensor):
            return value
    for _, tensor in tensors(result):
        if tensor.is_floating_point():
            return tensor
    raise ArgumentTypeError(
        f"the model returned a {type(result).__name__} without a floating-point tensor; "
        "let its forward return a tensor, or a tuple or dict of tensors."
    )


def iterate(data: Any, *, batch_size: int = 64, what: str = "data") -> Iterator[Any]:
    """Iterates over the batches of ``data``, whatever form it has; ``data`` means the same in every call.

    Args:
        data: A DataLoader, a list or another iterable of batches, or a function that returns one; a Dataset, or the
            samples themselves, ``x`` or ``(x, y)`` or a mapping of tensors, which are cut into batches in their order.
        batch_size: Samples a batch, where batches are made here.
        what: How messages call ``data``.

    Raises:
        ArgumentTypeError: at once, if ``data`` is none of these.
        ShapeMismatchError: at once, if its tensors have different numbers of samples.
        EmptyDataError: on the first step, if ``data`` yields nothing.

    Example:
        >>> x, y = torch.arange(5), torch.arange(5)
        >>> [len(inputs) for inputs, _ in iterate((x, y), batch_size=2)]
        [2, 2, 1]
        >>> list(iterate([(x, y)])) == [(x, y)]
        True
    """
    data = data.tensors if type(data) is TensorDataset else data
    if is_samples(data):
        return _cut(data, count_samples(data, what), batch_size)
    if is_dataset(data):
        data = DataLoader(data, batch_size=batch_size)
    elif is_factory(data):
        data = data()
    if not is_batches(data):
        raise ArgumentTypeError(
            f"{what} must be a DataLoader, a Dataset, tensors, an iterable of batches or a function that returns one, "
            f"not {type(data).__name__}."
        )
    return _checked(data, what)


def steps(data: Any, batch_size: int = 64) -> int | None:
    """Returns how many batches :func:`iterate` yields, or ``None`` where that is known only afterwards.

    Example:
        >>> steps(torch.zeros(130, 3)), steps([torch.zeros(8, 3)]), steps(iter([]))
        (3, 1, None)
    """
    try:
        if is_samples(data):
            return -(-count_samples(data) // batch_size)
        return -(-len(data) // batch_size) if is_dataset(data) else len(data)
    except (TypeError, InvalidArgumentError):
        return None


def is_samples(data: Any) -> bool:
    """Whether ``data`` is the samples themselves: a tensor, or a tuple or mapping of nothing but tensors."""
    if isinstance(data, Tensor):
        return data.dim() > 0
    if isinstance(data, Mapping):
        return bool(data) and all(is_samples(one) for one in data.values())
    return isinstance(data, tuple) and bool(data) and all(is_samples(one) for one in data)


def is_dataset(data: Any) -> bool:
    """Whether ``data`` yields single samples by index."""
    if isinstance(data, (IterableDataset, list, tuple, str, bytes, Mapping)):
        return False
    if isinstance(data, Dataset):
        return hasattr(data, "__len__") and hasattr(data, "__getitem__")
    # Hugging Face's datasets are no torch Dataset and look like one.
    return hasattr(data, "__getitems__") and hasattr(data, "__len__")


def is_factory(data: Any) -> bool:
    """Whether ``data`` is a function that makes an iterable of batches."""
    return callable(data) and not isinstance(data, (Iterable, type, nn.Module))


def is_batches(data: Any) -> bool:
    """Whether ``data`` can be iterated for batches."""
    if isinstance(data, (Tensor, Mapping, str, bytes, type, nn.Module)):
        return False
    return isinstance(data, Iterable) or hasattr(data, "__getitem__")


def count_samples(data: Any, what: str = "data") -> int:
    """Returns how many samples there are in tensors given directly.

    Raises:
        ShapeMismatchError: some have more than others.
        EmptyDataError: there is none.
    """
    lengths = {len(one) for _, one in tensors(data)}
    if len(lengths) > 1:
        raise ShapeMismatchError(
            f"the tensors of {what} have {' and '.join(map(str, sorted(lengths)))} samples; give all as many, or "
            f"write a list, [(x, y), ...], if they are batches."
        )
    count = lengths.pop()
    if count == 0:
        raise EmptyDataError(f"{what} has no sample; its tensors have length 0.")
    return count


def _cut(data: Any, count: int, size: int) -> Iterator[Any]:
    for start in range(0, count, size):
        yield _mapped(data, operator.itemgetter(slice(start, start + size)))


def _checked(data: Iterable[Any], what: str) -> Iterator[Any]:
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        used_up = isinstance(data, Iterator)
        hint = (
            "a generator can be read only once, so pass a list or a DataLoader"
            if used_up
            else "check the dataset's length, and drop_last of the loader"
        )
        raise EmptyDataError(f"{what} ({type(data).__name__}) yielded no batch; {hint}.")


def _positional(inputs: Any) -> Any:
    # A DataLoader collates the tuples of a dataset into lists.
    return tuple(inputs) if isinstance(inputs, list) else inputs


def _entries(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), one) for key, one in value.items()]
    fields = getattr(value, "_fields", None)
    if isinstance(value, tuple) and fields:
        return list(zip(fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return [(str(position), one) for position, one in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(_forward(model)).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(inputs)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    accepted = {name: value for name, value in inputs.items() if name in names}
    if not accepted:
        raise ArgumentTypeError(
            f"the forward of {type(model).__name__} takes ({', '.join(names)}), "
            f"and the batch has only {', '.join(map(repr, inputs)) or 'nothing'}; rename the batch's keys."
        )
    return accepted


def _forward(model: nn.Module) -> Callable[..., Any]:
    return model.forward


def _check_meta(model: nn.Module, inputs: Any) -> None:
    # Mixed with real tensors, tensors without data sometimes fail late and sometimes not at all.
    home = device_of(model)
    for path, tensor in _described(*inputs):
        if home is not None and (tensor.device.type == "meta") != (home.type == "meta"):
            hint = "materialise the model with .to_empty(device=...) and load its weights"
            if home.type != "meta":
                hint = f"move it with .to({str(home)!r})"
            where = f"input {path}" if path else "the input"
            raise DeviceMismatchError(f"{where} is on {tensor.device} and {type(model).__name__} on {home}; {hint}.")


def _described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [*tensors(args), *tensors(kwargs)]


def _forward_error(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> NetoptError:
    given = _described(args, kwargs)
    lines = [
        f"  input {path}: shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}, {tensor.device}"
        for path, tensor in given
    ]
    home = device_of(model)
    first = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {first[0]}" if first else type(error).__name__
    listing = "\n".join(lines) or "  no tensor among the inputs"
    if home is not None and any(tensor.device != home and tensor.dim() > 0 for _, tensor in given):
        return DeviceMismatchError(
            f"{type(model).__name__} is on {home} and some inputs are not:\n{listing}\n"
            f"The forward failed ({reason}). Move the inputs with .to({str(home)!r})."
        )
    advice = "Pass inputs with which model(...) runs"
    if "does not require grad" in reason:
        advice = "A forward that takes gradients itself does so under torch.enable_grad(); it is run without gradients"
    return ForwardError(
        f"the forward of {type(model).__name__} failed on the inputs given:\n{listing}\n  {reason}\n"
        f"{advice}; the chained exception shows the line."
    )
