"""Pairs to show: their images, what both models answer, and where the text looks."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.pairs import Pair
from yopo.data.processing import images_of
from yopo.data.prompts import encode_for
from yopo.evaluation.fidelity import PairFidelity
from yopo.evaluation.looks import View, looks_of
from yopo.plans.schema import PruningPlan

MOST_DIFFERENT = 2 / 3
"""Largest share of examples whose answers differ, as far as there are others."""

_SIDE = 320
"""Longest side of a picture in pixels."""

_SHARP = 128
"""Longest side of pictures that are kept without loss."""

_MOST_IMAGES = 4
"""Images of one prompt that are shown."""


@dataclass(frozen=True)
class Answered:
    """What both models answered to a pair.

    Attributes:
        pair: The pair.
        kind: Its kind.
        dense, pruned: The generated answers.
        fidelity: Agreement and KL along the dense model's answer.
    """

    pair: Pair
    kind: str
    dense: str
    pruned: str
    fidelity: PairFidelity


@dataclass(frozen=True)
class Looks:
    """Where the text looks in one image, token by token: a picture of it with two maps.

    Attributes:
        picture: The image as a data URI, cut as the model gets it.
        rows, cols: The image's grid.
        dense, pruned: Share of the text's attention on every token, row by row, in the dense and in
            the pruned model.
    """

    picture: str
    rows: int
    cols: int
    dense: list[float]
    pruned: list[float]


@dataclass(frozen=True)
class Example:
    """One pair to show.

    Attributes:
        question: Of the pair.
        accepted: Its accepted answers, if it has any.
        kind: Its kind.
        dense, pruned: What both models answered.
        is_same: Whether these are identical.
        kl: Logit KL per answer token, in nats.
        images: The first images as data URIs, reduced.
        num_images: How many it has.
        looks: Where the text looks, for the images whose place among the tokens is known.
    """

    question: str
    accepted: list[str]
    kind: str
    dense: str
    pruned: str
    is_same: bool
    kl: float
    images: list[str]
    num_images: int
    looks: list[Looks]


def choose(answers: Sequence[Answered], count: int) -> list[Answered]:
    """Pairs to show: first those whose answers differ, by descending KL, then others likewise.

    Args:
        answers: All pairs.
        count: How many. At most ``MOST_DIFFERENT`` of them differ, as far as others exist. The
            others come from all kinds in turn.
    """
    ranked = sorted(answers, key=lambda each: -each.fidelity.kl / each.fidelity.tokens)
    different = [each for each in ranked if each.dense != each.pruned]
    same = _in_turn([each for each in ranked if each.dense == each.pruned])
    most = max(round(count * MOST_DIFFERENT), count - len(same))
    chosen = different[: min(most, count)]
    return chosen + same[: count - len(chosen)]


def _in_turn(answers: Sequence[Answered]) -> list[Answered]:
    """The answers, one of every kind at a time."""
    seen: dict[str, int] = {}
    turns = []
    for place, each in enumerate(answers):
        seen[each.kind] = seen.get(each.kind, 0) + 1
        turns.append((seen[each.kind], place, each))
    return [each for *_, each in sorted(turns, key=lambda turn: turn[:2])]


def examples_of(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    plan: PruningPlan,
    chosen: Sequence[Answered],
) -> tuple[Example, ...]:
    """Make examples of pairs: pictures, and where the text looks in the dense and pruned model.

    Args:
        model: The dense model in memory.
        processor: Its processor.
        plan: The evaluated plan.
        chosen: From ``choose``.
    """
    return tuple(_example(model, processor, plan, each) for each in chosen)


def _example(
    model: PreTrainedModel, processor: ProcessorMixin, plan: PruningPlan, each: Answered
) -> Example:
    batch = encode_for(model, processor, (each.pair,))
    images = images_of(each.pair)
    views = looks_of(model, processor, plan, batch, images)
    return Example(
        question=each.pair.question,
        accepted=list(each.pair.answers),
        kind=each.kind,
        dense=each.dense.strip(),
        pruned=each.pruned.strip(),
        is_same=each.dense == each.pruned,
        kl=each.fidelity.kl / each.fidelity.tokens,
        images=[picture(image) for image in images[:_MOST_IMAGES]],
        num_images=len(images),
        looks=[_looks(view) for view in views[:_MOST_IMAGES]],
    )


def _looks(view: View) -> Looks:
    maps = ([float(f"{share:.3g}") for share in each] for each in (view.dense, view.pruned))
    return Looks(picture(view.image), view.grid.rows, view.grid.cols, *maps)


def picture(image: Image.Image) -> str:
    """An image as a data URI: reduced, and as a PNG if it is small."""
    image = image.convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    kind = "png" if max(image.size) <= _SHARP else "jpeg"
    with io.BytesIO() as file:
        image.save(file, format=kind, quality=80, optimize=True)
        data = base64.b64encode(file.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{data}"
