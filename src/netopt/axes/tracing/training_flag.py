"""Who reads whether a model is in training, and what he does then, traced where it happens.

During the trace in evaluation mode modules have no ``training`` of their own: it is looked up among their children,
which tell that it was read. A forward that reads the flag runs once more, in training, and both its results are taken
for the same thing. Where that cannot be done, the whole model is traced in training mode as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netopt import batches
from netopt.axes.operation import Dim, Operation
from netopt.errors import ForwardError
from netopt.model.attributes import Parts
from netopt.model.visits import TABLES

if TYPE_CHECKING:
    from typing_extensions import Self

    from netopt.axes.tracing.sizes import SizeTracer

__all__ = ["TrainingFlag", "lendable"]

_NAME = "training"
# The only ones of torch's own layers whose operations do something else to zeros in training.
_OTHERS = (nn.AlphaDropout, nn.FeatureAlphaDropout)


class TrainingFlag:
    """The flag of each module, lent for one forward in evaluation mode.

    Args:
        parts: The modules of the model, itself first; their attributes are given back by who calls.
        tracer: Of the forward.

    Attributes:
        decides: Whether what it decides cannot be told module by module.
    """

    def __init__(self, parts: Parts, tracer: SizeTracer) -> None:
        self.decides = False
        self._tracer = tracer
        self._thread = threading.get_ident()
        self._in_training = False
        self._readers = [False]  # of each forward in progress, whether it read the flag; first the model's own
        self._known: set[int] = set()
        self._parts = parts
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> Self:
        """Lends the flags."""
        for name, module in self._parts:
            self._lend(module, is_root=not name)
        return self

    def __exit__(self, *error: object) -> None:
        """Gives every module the attributes it had, in one step each."""
        for module, attributes in self._before:
            object.__setattr__(module, "__dict__", attributes)

    def _lend(self, module: nn.Module, *, is_root: bool) -> None:
        before = module.__dict__
        held = before | {"_modules": _Children(before["_modules"], self, module)}
        del held[_NAME]
        own = "forward" in held
        if _is_known(type(module)) and not own and not any(held[table] for table in TABLES):
            self._known.add(id(module))
        elif not is_root and not own:
            held["forward"] = _Forward(self, module)
        self._before.append((module, before))
        object.__setattr__(module, "__dict__", held)

    def read(self, module: nn.Module) -> bool:
        """The flag of a module, and that it was read."""
        if threading.get_ident() != self._thread:
            return False
        if self._in_training:
            return True
        if id(module) not in self._known or self._tracer.visits.current.owner != id(module):
            self._readers[-1] = True
        return False

    def run(self, owner: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs the forward of a module; once more in training if it read the flag.

        Raises:
            ForwardError: It is not the module that is being run, but a copy of it, or who calls the forward itself.
        """
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if self._tracer.visits.current.owner != owner:
            raise ForwardError("a forward runs without its module, whose training flag cannot be lent.")
        if self._in_training:
            return forward(*args, **kwargs)
        self._readers.append(False)
        try:
            result = forward(*args, **kwargs)
        finally:
            reads = self._readers.pop()
        if reads:
            self._trained(forward, args, kwargs, result)
        return result

    def _trained(self, forward: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        self._in_training = True
        try:
            with self._tracer.aside():
                again = forward(*args, **kwargs)
        except Exception:  # a forward may refuse to be trained on these inputs, by whatever it raises
            return
        finally:
            self._in_training = False
        before, after = ([one for _, one in batches.tensors(value)] for value in (result, again))
        with torch._C.DisableTorchFunction():  # else looking at a shape would be a call of the forward's
            if [one.shape for one in before] != [one.shape for one in after]:
                self.decides = True
                return
            for one, other in zip(before, after, strict=True):
                self._same(one, other)

    def _same(self, one: Tensor, other: Tensor) -> None:
        trace = self._tracer.trace
        op = Operation(trace, "training", [one, other], one)
        dims = [
            Dim(op.same(left, right), left.zero and right.zero)
            for left, right in zip(trace.dims(one), trace.dims(other), strict=True)
        ]
        trace.merge(one, other, dims)

    @property
    def whole(self) -> bool:
        """Whether the model has to be traced in training mode as a whole."""
        return self.decides or self._readers[0]


def lendable(parts: Parts) -> bool:
    """Whether each module looks its flag up as modules do."""
    return all(
        _NAME in module.__dict__ and kind.__getattr__ is nn.Module.__getattr__ and not hasattr(kind, _NAME)
        for _, module in parts
        for kind in [type(module)]
    )


def _is_known(kind: type[nn.Module]) -> bool:
    """Whether a layer is one of torch's that in training drops, or takes statistics of, what else it passes on."""
    return kind.__module__.startswith("torch.nn.modules.") and kind not in _OTHERS


class _Forward:
    """The forward of a module, told of when it runs."""

    def __init__(self, flag: TrainingFlag, module: nn.Module) -> None:
        self._flag = flag
        self._owner = id(module)
        self.__wrapped__ = module.forward  # code may ask for its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._flag.run(self._owner, self.__wrapped__, args, kwargs)


class _Children(dict[str, Any]):
    """The children of a module, among which its flag is found."""

    __slots__ = ("_flag", "_module")

    def __init__(self, children: dict[str, Any], flag: TrainingFlag, module: nn.Module) -> None:
        super().__init__(children)
        self._flag = flag
        self._module = module

    def __contains__(self, name: object) -> bool:
        return name == _NAME or super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        return self._flag.read(self._module) if name == _NAME else super().__getitem__(name)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)
