"""Calibration batches: windows of text and crops of pictures, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import netopt
from netopt.calibration import images, texts
from netopt.errors import EmptyDataError, InvalidArgumentError


def tokens(text):
    return {"input_ids": list(text.encode())}


def test_windows_are_whole_and_of_the_text(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("abcdefgh" * 20)
    batches = texts(tokens, path, samples=5, length=16, batch_size=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    for batch in batches:
        assert batch["attention_mask"].all()
        assert all(bytes(row.tolist()).decode() == "abcdefgh" * 2 for row in batch["input_ids"])


def test_the_draw_is_by_the_seed():
    lines = [f"line {index:04d} " for index in range(64)]
    first, again, other = (texts(tokens, lines, samples=4, length=10, seed=seed)[0]["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_too_little_text_is_told():
    with pytest.raises(EmptyDataError, match="3 tokens, and a window needs 8"):
        texts(tokens, "abc", length=8)
    with pytest.raises(InvalidArgumentError, match="samples=0"):
        texts(tokens, "abc", samples=0)


def test_pictures_are_cropped_and_normalised(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "inner").mkdir()
    for index, size in enumerate([(40, 20), (20, 40), (30, 30)]):
        image.new("RGB", size, (255, 0, 51)).save(tmp_path / "inner" / f"{index}.png")
    batches = images(tmp_path, size=16, mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 1.0), batch_size=2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 16, 16), (1, 3, 16, 16)]
    torch.testing.assert_close(batches[0][0, :, 3, 3], torch.tensor([1.0, 0.0, 0.2]))
    with pytest.raises(EmptyDataError, match="no picture"):
        images(tmp_path / "none")


def test_the_pruners_take_them():
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [batch["input_ids"] for batch in texts(tokens, "some text " * 30, samples=8, length=12)]
    report = netopt.prune_neurons(model, batches[0], 0.5, data=batches, include="1", progress=False)
    assert report.params_after < report.params_before
