"""Another basis of heads: the same outputs, and positions that cost less when they go."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, ViTConfig, ViTModel

import netopt
from netopt.errors import EmptyDataError
from netopt.prune.balance import balanced

TOKENS = {"input_ids": torch.arange(60).view(6, 10) * 7 % 50}
PICTURES = {"pixel_values": torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 6}
MODELS = {
    "encoder": (lambda: BertModel(BertConfig(vocab_size=50, **SIZES)), TOKENS, 4),
    "grouped queries": (
        lambda: LlamaModel(LlamaConfig(vocab_size=50, num_key_value_heads=2, use_cache=False, **SIZES)),
        TOKENS,
        2,
    ),
    "fused": (lambda: GPT2Model(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, use_cache=False)), TOKENS, 2),
    "pictures": (lambda: ViTModel(ViTConfig(image_size=16, patch_size=4, **SIZES)), PICTURES, 4),
}


def built(name):
    torch.manual_seed(0)
    make, inputs, count = MODELS[name]
    return make().eval(), inputs, count


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_and_cutting_positions_costs_less(name):
    model, inputs, count = built(name)
    before, whole = output(model, inputs), copy.deepcopy(model)
    report = netopt.balance_heads(model, inputs, [inputs])
    assert len(report.spread) == count, report
    assert all(0.5 <= share <= 1 for share in report.spread.values())
    assert not any(torch.equal(one, other) for one, other in zip(_of_values(model), _of_values(whole), strict=True))
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-3, atol=1e-4)
    if name in ("grouped queries", "fused"):
        return  # there positions of values go only with those of queries, which stay as they are
    lost = []
    for one in (whole, model):
        scores = netopt.reconstruction_scores(one, inputs, [inputs], include=list(report.spread), progress=False)
        netopt.prune_neurons(one, inputs, 0.5, importance=scores, scope="layer", include=list(scores), progress=False)
        lost.append(float((output(one, inputs) - before).square().mean()))
    assert lost[1] < lost[0]


def _of_values(model):
    return [one for name, one in model.named_parameters() if name.endswith(("value.weight", "v_proj.weight"))]


def test_what_is_not_the_product_alone_stays_as_it_was():
    class Clipped(nn.Module):
        """Values pass an activation on their way."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x):
            q, k, v = (one(x).unflatten(-1, (4, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q.tanh(), k, v).relu()
            return self.o(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Clipped(), torch.randn(5, 7, 16)
    before = copy.deepcopy(model.state_dict())
    report = netopt.balance_heads(model, x, [x])
    assert not report.spread
    assert set(report.left.values()) == {"does not compute the same in another basis"}
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_the_better_half_is_that_of_the_product():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(8, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    change, values = balanced(p @ p.T, q @ q.T)
    one, two = change @ p, torch.linalg.inv(change).T @ q
    torch.testing.assert_close(one.T @ two, p.T @ q)
    expected = torch.linalg.svdvals(p.T @ q)[:8]
    torch.testing.assert_close(values, expected, rtol=1e-2, atol=1e-2)


def test_interrupted_nothing_has_changed(monkeypatch):
    model, inputs, _ = built("encoder")
    before, calls = copy.deepcopy(model.state_dict()), []

    def stop(*args):
        calls.append(args)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return balanced(*args)

    monkeypatch.setattr("netopt.prune.balance.balanced", stop)
    with pytest.raises(KeyboardInterrupt):
        netopt.balance_heads(model, inputs, [inputs])
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    with pytest.raises(EmptyDataError):
        netopt.balance_heads(model, inputs, [])
