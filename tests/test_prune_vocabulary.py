"""Tokens that a corpus does not need go from model and tokenizer; texts whose tokens stay come out as before."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import netopt
from netopt.errors import (
    ArgumentTypeError,
    EmptyDataError,
    InvalidArgumentError,
    NothingToPruneError,
    VerificationError,
)

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

ANIMALS = ["the cat sat on the mat", "a dog ran to the cat", "cats and dogs sat", "the dogs ran on a mat"] * 3
OTHERS = ["quantum fields fluctuate", "integrals converge slowly", "a manifold is smooth", "the tensor contracts"] * 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
SIZE = 330


def byte_pairs():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ANIMALS + OTHERS, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer


def character_pairs():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        ANIMALS + OTHERS,
        trainers.BpeTrainer(vocab_size=140, special_tokens=SPECIAL, end_of_word_suffix="</w>"),
    )
    return tokenizer


def word_pieces():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(ANIMALS + OTHERS, trainers.WordPieceTrainer(vocab_size=140, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        ANIMALS + OTHERS, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


TOKENIZERS = {one.__name__: one for one in (byte_pairs, character_pairs, word_pieces, unigram)}
_TRAINED: dict[str, str] = {}


def trained(kind):
    if kind not in _TRAINED:
        _TRAINED[kind] = TOKENIZERS[kind]().to_str()
    return Tokenizer.from_str(_TRAINED[kind])


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(size, **options):
    config = transformers.LlamaConfig(vocab_size=size, num_key_value_heads=1, **SMALL, **IDS, **options)
    return transformers.LlamaForCausalLM(config)


def gpt2(size):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, **IDS))


def bert(size):
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=size, **SMALL, pad_token_id=0))


def roberta(size):
    return transformers.XLMRobertaForMaskedLM(
        transformers.XLMRobertaConfig(vocab_size=size, max_position_embeddings=60, **SMALL, **IDS)
    )


def t5(size):
    config = transformers.T5Config(
        vocab_size=size, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0, **IDS
    )
    return transformers.T5ForConditionalGeneration(config)


def bart(size):
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
    }
    config = transformers.BartConfig(
        vocab_size=size,
        d_model=16,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
        **sizes,
        **IDS,
    )
    return transformers.BartForConditionalGeneration(config)


class Own(nn.Module):
    """A model of no library, with a separate head."""

    def __init__(self, size):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(64, 16))
        self.table, self.mix, self.head = nn.Embedding(size, 16, padding_idx=0), nn.Linear(16, 16), nn.Linear(16, size)

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.table(ids) + self.positions[: ids.shape[1]])))


MODELS = {
    "llama": llama,
    "llama_tied": lambda size: llama(size, tie_word_embeddings=True),
    "gpt2": gpt2,
    "bert": bert,
    "roberta": roberta,
    "t5": t5,
    "bart": bart,
    "own": Own,
}


def made(family, tokenizer, more=3):
    """A model with some rows more than there are tokens, as they are padded."""
    torch.manual_seed(0)
    return MODELS[family](tokenizer.get_vocab_size() + more).eval()


def ids_of(tokenizer, text):
    return torch.tensor([tokenizer.encode(text).ids])


def run(model, ids):
    """Hidden states or what there is, and scores."""
    with torch.no_grad():
        if isinstance(model, Own):
            return [], model(ids)
        options = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        result = model(input_ids=ids, output_hidden_states=True, **options)
    states = result.get("hidden_states") or (*result.encoder_hidden_states, *result.decoder_hidden_states)
    return list(states), result.logits


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", MODELS)
def test_texts_whose_tokens_stay_come_out_as_before(family, kind):
    tokenizer = trained(kind)
    model = made(family, tokenizer)
    before = {text: (ids_of(tokenizer, text), *run(model, ids_of(tokenizer, text))) for text in ANIMALS[:4]}
    report = netopt.prune_vocabulary(model, tokenizer, ANIMALS, progress=False)
    kept = (report.ids >= 0).nonzero().flatten()
    assert report.ids[kept].tolist() == list(range(len(kept)))
    assert tokenizer.get_vocab_size() == len(kept) < len(report.ids) - 3
    for text, (old, states, scores) in before.items():
        new = ids_of(tokenizer, text)
        assert new.tolist() == report.ids[old].tolist()
        after = run(model, new)
        assert len(states) == len(after[0])
        assert all(torch.equal(one, other) for one, other in zip(states, after[0], strict=True))
        torch.testing.assert_close(after[1], scores[..., kept], rtol=1e-6, atol=1e-6)
    if family != "own":
        assert model.config.vocab_size == len(kept)
        assert model.get_input_embeddings().num_embeddings == len(kept)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "options", [{"keep": 0.9}, {"keep": 100}, {"coverage": 0.6}, {"round_to": 8}, {"always": ["<mask>"]}]
)
def test_any_choice_is_closed(kind, options):
    """Whatever stays is encoded alike, tokens beyond what the corpus needs among them."""
    old, tokenizer = trained(kind), trained(kind)
    if kind == "byte_pairs" and options == {"keep": 100}:
        options = {"keep": 300}
    report = netopt.prune_vocabulary(made("own", tokenizer), tokenizer, ANIMALS, progress=False, **options)
    covered = 0
    for text in {*ANIMALS, *OTHERS, *(word for one in (*ANIMALS, *OTHERS) for word in one.split())}:
        ids = old.encode(text).ids
        if all(report.ids[one] >= 0 for one in ids):
            covered += 1
            assert tokenizer.encode(text).ids == report.ids[ids].tolist()
    assert covered
    vocabulary = tokenizer.get_vocab()
    assert all(token in vocabulary for token in SPECIAL)
    if "round_to" in options:
        assert tokenizer.get_vocab_size() % 8 == 0
    if isinstance(options.get("keep"), int):
        assert tokenizer.get_vocab_size() <= options["keep"]


def test_other_texts_are_spelt_out_and_come_back():
    tokenizer = trained("byte_pairs")
    netopt.prune_vocabulary(made("own", tokenizer), tokenizer, ANIMALS, progress=False)
    for text in [*OTHERS[:4], "ünïcode ☃ 中文"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_folder_loads_and_generates_the_same(kind, tmp_path):
    tokenizer = trained(kind)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model = made("llama_tied", tokenizer)
    inputs = wrapped(ANIMALS[0], return_tensors="pt", return_token_type_ids=False)
    report = netopt.prune_vocabulary(model, wrapped, ANIMALS, progress=False)
    model.save_pretrained(tmp_path)
    wrapped.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(wrapped) == model.config.vocab_size
    new = again(ANIMALS[0], return_tensors="pt", return_token_type_ids=False)
    assert new["input_ids"].tolist() == report.ids[inputs["input_ids"]].tolist()
    assert (again.pad_token_id, again.eos_token_id) == (loaded.config.pad_token_id, loaded.config.eos_token_id)
    ours = model.generate(**new, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, loaded.generate(**new, max_new_tokens=5, do_sample=False))


def test_numbers_of_tokens_follow_in_configurations():
    tokenizer = trained("unigram")
    model = made("t5", tokenizer)
    pad, late = tokenizer.token_to_id("<pad>"), max(tokenizer.get_vocab().values())
    model.config.eos_token_id = [2, late]
    model.generation_config.suppress_tokens = [late, late - 1]
    report = netopt.prune_vocabulary(model, tokenizer, ANIMALS, coverage=0.5, progress=False)
    assert report.ids[late] >= 0
    assert model.config.eos_token_id == [int(report.ids[2]), int(report.ids[late])]
    assert model.config.pad_token_id == report.ids[pad]
    expected = [int(report.ids[one]) for one in (late, late - 1) if report.ids[one] >= 0]
    assert model.generation_config.suppress_tokens == expected
    assert model.config.decoder.vocab_size if hasattr(model.config, "decoder") else True


def test_the_optimizer_and_the_plan_follow():
    tokenizer = trained("word_pieces")
    model = made("bert", tokenizer)
    fresh, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters())
    run(model, ids_of(tokenizer, ANIMALS[0]))
    model(input_ids=ids_of(tokenizer, ANIMALS[0])).logits.square().sum().backward()
    optimizer.step()
    table = model.get_input_embeddings().weight
    moments = optimizer.state[table]["exp_avg"].clone()
    report = netopt.prune_vocabulary(model, tokenizer, ANIMALS, optimizer=optimizer, progress=False)
    assert model.get_input_embeddings().weight is table
    kept = (report.ids >= 0).nonzero().flatten()
    assert torch.equal(optimizer.state[table]["exp_avg"], moments[kept])
    optimizer.step()
    again = netopt.Plan.from_dict(json.loads(json.dumps(report.plan.to_dict())))
    again.apply(fresh)
    assert {name: one.shape for name, one in fresh.named_parameters()} == {
        name: one.shape for name, one in model.named_parameters()
    }
    assert fresh.config.vocab_size == model.config.vocab_size
    assert json.dumps(report.to_dict())


def ordinary(kind):
    """A tokenizer none of whose tokens is an added one, whatever is put around texts."""
    data = json.loads(_TRAINED.get(kind) or trained(kind).to_str())
    return Tokenizer.from_str(json.dumps({**data, "added_tokens": [], "post_processor": None}))


TEMPLATE = {"single": "<mask> $A </s>", "special_tokens": [("<mask>", 4), ("</s>", 2)]}
AROUND = {
    "bert": processors.BertProcessing(("</s>", 2), ("<mask>", 4)),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<mask>", 4)),
    "template": processors.TemplateProcessing(**TEMPLATE),
    "several": processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(**TEMPLATE)]),
    "none": None,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_put_around_and_behind_stay(kind, around):
    """Though they are ordinary ones, which no text of the corpus has."""
    tokenizer = ordinary(kind)
    if AROUND[around] is not None:
        tokenizer.post_processor = AROUND[around]
    tokenizer.enable_padding(pad_id=3, pad_token="<unk>", length=40)
    before = tokenizer.encode(ANIMALS[0])
    report = netopt.prune_vocabulary(made("own", tokenizer), tokenizer, ANIMALS, progress=False)
    after = tokenizer.encode(ANIMALS[0])
    assert after.ids == report.ids[before.ids].tolist()
    assert after.tokens == before.tokens
    assert tokenizer.padding["pad_id"] == report.ids[3] == after.ids[-1]


class Counted(Own):
    """Uses the numbers of tokens as numbers."""

    def forward(self, ids):
        return super().forward(ids) + ids[..., None] / 7


class Clustered(Own):
    """Scores of clusters of tokens, which keep their numbers."""

    def __init__(self, size):
        super().__init__(size)
        self.head = nn.AdaptiveLogSoftmaxWithLoss(16, size, [20, 30])

    def forward(self, ids):
        return self.head.log_prob(self.mix(self.table(ids)).flatten(0, 1))


class Untabled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x.float().expand(4))


def padded(tokenizer):
    tokenizer.enable_padding(pad_id=5000)
    return tokenizer


WRONG = {
    "padding with no token": (lambda t: (made("own", t), padded(t), ANIMALS), {}, InvalidArgumentError),
    "no corpus": (lambda t: (made("own", t), t, []), {}, EmptyDataError),
    "one text": (lambda t: (made("own", t), t, "a cat"), {}, ArgumentTypeError),
    "no texts": (lambda t: (made("own", t), t, [1, 2]), {}, ArgumentTypeError),
    "no tokenizer": (lambda t: (made("own", t), object(), ANIMALS), {}, ArgumentTypeError),
    "keep 0": (lambda t: (made("own", t), t, ANIMALS), {"keep": 0}, InvalidArgumentError),
    "keep too few": (lambda t: (made("own", t), t, ANIMALS), {"keep": 3}, InvalidArgumentError),
    "coverage 2": (lambda t: (made("own", t), t, ANIMALS), {"coverage": 2}, InvalidArgumentError),
    "both": (lambda t: (made("own", t), t, ANIMALS), {"coverage": 0.5, "keep": 0.5}, InvalidArgumentError),
    "keep True": (lambda t: (made("own", t), t, ANIMALS), {"keep": True}, ArgumentTypeError),
    "always": (lambda t: (made("own", t), t, ANIMALS), {"always": ["zebra?"]}, InvalidArgumentError),
    "round_to": (lambda t: (made("own", t), t, ANIMALS), {"round_to": 0}, InvalidArgumentError),
    "small table": (lambda t: (Own(40), t, ANIMALS), {}, InvalidArgumentError),
    "no table": (lambda t: (Untabled(), t, ANIMALS), {"example_inputs": torch.ones(1)}, InvalidArgumentError),
    "all stay": (lambda t: (made("own", t, more=0), t, ANIMALS + OTHERS), {"keep": 1.0}, NothingToPruneError),
    "numbers stay": (lambda t: (Clustered(t.get_vocab_size()), t, ANIMALS), {}, VerificationError),
    "numbers count": (lambda t: (Counted(t.get_vocab_size()), t, ANIMALS), {}, VerificationError),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_said_and_leaves_all(case):
    make, options, error = WRONG[case]
    tokenizer = trained("unigram")
    model, given, corpus = make(tokenizer)
    state, text = copy.deepcopy(model.state_dict()), tokenizer.to_str()
    with pytest.raises(error):
        netopt.prune_vocabulary(model, given, corpus, progress=False, **options)
    assert tokenizer.to_str() == text
    after = model.state_dict()
    assert all(torch.equal(after[name], one) for name, one in state.items())
