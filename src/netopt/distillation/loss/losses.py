"""How far a student's output is from a teacher's: small pure functions with a formula, and a registry of them.

A loss maps two float tensors to one value an item and never reduces over items: what a mean runs over is decided once,
by the objective, for the whole optimizer step. An item is a *sample* (the first dimension) or a *position* (a sample,
a token, a pixel: everything but the class dimension, which comes last and flattened here to ``(items, classes)``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from netopt.distillation.loss.divergence import condensed_divergence, divergence, explicit_divergence
from netopt.errors import InvalidArgumentError, UnknownNameError

__all__ = ["Loss", "cosine", "dist", "dkd", "get", "js", "kl", "loss", "mse", "names", "reverse_kl"]

_REGISTRY: dict[str, Loss] = {}


@dataclass(frozen=True)
class Loss:
    """One registered loss: a pure function from two outputs to a value an item.

    Args:
        name: What users write in ``loss=``.
        function: ``(student, teacher, **options) -> (items,)``; it is handed ``temperature`` and ``labels`` if it names
            them.
        per: What an item is, ``"sample"`` or ``"position"``.
        batchwise: Whether an item's value depends on the other items of the batch.
        paper: Where the formula comes from.
        options: Keyword options bound by :meth:`using`.
        condensed: The same of a student's output and a :class:`~netopt.distillation.loss.divergence.TopK` teacher's,
            where that need not be spread out again.
        explicit: The sum over items together with its gradient, where that takes less than to differentiate.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
        >>> mse(student, teacher)
        tensor([5.])
        >>> kl.using(standardize=True).options
        {'standardize': True}
    """

    name: str
    function: Callable[..., Tensor]
    per: Literal["sample", "position"]
    batchwise: bool = False
    paper: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    condensed: Callable[..., Tensor] | None = None
    explicit: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __call__(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        """Returns one value an item; ``options`` override those bound by :meth:`using`."""
        return self.function(student, teacher, **{**options, **self.options})

    def using(self, **options: Any) -> Loss:
        """Returns this loss with ``options`` bound, such as ``kl.using(standardize=True)``.

        Raises:
            InvalidArgumentError: The function has no such option.
        """
        unknown = [name for name in options if name not in self.accepts]
        if unknown:
            raise InvalidArgumentError(
                f"the loss {self.name!r} has no option {unknown[0]!r}; it has {', '.join(self.accepts) or 'none'}."
            )
        return replace(self, options={**self.options, **options})

    @property
    def accepts(self) -> tuple[str, ...]:
        """The names of the function's keyword options."""
        return keywords(self.function)


