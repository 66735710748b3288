"""Dispatch modes that other threads do not see.

Torch keeps the stack of modes per thread, and beside it flags of the whole process that its compiler reads;
two threads that leave in turn would leave these set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ThreadDispatchMode"]


class ThreadDispatchMode(TorchDispatchMode):
    """A dispatch mode of one thread; subclasses define ``__torch_dispatch__``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default guards every call against compilation and imports the compiler, which takes seconds, to do so.
        return False

    def __enter__(self) -> Self:
        """Puts the mode on this thread's stack."""
        _push_mode(self)
        return self

    def __exit__(self, *error: object) -> None:
        """Takes the mode off."""
        _pop_mode(None)
