"""All laws on one build of a model, for networks of published size, of which each build and each trace takes time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tests.zoo.case import Case, call
from tests.zoo.laws import (
    ALMOST_NOTHING,
    check_layer,
    choose,
    described,
    exact_counts,
    halves,
    mask,
    plan_for,
    random_states,
    rows,
    shapes,
    tensors,
    to_double,
)
from tests.zoo.order import check_reordered
from tests.zoo.share import check_reasons, free_share
from torch import nn

from netopt.axes import Axes, find_axes


def check_all_laws(case: Case, *, order: bool = True) -> None:
    """Reading leaves no trace and is repeatable; what it finds can be removed; where it is exact, masking agrees.

    ``order`` has neurons exchanged too, which takes as long as masking them.
    """
    model = case.build()
    dense = copy.deepcopy(model)
    axes = check_reading(case, model, dense)
    share = free_share(dense, axes)
    assert share >= case.share, f"{share:.4f} of the parameters lie on a free axis, not {case.share}\n{axes}"
    check_reasons(case, axes)
    check_removal(case, model, dense, axes)
    del model
    if order and not case.ordered:
        check_reordered(case, copy.deepcopy(dense), copy.deepcopy(dense), axes)
    check_masking(case, dense, axes)


def check_reading(case: Case, model: nn.Module, dense: nn.Module) -> Axes:
    """The axes, found twice the same, with the model as it was before."""
    identities = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    held = {name: described(vars(module), {}) for name, module in model.named_modules()}
    randomness = random_states()
    axes = find_axes(model, case.inputs())
    assert random_states() == randomness
    assert {name: described(vars(module), {}) for name, module in model.named_modules()} == held
    before = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert id(tensor) == identities[name], f"{name} is another tensor"
        assert torch.equal(tensor, before[name]), f"{name} has other values"
    assert rows(find_axes(model, case.inputs())) == rows(axes)
    return axes


def check_removal(case: Case, model: nn.Module, dense: nn.Module, axes: Axes) -> None:
    """Half of every free axis removed: the model runs in both modes, at both sizes, and learns."""
    counts = halves(axes)
    assert any(counts[axis.name] < axis.size for axis in axes.free), "nothing can be removed"
    plan_for(axes, counts, choose(axes, counts, 0)).apply(model)
    with torch.no_grad():
        for training in (False, True):
            expected = shapes(call(copy.deepcopy(dense).train(training), case.inputs()))
            assert shapes(call(model.train(training), case.inputs())) == expected
        if (other := case.other_inputs()) is not None:
            assert shapes(call(model.eval(), other)) == shapes(call(dense.eval(), other))
    for name, module in model.named_modules():
        check_layer(name, module)
    if not case.train_step:
        learn(model, case.inputs())
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(call(model.eval(), case.inputs())))


def learn(model: nn.Module, inputs: Any) -> None:
    """One step of gradient descent on the mean square of all outputs."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [tensor for tensor in tensors(call(model, inputs)) if tensor.requires_grad]
    loss = torch.stack([tensor.square().mean() for tensor in found]).mean()
    loss.backward()
    grads = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert grads, "no gradient"
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    torch.optim.SGD(trained, lr=1e-3).step()


@torch.no_grad()
def check_masking(case: Case, dense: nn.Module, axes: Axes) -> None:
    """Half of every exact axis removed: the outputs are those of the model with these neurons at zero."""
    counts = exact_counts(axes)
    kept = choose(axes, counts, seed=1)
    assert all(axes[name].exact for name in kept)
    inputs = case.inputs()
    removed = dense.eval()
    if case.double:
        removed, inputs = removed.double(), to_double(inputs)
    masked = copy.deepcopy(removed)
    mask(masked, axes, kept)
    expected = tensors(call(masked, inputs))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in expected):
        masked = copy.deepcopy(removed)
        mask(masked, axes, kept, ALMOST_NOTHING)
        expected = tensors(call(masked, inputs))
    del masked
    plan_for(axes, counts, kept).apply(removed)
    found = tensors(call(removed, inputs))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=case.tolerance, atol=case.tolerance)
