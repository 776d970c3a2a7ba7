"""The embedded demo: two tiny trained models, and generated pictures with questions for them."""

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
``glyphs-shifted`` are grids drawn differently from the other three sets, and disjoint from them."""

_GLYPH_READERS = ("qwen2-vl-tiny",)


def demo_data(model: str, split: str) -> str:
    """Name the demo pairs for a model, as ``demo:SET``: those of its own task, or scenes.

    Args:
        model: The model's name in plans.
        split: ``calibration``, ``heldout`` or ``train``.
    """
    return f"demo:glyphs-{split}" if model in _GLYPH_READERS else f"demo:{split}"
