"""torch.nn's own attention modules, and embeddings."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from tests.zoo.case import axis, case, tokens
from torch import nn


def heads(name):
    """The members of the heads, and of their entries, of an attention module with one fused input projection."""
    return f"{name}.in_proj_weight:0 {name}.in_proj_bias:0 {name}.out_proj.weight:1"


@case(
    "multihead_self",
    inputs=(2, 6, 10),
    other=(3, 9, 10),
    share=0.99,
    expected=[
        axis("embed:0 attn.in_proj_weight:1 attn.out_proj:0 norm:0 head.weight:1", 16, False, "e"),
        axis(heads("attn"), 4, None, "h"),
        axis(heads("attn"), 4, False),
    ],
    sizes={"attn.embed_dim": "e", "attn.num_heads": "h", "attn.head_dim": "e // h", "norm.normalized_shape.0": "e"},
)
class MultiheadSelf(nn.Module):
    """Its width is heads · entries: the three counts are tied."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(10, 16)
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        attended, _ = self.attn(x, x, x, need_weights=False)
        return self.head(self.norm(x + attended))


@case(
    "multihead_cross",
    inputs=lambda: (torch.randn(5, 2, 10), torch.randn(7, 2, 9)),
    other=lambda: (torch.randn(4, 3, 10), torch.randn(8, 3, 9)),
    share=0.99,
    expected=[
        axis("queries:0 attn.q_proj_weight:1 attn.out_proj:0 head.weight:1", 12, label="e"),
        axis("keys:0 attn.k_proj_weight:1", 8, label="k"),
        axis("values:0 attn.v_proj_weight:1", 6, label="v"),
        # The weights that are returned are a mean over the heads.
        axis(
            "attn.q_proj_weight:0 attn.k_proj_weight:0 attn.v_proj_weight:0 attn.in_proj_bias:0 attn.out_proj.weight:1",
            3,
            False,
            "h",
        ),
        axis("attn.q_proj_weight:0 attn.k_proj_weight:0 attn.in_proj_bias:0", 4, False),
        axis("attn.v_proj_weight:0 attn.in_proj_bias:0 attn.out_proj.weight:1", 4, None),
    ],
    sizes={"attn.embed_dim": "e", "attn.kdim": "k", "attn.vdim": "v", "attn.num_heads": "h"},
)
class MultiheadCross(nn.Module):
    """Keys and values of widths of their own, sequence first, with the weights returned."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys, self.values = nn.Linear(10, 12), nn.Linear(9, 8), nn.Linear(9, 6)
        self.attn = nn.MultiheadAttention(12, 3, dropout=0.1, kdim=8, vdim=6)
        self.head = nn.Linear(12, 3)

    def forward(self, x, memory):
        q = self.queries(x)
        out, weights = self.attn(q, self.keys(memory), self.values(memory))
        return self.head(q + out).mean(0), weights


@case(
    "multihead_masks_and_bias_kv",
    inputs=(2, 6, 12),
    other=(3, 5, 12),
    share=0.99,
    expected=[
        axis("fc:0 attn.in_proj_weight:1 attn.out_proj:0 head.weight:1", 12, None, "e"),
        axis(heads("attn") + " attn.bias_k:2 attn.bias_v:2", 3, None, "h"),
        axis(heads("attn") + " attn.bias_k:2 attn.bias_v:2", 4, False),
    ],
    sizes={"attn.embed_dim": "e", "attn.num_heads": "h"},
)
class MultiheadMasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.attn = nn.MultiheadAttention(12, 3, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.fc(x)
        n = x.shape[1]
        causal = torch.triu(torch.ones(n, n, dtype=torch.bool), 1)
        padding = torch.zeros(len(x), n, dtype=torch.bool)
        padding[:, -1] = True
        out = self.attn(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]
        return self.head(x + out)


ENCODER = [
    axis("embed:0 encoder.layers.0.self_attn.in_proj_weight:1 "
         "encoder.layers.0.self_attn.out_proj:0 encoder.layers.0.norm1:0 "
         "encoder.layers.0.norm2:0 encoder.layers.0.linear1.weight:1 encoder.layers.0.linear2:0 "
         "encoder.layers.1.self_attn.in_proj_weight:1 encoder.layers.1.self_attn.out_proj:0 encoder.layers.1.norm1:0 "
         "encoder.layers.1.norm2:0 encoder.layers.1.linear1.weight:1 encoder.layers.1.linear2:0 "
         "head.weight:1", 16, False, "e"),
    axis(heads("encoder.layers.0.self_attn"), 4, None, "h"),
    axis(heads("encoder.layers.0.self_attn"), 4, False),
    axis(heads("encoder.layers.1.self_attn"), 4, None),
    axis(heads("encoder.layers.1.self_attn"), 4, False),
    axis("encoder.layers.0.linear1:0 encoder.layers.0.linear2.weight:1", 20, label="f"),
    axis("encoder.layers.1.linear1:0 encoder.layers.1.linear2.weight:1", 20),
]  # fmt: skip


class Encoder(nn.Module):
    """Torch's encoder; in eval mode it takes its fast path."""

    def __init__(self, norm_first=False):
        super().__init__()
        self.embed = nn.Linear(10, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 20, dropout=0.1, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)))


