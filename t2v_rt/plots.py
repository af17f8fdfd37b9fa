"""Pictures of figures, as SVG, by matplotlib (extra `plots`); under one version of it, the same give the same bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from t2v_rt.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure.

    Args:
        width: in inches of 72 points.
        height: in inches of 72 points.

    Raises:
        InputError: matplotlib is not installed; the extra is named.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise InputError(f"drawing a picture needs the package {exc.name!r}; install t2v-rt[plots]") from exc
    return Figure((width, height), layout="constrained")


def as_svg(figure: Figure) -> bytes:
    """A drawn figure as the content of an SVG file, without a date."""
    from matplotlib import rc_context

    content = io.BytesIO()
    # names of elements are made from the salt instead of at random; text stays text, which can be searched and copied
    with rc_context({"svg.hashsalt": "t2v-rt", "svg.fonttype": "none"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
