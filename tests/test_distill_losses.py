"""Every loss against another way to compute it, and the properties its formula promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from netopt.distillation import Hint, distill
from netopt.distillation.loss import divergence as divergence_module
from netopt.distillation.loss import losses
from netopt.distillation.loss.divergence import condense, condensed_divergence
from netopt.distillation.loss.hints import _KINDS
from netopt.errors import InvalidArgumentError, NetoptError, ShapeMismatchError, UnknownNameError

DOUBLE = torch.float64
NAMES = ["mse", "kl", "reverse_kl", "js", "cosine", "dist", "dkd"]


@pytest.fixture(name="pair")
def logits():
    return torch.randn(9, 5, dtype=DOUBLE), 3 * torch.randn(9, 5, dtype=DOUBLE)


def softmax(z, t=1.0):
    return (z / t).softmax(-1)


def divergence(p, q):
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


def test_all_of_these_are_registered_with_formula_and_source():
    assert set(NAMES) <= set(losses.names())
    for name in NAMES:
        one = losses.get(name)
        assert one.paper.startswith("https://")
        assert ":math:" in one.__doc__
        assert one(torch.randn(4, 3), torch.randn(4, 3)).shape == (4,)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_zero_for_equal_outputs_and_positive_otherwise(name, pair):
    student, teacher = pair
    assert losses.get(name)(teacher, teacher).abs().max() < 1e-12
    assert losses.get(name)(student, teacher).mean() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name, pair):
    student, teacher = pair
    assert torch.autograd.gradcheck(lambda z: losses.get(name)(z, teacher).sum(), student.requires_grad_())


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"dist"}))
def test_an_item_does_not_depend_on_the_others(name, pair):
    student, teacher = pair
    whole = losses.get(name)(student, teacher)
    parts = torch.cat([losses.get(name)(student[i : i + 1], teacher[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(whole, parts)


def test_formulas(pair):
    s, t = pair
    close = torch.testing.assert_close
    close(losses.mse(s, t), ((s - t) ** 2).sum(1))
    close(losses.kl(s, t, temperature=3.0), 9 * divergence(softmax(t, 3), softmax(s, 3)))
    close(losses.reverse_kl(s, t, temperature=3.0), 9 * divergence(softmax(s, 3), softmax(t, 3)))
    close(losses.cosine(s, t), 1 - F.cosine_similarity(s, t))
    for beta in (0.5, 0.1):
        p, q = softmax(t, 2), softmax(s, 2)
        m = beta * p + (1 - beta) * q
        expected = 4 * (beta * divergence(p, m) + (1 - beta) * divergence(q, m))
        close(losses.js(s, t, temperature=2.0, beta=beta), expected)
    near = losses.js(s, t, beta=1e-5) / 1e-5
    close(near, losses.kl(s, t), rtol=1e-3, atol=1e-3)


def test_standardized_logits_know_no_shift_and_no_scale(pair):
    s, t = pair
    loss = losses.kl.using(standardize=True)
    torch.testing.assert_close(loss(s, t), loss(3 * s + 1, 7 * t - 2), rtol=1e-5, atol=1e-6)
    assert loss(2 * t + 3, t).abs().max() < 1e-6


def test_dist_is_pearsons_correlation_both_ways(pair):
    s, t = pair
    p, q = softmax(s, 4.0), softmax(t, 4.0)
    rows = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p, q, strict=True)])
    columns = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    torch.testing.assert_close(losses.dist(s, t), 16 * (rows + columns.mean()), rtol=1e-6, atol=1e-8)
    assert torch.isfinite(losses.dist(s[:1], t[:1])).all()


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_dkd_with_the_right_weights_is_kl(classes):
    """KL = TCKD + (1 - p_target) NCKD, with which the paper opens; for two classes the second term is 0."""
    s, t = torch.randn(6, classes, dtype=DOUBLE), torch.randn(6, classes, dtype=DOUBLE)
    labels = torch.randint(classes, (6,))
    hit = losses.dkd(s, t, temperature=1.0, labels=labels, others=0.0)
    rest = losses.dkd(s, t, temperature=1.0, labels=labels, target=0.0, others=1.0)
    p = softmax(t)[torch.arange(6), labels]
    torch.testing.assert_close(hit + (1 - p) * rest, losses.kl(s, t, temperature=1.0))
    if classes == 2:
        assert rest.abs().max() < 1e-12


def test_an_excluded_class_leaves_value_and_gradient_finite():
    s = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 1.0, 2.0]], requires_grad=True)
    t = torch.tensor([[0.5, 1.0, -torch.inf], [2.0, 1.0, -torch.inf]])
    for name in ("kl", "js"):
        value = losses.get(name)(s, t)
        (gradient,) = torch.autograd.grad(value.sum(), s)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_in_one_pass_or_in_many_the_divergence_and_its_gradient_are_the_same(block, monkeypatch):
    """Of many classes value and gradient are computed together, block by block."""
    monkeypatch.setattr(divergence_module, "BLOCK", block)
    s, t = torch.randn(2, 7, 9, dtype=DOUBLE), 3 * torch.randn(2, 7, 9, dtype=DOUBLE)
    s[0, 0, 3] = t[0, 0, 3] = -torch.inf
    scale = torch.randn(2, 7, dtype=DOUBLE)
    found = []
    # A teacher that wants a gradient of its own gets one, in the ordinary way.
    mutual = t.clone().requires_grad_()
    for theirs in (mutual, t):
        ours = s.clone().requires_grad_()
        value = losses.kl(ours, theirs, temperature=3.0)
        found.append((value.detach(), *torch.autograd.grad((scale * value).sum(), ours)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses.kl(s, t, temperature=3.0), found[0][0])
    assert torch.autograd.grad(losses.kl(s, mutual).sum(), mutual)[0].abs().sum() > 0


@pytest.mark.parametrize("block", [1, 10**6])
def test_a_condensed_teacher_says_what_it_says_spread_out(block, monkeypatch):
    monkeypatch.setattr(divergence_module, "BLOCK", block)
    s, t = torch.randn(4, 30, dtype=DOUBLE), 4 * torch.randn(4, 30, dtype=DOUBLE)
    t[0, 5:] = -torch.inf  # nothing is left for the rest
    s[0, 29] = -torch.inf
    kept = condense(t, 6, temperature=2.0)
    assert kept.shape == t.shape
    results = []
    for of in (
        lambda z: condensed_divergence(z, kept, temperature=2.0),
        lambda z: losses.kl(z, kept.dense(), temperature=2.0),
    ):
        ours = s.clone().requires_grad_()
        value = of(ours)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), ours)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert all(torch.isfinite(one).all() for one in results[0])
    # The kept probabilities are right, and so is their sum.
    p, q = softmax(t, 2.0), softmax(kept.dense(), 2.0)
    torch.testing.assert_close(q.gather(1, kept.which.long()), p.gather(1, kept.which.long()), rtol=1e-6, atol=1e-8)


def test_losses_that_need_every_logit_get_them():
    """A loss without a condensed form, or with options that form lacks, is given all classes."""
    from netopt.distillation.loss.objective import Items, Kept, Objective, Target

    s, t = torch.randn(4, 30), 4 * torch.randn(4, 30)
    kept = condense(t, 6, temperature=4.0)
    for loss in ("kl", "reverse_kl", "mse", losses.kl.using(standardize=True), lambda a, b: (a - b).abs().sum(1)):
        objective = Objective(loss, temperature=4.0, hard=0.0, teachers=[1.0])
        assert objective.condensable is (loss == "kl")
        found = []
        for one in (kept, kept.dense()):
            ours = s.clone().requires_grad_()
            (told,) = objective.sums(ours, {}, Target(Items((4,)), [Kept(one, {})], None))
            torch.autograd.backward(told.root, told.seed)
            found.append((told.value, ours.grad))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 10, 17])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [one for one in losses.names() if losses.get(one).explicit is not None])
def test_a_gradient_said_beforehand_is_that_of_the_function(name, masked, classes):
    """What a loss says its sum and gradient are is what comes of differentiating it, masked positions left out."""
    from netopt.distillation.loss.objective import Items, Objective, Record, Target

    s, t = torch.randn(6, 3, classes, dtype=DOUBLE), 3 * torch.randn(6, 3, classes, dtype=DOUBLE)
    if name == "kl":
        s[1, 0, 0] = t[1, 0, 0] = t[2, 0, 1] = -torch.inf
    loss = losses.get(name)
    items = Items((6, 3), torch.rand(6, 3) > 0.4 if masked else None)
    found = []
    for one in (loss, replace(loss, explicit=None)):
        ours = s.clone().requires_grad_()
        objective = Objective(one, temperature=3.0, hard=0.0, teachers=[1.0])
        (told,) = objective.sums(ours, {}, Target(items, [Record(t, {})], None), [0.25])
        assert (told.seed is None) is (one.explicit is None)
        torch.autograd.backward(told.root, told.value.new_tensor(0.25) if told.seed is None else told.seed)
        found.append((told.value, ours.grad))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert torch.isfinite(found[0][1]).all()


def test_kl_does_not_shrink_with_the_number_of_classes():
    """Classes nobody believes in change nothing; torch's mean reduction would divide by them."""
    s, t = torch.randn(4, 3, dtype=DOUBLE), torch.randn(4, 3, dtype=DOUBLE)
    padding = torch.full((4, 97), -1e4, dtype=DOUBLE)
    wide = losses.kl(torch.cat([s, padding], 1), torch.cat([t, padding], 1))
    torch.testing.assert_close(wide, losses.kl(s, t))