@case(
    "transformer_encoder",
    inputs=(2, 6, 10),
    other=(3, 9, 10),
    share=0.99,
    expected=ENCODER,
    sizes={
        "encoder.layers.0.self_attn.embed_dim": "e",
        "encoder.layers.0.self_attn.num_heads": "h",
        "encoder.layers.0.linear1.out_features": "f",
    },
)
def transformer_encoder():
    return Encoder()


@case(
    "transformer_encoder_fast_path",
    inputs=(2, 6, 10),
    other=(3, 9, 10),
    share=0.99,
    expected=ENCODER,
    prepare=lambda model: model.eval().requires_grad_(False),
    train_step="its parameters are frozen, which is what switches the fast path on",
)
def transformer_encoder_fast_path():
    return Encoder()


@case(
    "transformer_decoder",
    inputs=lambda: {"tgt": torch.randint(11, (2, 5)), "memory": torch.randn(2, 7, 10)},
    other=lambda: {"tgt": torch.randint(11, (3, 4)), "memory": torch.randn(3, 6, 10)},
    share=0.99,
    expected=[
        axis("word:1 position:1 memory:0 layer.self_attn.in_proj_weight:1 layer.self_attn.out_proj:0 "
             "layer.multihead_attn.in_proj_weight:1 layer.multihead_attn.out_proj:0 layer.norm1:0 "
             "layer.norm2:0 layer.norm3:0 "
             "layer.linear1.weight:1 layer.linear2:0 head.weight:1", 12, False, "e"),
        axis(heads("layer.self_attn"), 3, None, "h"),
        axis(heads("layer.self_attn"), 4, False),
        axis(heads("layer.multihead_attn"), 3, None),
        axis(heads("layer.multihead_attn"), 4, False),
        axis("layer.linear1:0 layer.linear2.weight:1", 20),
    ],
    sizes={"layer.self_attn.num_heads": "h", "word.embedding_dim": "e"},
)  # fmt: skip
class Decoder(nn.Module):
    def __init__(self, d_model=12):
        super().__init__()
        self.word = nn.Embedding(11, d_model)
        self.position = nn.Embedding(16, d_model)
        self.memory = nn.Linear(10, d_model)
        self.layer = nn.TransformerDecoderLayer(d_model, 3, 20, activation="gelu", batch_first=True)
        self.head = nn.Linear(d_model, 11)

    def forward(self, tgt, memory):
        n = tgt.size(1)
        x = self.word(tgt) + self.position(torch.arange(n, device=tgt.device))
        mask = nn.Transformer.generate_square_subsequent_mask(n, dtype=x.dtype)
        return self.head(self.layer(x, self.memory(memory), tgt_mask=mask, tgt_is_causal=True))


