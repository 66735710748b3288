"""A report says what was done, as text, as HTML, as a figure and as plain data."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import netopt
from conftest import unchanged
from netopt import batches
from netopt.distillation.report import Epoch
from netopt.errors import InvalidArgumentError, MissingPackageError, NetoptError
from netopt.figures import scores_by_kind, tradeoff
from netopt.measure import Cost, Latency
from netopt.progress import bar
from netopt.report import PruningReport, Row


def a_report(**changes) -> PruningReport:
    given = {
        "call": "prune_neurons",
        "before": Cost(params=1000, nonzero=990, bytes=4000, macs=2_000_000),
        "after": Cost(params=250, nonzero=250, bytes=1000, macs=500_000),
        "rows": (Row("stem", 64, 16, exact=True), Row("blocks.0.norm", 32, 8, exact=False, note="LayerNorm over it")),
        "frozen": {"head": "is a model output", "<odd>": "reaches & stops"},
        "settings": {"amount": 0.75, "importance": "saliency", "exclude": [nn.Linear], "loss_fn": None},
    }
    return PruningReport(**{**given, **changes})


def test_the_attributes_of_the_contract():
    report = a_report()
    assert (report.params_before, report.params_after) == (1000, 250)
    assert (report.nonzero_before, report.nonzero_after) == (990, 250)
    assert (report.macs_before, report.macs_after) == (2_000_000, 500_000)
    assert (report.bytes_before, report.bytes_after) == (4000, 1000)
    assert report.removed == pytest.approx(0.75)
    assert report.rows[0].removed == pytest.approx(0.75)


def test_text_has_every_number_and_reason_in_aligned_columns():
    text = str(a_report())
    assert text.splitlines()[0] == "prune_neurons: 75.0 % of 96 neurons removed"
    for word in (
        "parameters",
        "1,000",
        "2,000,000",
        "25.0 %",
        "blocks.0.norm",
        "LayerNorm over it",
        "is a model output",
    ):
        assert word in text
    totals = text.splitlines()[1:6]
    assert {line.index("before") + 6 for line in totals[:1]} == {line.index("1,000") + 5 for line in totals[1:2]}
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_long_reports_are_cut_and_say_so():
    report = a_report(rows=tuple(Row(f"axis{i}", 4, 2) for i in range(50)), frozen={f"f{i}": "is" for i in range(30)})
    assert "... and 30 more" in str(report)
    assert "... and 10 more" in str(report)
    assert "more" not in report.table()
    assert "axis49" in report.table()
    assert "... and 30 more" in report._repr_html_()


def test_counts_without_inputs_are_left_out():
    report = a_report(before=Cost(10, 10, 40), after=Cost(10, 1, 40), call="prune_weights", frozen={})
    assert report.macs_before is None
    assert "MACs" not in str(report)
    assert "frozen" not in str(report)
    assert "entries removed" in str(report)


def test_an_empty_report_can_be_shown():
    report = a_report(rows=(), frozen={})
    assert report.removed == 0.0
    assert "0.0 % of 0 neurons" in str(report)
    assert report._repr_html_().startswith("<p>")
    assert report.plot() is not None


def test_html_is_escaped_and_balanced():
    page = a_report()._repr_html_()
    assert "&lt;odd&gt;" in page
    assert "reaches &amp; stops" in page
    for tag in ("table", "tr", "td", "th", "p"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>")


def test_to_dict_is_json_and_complete():
    report = a_report(latency_after=Latency(0.5, 0.1))
    read = json.loads(json.dumps(report.to_dict()))
    assert read["before"]["params"] == 1000
    assert read["after"]["latency"] == {"median": 0.5, "spread": 0.1}
    assert read["before"]["latency"] is None
    assert read["rows"][1] == {
        "name": "blocks.0.norm", "before": 32, "after": 8, "exact": False, "note": "LayerNorm over it", "size": None,
        "kind": None,
    }  # fmt: skip
    assert read["settings"] == {"amount": 0.75, "importance": "saliency", "exclude": ["Linear"], "loss_fn": None}
    assert read["frozen"]["head"] == "is a model output"


def test_a_plan_that_can_be_a_dict_becomes_one():
    class Planned:
        def to_dict(self):
            return {"axes": 2}

    assert a_report(plan=Planned()).to_dict()["plan"] == {"axes": 2}


@pytest.mark.parametrize("dense", ["module", "latency", None])
def test_measuring_adds_seconds_and_changes_nothing(dense):
    model, inputs = nn.Sequential(nn.Linear(4, 4), nn.Dropout()), torch.zeros(2, 4)
    given = {"module": copy.deepcopy(model), "latency": Latency(0.25, 0.0), None: None}[dense]
    report = a_report(subject=model)
    with unchanged(model):
        measured = report.measure(inputs, dense=given, repeats=2)
    assert measured.latency_after.median > 0
    assert (measured.latency_before is None) == (dense is None)
    assert "latency" in str(measured)
    assert "latency" not in str(report)


def test_a_report_does_not_keep_the_model_alive_and_can_be_copied():
    model = nn.Linear(4, 4)
    report = a_report(subject=model)
    copies = [copy.deepcopy(report), pickle.loads(pickle.dumps(report))]
    assert all(one == report for one in copies)
    del model
    for one in (report, *copies):
        with pytest.raises(InvalidArgumentError, match="pass it as model="):
            one.measure(torch.zeros(2, 4))
    assert report.measure(torch.zeros(2, 4), model=nn.Linear(4, 4), repeats=1).latency_after is not None


def test_plot_draws_a_bar_for_each_row(tmp_path):
    drawn = a_report().plot()
    assert [bar.get_width() for bar in drawn.axes[0].patches] == [100, 100, 25, 25]
    assert drawn._repr_png_().startswith(b"\x89PNG")
    drawn.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


def words_of(drawn) -> str:
    axes = drawn.axes[0]
    return " ".join(text.get_text() for text in [*axes.texts, *axes.get_yticklabels()])


def test_plot_leaves_nothing_out_without_saying_so():
    rows = tuple(Row(f"block{'abcdefgh'[i % 8] * (i // 8 + 1)}", 2 + i, 1 + i) for i in range(48))
    left = words_of(a_report(rows=rows).plot())
    assert "and 8 smaller ones" in left
    assert "of the neurons" in left
    assert "more" not in words_of(a_report(rows=rows).plot(rows=None))
    deep = tuple(Row(f"layer.{i}.{kind}", 8, 4 + i % 2) for i in range(30) for kind in ("heads", "ffn"))
    told = words_of(a_report(rows=deep).plot())
    assert "layer.*.heads (30)" in told
    assert "4-5 of 8" in told


def covered(drawn) -> list:
    """Rectangles of what is written, in pixels, in the figure that is drawn."""
    FigureCanvasAgg(drawn).draw()
    axes = drawn.axes[0]
    written = [drawn._suptitle, *axes.texts, *axes.get_yticklabels(), axes.xaxis.label, *drawn.legends]
    return [one.get_window_extent() for one in written if one is not None]


@pytest.mark.parametrize(
    "names", [["a", "b"], [f"encoder.layer.{i}.attention.self.attention_head_size" for i in range(6)]]
)
def test_what_is_written_in_a_plot_is_whole_and_overlaps_nothing(names):
    drawn = a_report(rows=tuple(Row(name, 3072, 1890) for name in names), already=0.5).plot()
    boxes = covered(drawn)
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= drawn.bbox.x1 + 1
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_rows_of_many_layers_are_printed_by_pattern_in_at_most_100_columns():
    rows = tuple(
        Row(f"bert.encoder.layer.{i}.{kind}", 384, 380 + i % 2, exact=False, note="a norm over it, " * 9)
        for i in range(24)
        for kind in ("intermediate.dense", "a_module_of_a_name_that_takes_a_whole_line_of_its_own_or_more")
    )
    text = str(a_report(rows=rows, frozen={f"layer.{i}.out": "is a model output " * 9 for i in range(24)}))
    assert "bert.encoder.layer.*.intermediate.dense (24)" in text
    assert "380-381" in text
    assert "layer.*.out (24)" in text
    assert max(map(len, text.splitlines())) <= 100
    assert max(map(len, a_report(rows=rows).table().splitlines())) <= 100
    assert a_report(rows=rows).table().count("intermediate.dense") == 24


def test_macs_are_shown_for_a_sample_and_name_the_batch():
    text = str(a_report(batch=500))
    assert "MACs per sample (batch of 500)" in text
    assert "4,000  1,000" in text
    assert "2,000,000" in str(a_report(batch=7))  # not of these inputs: no whole number a sample


def test_a_second_pruning_says_what_it_is_a_share_of():
    net, inputs = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(5, 4)
    first, second = (netopt.prune_neurons(net, inputs, 0.5) for _ in range(2))
    assert "as it is now" not in str(first)
    assert "of the model as it is now" in str(second)
    assert second.batch == 5
    assert second.already == pytest.approx(1 - first.params_after / first.params_before)


@pytest.mark.parametrize(
    ("amount", "hinted"), [(50, True), (1, False), (0.5, False), (200, False), ({"stem": 50}, False)]
)
def test_a_count_that_looks_like_a_percentage_is_pointed_out(amount, hinted):
    report = a_report(settings={"amount": amount})
    for text in (str(report), report._repr_html_()):
        assert ("amount=50 is a count; for 50 percent write amount=0.5" in text) == hinted


def test_values_show_themselves_in_one_line():
    model = nn.Linear(4, 3)
    shown = [a_report(), netopt.masking.sparsity(model), netopt.measure.latency(model, torch.zeros(1, 4), repeats=2)]
    for value in [*shown, netopt.DistillationReport()]:
        assert "\n" not in repr(value)
        assert len(repr(value)) < 200
    assert netopt.masking.sparsity(model)._repr_html_().count("<tr>") == 2


def test_words_stand_to_the_left_in_html():
    page = a_report()._repr_html_()
    assert '<td style="text-align:left">is a model output' in page
    assert '<td style="text-align:left">LayerNorm over it' in page
    assert '<td style="text-align:right">1,000' in page


def test_a_distillation_is_drawn_with_a_legend_and_shown():
    epochs = [Epoch(i, 4 * i, 1 / i, {"soft": 1 / i}, 0.5 + i / 10, 1.0) for i in (1, 2, 3)]
    report = netopt.DistillationReport(epochs, metric="<lambda>", best=0.8, best_epoch=3)
    drawn = report.plot()
    assert drawn._repr_png_().startswith(b"\x89PNG")
    labels = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
    assert labels == ["loss", "validation", "best validation, 0.8"]
    assert drawn.axes[0].get_ylabel() == "loss, mean of the epoch"
    ours = report.plot()
    assert report.plot(ours.axes[0]) is ours


def test_scores_are_drawn_by_kind_with_what_stays_and_what_goes():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)), torch.randn(8, 6)
    report = netopt.prune_neurons(net, x, amount=10, progress=False)
    assert {name: len(one) for name, one in report.scores.items()} == {"0": 40}
    drawn = report.plot_scores()
    assert drawn.axes[0].get_title() == "ffn"
    labels = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
    assert labels == ["30 stay", "10 go"]
    stay, go = (sum(patch.get_height() for patch in bars) for bars in drawn.axes[0].containers)
    assert (stay, go) == (30, 10)
    assert report.scores["0"].min() not in report.scores["0"][report.plan.axes[0].kept]
    given = netopt.prune_weights(net, 0.5)
    with pytest.raises(InvalidArgumentError, match="no scores of neurons"):
        given.plot_scores()


def test_scores_of_zero_and_a_kind_of_one_value_are_drawn():
    scores = {"a": torch.zeros(4), "b": torch.ones(3), "c": torch.tensor([0.0, 2.0])}
    drawn = scores_by_kind(scores, {"b": torch.tensor([0, 2])}, {"a": "heads", "b": "ffn", "c": None})
    assert [axes.get_title() for axes in drawn.axes] == ["heads", "ffn", "other"]
    assert [sum(patch.get_height() for bars in axes.containers for patch in bars) for axes in drawn.axes] == [4, 3, 2]


def test_quality_is_drawn_against_what_is_left():
    report = a_report()
    left = 100 * report.params_after / report.params_before
    drawn = tradeoff({"ours": [(report, 0.9), (0.01, 0.5)]}, cost="params", quality="accuracy", dense=0.97)
    line, dense = drawn.axes[0].get_lines()
    assert line.get_xdata().tolist() == pytest.approx([1, left])
    assert line.get_ydata().tolist() == [0.5, 0.9]
    assert set(dense.get_ydata()) == {0.97}
    assert drawn.axes[0].get_xlabel() == "params left, %"
    with pytest.raises(InvalidArgumentError, match="not 50"):
        tradeoff({"ours": [(50, 0.9)]}, dense=1.0)


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'netopt\[plots\]'") as caught:
        a_report().plot()
    with pytest.raises(MissingPackageError):
        netopt.DistillationReport().plot()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, NetoptError)


def test_bars_know_how_long_they_are_and_hide_what_is_over_at_once(capsys):
    data = DataLoader(TensorDataset(torch.zeros(130, 3)), batch_size=64)
    assert [batches.steps(one) for one in (data, lambda: data, torch.zeros(130, 3), [torch.zeros(2, 3)])] == [
        3,
        None,
        3,
        1,
    ]
    with bar(None, "steps", total=3) as shown:
        assert (shown.total, shown.delay, shown.desc) == (3, 1, "steps")
    assert list(bar([1, 2], "quick")) == [1, 2]
    assert "quick" not in capsys.readouterr().err