@functools.cache
def keywords(function: Callable[..., Tensor]) -> tuple[str, ...]:
    """Returns the names of a function's keyword options."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.KEYWORD_ONLY)


def loss(
    name: str,
    *,
    per: Literal["sample", "position"],
    batchwise: bool = False,
    paper: str = "",
    condensed: Callable[..., Tensor] | None = None,
    explicit: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Callable[[Callable[..., Tensor]], Loss]:
    """Registers a function as the loss ``name``, so that ``distill(..., loss=name)`` finds it.

    Args:
        name: The name, not taken yet.
        per: ``"sample"``: the function gets both outputs whole, ``(samples, ...)``; ``"position"``: it gets
            ``(items, classes)``. Either way it returns one value an item, in float32.
        batchwise: Say so if an item's value depends on the others.
        paper: Where the formula comes from.
        condensed: The same of ``(student, condensed_teacher)``, of which a cache keeps the largest logits alone;
            without it those are spread out to all classes first.
        explicit: ``(student, teacher, share)`` to the sum of what the function returns and ``share`` times its gradient
            by ``student``, undifferentiated; with ``condensed``, of a condensed teacher too.

    Raises:
        InvalidArgumentError: The name is taken.

    Example:
        >>> @loss("l1-of-docs", per="sample")
        ... def l1(student, teacher):
        ...     return (student - teacher).abs().flatten(1).sum(1)
        >>> l1(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([3., 3.])
    """

    def register(function: Callable[..., Tensor]) -> Loss:
        if name in _REGISTRY:
            raise InvalidArgumentError(f"a loss named {name!r} is registered already; choose another name.")
        made = Loss(name, function, per, batchwise, paper, condensed=condensed, explicit=explicit)
        object.__setattr__(made, "__doc__", function.__doc__)
        _REGISTRY[name] = made
        return made

    return register


def names() -> list[str]:
    """Returns the names of all registered losses.

    Example:
        >>> {"mse", "kl", "js"} <= set(names())
        True
    """
    return sorted(_REGISTRY)


def get(name: str) -> Loss:
    """Returns the registered loss ``name``.

    Raises:
        UnknownNameError: No loss of that name; the message lists the near ones.
    """
    if name not in _REGISTRY:
        raise UnknownNameError.of("loss", name, names())
    return _REGISTRY[name]


def _explicit_mse(student: Tensor, teacher: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:
    apart = student.detach() - teacher
    return apart.square().sum(), apart.mul_(2 * share)


@loss("mse", per="sample", paper="https://arxiv.org/abs/1312.6184", explicit=_explicit_mse)
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared error summed over a sample's outputs, :math:`\sum_c (s_c - t_c)^2`; the mean runs over samples.

    Do Deep Nets Really Need to be Deep? (Ba and Caruana, 2014).
    """
    return (student - teacher).square().flatten(1).sum(1) if student.dim() > 1 else (student - teacher).square()


@loss(
    "kl",
    per="position",
    paper="https://arxiv.org/abs/1503.02531",
    condensed=condensed_divergence,
    explicit=explicit_divergence,
)
def kl(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, standardize: bool = False) -> Tensor:
    r"""Hinton's softened divergence, :math:`T^2 \sum_c p^t_c (\log p^t_c - \log p^s_c)` with :math:`p = softmax(z/T)`.

    Summed over classes and never divided by their number. With ``standardize`` the logits of each position are brought
    to mean 0 and standard deviation 1 first: Logit Standardization in Knowledge Distillation (Sun et al., 2024),
    https://arxiv.org/abs/2403.01427.
    """
    if standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    if not teacher.requires_grad:
        return divergence(student, teacher, temperature=temperature)
    return temperature**2 * _divergence(_log_softmax(teacher, temperature), _log_softmax(student, temperature))


@loss("reverse_kl", per="position", paper="https://arxiv.org/abs/2306.08543")
def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""The divergence the other way round, :math:`T^2\, KL(p^s \| p^t)`: the student seeks the teacher's modes.

    MiniLLM: Knowledge Distillation of Large Language Models (Gu et al., 2023).
    """
    return temperature**2 * _divergence(_log_softmax(student, temperature), _log_softmax(teacher, temperature))


@loss("js", per="position", paper="https://arxiv.org/abs/2306.13649")
def js(student: Tensor, teacher: Tensor, *, temperature: float = 4.0, beta: float = 0.5) -> Tensor:
    r"""Generalised Jensen-Shannon divergence, :math:`T^2 (\beta KL(p^t\|m) + (1-\beta) KL(p^s\|m))`.

    With :math:`m = \beta p^t + (1-\beta) p^s` and ``beta`` in (0, 1); 0.5 is the symmetric one. Divided by ``beta`` it
    tends to ``kl`` as ``beta`` goes to 0. On-Policy Distillation of Language Models (Agarwal et al., 2023).
    """
    if not 0 < beta < 1:
        raise InvalidArgumentError(f"beta of the loss 'js' must lie in (0, 1), not {beta}; use 'kl' or 'reverse_kl'.")
    log_s, log_t = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    weights = torch.tensor([1 - beta, beta], dtype=log_s.dtype, device=log_s.device).log()
    log_m = torch.logaddexp(log_s + weights[0], log_t + weights[1])
    return temperature**2 * (beta * _divergence(log_t, log_m) + (1 - beta) * _divergence(log_s, log_m))


@loss("cosine", per="position", paper="https://arxiv.org/abs/1910.01108")
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    r"""One minus the cosine of the angle between the two output vectors, :math:`1 - s \cdot t / (\|s\| \|t\|)`.

    DistilBERT (Sanh et al., 2019).
    """
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


@loss("dist", per="position", batchwise=True, paper="https://arxiv.org/abs/2205.10536")
def dist(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, between: float = 1.0, within: float = 1.0
) -> Tensor:
    r"""DIST: what matters is the correlation of predictions, :math:`T^2 (\beta\, d_{inter} + \gamma\, d_{intra})`.

    :math:`d = 1 - \rho` with Pearson's :math:`\rho` of the softened probabilities, across classes for each position
    (``between``, beta) and across the positions of the batch for each class, averaged over classes (``within``,
    gamma). Knowledge Distillation from A Stronger Teacher (Huang et al., 2022).
    """
    p_s, p_t = _log_softmax(student, temperature).exp(), _log_softmax(teacher, temperature).exp()
    inter = 1 - _pearson(p_s, p_t, dim=1)
    # One position has no correlation across positions: the second relation starts at two.
    intra = (1 - _pearson(p_s, p_t, dim=0)).mean() if len(p_s) > 1 else p_s.new_zeros(())
    return temperature**2 * (between * inter + within * intra)


@loss("dkd", per="position", paper="https://arxiv.org/abs/2203.08679")
def dkd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    labels: Tensor | None = None,
    target: float = 1.0,
    others: float = 8.0,
) -> Tensor:
    r"""Decoupled: :math:`T^2 (\alpha\, KL(b^t \| b^s) + \beta\, KL(\hat p^t \| \hat p^s))`.

    :math:`b` is the target class against all others (``target``, alpha), :math:`\hat p` the distribution among the
    others (``others``, beta). The target is the label, and where there is none the teacher's first choice. Of two
    classes the other is but one, so the second term is 0. Decoupled Knowledge Distillation (Zhao et al., 2022).
    """
    wanted = teacher.argmax(dim=-1) if labels is None else torch.where(labels >= 0, labels, teacher.argmax(dim=-1))
    log_s, log_t = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    rest = torch.arange(student.shape[-1] - 1, device=student.device).expand(len(student), -1)
    rest = rest + (rest >= wanted[:, None])
    hit_s, hit_t = (one.gather(1, wanted[:, None]) for one in (log_s, log_t))
    miss_s, miss_t = (one.gather(1, rest) for one in (log_s, log_t))
    pair_s, pair_t = (
        torch.cat([hit, miss.logsumexp(1, keepdim=True)], dim=1) for hit, miss in ((hit_s, miss_s), (hit_t, miss_t))
    )
    among = _divergence(miss_t.log_softmax(1), miss_s.log_softmax(1))
    return temperature**2 * (target * _divergence(pair_t, pair_s) + others * among)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    # Classes excluded by a logit of -inf stay finite, or their zero probability times infinity spoils the gradient.
    return (logits / temperature).log_softmax(dim=-1).clamp_min(-1e30)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _standardized(logits: Tensor) -> Tensor:
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True, correction=0) + 1e-7)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return F.cosine_similarity(a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim=dim, eps=1e-8)
