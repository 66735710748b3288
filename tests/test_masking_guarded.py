"""A write to a masked weight that is no plain tensor reaches the weight below, or is refused at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor

from netopt import masking
from netopt.errors import MaskError
from test_masking_writes import MODES, REFUSED, WRITES, attempt, masked_and_plain


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    place = tmp_path_factory.mktemp("group") / "meeting"
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def two(layer):
    """Its weight as a tensor made of two, both alike."""
    weight = layer._parameters["weight_orig"].detach()
    pair = nn.Parameter(TwoTensor(weight.clone(), weight.clone()), requires_grad=layer.weight.requires_grad)
    layer._parameters["weight_orig"] = pair
    return layer


def sharded(layer):
    """Its weight as a part of a tensor that processes share."""
    return fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))


def values(weight):
    weight = weight.detach()
    return (weight.a if isinstance(weight, TwoTensor) else weight.to_local()).clone()


def reset(layer):
    layer.weight.data.copy_(torch.ones_like(layer.weight.data))


EVERY = WRITES | REFUSED | {"copy of its kind": reset, "zero_": lambda layer: layer.weight.zero_()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", [two, sharded])
@pytest.mark.parametrize("name", EVERY)
def test_a_write_reaches_the_weight_below_or_raises(name, kind, frozen, mode):
    masked, _ = masked_and_plain(frozen)
    masked = kind(masked)
    weight, kept = masked.weight_orig, masked.weight_mask.clone()
    before = values(weight)
    error = attempt(EVERY[name], masked, mode)
    if name == "another_parameter" and error is None:
        return
    assert error is not None, "lost"
    assert masked.weight_orig is weight
    assert torch.equal(values(weight), before)
    torch.testing.assert_close(values(masked.weight), before * kept)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [two, sharded])
def test_reading_is_as_ever(kind):
    masked, plain = masked_and_plain()
    expected = masked.weight.detach().clone()
    masked = kind(masked)
    torch.testing.assert_close(values(masked.weight * 2), 2 * expected)
    torch.testing.assert_close(values(masked.weight.t()), expected.t())
    changed = masked.weight.detach().clone()
    with torch.no_grad():
        changed.fill_(1.0)  # a copy is the reader's own
    assert torch.equal(values(changed), torch.ones(5, 6))
    found, x = masked(torch.eye(6)), torch.eye(6)
    torch.testing.assert_close(values(found) if kind is two else found, plain(x))
    if kind is sharded:
        masked.reshard()
    with torch.no_grad(), pytest.raises(MaskError, match=r"module.weight_orig"):
        masked.weight.fill_(1.0)


def test_masks_go_on_and_off_a_weight_of_two():
    layer = nn.Linear(6, 5)
    weight = layer.weight.detach().clone()
    layer.weight = nn.Parameter(TwoTensor(weight.clone(), weight.clone()))
    mask = torch.rand(5, 6) > 0.5
    masking.put(layer, {"weight": mask})
    masking.bake(layer)
    assert torch.equal(values(layer.weight), weight * mask)