def test_a_registered_function_is_found_and_names_are_taken_once():
    with pytest.raises(InvalidArgumentError, match="registered already"):
        losses.loss("kl", per="position")(lambda s, t: s)
    with pytest.raises(UnknownNameError, match="Did you mean 'cosine'"):
        losses.get("cosin")
    with pytest.raises(InvalidArgumentError, match="has no option 'sharpness'"):
        losses.kl.using(sharpness=1)


def same_training(ours, theirs, x):
    """Whether two losses train alike."""
    results = []
    for loss in (ours, theirs):
        torch.manual_seed(0)
        student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        distill(student, teacher, x, loss=loss, epochs=2, batch_size=8, progress=False)
        results.append(student.weight.detach())
    return torch.allclose(*results, rtol=1e-4, atol=1e-6)


def test_any_callable_is_a_loss_whatever_it_averages_over():
    x = torch.randn(36, 4)
    assert same_training("mse", lambda s, t: (s - t).square().sum(1), x)
    assert same_training("mse", lambda s, t: (s - t).square().sum(1).mean(), x)
    assert same_training({"mse": 1.0, "kl": 0.0}, "mse", x)
    assert same_training({"mse": 3.0}, nn.MSELoss(reduction="sum"), x) is False
    assert same_training("kl", lambda s, t, temperature: losses.kl(s, t, temperature=temperature), x)
    assert same_training({"kl": 0.5, "mse": 0.5}, lambda s, t: 0.5 * losses.kl(s, t) + 0.5 * losses.mse(s, t), x)


