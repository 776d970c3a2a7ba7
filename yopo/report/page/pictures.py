"""Pictures inside a document that anyone may have written: looked at before a page shows them.

A few bytes can declare a picture of gigabytes. The page's reader would pay for it, whose browser
decodes what the page holds, so sizes are read here, from the header alone.
"""

from __future__ import annotations

import base64
import io
import re
import warnings

from PIL import Image

MAX_SIDE = 1024
"""Longest side of a picture in pixels; ``yopo eval`` writes at most 320."""

_PICTURE = re.compile(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/]+={0,2})")


def picture_problem(text: str) -> str | None:
    """What is wrong with a picture's data URI, as the rest of "a picture ...", or None."""
    match = _PICTURE.fullmatch(text)
    if match is None:
        return "that is no PNG or JPEG in base64"
    kind, data = match.groups()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(base64.b64decode(data)), formats=(kind,)) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        return f"that declares far more than {MAX_SIDE} pixels a side"
    except (OSError, ValueError, SyntaxError):  # what Pillow's parsers raise on damaged files
        return f"that cannot be read as {kind.upper()}"
    if max(width, height) > MAX_SIDE:
        return f"of {width} x {height} pixels, more than {MAX_SIDE} a side"
    return None