@case(
    "transformer_whole",
    inputs=lambda: (torch.randn(6, 2, 12), torch.randn(4, 2, 12)),
    other=lambda: (torch.randn(5, 3, 12), torch.randn(7, 3, 12)),
    share=0.32,
    expected=[
        axis("transformer.encoder.layers.0.linear1:0 transformer.encoder.layers.0.linear2.weight:1", 20),
        axis("transformer.decoder.layers.0.linear1:0 transformer.decoder.layers.0.linear2.weight:1", 20),
    ],
    frozen={
        "transformer.encoder.layers.0.self_attn.in_proj_weight:0!": "must satisfy|literal 3 in unflatten",
        "transformer.decoder.layers.0.multihead_attn.in_proj_weight:0!": "literal 2 in unflatten|must satisfy",
        "transformer.encoder.layers.0.norm1.weight:0!": "output|input",
    },
)
class WholeTransformer(nn.Module):
    """Inputs go straight in: the width is the caller's, and stays."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self.transformer = nn.Transformer(12, 3, 1, 1, 20)

    def forward(self, src, tgt):
        return self.transformer(src, tgt)


@case(
    "tied_embedding_and_head",
    inputs=tokens(2, 6, 13),
    other=tokens(3, 9, 13),
    share=1.0,
    expected=[
        axis("wte:1 wpe:1 norm:0 mlp.0.weight:1 mlp.2:0 lm_head.weight:1", 12, False, "e"),
        axis("mlp.0:0 mlp.2.weight:1", 20),
    ],
    frozen={"wte.weight:0": "output|embedding|rows|number", "wpe:0!": "input|slice|not read|cut off"},
    sizes={"wte.embedding_dim": "e", "lm_head.in_features": "e", "norm.normalized_shape.0": "e"},
)
class TiedLanguageModel(nn.Module):
    def __init__(self, width=12, vocabulary=13):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Parameter(0.1 * torch.randn(16, width))
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids) + self.wpe[: ids.shape[-1]]
        return self.lm_head(x + self.mlp(self.norm(x)))


@case(
    "embedding_bag",
    inputs=lambda: (torch.randint(20, (9,)), torch.tensor([0, 4, 7])),
    other=lambda: (torch.randint(20, (12,)), torch.tensor([0, 3])),
    share=0.98,
    expected=[axis("bag:1 fc.weight:1", 10, label="e"), axis("fc:0 head.weight:1", 8)],
    sizes={"bag.embedding_dim": "e"},
)
class TextClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 10, mode="mean")
        self.fc = nn.Linear(10, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, text, offsets):
        return self.head(F.relu(self.fc(self.bag(text, offsets))))


@case(
    "positions_added_and_broadcast",
    inputs=(2, 3, 8, 8),
    other=(3, 3, 8, 8),
    share=0.99,
    expected=[axis("embed:0 rows:0 columns:0 cls:0 token_type:1 mix.weight:1", 12), axis("mix:0 head.weight:1", 9)],
)
class Positions(nn.Module):
    """Rows and columns, broadcast over each other; a class token by cat; a fixed sine table."""

    def __init__(self, width=12):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, 2)
        self.rows = nn.Parameter(torch.randn(width, 4, 1))
        self.columns = nn.Parameter(torch.randn(width, 1, 4))
        self.cls = nn.Parameter(torch.zeros(width))
        self.token_type = nn.Embedding(2, width, padding_idx=0)
        self.mix = nn.Linear(width, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        x = self.embed(x) + self.rows + self.columns
        x = x.flatten(2).mT
        cls = self.cls.repeat(x.size(0), 1, 1)
        x = torch.cat((cls, x), 1)
        kind = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        kind[:, 1:] = 1
        x = x + self.token_type(kind)
        return self.head(self.mix(x).relu())[:, 0]


@case(
    "sinusoid_buffer",
    inputs=tokens(2, 6, 13),
    other=tokens(3, 9, 13),
    share=0.98,
    expected=[axis("word:1 pe:2 fc.weight:1", 8), axis("fc:0 head.weight:1", 10)],
)
class Sinusoids(nn.Module):
    """The table of Attention Is All You Need, and one-hot words times a matrix."""

    def __init__(self, d_model=8, max_len=32):
        super().__init__()
        self.word = nn.Parameter(torch.randn(13, d_model))
        self.fc = nn.Linear(d_model, 10)
        self.head = nn.Linear(10, 3)
        position = torch.arange(max_len).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, d_model, 2) * (-9.21 / d_model))
        pe = torch.zeros(1, max_len, d_model)
        pe[0, :, 0::2] = torch.sin(position * div_term)
        pe[0, :, 1::2] = torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, ids):
        x = F.one_hot(ids, 13).to(self.word.dtype) @ self.word
        x = x * 8**0.5 + self.pe[:, : x.size(1)]
        return self.head(self.fc(x).relu()).amax(1)


@case(
    "factorised_embedding",
    inputs=tokens(2, 6, 13),
    other=tokens(3, 9, 13),
    share=0.96,
    expected=[axis("words:1 widen.weight:1 narrow:0", 6), axis("widen:0 layer:0 layer.weight:1 narrow.weight:1", 12)],
)
class FactorisedEmbedding(nn.Module):
    """ALBERT's embedding, tied at the other end through F.linear."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(13, 6)
        self.widen = nn.Linear(6, 12)
        self.layer = nn.Linear(12, 12)
        self.narrow = nn.Linear(12, 6)
        self.bias = nn.Parameter(torch.zeros(13))

    def forward(self, ids):
        x = self.widen(self.words(ids))
        for _ in range(3):
            x = x + torch.tanh(self.layer(x))
        return F.linear(F.gelu(self.narrow(x)), self.words.weight, self.bias)
