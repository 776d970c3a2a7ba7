"""Opens the pairs of a command: the user's, or for a demo model those of its task."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from yopo.data.pairs import Pairs
from yopo.data.sources import open_pairs
from yopo.demo import demo_data, is_demo
from yopo.models.public_pairs import PHOTOS, PublicPairs
from yopo.models.registry import FAMILIES, family_of, resolve
from yopo.pipeline.options import RunOptions
from yopo.support.console import note
from yopo.support.errors import DataError

if TYPE_CHECKING:
    from yopo.pipeline.model_handle import ModelHandle
    from yopo.plans.schema import PruningPlan


def open_for(handle: ModelHandle, options: RunOptions, name: str, split: str) -> Pairs:
    """The pairs of a command, without those whose prompts do not fit the model.

    Args:
        handle: The model; its weights are not loaded.
        options: Options with the requested data.
        name: The model's name in plans.
        split: ``calibration`` or ``heldout``, of a demo model's pairs if none are requested.

    Raises:
        DataError: No data is given for a model that is not a demo model, or no pair is usable.
    """
    from yopo.data.lengths import without_long_prompts

    data = options.data
    if data is None:
        check_named(name, split, family=family_of(handle.config).name)
        data = demo_data(name, split)
        if split == "calibration":
            note(f"Using the demo pairs included with yopo ({data}).")
    pairs = open_pairs(
        data,
        samples=options.samples,
        seed=options.seed,
        strict=options.strict,
        videos=family_of(handle.config).takes_videos,
    )
    return without_long_prompts(
        pairs,
        handle.processor,
        handle.config,
        room=options.max_new_tokens,
        strict=options.strict,
    )


def note_other_processor(plan: PruningPlan, options: RunOptions) -> None:
    """Say so where a plan was calibrated with other settings of the processor."""
    calibrated = plan.provenance.get("processor", {})
    if calibrated != options.image_options:
        note(
            f"The plan was calibrated with the processor options {calibrated or 'of the model'}, "
            f"and is evaluated with {options.image_options or 'those of the model'}."
        )


def check_named(
    model: str, split: str, *, typed: str | None = None, family: str | None = None
) -> None:
    """Refuse a model without data, unless it is a demo model, before it is fetched or loaded.

    Drawings of 64 pixels do not show what a model of photos or documents can do without.

    Args:
        model: Name or location of the model; with ``family``, its name in plans.
        split: ``calibration`` or ``heldout``: what the data is for.
        typed: The command without data, as the user typed it.
        family: The model's family, if it is known.

    Raises:
        DataError: It is none; the remedy names a public set of its kind and the command.
        ModelError: There is no such model.
    """
    name = resolve(model).name if family is None else model
    if is_demo(name):
        return
    public = _public_pairs(model, family)
    data = public.calibration if split == "calibration" else public.heldout
    typed = typed or f"yopo calibrate --model {shlex.quote(model)}"
    raise DataError(
        f"{name}: no pairs are given, and the drawings that come with yopo say nothing about a "
        "model other than its demo models.",
        remedy="Give a few hundred pairs like those you serve, or try a public set "
        f"({public.kind}): {typed} --data {data}",
    )


def _public_pairs(model: str, named: str | None) -> PublicPairs:
    """The public pairs of a model's family, as far as it is known without a network."""
    kind = None
    with suppress(OSError, ValueError, AttributeError):
        text = (Path(model).expanduser() / "config.json").read_text(encoding="utf-8")
        kind = json.loads(text).get("model_type")
    for family in FAMILIES:
        is_it = model in family.aliases or kind in (family.model_type, *family.originals)
        if family.name == named or (named is None and is_it):
            return family.public_pairs
    return PHOTOS
