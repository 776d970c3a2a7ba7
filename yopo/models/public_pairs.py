"""Public sets of image-question pairs to try a model of a family on, for those without their own.

The names and columns are from memory: no hub could be reached where this was written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublicPairs:
    """Two sets on the hub, of the kind of images that a family was made for.

    Attributes:
        kind: What they are about.
        calibration: To calibrate on, as ``--data`` takes it.
        heldout: To evaluate on: of the same kind, other images.
    """

    kind: str
    calibration: str
    heldout: str


PHOTOS = PublicPairs(
    "questions about photos",
    "HuggingFaceM4/the_cauldron:aokvqa:train",
    "lmms-lab/VQAv2:validation",
)
"""For models that see every image at one small size."""

DOCUMENTS = PublicPairs(
    "questions about scanned documents",
    "HuggingFaceM4/the_cauldron:docvqa:train",
    "lmms-lab/DocVQA:DocVQA:validation",
)
"""For models that see large images in tiles, or at their own size."""
