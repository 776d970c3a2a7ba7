"""The embedded demo: two tiny trained models, and generated pictures with questions to ask them."""

from pathlib import Path

# Any from_pretrained takes these directories.
LLAVA_TINY = Path(__file__).parent / "llava_tiny"
QWEN2_VL_TINY = Path(__file__).parent / "qwen2_vl_tiny"

SETS = (
    "calibration",
    "heldout",
    "train",
    "glyphs-calibration",
    "glyphs-heldout",
    "glyphs-train",
    "glyphs-shifted",
)
"""Sets of pairs: scenes of shapes, then grids of glyphs; no picture is in two splits of a task.
``glyphs-shifted`` are grids unlike those of the other three, and of no split of theirs."""

_GLYPH_READERS = ("qwen2-vl-tiny",)


def demo_data(model: str, split: str) -> str:
    """Name the demo pairs to show a model, as ``demo:SET``: those of its own task, or scenes.

    Args:
        model: What plans call the model.
        split: ``calibration``, ``heldout`` or ``train``.
    """
    return f"demo:glyphs-{split}" if model in _GLYPH_READERS else f"demo:{split}"
