"""The operators of torchvision's own library: boxes, regions and deformable kernels.

Where it cannot be loaded, stand-ins of the same signatures are enough: rules know shapes and positions, no values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netopt.axes import find_axes
from netopt.prune import prune_neurons


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return scores.argsort(descending=True)[: len(scores) // 2]


def roi_align(
    tensor: Tensor, boxes: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool
) -> Tensor:
    return F.adaptive_avg_pool2d(tensor[boxes[:, 0].long()], (height, width))


def deform_conv2d(
    tensor: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *rest: int | bool
) -> Tensor:
    (stride, _, padding, _, dilation, _, groups), mean = rest[:7], mask.mean() if rest[-1] else 1.0
    return F.conv2d(tensor, weight, bias, stride, padding, dilation, groups) * (1 + offset.mean()) * mean


STAND_INS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "nms": (nms, "Tensor dets, Tensor scores, float iou_threshold"),
    "roi_align": (
        roi_align,
        "Tensor input, Tensor rois, float spatial_scale, SymInt height, SymInt width, int sampling_ratio, bool aligned",
    ),
    "deform_conv2d": (
        deform_conv2d,
        (
            "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt sh, SymInt sw, SymInt ph, "
            "SymInt pw, SymInt dh, SymInt dw, SymInt groups, SymInt offset_groups, bool use_mask"
        ),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def operators():
    """Torchvision's operators, or what stands in for them."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, (function, schema) in STAND_INS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}({schema}) -> Tensor")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "CPU"):
            library.impl(name, function, "CPU")
    yield
    library._destroy()


class Detector(nn.Module):
    """Boxes of each pixel, those that overlap left out, and what is seen in each."""

    def __init__(self):
        super().__init__()
        self.stem, self.boxes, self.scores = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1)
        self.hidden, self.head = nn.Linear(8 * 2 * 2, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        corner = self.boxes(x)[0].flatten(1).t().abs()
        boxes = torch.cat([corner[:, :2], corner[:, :2] + corner[:, 2:]], dim=1)
        kept = torch.ops.torchvision.nms(boxes, self.scores(x).flatten(), 0.5)
        boxes = torch.cat([torch.zeros(len(kept), 1), boxes[kept]], dim=1)
        seen = torch.ops.torchvision.roi_align(x, boxes, 1.0, 2, 2, 1, True)
        return self.head(self.hidden(seen.flatten(1)).relu()), boxes


class Deformable(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups
        self.stem, self.offset, self.mask = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 18, 3, padding=1), nn.Conv2d(8, 9, 1)
        self.weight, self.bias = nn.Parameter(torch.randn(12, 8 // groups, 3, 3)), nn.Parameter(torch.randn(12))
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        groups = x.shape[1] // self.weight.shape[1]
        return self.head(
            torch.ops.torchvision.deform_conv2d(
                x, self.weight, self.offset(x), self.mask(x), self.bias, 1, 1, 1, 1, 1, 1, groups, 1, True
            )
        )


def test_channels_pass_through_regions():
    torch.manual_seed(0)
    model, x = Detector(), torch.randn(1, 3, 6, 6)
    axes = find_axes(model, x)
    assert not axes.unknown
    assert axes["stem"].frozen is None
    assert "hidden.weight:1" in map(str, axes["stem"].members)
    assert axes["hidden"].exact
    report = prune_neurons(model, x, 0.5, importance="magnitude", scope="layer", progress=False)
    assert {row.after for row in report.rows} == {4, 6}


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_pass_through_a_deformable_convolution(groups):
    torch.manual_seed(0)
    model, x = Deformable(groups).double(), torch.randn(2, 3, 8, 8).double()
    dense = copy.deepcopy(model)
    axes = find_axes(model, x)
    assert not axes.unknown
    assert {axis.size for axis in axes.free} == ({8, 12} if groups == 1 else {2, 4, 6})
    assert all(axis.exact for axis in axes.free)
    prune_neurons(model, x, 0.5, importance="magnitude", scope="layer", progress=False)  # compares with the masked one
    assert model(x).shape == dense(x).shape
    assert model.head.in_channels < dense.head.in_channels
