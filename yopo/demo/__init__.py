"""The embedded demo: three tiny trained models, generated pictures and questions for them."""

from pathlib import Path

# Any from_pretrained takes these directories.
LLAVA_TINY = Path(__file__).parent / "llava_tiny"
QWEN2_VL_TINY = Path(__file__).parent / "qwen2_vl_tiny"
INTERNVL_TINY = Path(__file__).parent / "internvl_tiny"

SETS = (
    "calibration",
    "heldout",
    "train",
    "glyphs-calibration",
    "glyphs-heldout",
    "glyphs-train",
    "glyphs-shifted",
    "tickets-calibration",
    "tickets-heldout",
    "tickets-train",
    "tickets-small",
    "tickets-large",
)
"""Sets of pairs: scenes of shapes, grids of glyphs, tickets; no picture is in two splits of a task.
``glyphs-shifted`` are grids drawn differently from the other three sets, and disjoint from them.
``tickets-small`` are calibration tickets in pictures of one tile, ``tickets-large`` held-out ones
in pictures of three or four."""

_TASKS = {"qwen2-vl-tiny": "glyphs-", "internvl-tiny": "tickets-"}
"""Model -> what the sets of its own task are called before the split."""


MODELS = ("llava-tiny", "qwen2-vl-tiny", "internvl-tiny")
"""The demo models' aliases."""


def is_demo(model: str) -> bool:
    """Whether a model, by its name in plans, is a demo model: an alias, or its directory's name."""
    return model.replace("_", "-") in MODELS


def model_of_set(name: str) -> str:
    """The demo model whose task a set of pairs is about."""
    models = (model for model, prefix in _TASKS.items() if name.startswith(prefix))
    return next(models, MODELS[0])


def demo_data(model: str, split: str) -> str:
    """Name the demo pairs for a model, as ``demo:SET``: those of its own task, or scenes.

    Args:
        model: The model's name in plans.
        split: ``calibration``, ``heldout`` or ``train``.
    """
    return f"demo:{_TASKS.get(model, '')}{split}"
