"""The callbacks and trainers for Lightning and for transformers, in the real frameworks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import netopt
from netopt import masking
from netopt.errors import CheckpointError, InvalidArgumentError

with warnings.catch_warnings():
    # Deprecations of others, raised by their own imports.
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

    from netopt.integrations import lightning as ours
    from netopt.integrations.huggingface import trainer as theirs

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
STEPS = 8


def examples(count=STEPS * 4):
    # Batches of four are alike: Lightning goes on in the middle of an epoch with the loader's first batch.
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).repeat(count // 4, 1)
    return torch.utils.data.TensorDataset(x, x[:, :4].argmax(1))


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(module, callback, steps, folder, checkpoint=None):
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[callback] if callback else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(examples(), batch_size=4)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


KINDS = [
    {"kind": "weights", "final": 0.75},
    {"kind": "neurons", "final": 0.5, "importance": "magnitude", "example_inputs": torch.ones(1, 8)},
    {"kind": "neurons", "final": 0.5, "importance": "l2", "example_inputs": torch.ones(1, 8), "physical": True},
]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("stop", [4, 7])
def test_lightning_resumes_where_it_stopped_and_ends_the_same(options, stop, tmp_path):
    whole = Classifier()
    fit(whole, ours.PruningCallback(end=6, every=2, **options), STEPS, tmp_path)
    first = Classifier()
    fit(first, ours.PruningCallback(end=6, every=2, **options), stop, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if "_orig" in name or "_mask" in name]
    assert list(saved) == list(Classifier().state_dict())
    again, callback = Classifier(), ours.PruningCallback(end=6, every=2, **options)
    fit(again, callback, STEPS, tmp_path, tmp_path / "a.ckpt")
    assert callback.pruner.steps == STEPS
    assert callback.pruner.sparsity == options["final"]
    found, wanted = masking.state_dict(again), masking.state_dict(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    if options["kind"] == "weights":
        assert masking.sparsity(again).total == 0.75
        dense = Classifier()
        dense.load_state_dict(saved)
    else:
        assert again.net[0].out_features + again.net[2].out_features == 16


def test_lightning_distils_and_keeps_the_student_alone(tmp_path):
    teacher = Classifier().net.train()
    student = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before, was = copy.deepcopy(teacher.state_dict()), student(examples().tensors[0])
    options = {
        "loss": {"kl": 1.0, "mse": 0.1},
        "hard": 0.1,
        "cache": True,
        "optimizer": lambda p: torch.optim.Adam(p, 0.02),
    }
    module = ours.DistillationModule(student, teacher, **options)
    trainer = fit(module, None, 10 * STEPS, tmp_path)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert all(name.startswith("student.") for name in torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"])
    x = examples().tensors[0]
    distances = [nn.functional.mse_loss(one, teacher(x)) for one in (student(x), was)]
    assert distances[0] < 0.5 * distances[1]
    assert module.teaching.hits > 5 * len(x)
    assert all(torch.equal(one, before[name]) for name, one in teacher.state_dict().items())
    assert all(one.training for one in teacher.modules())


def test_the_loss_of_a_batch_is_that_of_distill():
    x, y = examples().tensors
    for loss in ("mse", "kl", {"cosine": 0.5, "kl": 0.5}):
        teacher, student = Classifier().net, nn.Sequential(nn.Linear(8, 4))
        module = ours.DistillationModule(student, teacher, loss=loss, hard=0.25)
        value = module.teaching.loss(student(x), (x, y))
        value.backward()
        grads = [one.grad.clone() for one in student.parameters()]
        before = [one.detach().clone() for one in student.parameters()]
        sgd = torch.optim.SGD(student.parameters(), lr=1.0)
        netopt.distill(
            student,
            teacher,
            (x, y),
            loss=loss,
            hard=0.25,
            batch_size=len(x),
            optimizer=sgd,
            cache=False,
            progress=False,
        )
        for was, now, grad in zip(before, student.parameters(), grads, strict=True):
            torch.testing.assert_close(was - now.detach(), grad, rtol=1e-4, atol=1e-6)


def bert(seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def sentences(count=32):
    ids = torch.randint(1, 40, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]


def arguments(folder, steps, **more):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps",
        save_steps=3,
        seed=0,
        lr_scheduler_type="constant",
        **more,
    )


def prune_with_trainer(model, callback, folder, steps, resume=None):
    from transformers import Trainer

    trainer = Trainer(model=model, args=arguments(folder, steps), train_dataset=sentences(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_the_trainer_resumes_weights_and_its_checkpoints_load_anywhere(tmp_path):
    options = {"final": 0.6, "end": 5}
    whole = prune_with_trainer(bert(), theirs.PruningCallback(**options), tmp_path / "whole", 6)
    saved = tmp_path / "whole" / "checkpoint-3"
    plain = BertForSequenceClassification.from_pretrained(saved)
    zeros = masking.sparsity(plain).total
    assert 0.3 < zeros < 0.6
    again = prune_with_trainer(bert(), theirs.PruningCallback(**options), tmp_path / "whole", 6, str(saved))
    found, wanted = masking.state_dict(again), masking.state_dict(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert masking.sparsity(again).total == pytest.approx(0.6, abs=1e-3)


def test_the_trainer_resumes_after_neurons_were_removed(tmp_path):
    inputs = {"input_ids": torch.ones(1, 6, dtype=torch.long)}
    options = {"kind": "neurons", "final": 0.5, "end": 2, "importance": "l2", "example_inputs": inputs}
    options["include"] = "ffn"
    whole = prune_with_trainer(bert(), theirs.PruningCallback(**options), tmp_path / "whole", 6)
    assert whole.bert.encoder.layer[0].intermediate.dense.out_features < 32
    again, callback = bert(), theirs.PruningCallback(**options)
    saved = tmp_path / "whole" / "checkpoint-3"
    callback.resume(again, saved)
    prune_with_trainer(again, callback, tmp_path / "whole", 6, str(saved))
    assert all(torch.equal(one, whole.state_dict()[name]) for name, one in again.state_dict().items())


@pytest.mark.parametrize("cache", [None, True])
def test_the_distillation_trainer_comes_near_its_teacher(cache, tmp_path):
    teacher, student = bert(1), bert(2)
    inputs = {"input_ids": torch.stack([one["input_ids"] for one in sentences()])}
    with torch.no_grad():
        wanted, before = teacher.eval()(**inputs).logits, student.eval()(**inputs).logits
    trainer = theirs.DistillationTrainer(
        model=student,
        args=arguments(tmp_path, 40, eval_strategy="no"),
        train_dataset=sentences(),
        eval_dataset=sentences(),
        teacher=teacher,
        loss="mse",
        cache=cache,
    )
    trainer.train()
    own = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        after = student.eval()(**inputs).logits
        labels = torch.stack([one["labels"] for one in sentences()])
        assert own == pytest.approx(nn.functional.cross_entropy(after, labels).item(), rel=1e-3)
    assert (after - wanted).square().mean() < 0.5 * (before - wanted).square().mean()
    assert (trainer.teaching.hits > 0) == bool(cache)


def test_what_cannot_be_is_refused(tmp_path):
    for module in (ours, theirs):
        with pytest.raises(InvalidArgumentError, match="regrow"):
            module.PruningCallback(regrow=True)
    with pytest.raises(CheckpointError, match="resume"):
        theirs.PruningCallback().resume(bert(), tmp_path)
    model = bert()
    with pytest.raises(InvalidArgumentError, match="same model"):
        ours.DistillationModule(model, model)
