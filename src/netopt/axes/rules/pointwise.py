"""Operations that act position by position: aligned dimensions are one and the same.

Where a masked neuron is zero on the way in, it is zero on the way out only for functions with f(0) = 0; a product is
zero where either factor is, a sum where both terms are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from netopt.axes.layout import Atom
from netopt.axes.operation import Dim, Dims, Operation, is_zero, rule

_MEAN = 1

_KEEP_ZERO = """
abs alias arcsin arctan asin asinh atan atanh celu ceil clone contiguous conj _conj copysign detach
dropout native_dropout elu erf erfinv expm1 feature_dropout floor frac gelu hardshrink hardswish
leaky_relu lift lift_fresh lift_fresh_copy log1p mish neg negative relu relu6
rrelu_with_noise round selu sgn sign silu sin sinh softshrink sqrt square tan tanh trunc
_to_copy to type_as remainder fmod fix positive resolve_conj resolve_neg real imag
rrelu special_erf bitwise_left_shift bitwise_right_shift
deg2rad rad2deg arctanh arcsinh conj_physical _conj_physical xlogy special_xlog1py poisson frexp
__lshift__ __rshift__ __ilshift__ __irshift__ special_i1 special_i1e special_bessel_j1"""

_LOSE_ZERO = """
acos acosh cos cosh digamma eq exp exp2 ge gt hardsigmoid isfinite isinf isnan le lgamma
log log10 log2 log_sigmoid_forward logaddexp logaddexp2 logical_not logical_or logical_xor logit lt
ne bitwise_not bitwise_or bitwise_xor reciprocal rsqrt sigmoid softplus threshold special_entr
special_expit heaviside erfc ones_like rand_like randn_like empty_like bernoulli
normal_functional randint_like uniform normal exponential random igamma polar complex isposinf
isneginf isreal signbit angle i0 special_i0 sinc alpha_dropout feature_alpha_dropout nextafter
cauchy log_normal geometric special_ndtr special_log_ndtr special_ndtri special_erfcx special_i0e
special_airy_ai special_bessel_j0 special_bessel_y0 special_bessel_y1 special_zeta polygamma igammac binomial
_standard_gamma"""

# What a forward that takes gradients itself runs: zero where the gradient that comes in is.
_GRADIENTS = """
threshold_backward sigmoid_backward tanh_backward gelu_backward silu_backward softplus_backward elu_backward
leaky_relu_backward hardtanh_backward mish_backward hardswish_backward hardsigmoid_backward softshrink_backward
hardshrink_backward logit_backward rrelu_with_noise_backward native_dropout_backward mse_loss_backward
smooth_l1_loss_backward huber_loss_backward"""


def _names(listing: str) -> tuple[str, ...]:
    return tuple(f"aten::{name}" for name in dict.fromkeys(listing.split()))


def aligned(op: Operation, tensors: Sequence[Tensor], rank: int) -> list[tuple[Dim | None, list[bool]]]:
    """Unifies dimensions that broadcasting aligns, counted from the right.

    Returns:
        For each dimension of the result the common one, or ``None`` if every operand is of size 1 there, and for each
        operand whether it is zero at a masked position of that dimension (never, where it is broadcast).
    """
    known = [op.dims(tensor) for tensor in tensors]
    found: list[tuple[Dim | None, list[bool]]] = []
    for right in range(rank, 0, -1):
        common: Dim | None = None
        zeros: list[bool] = []
        for dims in known:
            dim = dims[-right] if right <= len(dims) else None
            if dim is None or dim.size == 1:
                zeros.append(False)
                continue
            zeros.append(dim.zero)
            if common is None:
                common = dim
            else:
                op.same(common, dim)
        found.append((common, zeros))
    return found


def pointwise(op: Operation, tensors: Sequence[Tensor], zero: Callable[[list[bool]], bool]) -> Dims:
    """The dimensions of a pointwise result; ``zero`` maps operands' flags to whether it is zero where masked."""
    if len(tensors) == 1 and isinstance(op.out, Tensor):
        own = op.dims(tensors[0])
        if len(own) == op.out.dim():  # nothing is broadcast
            flags = {flag: bool(zero([flag])) for flag in (False, True)}
            return [dim if dim[1] is flags[dim[1]] else Dim(dim[0], flags[dim[1]]) for dim in own]
    out = (
        op.out if isinstance(op.out, Tensor) else next(leaf for leaf in tree_leaves(op.out) if isinstance(leaf, Tensor))
    )
    dims: Dims = []
    for size, (common, zeros) in zip(out.shape, aligned(op, tensors, out.dim()), strict=True):
        if common is None:
            dims.append(Dim(Atom(size)))
        else:
            dims.append(Dim(common.layout, zero(zeros)))
    return dims


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return [args[0]]
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _answers(op: Operation, dims: Dims) -> Any:
    if isinstance(op.out, Tensor):
        return dims
    return tuple(
        dims if leaf.dim() == len(dims) and all(d.size == s for d, s in zip(dims, leaf.shape, strict=True)) else None
        for leaf in tree_leaves(op.out)
        if isinstance(leaf, Tensor)
    )


