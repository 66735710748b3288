"""Every family of transformers named by the library's promise, as a tiny model from its configuration class.

No two sizes are equal unless the family says so, so that a dimension mistaken for another shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import transformers as hf
from tests.zoo.case import Case
from tests.zoo.stays import STAYS
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, INNER, WORDS = 48, 2, 4, 80, 61
ENCODER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
TEXT = {**ENCODER, "vocab_size": WORDS, "max_position_embeddings": 40}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {**ENCODER, "image_size": 32, "patch_size": 8}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
UNPADDED = {"bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
}
T5 = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 10, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS}


def words(batch: int, length: int) -> Tensor:
    """Token numbers, none of them special."""
    return torch.randint(3, WORDS, (batch, length))


def text(other: bool = False) -> dict[str, Tensor]:
    """Inputs of a language model."""
    return {"input_ids": words(3, 9) if other else words(2, 7)}


def masked_text(other: bool = False) -> dict[str, Tensor]:
    """Inputs of a language model, padded on the right."""
    inputs = text(other)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -2:] = 0
    return {**inputs, "attention_mask": mask}


def pair(other: bool = False) -> dict[str, Tensor]:
    """Inputs of an encoder and of its decoder."""
    return {**text(other), "decoder_input_ids": words(3, 4) if other else words(2, 5)}


def image(other: bool = False) -> dict[str, Tensor]:
    """Images of the one size that positional parameters allow; only the batch differs."""
    return {"pixel_values": torch.randn(3 if other else 2, 3, 32, 32)}


def any_image(other: bool = False) -> dict[str, Tensor]:
    """Images for a network that takes every size."""
    return {"pixel_values": torch.randn(3, 3, 96, 96) if other else torch.randn(2, 3, 64, 64)}


def text_and_image(other: bool = False) -> dict[str, Tensor]:
    """Inputs of a pair of towers."""
    return {**text(other), **image(other)}


def spectrum(other: bool = False) -> dict[str, Tensor]:
    """Inputs of a speech encoder with positions of fixed length, and of its decoder."""
    batch = 3 if other else 2
    return {"input_features": torch.randn(batch, 10, 30), "decoder_input_ids": words(batch, 4 if other else 5)}


def wave(other: bool = False) -> dict[str, Tensor]:
    """Raw sound."""
    return {"input_values": torch.randn(3, 520) if other else torch.randn(2, 400)}


def _case(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[bool], Mapping[str, Tensor]] = text,
    *,
    share: float = 0.99,
    **kwargs: object,
) -> Case:
    return Case(
        name=f"transformers.{name}",
        make=build,
        make_inputs=lambda: inputs(False),
        make_other=lambda: inputs(True),
        share=share,
        stays=STAYS.get(f"transformers.{name}", ()),
        **kwargs,
    )


def _experts(name: str, build: Callable[..., nn.Module], **kwargs: object) -> tuple[Case, Case]:
    """A mixture of experts as it comes, by a grouped matrix product without float64, and as a loop over experts."""
    return (
        _case(name, build, double=False, tolerance=1e-4, **kwargs),
        _case(f"{name}.loop", lambda: build(experts_implementation="eager"), **kwargs),
    )


ENCODERS = (
    _case("bert", lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), masked_text),
    _case("bert.masked", lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT))),
    _case("roberta", lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT, **TOKENS)), masked_text),
    _case(
        "distilbert",
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                vocab_size=WORDS,
                max_position_embeddings=40,
                dim=WIDTH,
                n_layers=LAYERS,
                n_heads=HEADS,
                hidden_dim=INNER,
            )
        ),
        masked_text,
    ),
    _case(
        "albert",
        lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, embedding_size=20, **TOKENS)),
    ),
    _case("electra", lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**TEXT, embedding_size=20))),
    _case(
        "deberta_v2",
        lambda: hf.DebertaV2ForSequenceClassification(
            hf.DebertaV2Config(
                **TEXT,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                position_buckets=8,
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                type_vocab_size=0,
            )
        ),
    ),
)

DECODERS = (
    _case(
        "gpt2",
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=WORDS, n_positions=40, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, **UNPADDED
            )
        ),
    ),
    _case("gpt_neox", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT, **UNPADDED))),
    _case(
        "opt",
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=WORDS,
                max_position_embeddings=40,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                ffn_dim=INNER,
                word_embed_proj_dim=WIDTH,
                **TOKENS,
            )
        ),
        masked_text,
    ),
    _case(
        "bloom",
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=WORDS, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, **TOKENS)
        ),
    ),
    _case(
        "falcon",
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(
                vocab_size=WORDS,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                **UNPADDED,
            )
        ),
    ),
    _case(
        "falcon.grouped",
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(
                vocab_size=WORDS,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_kv_heads=2,
                new_decoder_architecture=True,
                **UNPADDED,
            )
        ),
    ),
    _case("llama", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **UNPADDED)), masked_text),
    _case("mistral", lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, **UNPADDED))),
    _case("qwen2", lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED))),
    _case("qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=16))),
    _case("gemma2", lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=16, **TOKENS))),
    _case("phi3", lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, **TOKENS))),
    *_experts(
        "deepseek_v3",
        lambda **how: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(
                **TEXT,
                **UNPADDED,
                num_key_value_heads=HEADS,
                n_routed_experts=4,
                n_shared_experts=1,
                num_experts_per_tok=2,
                n_group=2,
                topk_group=1,
                moe_intermediate_size=24,
                first_k_dense_replace=1,
                kv_lora_rank=14,
                q_lora_rank=18,
                qk_rope_head_dim=8,
                qk_nope_head_dim=10,
                v_head_dim=12,
                **how,
            )
        ),
    ),
    *_experts(
        "mixtral",
        lambda **how: hf.MixtralForCausalLM(
            hf.MixtralConfig(**GROUPED, **UNPADDED, num_local_experts=4, num_experts_per_tok=2, **how)
        ),
    ),
    *_experts(
        "qwen2_moe",
        lambda **how: hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(
                **GROUPED,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                shared_expert_intermediate_size=28,
                **how,
            )
        ),
    ),
    _case(
        "mamba",
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(
                vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=6, time_step_rank=5
            )
        ),
    ),
)

ENCODER_DECODERS = (
    _case(
        "t5",
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
        pair,
        # The encoder's states are an output, and with them the width of the embeddings that both halves share.
        share=0.95,
    ),
    _case(
        "t5.gated",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(**T5, decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        pair,
        # Likewise.
        share=0.95,
    ),
    _case(
        "bart",
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, max_position_embeddings=40, **TOKENS)),
        pair,
        # The encoder's states are an output: embeddings, positions and norms have no other dimension to shrink.
        share=0.9,
    ),
    _case(
        "whisper",
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                **SEQ2SEQ,
                **TOKENS,
                num_mel_bins=10,
                max_source_positions=15,
                max_target_positions=20,
                decoder_start_token_id=1,
            )
        ),
        spectrum,
        # The encoder's states are an output, and with them the width of its positions.
        share=0.98,
    ),
)

BEYOND_TEXT = (
    _case("vit", lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)), image),
    _case("deit", lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**IMAGE)), image),
    _case(
        "beit",
        lambda: hf.BeitForImageClassification(hf.BeitConfig(**IMAGE, use_relative_position_bias=True)),
        image,
    ),
    _case(
        "swin",
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        image,
    ),
    _case(
        "clip",
        lambda: hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**TEXT, **TOKENS, "projection_dim": 20},
                vision_config={**IMAGE, "hidden_size": 40, "projection_dim": 20},
                projection_dim=20,
            )
        ),
        text_and_image,
        # The states of both towers are outputs: embeddings and norms have no other dimension to shrink.
        share=0.78,
    ),
    _case(
        "segformer",
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                hidden_sizes=[8, 16, 24, 32],
                depths=[1, 1, 1, 1],
                num_attention_heads=[1, 2, 2, 4],
                decoder_hidden_size=20,
            )
        ),
        any_image,
    ),
    _case(
        "detr",
        lambda: hf.DetrForObjectDetection(
            hf.DetrConfig(
                use_timm_backbone=False,
                backbone=None,
                backbone_config=hf.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=["stage4"]
                ),
                d_model=WIDTH,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=HEADS,
                decoder_attention_heads=HEADS,
                encoder_ffn_dim=INNER,
                decoder_ffn_dim=INNER,
                num_queries=6,
            )
        ),
        any_image,
        # The states of encoder and decoder are outputs.
        share=0.97,
    ),
    _case(
        "wav2vec2",
        lambda: hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                **ENCODER,
                vocab_size=WORDS,
                conv_dim=(20, 20, 20),
                conv_stride=(5, 2, 2),
                conv_kernel=(10, 3, 3),
                num_feat_extract_layers=3,
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            )
        ),
        wave,
    ),
)

CASES = {case.name: case for case in (*ENCODERS, *DECODERS, *ENCODER_DECODERS, *BEYOND_TEXT)}
