"""Where the text looks, drawn over a picture: a tiny PNG that the browser scales up."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from markupsafe import Markup
from PIL import Image

from yopo.report.page.results import Look

_COLORS = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))
"""From little to much attention (the map "plasma" of matplotlib, CC0)."""

_MOST_OPAQUE = 215
"""Of 255: the picture stays visible below."""


def overlays(look: Look) -> tuple[Markup, Markup]:
    """The dense and the pruned model's map as data URIs, on one scale: their larger maximum."""
    top = max(*look.dense, *look.pruned, 1e-12)
    dense, pruned = (_png(each, look.rows, look.cols, top) for each in (look.dense, look.pruned))
    return dense, pruned


def color(share: float) -> tuple[int, int, int]:
    """A color of the map for a share between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(_COLORS) - 1)
    low = min(int(place), len(_COLORS) - 2)
    pairs = zip(_COLORS[low], _COLORS[low + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in pairs)
    return red, green, blue


def _png(values: Sequence[float], rows: int, cols: int, top: float) -> Markup:
    image = Image.new("RGBA", (cols, rows))
    shares = [max(value, 0.0) / top for value in values]
    image.putdata([(*color(share), round(_MOST_OPAQUE * share**0.5)) for share in shares])
    with io.BytesIO() as file:
        image.save(file, format="png", optimize=True)
        return Markup("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
