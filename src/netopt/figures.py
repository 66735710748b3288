"""Figures outside of pyplot, so that no window opens and no global state is touched, which a notebook shows."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from netopt.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure"]


def figure(**settings: Any) -> Figure:
    """Returns an empty figure; ``settings`` are those of matplotlib's.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib import figure as shapes
    except ImportError as error:
        raise MissingPackageError(
            "pictures are drawn with matplotlib, which is not installed; pip install 'netopt[plots]'."
        ) from error

    class Figure(shapes.Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Figure(**settings)
