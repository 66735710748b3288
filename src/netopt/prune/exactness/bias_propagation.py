"""What the results of a call lack, given what its arguments lack.

A call that is linear hands on what is lacking, through its weights; one that adds a parameter lets the parameter take
it; one that subtracts a mean does not see it. Every other call refuses. The table says which call does what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

__all__ = ["RefusedError", "Visit", "equal", "within"]


class RefusedError(Exception):
    """A constant cannot be followed through a call."""


@dataclass(frozen=True)
class Visit:
    """One call that something arrives at.

    Attributes:
        operation: The call's name.
        function: What was called.
        args: With what.
        kwargs: And what else.
        lacks: What its arguments lack, by id.
        is_fixed: Whether a value does not depend on the inputs.
        take: Lets a parameter or buffer that is added take what is lacking, if it can; says whether it did.
    """

    operation: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    lacks: dict[int, Tensor]
    is_fixed: Callable[[Any], bool]
    take: Callable[[Any, Tensor], bool]

    def lacking(self) -> Any:
        """What the results lack: like the call's own results, ``None`` for nothing.

        Raises:
            RefusedError: The call is not linear, or multiplies with what depends on the inputs.
        """
        known = WAYS.get(self.operation) or WAYS.get(self.operation.removesuffix("_"))
        if known is None:
            raise RefusedError("meets what is not linear")
        return known(self)

    def of(self, place: int) -> Tensor | None:
        """What a positional argument lacks."""
        return self.lacks.get(id(self.args[place])) if place < len(self.args) else None

    def option(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def with_args(self, changes: Mapping[int, Any], **more: Any) -> Any:
        """Calls the function with other arguments."""
        args = [changes.get(place, one) for place, one in enumerate(self.args)]
        return self.function(*args, **{**self.kwargs, **more})

    def only(self, *places: int) -> tuple[int, Tensor]:
        """The one argument that lacks something; everything else must not depend on the inputs."""
        found = [(place, lack) for place in places if (lack := self.of(place)) is not None]
        if len(found) != 1:
            raise RefusedError("is multiplied with itself" if found else "meets what is not linear")
        others = [one for place, one in enumerate(self.args) if place != found[0][0]]
        if not all(self.is_fixed(one) for one in tree_iter((others, self.kwargs))):
            raise RefusedError("is multiplied with what depends on the inputs")
        return found[0]


# Ways through: what the results of a call lack, given what its arguments lack.


def _along(visit: Visit) -> Any:
    """Linear in the first argument: a change of shape, a mean, a factor that is a number."""
    _, lack = visit.only(0)
    return visit.with_args({0: lack})


def _either(visit: Visit) -> Any:
    """Linear in either of two arguments."""
    place, lack = visit.only(0, 1)
    return visit.with_args({place: lack})


def _dropped(visit: Visit) -> Any:
    if visit.option(2, "train"):
        raise RefusedError("meets what is random")
    return visit.only(0)[1]


def _sum(visit: Visit) -> Any:
    """Linear in all arguments together; a parameter among them may take what is lacking."""

    def alone(value: Any) -> Any:
        if isinstance(value, Tensor):
            return visit.lacks.get(id(value), torch.zeros_like(value))
        return value

    args = tree_map_only(Tensor, alone, visit.args)
    if visit.operation in _TERMS:
        args = tuple(0 if isinstance(one, (int, float, complex)) else one for one in args)
    lack = visit.function(*args, **visit.kwargs)
    if visit.operation in _TERMS and not visit.kwargs:
        for place, sign in enumerate(_TERMS[visit.operation]):
            if visit.of(place) is None and visit.take(visit.args[place], sign * lack):
                return None
    return lack


def _linear(visit: Visit) -> Any:
    """A contraction with a bias behind its weight."""
    _, lack = visit.only(0)
    changes, more = {0: lack, 2: None}, {"bias": None} if "bias" in visit.kwargs else {}
    out = visit.with_args(changes, **more)
    weight, bias = visit.option(1, "weight"), visit.option(2, "bias")
    channel = -1 if visit.operation == "linear" else 1 - weight.dim()
    return None if visit.take(bias, out.movedim(channel, -1)) else out


def _added_product(visit: Visit) -> Any:
    """A product of the second and third argument, added to the first."""
    if visit.kwargs or visit.args[3:]:
        raise RefusedError("meets a sum with factors")
    if visit.of(0) is not None:
        raise RefusedError("meets what is not linear")
    place, lack = visit.only(1, 2)
    terms = list(visit.args)
    terms[place] = lack
    out = torch.matmul(*terms[1:])
    return None if visit.take(terms[0], out) else out


def _batch_norm(visit: Visit) -> Any:
    """Its mean takes a constant per channel; statistics of the batch would take it away by themselves."""
    _, lack = visit.only(0)
    weight, mean, variance, of_batch, eps = (visit.args[place] for place in (1, 3, 4, 5, 7))
    if of_batch or mean is None:
        return _unseen(lack, [dim for dim in range(lack.dim()) if dim != 1])
    if visit.take(mean, -lack.movedim(1, -1)):
        return None
    return torch.batch_norm(lack, weight, None, torch.zeros_like(mean), variance, False, 0.0, eps, False)


def _normalized(dims: Callable[[Visit, Tensor], list[int]]) -> Callable[[Visit], Any]:
    """A call that takes away the mean over some dimensions: a constant along them is not seen."""

    def way(visit: Visit) -> Any:
        _, lack = visit.only(0)
        return _unseen(lack, dims(visit, lack))

    return way


def _largest(visit: Visit) -> Any:
    """The largest of numbers that all lack the same lacks the same."""
    _, lack = visit.only(0)
    dims = int(visit.operation[-2])
    if within(lack, [1 if dim >= lack.dim() - dims else size for dim, size in enumerate(lack.shape)]) is None:
        raise RefusedError("differs from place to place")
    return visit.with_args({0: lack})


def _padded(visit: Visit) -> Any:
    _, lack = visit.only(0)
    return visit.function(lack, visit.option(1, "pad"), visit.option(2, "mode", "constant"), None)


def _recurrent(visit: Visit) -> Any:
    """The biases of the inputs of the first layer take it, in both directions."""
    shift = int(isinstance(visit.args[3], (list, tuple)))  # of packed sequences, the sizes come second
    weights, biased, layers = visit.args[2 + shift : 5 + shift]
    directions = 1 + int(visit.args[7 + shift])
    step = len(weights) // (layers * directions)
    lack = visit.of(0)
    if lack is None or not biased or len(visit.lacks) > 1:
        raise RefusedError("meets what is not linear")
    for first in range(0, step * directions, step):
        _took(visit, weights[first + 2], nn.functional.linear(lack, weights[first]))


def _recurrent_cell(visit: Visit) -> Any:
    lack = visit.of(0)
    if lack is None or len(visit.lacks) > 1:
        raise RefusedError("meets what is not linear")
    _took(visit, visit.args[4], nn.functional.linear(lack, visit.args[2]))


def _took(visit: Visit, bias: Any, lack: Tensor) -> None:
    if not visit.take(bias, lack):
        raise RefusedError("meets what is not linear before a bias that could take it")


def _unseen(lack: Tensor, dims: Sequence[int]) -> None:
    if within(lack, [1 if dim in dims else size for dim, size in enumerate(lack.shape)]) is None:
        raise RefusedError("differs from place to place where only a constant would go unseen")


def within(lack: Tensor, shape: Sequence[int]) -> Tensor | None:
    """``lack`` in a smaller shape that broadcasts to it; None if it differs along what has no room."""
    ahead = lack.dim() - len(shape)
    if ahead < 0:
        return None
    for dim, size in enumerate([1] * ahead + list(shape)):
        if size not in (1, lack.shape[dim]):
            return None
        if size < lack.shape[dim]:
            first = lack.narrow(dim, 0, 1)
            if not equal(first, lack):
                return None
            lack = first
    return lack.reshape(tuple(shape))


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether two constants are the same to rounding."""
    largest = float(second.abs().max()) if second.numel() else 0.0
    gap = float((first - second).abs().max()) if second.numel() else 0.0
    return gap <= 64 * torch.finfo(second.dtype).eps * largest


