"""Why axes of the networks of torchvision, timm and transformers stay, model by model.

The usual reasons (inputs, outputs, kernels, pixels, tables that are looked up) need no word; every other one does: an
axis frozen for a reason that is not listed for its model is a mistake, and so is a reason listed that freezes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ACROSS = "is sliced across the boundaries of its parts"  # a table is read in pieces that do not match
ALIGNED = "has parts that (add|scaled_dot_product_attention) aligns in two ways"  # windows, shifted and not
BUFFER = "belongs to no parameter"  # a mask of windows
INDEXED = "is indexed by a tensor"  # a table of relative positions, of kinds of tokens, or of rotary angles
LITERAL = "meets the literal [23] in (view|slice|unflatten)"  # queries, keys and values; halves of a pair
NUMBERED = "is numbered by arange"  # positions of tokens, or of pixels
PADDING = "is padding"  # relative positions on a grid
RANKED = "is ranked by topk"  # a router's scores, one for each expert
ROWS = "is a number of groups of rows"  # experts, as many as the router has scores
SINGLED = "is a position that is singled out"  # a class token, one head, one gate
SLICED = "is passed over by a slice of a weight"  # positions beyond the length of these inputs
STACKED = "is the number of tensors stacked"  # a sine and a cosine for each frequency
STEPS = "is read every few positions"  # pairs of a rotation, side by side
TAKEN = "has a position taken by number"  # a class token, or the expert of a loop
TIED = "has a size that must satisfy"  # as large as something that is frozen, or 1 already
UNUSED = "is not used by the forward"  # a buffer kept for later, or a mask token

STAYS: Mapping[str, Sequence[str]] = {
    "transformers.bert": (NUMBERED, SLICED, INDEXED),
    "transformers.bert.masked": (SLICED, INDEXED),
    "transformers.roberta": (UNUSED, INDEXED),
    "transformers.distilbert": (NUMBERED, SLICED),
    "transformers.albert": (SLICED, INDEXED),
    "transformers.electra": (SLICED, INDEXED),
    "transformers.deberta_v2": (INDEXED, NUMBERED, SLICED),
    "transformers.gpt_neox": (UNUSED,),
    "transformers.bloom": (NUMBERED, LITERAL),
    "transformers.falcon": (INDEXED, LITERAL, UNUSED),
    "transformers.falcon.grouped": (INDEXED, LITERAL, UNUSED),
    "transformers.llama": (TIED, UNUSED),
    "transformers.mistral": (TIED, UNUSED),
    "transformers.qwen2": (TIED, UNUSED),
    "transformers.qwen3": (TIED, UNUSED),
    "transformers.gemma2": (TIED, UNUSED),
    "transformers.phi3": (TIED, ACROSS, UNUSED),
    "transformers.deepseek_v3": (STEPS, RANKED, UNUSED, ROWS),
    "transformers.deepseek_v3.loop": (STEPS, TAKEN, RANKED, UNUSED),
    "transformers.mixtral": (TIED, RANKED, UNUSED, ROWS),
    "transformers.mixtral.loop": (TIED, RANKED, TAKEN, UNUSED),
    "transformers.qwen2_moe": (TIED, RANKED, UNUSED, ROWS),
    "transformers.qwen2_moe.loop": (TIED, RANKED, TAKEN, UNUSED),
    "transformers.bart": (TAKEN,),
    "transformers.whisper": (INDEXED,),
    "transformers.vit": (TAKEN,),
    "transformers.deit": (TAKEN,),
    "transformers.beit": (INDEXED,),
    "transformers.swin": (ALIGNED,),
    "transformers.clip": (SLICED, TAKEN),
    "transformers.detr": (NUMBERED, STACKED),
    "torchvision.shufflenet_v2_x1_0": (SINGLED, LITERAL, TIED),
    "torchvision.vit_b_16": (TAKEN, LITERAL),
    "torchvision.swin_t": (ALIGNED, LITERAL),
    "torchvision.swin_v2_t": (ALIGNED,),
    "torchvision.maxvit_t": (INDEXED,),
    "timm.deit3_small_patch16_224": (LITERAL,),
    "timm.eva02_tiny_patch14_224": (SINGLED, STACKED, UNUSED),
    "timm.beitv2_base_patch16_224": (SINGLED, TIED, INDEXED),
    "timm.vit_base_patch16_siglip_224": (LITERAL, TIED),
    "timm.cait_xxs24_224": (LITERAL,),
    "timm.xcit_nano_12_p16_224": (NUMBERED, STACKED, LITERAL),
    "timm.tnt_s_patch16_224": (TAKEN, LITERAL),
    "timm.coatnet_nano_rw_224": (ALIGNED,),
    "timm.levit_128s": (INDEXED, ACROSS),
    "timm.mobilevit_xs": (LITERAL,),
    "timm.pvt_v2_b0": (LITERAL,),
    "timm.efficientvit_b0": (SINGLED,),
    "timm.edgenext_xx_small": (NUMBERED, STACKED, LITERAL),
    "timm.davit_tiny": (LITERAL,),
    "timm.focalnet_tiny_srf": (LITERAL, SINGLED),
    "timm.hiera_tiny_224": (LITERAL,),
    "timm.swinv2_cr_tiny_ns_224": (LITERAL, ALIGNED, BUFFER),
    "timm.resnest14d": (TIED,),
    "timm.lambda_resnet26t": (TIED,),
    "timm.botnet26t_256": (PADDING,),
}
