"""Every rule is held to what it claims, operation by operation, on random arguments made from the schema.

An operation is run on tensors the model holds, some shifted so that a masked neuron of theirs is not zero. Then for
each axis that the rule leaves free and exact, removing positions before the operation must give what masking them
gives, at the positions that remain; and a dimension of the result that is said to be zero where masked must be zero.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from netopt.axes import rules  # noqa: F401 - registers the rules
from netopt.axes.layout import Atom, atoms, resolve
from netopt.axes.operation import find_rule, known_operations
from netopt.axes.tracing.dims import DimTracer

SHAPES = {1: (4,), 2: (3, 4), 3: (6, 3, 4), 4: (5, 6, 3, 4)}
SAMPLES = 25
LEFT_OUT = {
    "the result is random, or memory as it is": """rand_like randn_like randint_like empty_like empty empty_permuted
        empty_strided new_empty new_empty_strided bernoulli normal uniform exponential random cauchy log_normal
        geometric multinomial poisson dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout
        rrelu rrelu_with_noise binomial _standard_gamma set normal_functional fractional_max_pool2d
        fractional_max_pool3d rand randn randint randperm""",
    "sizes among the arguments are followed in the call": """expand_as split split_with_sizes split_with_sizes_copy
        unsafe_split unsafe_split_with_sizes scaled_dot_product_attention _scaled_dot_product_attention_math""",
    "called by torch alone, with arguments that fit": """_log_softmax_backward_data _softmax_backward_data
        _cdist_forward _pdist_forward _prelu_kernel _reshape_alias _trilinear _weight_norm _weight_norm_interface
        native_group_norm""",
}
SKIPPED = frozenset(f"aten::{name}" for names in LEFT_OUT.values() for name in names.split())
# Kernels and families that do not look at their arguments before they read memory.
UNGUARDED = """batch_norm flash efficient mkldnn miopen cudnn ctc _fused embedding_bag unpool linear_algebra recurrent
convolution"""


def is_tried(name):
    family = Path(getattr(find_rule(name), "__module__", "").replace(".", "/")).name
    return name not in SKIPPED and not any(word in f"{family}.{name}" for word in UNGUARDED.split())


def operations():
    """The overloads of every operation with a rule that reads tensors and writes none."""
    found = []
    for library, _, short in (name.partition("::") for name in known_operations() if is_tried(name)):
        packet = getattr(getattr(torch.ops, library), short, None)
        for overload in () if packet is None else packet.overloads():
            operation = getattr(packet, overload)
            arguments = operation._schema.arguments
            reads = arguments and str(arguments[0].type).startswith(("Tensor", "List[Tensor"))
            writes = operation._schema.is_mutable or "out" in [argument.name for argument in arguments]
            if reads and not writes and not overload.startswith("prim"):
                found.append(pytest.param(operation, id=str(operation)))
    return found


NUMBERS = [-2.5, -1.0, 0.0, 0.5, 1.0, 2.0, float("inf"), float("-inf")]


def drawn(argument, draw, rank, make):
    """A random value of an argument, by its type in the schema; the default half of the time."""
    kind = str(argument.type)
    if argument.has_default_value() and (argument.kwarg_only or draw.random() < 0.5):
        return argument.default_value
    if kind.startswith("Optional["):
        if draw.random() < 0.5:
            return None
        kind = kind[len("Optional[") : -1]
    is_dim = "dim" in argument.name
    if argument.name in ("beta", "delta", "eps"):
        return 0.7
    makers = {
        "Tensor": lambda: make(argument.name),
        "List[Tensor]": lambda: [make(argument.name), make(argument.name)],
        "int": lambda: draw.randrange(-rank, rank) if is_dim else draw.choice([0, 1, 1, 2]),
        "List[int]": lambda: sorted(draw.sample(range(rank), draw.randint(1, rank))) if is_dim else several(draw, rank),
        "bool": lambda: draw.random() < 0.5,
        **dict.fromkeys(("number", "Scalar", "float"), lambda: draw.choice(NUMBERS)),
    }
    if kind not in makers:
        raise NotImplementedError(kind)
    return makers[kind]()


def several(draw, rank):
    return [draw.choice([1, 2]) for _ in range(draw.choice([1, 2, rank]))]


class Sample:
    """One operation with arguments, that can be run on the tensors given, on masked or on smaller ones."""

    def __init__(self, operation, seed):
        draw = random.Random(f"{operation}/{seed}")
        generator = torch.Generator().manual_seed(seed)
        rank = draw.choice([1, 2, 2, 3, 3, 4])
        self.held: dict[str, Tensor] = {}
        self.shift: dict[str, float] = {}
        integers = draw.random() < 0.15

        def make(name):
            key = f"{name}{len(self.held)}"
            shape = SHAPES[rank if draw.random() < 0.8 else draw.choice([1, 2, 3])]
            if name.startswith("ind"):
                self.held[key] = torch.randint(2, shape, generator=generator)
            elif name in ("mask", "condition") or (integers and draw.random() < 0.3):
                self.held[key] = torch.rand(shape, generator=generator) > 0.5
            elif integers:
                self.held[key] = torch.randint(-4, 5, shape, generator=generator)
            else:
                self.held[key] = torch.randn(shape, generator=generator, dtype=torch.float64)
                self.shift[key] = draw.choice([0.0, 0.0, 1.5, -1.5])
            return key

        self.operation = operation
        arguments = operation._schema.arguments
        self.args = [drawn(one, draw, rank, make) for one in arguments if not one.kwarg_only]
        self.kwargs = {one.name: drawn(one, draw, rank, make) for one in arguments if one.kwarg_only}

    def run(self, held):
        ready = {name: held[name] + self.shift[name] if self.shift.get(name) else held[name].clone() for name in held}

        def filled(value):
            if isinstance(value, list):
                return [filled(one) for one in value]
            return ready.get(value, value) if isinstance(value, str) else value

        out = self.operation(*map(filled, self.args), **self.kwargs)
        return [one for one in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(one, Tensor)]


def smaller(tensors, layouts, atom, kept):
    return {name: at_kept(tensor, layouts[name], atom, kept) for name, tensor in tensors.items()}


def at_kept(tensor, places, atom, kept):
    for dim, place in enumerate(places):
        if place is atom:
            tensor = tensor.index_select(dim, kept)
    return tensor


def masked(tensors, layouts, atom, gone):
    found = dict(tensors)
    for name, places in layouts.items():
        for dim, place in enumerate(places):
            if place is atom and found[name].is_floating_point():
                found[name] = found[name].index_fill(dim, gone, 0.0)
    return found


def assert_alike(one, other, sample):
    assert one.shape == other.shape, f"another shape: {sample.args}"
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    known = ~one.isnan()  # what is divided by itself, at zero
    near = {"rtol": 1e-9, "atol": 1e-12} if one.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert torch.allclose(one[known].double(), other[known].double(), **near), f"removed, not masked: {sample.args}"


def assert_zero(out, dims, atom, gone, sample):
    for dim, one in enumerate(dims):
        if resolve(one.layout) is atom and one.zero:
            lost = out.index_select(dim, gone)
            lost = torch.view_as_real(lost) if lost.is_complex() else lost
            assert bool(((lost == 0) | lost.isnan()).all()), f"not zero where masked: {sample.args}"


def traced(sample):
    """What the rules say of a sample: layouts of what it reads, and the dimensions of its results."""
    trace = DimTracer(dict(sample.held), frozenset())
    try:
        with torch.no_grad(), trace:
            outs = sample.run(sample.held)
        trace.reach(outs)
        trace.finalize()
        layouts = {name: [resolve(dim.layout) for dim in trace.dims(tensor)] for name, tensor in sample.held.items()}
        return layouts, [trace.dims(out) for out in outs], not trace.unknown
    finally:
        trace.close()


def is_whole(atom, layouts):
    """Whether an axis is free and every dimension it is in is that axis alone; else sizes would have to change too."""
    if not isinstance(atom, Atom) or atom.frozen is not None or atom.size < 2:
        return False
    return all(one is atom or atom not in set(atoms(one)) for one in layouts)


def check(sample):
    """How many axes were compared."""
    layouts, made, is_known = traced(sample)
    results = [[resolve(dim.layout) for dim in dims] for dims in made]
    everything = [one for dims in (*layouts.values(), *results) for one in dims]
    compared = 0
    for atom in {id(one): one for dims in layouts.values() for one in dims}.values():
        if not is_known or not is_whole(atom, everything):
            continue
        gone, kept = torch.arange(atom.size).split([1, atom.size - 1])
        with torch.no_grad():
            wanted = sample.run(masked(sample.held, layouts, atom, gone))
            for out, dims in zip(wanted, made, strict=True):
                assert_zero(out, dims, atom, gone, sample)
            if atom.inexact is None:
                compared += 1
                found = sample.run(smaller(sample.held, layouts, atom, kept))
                for out, other, places in zip(found, wanted, results, strict=True):
                    assert_alike(at_kept(other, places, atom, kept), out, sample)
    return compared


COUNTS: dict[str, tuple[int, int]] = {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operation", operations())
def test_a_rule_keeps_its_claims(operation):
    compared = ran = 0
    for seed in range(SAMPLES):
        try:
            sample = Sample(operation, seed)
            sample.run(sample.held)
        except (RuntimeError, NotImplementedError, IndexError, ValueError, TypeError):
            continue  # no arguments of this operation
        ran += 1
        compared += check(sample)
    COUNTS[str(operation)] = ran, compared
    assert compared == 0 or ran > 0


def test_many_operations_were_compared():
    if len(COUNTS) < 400:
        pytest.skip("a part of the operations was chosen")
    assert sum(ran > 0 for ran, _ in COUNTS.values()) > 300
    assert sum(compared for _, compared in COUNTS.values()) > 10_000