def _grouped_norm(visit: Visit) -> Any:
    _, lack = visit.only(0)
    _unseen(lack.reshape(lack.shape[0], visit.args[1], -1), [2])


def _instance_norm(visit: Visit) -> Any:
    if not visit.args[5]:
        return _batch_norm(visit)
    return _unseen(visit.only(0)[1], range(2, visit.args[0].dim()))


def _behind(visit: Visit, lack: Tensor) -> list[int]:
    return list(range(lack.dim() - len(visit.option(1, "normalized_shape")), lack.dim()))


def _one(visit: Visit, lack: Tensor) -> list[int]:
    return [int(visit.option(1, "dim")) % lack.dim()]


# By call, the sign with which each argument enters a sum.
_TERMS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), (1, 1)),
    **dict.fromkeys(("sub", "sub_", "subtract", "__sub__", "__isub__"), (1, -1)),
    **dict.fromkeys(("rsub", "__rsub__"), (-1, 1)),
}
_SHAPES = (
    "view reshape permute transpose t flatten unflatten squeeze unsqueeze contiguous clone to type float double half "
    "bfloat16 movedim moveaxis swapaxes swapdims expand expand_as repeat repeat_interleave tile select narrow roll "
    "flip detach chunk split split_with_sizes tensor_split unbind unfold index_select pixel_shuffle pixel_unshuffle "
    "channel_shuffle __getitem__ __get__ view_as reshape_as broadcast_to"
)
_SCALES = (
    "neg negative positive sum mean cumsum div true_divide divide __truediv__ avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"
)
WAYS: dict[str, Callable[[Visit], Any]] = {
    **dict.fromkeys((*_SHAPES.split(), *_SCALES.split()), _along),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _either),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv"), _either),
    **dict.fromkeys((*_TERMS, "cat", "concat", "stack"), _sum),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), _linear),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _linear),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _added_product),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _largest),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent_cell),
    **dict.fromkeys(("softmax", "log_softmax"), _normalized(_one)),
    "layer_norm": _normalized(_behind),
    "group_norm": _grouped_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "dropout": _dropped,
    "pad": _padded,
}
