"""A note where a calibration saw one size of images, and the model takes larger ones."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.pairs import Pair
from yopo.data.prompts import encode_for
from yopo.data.sizes import scaled
from yopo.plans.extent import MORE_TOKENS, Extent
from yopo.support.console import note
from yopo.support.errors import DataError

PROBED = 2.0
"""Factor of an image's sides by which a processor is asked for more visual tokens."""


def note_if_one_size(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Iterable[Pair],
    extent: Extent | None,
) -> None:
    """Say so where all images had one grid, and larger images would have a larger one.

    Args:
        model: The model.
        processor: Its processor, which is asked for the first pair's images, enlarged.
        pairs: Those of the calibration.
        extent: Of the calibration.
    """
    if extent is None or extent.smallest != extent.largest:
        return
    pair = next(iter(pairs))
    tokens, larger = (_tokens(model, processor, each) for each in (pair, scaled(pair, PROBED)))
    if larger > MORE_TOKENS * tokens > 0:
        note(
            f"All calibration images have {extent.largest.rows} x {extent.largest.cols} visual "
            "tokens, and larger images have more: plans are untried there. If you serve them, "
            "calibrate on several sizes, as with --grids 1,1.5."
        )


def _tokens(model: PreTrainedModel, processor: ProcessorMixin, pair: Pair) -> int:
    """Visual tokens of a pair's prompt; 0 if it cannot be made."""
    try:
        inputs = encode_for(model, processor, [pair]).inputs
    except DataError:
        return 0
    return int((inputs["input_ids"] == model.config.image_token_id).sum())
