"""Networks of torchvision and timm, with no hint of any kind, keep the laws of removal."""

from __future__ import annotations

import pytest
from tests.zoo.at_once import check_all_laws
from tests.zoo.vision import CASES

from netopt.axes import find_axes

# Of each way channels are mixed one network; the small ones of transformers do it all.
ORDER = frozenset(
    {
        "torchvision.densenet121",
        "torchvision.shufflenet_v2_x1_0",
        "torchvision.convnext_tiny",
        "torchvision.swin_t",
        "timm.levit_128s",
        "timm.gmlp_ti16_224",
        "timm.xcit_nano_12_p16_224",
        "timm.mambaout_femto",
    }
)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_a_network_as_published_keeps_the_laws(case):
    check_all_laws(case, order=case.name in ORDER)
    assert case.share > 0


def test_the_networks_named_by_the_promise_are_here():
    promised = """
    alexnet vgg16_bn resnet18 resnet50 resnext50 wide_resnet50 densenet121 googlenet googlenet.aux inception_v3
    squeezenet mobilenet_v2 mobilenet_v3 shufflenet_v2 mnasnet efficientnet_b0 efficientnet_v2_s regnet_y convnext_tiny
    vit_b_16 swin_t swin_v2_t maxvit_t fcn_resnet50 deeplabv3_resnet50 lraspp r3d_18
    """
    missing = [name for name in promised.split() if not any(f"torchvision.{name}" in case for case in CASES)]
    assert not missing
    assert set(CASES) >= ORDER


def test_the_axis_of_a_layer_is_found_by_its_name():
    case = CASES["torchvision.resnet18"]
    axes = find_axes(case.build(), case.inputs())
    axis = axes["layer1.0.conv1"]
    assert (axis.size, axis.frozen, axis.exact) == (64, None, True)
    assert {str(one) for one in axis.members} == {
        "layer1.0.conv1.weight:0",
        "layer1.0.bn1.weight:0",
        "layer1.0.bn1.bias:0",
        "layer1.0.bn1.running_mean:0",
        "layer1.0.bn1.running_var:0",
        "layer1.0.conv2.weight:1",
    }
    # What the chain of residual blocks adds up is one axis, whichever layer it is asked of.
    assert axes["layer1.0.conv2"] == axes["layer1.1.conv2"] == axes["conv1"]