def test_losses_that_cannot_be_meant_are_told():
    student, teacher, x = nn.Linear(4, 1), nn.Linear(4, 1), torch.randn(8, 4)
    with pytest.raises(ShapeMismatchError, match="no two classes; use loss='mse'"):
        distill(student, teacher, x, loss="kl", progress=False)
    with pytest.raises(ShapeMismatchError, match="return one value a sample"):
        distill(student, teacher, x, loss=lambda s, t: torch.zeros(3), progress=False)
    with pytest.raises(NetoptError, match="returned a int"):
        distill(student, teacher, x, loss=lambda s, t: 0, progress=False)
    for loss in ({}, {"mse": -1.0}, {"mse": True}, {"mse": 0}, 3):
        with pytest.raises(NetoptError, match="loss"):
            distill(student, teacher, x, loss=loss, progress=False)


def test_images_have_their_classes_second():
    class Pixels(nn.Conv2d):
        pass

    student, teacher = Pixels(3, 4, 1).double(), Pixels(3, 4, 1).double()
    x, y = torch.randn(6, 3, 5, 5, dtype=DOUBLE), torch.randint(4, (6, 5, 5))
    y[0, 0] = -100
    report = distill(student, teacher, (x, y), loss="kl", hard=0.5, lr=1e-12, progress=False)
    with torch.no_grad():
        s, t = student(x), teacher(x)
        valid = y != -100
        soft = 16 * divergence(softmax(t.movedim(1, -1), 4), softmax(s.movedim(1, -1), 4))[valid].mean()
    assert report.history[0].terms["kl"] == pytest.approx(soft.item(), rel=1e-6)
    assert report.history[0].terms["labels"] == pytest.approx(F.cross_entropy(s, y).item(), rel=1e-6)


def test_unlabelled_samples_count_in_the_soft_terms_only():
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.tensor([0, 1, -1, -1, -1, -1, -1, -1])
    report = distill(student, teacher, (x, y), loss="kl", hard=0.5, lr=1e-12, progress=False)
    terms = report.history[0].terms
    assert terms["labels"] == pytest.approx(F.cross_entropy(student(x[:2]), y[:2]).item(), rel=1e-5)
    assert terms["kl"] == pytest.approx(losses.kl(student(x), teacher(x)).mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", _KINDS)
def test_hint_losses_are_zero_for_equal_features_and_differentiable(kind):
    ours, theirs = (torch.randn(5, 4, 3, 3, dtype=DOUBLE) for _ in range(2))
    assert _KINDS[kind](theirs, theirs).abs().max() < 1e-12
    assert _KINDS[kind](ours, theirs).sum() > 1e-3
    assert torch.autograd.gradcheck(lambda z: _KINDS[kind](z, theirs).sum(), ours.requires_grad_())


def test_hint_kinds_are_told():
    with pytest.raises(UnknownNameError, match="Did you mean 'attention'"):
        Hint("a", "atention")
    with pytest.raises(InvalidArgumentError, match="weight of a hint"):
        Hint("a", weight=-1)
