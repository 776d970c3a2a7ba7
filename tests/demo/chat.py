"""Messages of a chat, as chat templates take them."""

from __future__ import annotations

from PIL import Image


def user(*parts: Image.Image | str) -> dict:
    """Build a user turn of images and texts."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": content}