@rule(*_names(_KEEP_ZERO))
def keeps_zero(op: Operation, *args: Any, **kwargs: Any) -> Any:
    """Functions with f(0) = 0, of the first operand."""
    answer = _answers(op, pointwise(op, _operands(args, kwargs), lambda zeros: zeros[0]))
    if "native_dropout" in op.name:  # beside it, a mask of what was dropped
        return answer[0], [Dim(dim.layout) for dim in answer[0]]
    return answer


@rule("aten::nan_to_num")
def nan_to_num(op: Operation, tensor: Tensor, nan: Any = None, *rest: Any) -> Dims:
    """Zero where it was, if a zero divided by itself becomes one too."""
    return pointwise(op, [tensor], lambda zeros: zeros[0] and not nan)


@rule(*_names(_GRADIENTS), "aten::log_sigmoid_backward")
def gradient(op: Operation, *args: Any, **kwargs: Any) -> Any:
    """The derivative of a pointwise function, times the gradient that comes in."""
    tensors = [tensor for tensor in _operands(args, kwargs) if tensor.numel()]
    dims = pointwise(op, tensors, lambda zeros: zeros[0])
    if "loss" in op.name and _MEAN in args[3:4]:  # gradient, prediction, target, reduction
        op.inexact(dims, f"is averaged over by {op.short}")
    return _answers(op, dims)


@rule(*_names(_LOSE_ZERO))
def loses_zero(op: Operation, *args: Any, **kwargs: Any) -> Any:
    """Functions with f(0) != 0, or of which it is not known."""
    return _answers(op, pointwise(op, _operands(args, kwargs), lambda _: False))


@rule("aten::clamp", "aten::clip", "aten::hardtanh", "aten::clamp_min", "aten::clamp_max")
def clamp(op: Operation, tensor: Tensor, low: Any = None, high: Any = None) -> Dims:
    """Zero stays where it lies between the bounds."""
    if op.short == "clamp_max":
        low, high = None, low
    elif op.short.startswith("hardtanh"):
        low, high = (-1 if low is None else low), (1 if high is None else high)
    bounds = [bound for bound in (low, high) if isinstance(bound, Tensor)]
    above = isinstance(low, Tensor) or low is None or low <= 0
    below = isinstance(high, Tensor) or high is None or high >= 0
    return pointwise(op, [tensor, *bounds], lambda zeros: above and below and all(zeros))


@rule("aten::pow", "aten::float_power")
def pow_(op: Operation, base: Any, exponent: Any) -> Dims:
    """A power of zero is zero for a positive exponent, a number alone."""
    positive = isinstance(base, Tensor) and not isinstance(exponent, Tensor) and exponent > 0
    tensors = [value for value in (base, exponent) if isinstance(value, Tensor)]
    return pointwise(op, tensors, lambda zeros: positive and zeros[0])


@rule("aten::mul", "aten::multiply", "aten::logical_and", "aten::bitwise_and", "aten::__and__")
def mul(op: Operation, *args: Any, **kwargs: Any) -> Dims:
    """A product is zero where any factor is."""
    return pointwise(op, _operands(args, kwargs), any)


@rule(
    "aten::add",
    "aten::sub",
    "aten::subtract",
    "aten::maximum",
    "aten::minimum",
    "aten::fmax",
    "aten::fmin",
    "aten::hypot",
    "aten::gcd",
    "aten::lcm",
    "aten::__or__",
    "aten::atan2",
)
def add(op: Operation, left: Any, right: Any, *rest: Any, **kwargs: Any) -> Dims:
    """A sum is zero where all terms are; a number added is zero nowhere."""
    tensors = [value for value in (left, right) if isinstance(value, Tensor)]
    numbers = [value for value in (left, right) if not isinstance(value, Tensor)]
    if len(tensors) > 1 and not any(map(op.is_weight, tensors)):
        op.plays("added", op.dims(tensors[0]))
    return pointwise(op, tensors, lambda zeros: all(zeros) and not any(numbers))


