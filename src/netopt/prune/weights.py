"""Masks the least important weights of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from netopt.batches import Data
from netopt.errors import ArgumentTypeError, InvalidArgumentError, NothingToPruneError, UnknownNameError
from netopt.importance import Importance, lookup, scores, updates_layers
from netopt.importance.scoring import Scoring
from netopt.masking.decide import Request, decide
from netopt.masking.lifecycle import adopt
from netopt.masking.patterns import Pattern, Shape, parse
from netopt.masking.quantile import Scores
from netopt.masking.undo import all_or_nothing
from netopt.measure import Cost, count_parameters, size_bytes
from netopt.model.checks import check_model
from netopt.model.parameters import EMBEDDINGS, Place, places
from netopt.model.ranks import check_alike, is_shared
from netopt.model.signals import UndoLog
from netopt.reconstruction import reconstruct
from netopt.report import PruningReport, Row
from netopt.selectors import Selector, chosen, matches

__all__ = ["prune_weights"]

SCOPES = ("global", "layer", "row")
Amount: TypeAlias = float | int | Mapping[str, float | int]


def prune_weights(
    model: nn.Module,
    amount: Amount | None = None,
    *,
    threshold: float | None = None,
    importance: Importance | Mapping[str, Tensor] = "magnitude",
    data: Data | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    scope: str = "global",
    pattern: Pattern = "unstructured",
    include: Selector = None,
    exclude: Selector = None,
    progress: bool = True,
) -> PruningReport:
    r"""Masks the least important weights of ``model``, in place, through ``torch.nn.utils.prune``.

    Weights of linear, convolutional, recurrent and attention layers are candidates; embeddings, norms, biases and
    parameters used without a layer become so by naming them in ``include``. Shapes stay; parameters keep their values
    under the mask (:func:`netopt.masking.strip` shows them again, :func:`netopt.masking.bake` writes the zeros).

    Args:
        model: Any module. If the call fails it is left as it was.
        amount: How much of the candidates is zero afterwards: a fraction in :math:`[0, 1)`, of which exactly
            ``round(amount * N)`` of :math:`N` entries are masked, or a count. It is the total: 0.5 twice is 0.5.
            A mapping from names or patterns to amounts prunes each group by itself, each name in the first that fits.
            For ``scope`` ``"layer"`` and ``"row"`` it holds for each weight, each row; of blocks it counts blocks.
        threshold: Instead of ``amount``: mask what scores below.
        importance: A criterion's name (:func:`netopt.importance.names`), a criterion, a function of evidence, or the
            scores, a tensor for each name. Criteria of ``"layers"`` decide layer after layer, on the inputs of the
            model pruned so far: ``"sparsegpt"`` and ``"admm"`` also update what is kept, to make up for what is
            removed; ``"wanda_layerwise"`` does not. How much each layer loses of a global amount is told by gradients.
        data: Batches, for a criterion that needs gradients or inputs; read once, in eval mode.
        loss_fn: Of the model's result and a batch's targets, for a criterion that needs the loss; by default the
            ``loss`` the model returns.
        scope: What competes: all candidates (``"global"``), each weight's entries (``"layer"``), or each output's
            (``"row"``).
        pattern: ``"unstructured"``; ``"n:m"``, ``n`` kept of each ``m`` neighbours along the inputs (of a convolution:
            along the input channels first, then the kernel), which needs no amount; or ``("block", rows, columns)`` of
            the weight as a matrix, by mean score.
        include: Names, patterns, types, modules or predicates to restrict the candidates to. A parameter named
            directly, or the ``weight`` of an embedding or norm chosen as a module, becomes a candidate.
        exclude: What is left alone.
        progress: Whether to show a progress bar while evidence is collected.

    Returns:
        Parameters before and after, and one row a weight.

    Raises:
        InvalidArgumentError: not exactly one of ``amount`` and ``threshold``, or a value out of range.
        ArgumentTypeError: an argument of a wrong type, such as a bool as amount.
        NothingToPruneError: no candidate is left.
        SelectorError: ``include`` or ``exclude`` names nothing.
        UnknownNameError: no such criterion or scope.
        MissingDataError: the criterion needs ``data`` or ``loss_fn``, or no output depends on the weights by which a
            global amount could be shared out.
        ForwardError: gradients are needed and the outputs cannot be differentiated.
        NonFiniteError: a weight or score is NaN; the message names it.

    Note:
        Among equal scores the first entries, in the model's order, are kept. Entries that are zero already count as
        removed and go first. A weight that several modules share is scored, counted and masked once.

    References:
        Learning both Weights and Connections for Efficient Neural Networks (Han et al., 2015),
        https://arxiv.org/abs/1506.02626

    Example:
        >>> from netopt.masking import sparsity
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> _ = prune_weights(model, amount=0.75)
        >>> sparsity(model).total
        0.75
    """
    shape = _check_arguments(model, amount, threshold, scope, pattern)
    known = places(model)
    wanted = _candidates(model, known, include, exclude)
    scoring = Scoring(importance, data, loss_fn, progress=progress)
    solves, passed = updates_layers(importance), {}
    if solves and is_shared():
        raise InvalidArgumentError(
            f"importance={_name(importance)!r} fits the weights to one process's data; prune in one process, before "
            "training in several."
        )
    if solves:
        reason = "its layer normalises it, which a criterion of layers cannot make up for"
        passed = {name: reason for name, place in wanted.items() if place.computed is not None}
        wanted = {name: place for name, place in wanted.items() if name not in passed}
    if not wanted:
        raise NothingToPruneError(_nothing(model, known))
    nonzero = {name: place.nonzero for name, place in known.items()}
    before = _cost(model, nonzero)

    def prune(log: UndoLog) -> PruningReport:
        nonlocal wanted, passed
        masks: dict[str, Tensor] = {}
        if solves:
            requests = _requests(wanted, amount, shape, scope, threshold)
            parts = [(list(group), request) for group, request in requests]
            masks = reconstruct(model, wanted, parts, scoring, log)
        else:
            named = [name for name, place in wanted.items() if _is_named(place, include)]
            score, unread = _scorer(model, wanted, named, scoring)
            passed = dict.fromkeys(unread, "met no inputs on this data")
            wanted = {name: place for name, place in wanted.items() if name not in unread}
            for group, request in _requests(wanted, amount, shape, scope, threshold):
                masks |= decide(group, score, request)
            _check_norms(wanted, masks)
        check_alike(masks, "weights")
        adopt(model, masks)
        again = places(model)
        left = nonzero | {name: again[name].nonzero for name in wanted}
        rows = tuple(Row(name, nonzero[name], left[name], size=known[name].parameter.numel()) for name in wanted)
        settings = {"amount": amount, "threshold": threshold, "importance": _name(importance), "scope": scope}
        return PruningReport(
            call="prune_weights",
            before=before,
            after=_cost(model, left),
            rows=rows,
            frozen=_left_out(known, wanted, passed),
            settings=settings | {"pattern": str(shape)},
            subject=model,
        )

    return all_or_nothing(model).run(prune)


def _requests(
    wanted: Mapping[str, Place], amount: Amount | None, shape: Shape, scope: str, threshold: float | None
) -> list[tuple[dict[str, Place], Request]]:
    return [(group, Request(shape, scope, part, threshold)) for group, part in _groups(wanted, amount)]


def _left_out(known: Mapping[str, Place], wanted: Mapping[str, Place], passed: Mapping[str, str]) -> dict[str, str]:
    """What is not pruned though nobody excluded it, largest first, with its share of the parameters and the reason."""
    total = max(sum(place.parameter.numel() for place in known.values()), 1)
    others = [place for name, place in known.items() if name in passed or (name not in wanted and not place.prunable)]
    others.sort(key=lambda place: -place.parameter.numel())
    vectors = [place for place in others if place.parameter.dim() < 2 and place.name not in passed]
    found = {
        place.name: (place.parameter.numel(), passed.get(place.name) or _why_left_out(place))
        for place in others
        if place not in vectors
    }
    if vectors:
        count = sum(place.parameter.numel() for place in vectors)
        found[f"{len(vectors)} biases, norms and scales"] = count, "name in include those to prune"
    return {name: f"{count / total * 100:.1f} % of the parameters: {why}" for name, (count, why) in found.items()}


def _why_left_out(place: Place) -> str:
    if place.unsupported is not None:
        return place.unsupported
    if any(isinstance(module, EMBEDDINGS) for module, _ in place.owners):
        return "is an embedding; name it in include to prune it"
    if place.computed is not None:
        return "a layer's weight is computed from it, and zeros here are no zeros there"
    return "is used without a layer; name it in include to prune it"


def _check_arguments(
    model: nn.Module, amount: Amount | None, threshold: float | None, scope: str, pattern: Pattern
) -> Shape:
    check_model(model)
    shape = _check_form(scope, pattern)
    given = [name for name, value in (("amount", amount), ("threshold", threshold)) if value is not None]
    if shape.kind == "n:m":
        if given:
            raise InvalidArgumentError(f"the pattern {shape} says how much is kept; leave out {' and '.join(given)}.")
        return shape
    if len(given) != 1:
        raise InvalidArgumentError(
            f"give exactly one of amount and threshold, not {'both' if given else 'neither'}; for example amount=0.5."
        )
    for value in amount.values() if isinstance(amount, Mapping) else [amount]:
        if value is not None:
            _check_amount(value)
    _check_threshold(threshold)
    return shape


def _check_form(scope: str, pattern: Pattern) -> Shape:
    shape = parse(pattern)
    if scope not in SCOPES:
        raise UnknownNameError.of("scope", str(scope), SCOPES)
    if scope == "row" and shape.kind == "block":
        raise InvalidArgumentError("blocks span rows, so scope='row' has no meaning for them; use 'layer' or 'global'.")
    return shape


def _check_threshold(threshold: float | None) -> None:
    if threshold is None:
        return
    _check_number("threshold", threshold)
    if math.isnan(threshold):
        raise InvalidArgumentError("threshold is NaN, so nothing compares with it; give a number.")


def _check_amount(amount: float) -> None:
    _check_number("amount", amount)
    if isinstance(amount, int):
        if amount < 0:
            raise InvalidArgumentError(f"amount={amount} is a negative count; give at least 0.")
    elif not 0 <= amount < 1:
        hint = f"; for {amount:g} percent write {amount / 100:g}" if 1 < amount < 100 else ""
        raise InvalidArgumentError(f"amount={amount} is not in [0, 1){hint}. A count is an int.")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number, not {value!r} ({type(value).__name__}).")


def _candidates(model: nn.Module, known: Mapping[str, Place], include: Selector, exclude: Selector) -> dict[str, Place]:
    selected, excluded = chosen(model, include, exclude), matches(exclude, model, what="exclude")
    wanted = {
        name: place
        for name, place in known.items()
        if (place.prunable and selected(name)) or (_named(place, model, include) and not excluded(name))
    }
    for name, place in known.items():
        if hasattr(place.parameter, "device_mesh") and (place.prunable or name in wanted):
            raise InvalidArgumentError(
                f"{name!r} is sharded, and weights are compared whole; prune before fully_shard, which keeps the masks."
            )
    for name, place in wanted.items():
        if place.unsupported is not None:
            raise ArgumentTypeError(f"{name!r} {place.unsupported}; only dense floating-point weights are pruned.")
    return wanted


def _is_named(place: Place, include: Selector) -> bool:
    """Whether ``include`` has a name of this very parameter, spelt out."""
    entries = [include] if isinstance(include, str) else include if isinstance(include, (list, tuple, set)) else []
    return any(isinstance(entry, str) and entry in place.names for entry in entries)


def _named(place: Place, model: nn.Module, include: Selector) -> bool:
    """Whether ``include`` means this very parameter, though parameters of its kind are not pruned unasked."""
    if include is None:
        return False
    entries = [include] if isinstance(include, (str, type, nn.Module)) or callable(include) else list(include)
    return any(_names_parameter(entry, place) or _names_owner(entry, place, model) for entry in entries)


def _names_parameter(entry: Any, place: Place) -> bool:
    if not isinstance(entry, str):
        return False
    # A pattern that ends in a mere asterisk means modules, and a module's bias is not meant with it.
    last = entry.rpartition(".")[2]
    fits = last.strip("*?") != "" and any(fnmatchcase(name.rpartition(".")[2], last) for name in place.names)
    return fits and any(fnmatchcase(name, entry) for name in place.names)


def _names_owner(entry: Any, place: Place, model: nn.Module) -> bool:
    for owner, attribute in place.owners:
        if attribute.startswith("bias") or any(own.prunable for own in places(owner).values()):
            continue
        if isinstance(entry, type):
            fits = isinstance(owner, entry)
        elif isinstance(entry, str):
            fits = any(module is owner and name == entry for name, module in model.named_modules())
        else:
            fits = owner is entry
        if fits:
            return True
    return False


def _nothing(model: nn.Module, known: Mapping[str, Place]) -> str:
    name = type(model).__name__
    if not known:
        return f"{name} has no parameters, so there is nothing to prune."
    if any(place.prunable for place in known.values()):
        return f"include and exclude leave no weight of {name} to prune; a bias or a norm's weight is named in full."
    listed = ", ".join(f"{key} {tuple(place.parameter.shape)}" for key, place in list(known.items())[:8])
    return (
        f"no parameter of {name} is the weight of a linear, convolutional, recurrent or attention layer, so there "
        f"is nothing to prune unasked. It has {listed}; name those you mean in include."
    )


def _groups(wanted: Mapping[str, Place], amount: Amount | None) -> list[tuple[dict[str, Place], float | int | None]]:
    if not isinstance(amount, Mapping):
        return [(dict(wanted), amount)]
    left, groups = dict(wanted), []
    for entry, part in amount.items():
        if not isinstance(entry, str):
            raise ArgumentTypeError(f"the keys of amount are names or patterns, not {entry!r}.")
        group = {name: place for name, place in left.items() if any(_under(one, entry) for one in place.names)}
        if not group:
            raise NothingToPruneError(f"amount has {entry!r}, which fits no weight left; they are {', '.join(wanted)}.")
        left = {name: place for name, place in left.items() if name not in group}
        groups.append((group, part))
    return groups


def _under(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.") or fnmatchcase(name, entry)


def _scorer(
    model: nn.Module,
    wanted: Mapping[str, Place],
    named: Collection[str],
    scoring: Scoring,
) -> tuple[Callable[[Place], Scores], set[str]]:
    """Returns what scores one weight, and the names of those that nothing can be said of on this data."""
    if isinstance(scoring.importance, str) and scoring.importance == "magnitude":
        # Read from the weights themselves: no second tensor of their size.
        return _by_magnitude, set()
    found = scores(
        model,
        scoring.data,
        scoring.importance,
        loss_fn=scoring.loss_fn,
        wanted=wanted,
        named=named,
        progress=scoring.progress,
    )

    def score(place: Place) -> Scores:
        given = found[place.name]
        given = given if given.is_floating_point() else given.to(torch.float64)
        # What is zero already is removed already, whatever the criterion thinks of it.
        zero = place.parameter.detach() == 0
        if place.computed is not None:
            given = given.masked_fill(
                place.computed.best(given.masked_fill(zero, -torch.inf)), torch.finfo(given.dtype).max
            )
        return Scores(given.masked_fill(zero, torch.finfo(given.dtype).min), False, _alive(place), place.name)

    return score, {*wanted} - {*found}


def _by_magnitude(place: Place) -> Scores:
    if place.computed is None:
        return Scores(place.weight, True, _alive(place), place.name)
    found = place.weight.abs()
    alive = found if place.mask is None else found.masked_fill(~place.mask.bool(), -1)
    best = torch.finfo(found.dtype).max
    return Scores(found.masked_fill(place.computed.best(alive), best), False, _alive(place), place.name)


def _check_norms(wanted: Mapping[str, Place], masks: Mapping[str, Tensor]) -> None:
    for name, place in wanted.items():
        if place.computed is not None and place.computed.is_lost(masks[name]):
            raise InvalidArgumentError(
                f"nothing would be left of a part of {name!r} whose norm is taken, and the norm of nothing divides by "
                "zero; remove less, or exclude it."
            )


def _alive(place: Place) -> Tensor | None:
    return None if place.mask is None else place.mask.bool()


def _cost(model: nn.Module, nonzero: Mapping[str, int]) -> Cost:
    # As measure.cost, without counting again what a pass has counted.
    return Cost(count_parameters(model), sum(nonzero.values()), size_bytes(model))


def _name(importance: Any) -> str:
    if isinstance(importance, Mapping):
        return "scores"
    return importance if isinstance(importance, str) else lookup(importance, of="layers").name
