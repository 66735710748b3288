"""A case: one model, what to feed it, and what its architecture allows to be removed, written down by hand.

Members are written ``"conv1:0 bn1:0 conv2.weight:1"``: a tensor's dotted name and a dimension. The name of a module
stands for all tensors below it that have that dimension, and ``?`` before one says that it may be listed or not.
What is written is the whole axis, no member more and none less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Maker = Callable[[], Any]


@dataclass(frozen=True)
class Expected:
    """One free axis: its members, its number of neurons, and whether removing equals masking (None: either)."""

    members: str
    size: int
    exact: bool | None = True
    label: str = ""


def axis(members: str, size: int, exact: bool | None = True, label: str = "") -> Expected:
    """Shorthand for :class:`Expected`, as cases write it."""
    return Expected(members, size, exact, label)


@dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        name: Unique; the test's id.
        make: Makes the model; called under a fixed seed.
        make_inputs: Makes the example inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        make_other: Makes inputs of another batch, spatial or sequence size, where the model takes them.
        share: The least share of the parameters that lies on a free axis.
        expected: The free axes that must be found. Others may be found too, if they keep the laws.
        frozen: ``tensor:dim`` and a pattern the reason it is frozen for must match; ``tensor:dim!`` if no part of it
            is free.
        stays: Patterns of the reasons that axes of this model are frozen for beyond the usual ones, where ``frozen``
            names no tensors: the reason of every frozen axis must match one, and each must match some.
        sizes: An integer held by a module (``attn.num_heads``, ``norm.normalized_shape.0``) and what it must be
            after removal, an expression in the labels of the expected axes.
        train_step: Why a training step is not tried, or empty.
        double: Whether the model runs in float64; the law of masking is then checked to 1e-9.
        tolerance: The tolerance used where ``double`` is False.
        warm: Whether the model has run before, as one that caches tensors.
        stir: Whether constant parameters and running statistics get random values, so that nothing cancels by luck.
        fake: Why the model cannot run in shape only, or empty.
        ordered: Why the order of neurons matters although some can go, or empty.
        compared: Why axes are inexact in a way that the trace does not show and the comparison after surgery finds, or
            empty.
        warns: A pattern of warnings that torch itself gives when this model runs.
        prepare: Called with the finished model (to freeze parameters, set modes, ...).
    """

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Maker
    make_other: Maker | None = None
    share: float = 0.0
    expected: Sequence[Expected] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)
    stays: Sequence[str] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)
    train_step: str = ""
    double: bool = True
    tolerance: float = 1e-9
    warm: bool = False
    stir: bool = True
    fake: str = ""
    ordered: str = ""
    compared: str = ""
    warns: str = ""
    prepare: Callable[[nn.Module], Any] | None = None

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """The model, the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make()
            if self.stir:
                stir(model)
            if self.prepare is not None:
                self.prepare(model)
            if self.warm:
                call(model, self.make_inputs())
        return model

    def inputs(self) -> Any:
        """The example inputs, the same at every call."""
        return seeded(self.make_inputs, 1)

    def other_inputs(self) -> Any | None:
        """Inputs of another size, or None."""
        return None if self.make_other is None else seeded(self.make_other, 2)


def seeded(make: Maker, seed: int) -> Any:
    """What ``make`` returns under a seed, the global random state left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def call(model: nn.Module, inputs: Any) -> Any:
    """One forward; a tuple holds positional, a dict keyword inputs."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Gives random values to parameters that start constant and to running statistics."""
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


CASES: dict[str, Case] = {}


def case(name: str, inputs: Maker | tuple[int, ...], other: Maker | tuple[int, ...] | None = None, **about: Any) -> Any:
    """Registers the class or function below it as a case; a tuple of integers stands for a random tensor's shape."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        if name in CASES:
            raise ValueError(f"two cases are named {name!r}")
        CASES[name] = Case(name, make, maker(inputs), None if other is None else maker(other), **about)
        return make

    return register


def maker(spec: Maker | tuple[int, ...]) -> Maker:
    """A function that makes inputs, from one or from a shape."""
    if callable(spec):
        return spec
    shape = tuple(spec)
    return lambda: torch.randn(shape)


def tokens(batch: int, length: int, vocabulary: int) -> Callable[[], Tensor]:
    """A maker of random token ids."""
    return lambda: torch.randint(vocabulary, (batch, length))