@rule("aten::rsub")
def rsub(op: Operation, left: Any, right: Any, *rest: Any, **kwargs: Any) -> Dims:
    """``right - left``."""
    return add(op, right, left)


@rule("aten::div", "aten::divide", "aten::true_divide", "aten::floor_divide", "aten::ldexp")
def div(op: Operation, left: Any, right: Any, **kwargs: Any) -> Dims:
    """A quotient is zero where its numerator is."""
    tensors = [value for value in (left, right) if isinstance(value, Tensor)]
    first = isinstance(left, Tensor)
    return pointwise(op, tensors, lambda zeros: first and zeros[0])


@rule("aten::where")
def where(op: Operation, condition: Tensor, *branches: Any) -> Any:
    """Zero where both branches are."""
    if not branches:
        op.freeze(op.dims(condition), "is searched for true entries")
        return tuple(None for _ in op.out)
    tensors = [value for value in branches if isinstance(value, Tensor) and not is_zero(op, value)]
    numbers = [value for value in branches if not isinstance(value, Tensor)]
    return pointwise(op, [condition, *tensors], lambda zeros: all(zeros[1:]) and not any(numbers))


@rule("aten::masked_fill")
def masked_fill(op: Operation, tensor: Tensor, mask: Tensor, value: Any) -> Dims:
    """Zero where the tensor is, if what it is filled with is zero."""
    filled_with_zero = is_zero(op, value)
    return pointwise(op, [tensor, mask], lambda zeros: zeros[0] and filled_with_zero)


@rule("aten::copy", "aten::expand_as", "aten::_copy_from")
def copy(op: Operation, target: Tensor, source: Tensor, *rest: Any, **kwargs: Any) -> Dims:
    """The target becomes the source, broadcast."""
    return pointwise(op, [source, target], lambda zeros: zeros[0] or is_zero(op, source))


@rule("aten::fill", "aten::full_like")
def fill(op: Operation, tensor: Tensor, value: Any, **kwargs: Any) -> Dims:
    """One number everywhere."""
    return [Dim(dim.layout, is_zero(op, value)) for dim in op.dims(tensor)]


@rule("aten::zeros_like", "aten::zero")
def zeros_like(op: Operation, tensor: Tensor, **kwargs: Any) -> Dims:
    """Zero everywhere."""
    return [Dim(dim.layout, True) for dim in op.dims(tensor)]


@rule("aten::addcmul")
def addcmul(op: Operation, tensor: Tensor, left: Tensor, right: Tensor, **kwargs: Any) -> Dims:
    """``tensor + left * right``."""
    return pointwise(op, [tensor, left, right], lambda zeros: zeros[0] and (zeros[1] or zeros[2]))


@rule("aten::addcdiv")
def addcdiv(op: Operation, tensor: Tensor, left: Tensor, right: Tensor, **kwargs: Any) -> Dims:
    """``tensor + left / right``."""
    return pointwise(op, [tensor, left, right], lambda zeros: zeros[0] and zeros[1])


@rule("aten::lerp")
def lerp(op: Operation, start: Tensor, end: Tensor, weight: Any) -> Dims:
    """Zero where both ends are."""
    tensors = [value for value in (start, end, weight) if isinstance(value, Tensor)]
    return pointwise(op, tensors, lambda zeros: zeros[0] and zeros[1])


@rule("aten::prelu", "aten::_prelu_kernel")
def prelu(op: Operation, tensor: Tensor, weight: Tensor) -> Dims:
    """A slope for each position of dimension 1."""
    dims = op.dims(tensor)
    if weight.numel() > 1:
        slopes = next(dim for dim in op.dims(weight) if dim.size > 1)
        op.same(slopes, dims[1] if len(dims) > 1 else dims[0])
    return dims


@rule("aten::view_as_complex")
def view_as_complex(op: Operation, tensor: Tensor) -> Dims:
    """Pairs along the last dimension become complex numbers."""
    dims = op.dims(tensor)
    op.freeze(dims[-1], "is the real and imaginary part of complex numbers")
    return dims[:-1]


@rule("aten::view_as_real")
def view_as_real(op: Operation, tensor: Tensor) -> Dims:
    """Complex numbers become pairs."""
    return [*op.dims(tensor), op.frozen(2, "is the real and imaginary part of complex numbers")]
