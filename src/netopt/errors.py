"""What can go wrong, as one tree of exceptions.

Each error is also the builtin a Python user would catch, and says what happened, where, and what to do about it::

    NetoptError
    ├── InvalidArgumentError (ValueError)
    │   ├── UnknownNameError       a name that is not registered
    │   ├── SelectorError          include or exclude selects nothing
    │   ├── MissingDataError       a criterion needs data, targets or a loss and got none
    │   ├── EmptyDataError         data yields no batch
    │   ├── NothingToPruneError    everything is frozen, excluded, or there are no parameters
    │   ├── ShapeMismatchError     shapes that must agree do not
    │   ├── DeviceMismatchError    tensors that must meet live on different devices
    │   └── PlanMismatchError      a plan made for another model
    ├── NonFiniteError (ValueError)      NaN or infinity in weights, scores or a loss
    ├── CheckpointError (OSError)        a file of tensors cannot be read or written
    ├── ArgumentTypeError (TypeError)
    ├── ForwardError (RuntimeError)      the model's own forward failed on the inputs given
    ├── TraceError (RuntimeError)        the model ran, but its operations could not be followed
    ├── MaskError (RuntimeError)         masks are missing, or not ours to change
    ├── OptimizerStateError (RuntimeError)
    ├── SurgeryError (RuntimeError)      a tensor refuses to be exchanged; nothing changed
    ├── MissingPackageError (ImportError) an optional package is not installed
    └── VerificationError (RuntimeError) the changed model did not do what was promised; it was restored
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "ArgumentTypeError",
    "CheckpointError",
    "DeviceMismatchError",
    "EmptyDataError",
    "ForwardError",
    "InvalidArgumentError",
    "MaskError",
    "MissingDataError",
    "MissingPackageError",
    "NetoptError",
    "NonFiniteError",
    "NothingToPruneError",
    "OptimizerStateError",
    "PlanMismatchError",
    "SelectorError",
    "ShapeMismatchError",
    "SurgeryError",
    "TraceError",
    "UnknownNameError",
    "VerificationError",
    "nearest",
]


_MEANT = {
    "attention": ("branches",),
    "bfloat16": ("bf16",),
    "channels": ("neurons",),
    "cosine": ("influence",),
    "crossentropy": ("kl",),
    "filters": ("neurons",),
    "gradient": ("taylor",),
    "hessian": ("fisher",),
    "kd": ("kl",),
    "kldiv": ("kl",),
    "l1": ("magnitude",),
    "l1norm": ("magnitude",),
    "l2": ("magnitude", "mse"),
    "l2norm": ("l2", "magnitude"),
    "layers": ("blocks",),
    "local": ("layer",),
    "polynomial": ("cubic",),
    "rows": ("row", "layer"),
    "uniform": ("layer",),
    "usage": ("frequency",),
}
"""What other libraries call things, written small and without dashes, and our names."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Returns a sentence that suggests the known names closest to ``name``, or an empty string when none is close.

    Example:
        >>> nearest("salliency", ["saliency", "magnitude"])
        "Did you mean 'saliency'?"
        >>> nearest("L1", ["saliency", "magnitude"])
        "Did you mean 'magnitude'?"
    """
    known = list(known)
    folded = _folded(name)
    close = [one for one in known if _folded(one) == folded] or [one for one in _MEANT.get(folded, ()) if one in known]
    close = close[:count] or difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    return f"Did you mean {' or '.join(repr(one) for one in close)}?" if close else ""


def _folded(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).casefold()


def percent(amount: float) -> str:
    """What to write for a number out of range that looks like a percentage, or an empty string.

    Example:
        >>> percent(90)
        '; 90 percent is 0.9'
    """
    return f"; {amount:g} percent is {amount / 100:g}" if 1 < amount < 100 else ""


def quoted(names: Iterable[str]) -> str:
    """Returns names in quotes, as a list that can be pasted.

    Example:
        >>> quoted(["fc1", "fc2"])
        "'fc1', 'fc2'"
    """
    return ", ".join(map(repr, names))


class NetoptError(Exception):
    """The root of every error this library raises on purpose."""


class InvalidArgumentError(NetoptError, ValueError):
    """An argument of the right type has a value that cannot be meant."""


class ArgumentTypeError(NetoptError, TypeError):
    """An argument is of a type that cannot be used."""


class UnknownNameError(InvalidArgumentError):
    """A name is not registered; the message lists the near ones."""

    @classmethod
    def of(cls, what: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Builds the error for ``name``, said to be a ``what``, with the nearest and all ``known`` names.

        Example:
            >>> str(UnknownNameError.of("importance", "magnitud", ["magnitude", "saliency"]))
            "unknown importance 'magnitud'. Did you mean 'magnitude'? Known are: magnitude, saliency."
        """
        known = sorted(known)
        near = nearest(name, known) if isinstance(name, str) else ""
        parts = [f"unknown {what} {name!r}.", near, f"Known are: {', '.join(known)}."]
        return cls(" ".join(part for part in parts if part))


class SelectorError(InvalidArgumentError):
    """An entry of ``include`` or ``exclude`` selects nothing in this model."""


class MissingDataError(InvalidArgumentError):
    """Data, targets or a loss are needed and were not given."""


class EmptyDataError(InvalidArgumentError):
    """The data yields no batch."""


class NothingToPruneError(InvalidArgumentError):
    """There is nothing that could be removed; the message lists the reasons."""


class ShapeMismatchError(InvalidArgumentError):
    """Shapes that must agree do not."""


class DeviceMismatchError(InvalidArgumentError):
    """Tensors that must meet live on different devices."""


class PlanMismatchError(InvalidArgumentError):
    """A plan was made for a model with other tensors or sizes."""


class NonFiniteError(NetoptError, ValueError):
    """NaN or infinity where a finite number is needed."""


class ForwardError(NetoptError, RuntimeError):
    """The model's own forward failed on the inputs given; its exception is chained."""


class TraceError(NetoptError, RuntimeError):
    """The model ran, but its operations could not be followed."""


class MaskError(NetoptError, RuntimeError):
    """Masks are missing, do not fit, or were put there by someone else."""


class OptimizerStateError(NetoptError, RuntimeError):
    """An optimizer's state does not fit the parameters it holds."""


class MissingPackageError(NetoptError, ImportError):
    """An optional package is needed and not installed; the message has the command."""


class VerificationError(NetoptError, RuntimeError):
    """The changed model did not do what was promised; model and optimizer were restored."""


class SurgeryError(NetoptError, RuntimeError):
    """A tensor refuses to be exchanged for its smaller successor; everything was put back."""


class CheckpointError(NetoptError, OSError):
    """A file of tensors cannot be read or written; files that were finished stay."""
