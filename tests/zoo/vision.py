"""The networks that torchvision and timm build, untouched, on inputs as small as they allow.

Widths are as published; the depth of a few transformers is cut, since each layer repeats the same mechanism.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from tests.zoo.case import Case
from tests.zoo.stays import STAYS
from torch import nn
from torchvision import models
from torchvision.models import segmentation, video
from torchvision.models.maxvit import MaxVit


def _case(
    name: str,
    build: Callable[[], nn.Module],
    size: int | tuple[int, ...],
    *,
    other: int | tuple[int, ...] | None = None,
    share: float = 0.99,
    **kwargs: object,
) -> Case:
    """A case whose inputs are a batch of two square images, or of the shape given; ``other`` is the second size."""

    def images(shape: int | tuple[int, ...], batch: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 3, shape, shape) if isinstance(shape, int) else torch.randn(batch, *shape),)

    return Case(
        name=name,
        make=build,
        make_inputs=lambda: images(size, 2),
        make_other=lambda: images(size if other is None else other, 3),
        share=share,
        stays=STAYS.get(name, ()),
        **kwargs,
    )


def _vision(name: str, size: int | tuple[int, ...] = 64, *, other: int | None = 96, share: float = 0.99, **options):
    """A classifier of torchvision."""
    return _case(
        f"torchvision.{name}", lambda: models.get_model(name, weights=None, **options), size, other=other, share=share
    )


def _timm(
    name: str, size: int = 64, *, other: int | None = 96, share: float = 0.99, tolerance: float = 1e-9, **options
) -> Case:
    """A model of timm."""
    return _case(
        f"timm.{name}",
        lambda: timm.create_model(name, pretrained=False, **options),
        size,
        other=other,
        share=share,
        tolerance=tolerance,
    )


TORCHVISION = (
    _vision("alexnet"),
    _vision("vgg16_bn", 32, other=64),
    _vision("resnet18"),
    _vision("resnet50"),
    _vision("resnext50_32x4d"),
    _vision("wide_resnet50_2"),
    _vision("densenet121"),
    _vision("googlenet", aux_logits=False, init_weights=False),
    _case(
        "torchvision.googlenet.aux",
        lambda: models.googlenet(weights=None, aux_logits=True, init_weights=False),
        64,
        other=96,
    ),
    _vision("inception_v3", 75, other=107, aux_logits=False, init_weights=False),
    _case("torchvision.inception_v3.aux", lambda: models.inception_v3(weights=None, init_weights=False), 299),
    _vision("squeezenet1_1"),
    _vision("mobilenet_v2"),
    _vision("mobilenet_v3_small"),
    _vision("mobilenet_v3_large"),
    _vision("shufflenet_v2_x1_0"),
    _vision("mnasnet1_0"),
    _vision("efficientnet_b0"),
    _vision("efficientnet_v2_s"),
    _vision("regnet_y_400mf"),
    _vision("regnet_x_400mf"),
    _vision("convnext_tiny"),
    _vision("vit_b_16", image_size=64, other=None),
    _vision("swin_t"),
    _vision("swin_v2_t"),
    _case(
        "torchvision.maxvit_t",
        lambda: MaxVit(
            input_size=(64, 64),
            stem_channels=64,
            partition_size=2,
            block_channels=[64, 128, 256, 512],
            block_layers=[2, 2, 5, 2],
            head_dim=32,
            stochastic_depth_prob=0.2,
        ),
        64,
    ),
    _case(
        "torchvision.fcn_resnet50",
        lambda: segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True),
        64,
        other=96,
    ),
    _case(
        "torchvision.deeplabv3_resnet50",
        lambda: segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None),
        64,
        other=96,
    ),
    _case(
        "torchvision.lraspp_mobilenet_v3_large",
        lambda: segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
        64,
        other=96,
    ),
    _case("torchvision.r3d_18", lambda: video.r3d_18(weights=None), (3, 4, 32, 32), other=(3, 6, 48, 48)),
    _case("torchvision.r2plus1d_18", lambda: video.r2plus1d_18(weights=None), (3, 4, 32, 32), other=(3, 6, 48, 48)),
)

TIMM = (
    _timm("mixer_s32_224", img_size=64, other=None),
    _timm("resmlp_12_224", img_size=64, other=None),
    _timm("gmlp_ti16_224", img_size=64, other=None),
    _timm("convmixer_768_32"),
    _timm("deit3_small_patch16_224", img_size=64, depth=2, other=None),
    _timm("eva02_tiny_patch14_224", 56, img_size=56, depth=2, num_classes=10, other=None),
    _timm("beitv2_base_patch16_224", img_size=64, depth=2, other=None),
    _timm("vit_base_patch16_siglip_224", img_size=64, depth=2, other=None),
    _timm("cait_xxs24_224", img_size=64, depth=2, other=None),
    _timm("xcit_nano_12_p16_224", img_size=64, depth=2, other=None),
    _timm("tnt_s_patch16_224", img_size=64, depth=2, other=None),
    _timm("coatnet_nano_rw_224", img_size=64, other=None),
    _timm("levit_128s", 224, other=None),
    _timm("mobilevit_xs"),
    _timm("pvt_v2_b0"),
    _timm("poolformer_s12"),
    _timm("efficientvit_b0", tolerance=1e-6),  # divides by sums of products of ReLUs, some nearly zero
    _timm("edgenext_xx_small"),
    _timm("davit_tiny"),
    _timm("convnextv2_atto"),
    _timm("focalnet_tiny_srf"),
    _timm("mambaout_femto"),
    _timm("hiera_tiny_224", img_size=64, other=None),
    _timm("swinv2_cr_tiny_ns_224", img_size=64, window_size=2, other=None),
    _timm("mobileone_s0"),
    _timm("repvgg_a0"),
    _timm("ghostnet_100"),
    _timm("hrnet_w18_small"),
    _timm("res2net50_26w_4s"),
    _timm("resnest14d"),
    _timm("skresnet18"),
    _timm("nf_resnet26"),
    _timm("dla34"),
    _timm("ese_vovnet19b_dw"),
    _timm("dpn48b"),
    _timm("lambda_resnet26t"),
    _timm("botnet26t_256", img_size=64, other=None),
)

CASES = {case.name: case for case in (*TORCHVISION, *TIMM)}
