"""Where the text looks: its attention over the tokens of an image, dense and pruned.

A map is the mean, over the layers and their heads that the plan lets read images and over the text
after the first image, of the attention on every visual token. Both models run the same code and
are watched in the same heads, so that maps differ only by what pruning changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.prompts import Batch
from yopo.plans.grid import Grid
from yopo.plans.schema import PruningPlan, full_plan
from yopo.runtime.attention_masks import AttentionMasks
from yopo.runtime.install import pruned
from yopo.runtime.reading import Reading
from yopo.runtime.watching import watching


@dataclass(frozen=True)
class View:
    """One image as the model gets it, and where the text looks.

    Attributes:
        image: The picture that the grid lies over.
        grid: Its tokens.
        dense, pruned: Share of the attention on every token, row by row.
    """

    image: Image.Image
    grid: Grid
    dense: list[float]
    pruned: list[float]


class _Watcher:
    """Sums of one forward of one prompt.

    Args:
        plan: Which heads are watched.
        running: The plan that the model runs under.
        whole: That of a forward in which all visual tokens are; None: this one is.
    """

    def __init__(self, plan: PruningPlan, running: PruningPlan, whole: _Watcher | None = None):
        self._plan, self._running, self._whole = plan, running, whole or self
        self._sum: torch.Tensor | None = None
        self._heads = 0
        self.grids: tuple[Grid, ...] = ()
        self.places = torch.empty(0, dtype=torch.int64)

    def __call__(
        self,
        layer: int,
        queries: torch.Tensor,
        reading: Reading,
        masks: AttentionMasks,
        scale: float,
    ) -> None:
        heads, shape = self._plan.layers[layer].read_heads, self._plan.model.shape
        if not heads or masks.layout is None:
            return
        layout = masks.layout
        self.grids, self.places = layout.grids[0], layout.visual.index[0].cpu()
        after = layout.text.index[0] > self._whole.places[0]
        kept = self._running.layers[layer].kept_kv(shape)
        places = [kept.index(head // shape.group) for head in heads]
        keys = reading.kept[0][0, places].float()  # (heads, visual + text, head_dim)
        scores = queries[0, list(heads)][:, after].float() @ keys.transpose(1, 2) * scale
        if masks.reading_mask is not None:
            scores = scores.masked_fill(~masks.reading_mask[0, 0][after], float("-inf"))
        shares = scores.softmax(dim=-1)[..., : reading.num_visual].mean(dim=1).sum(dim=0).cpu()
        self._sum = shares if self._sum is None else self._sum + shares
        self._heads += len(heads)

    def maps(self) -> list[list[float]]:
        """The map of every grid, 0 where a reduction dropped a token; empty if no head reads."""
        if self._sum is None:
            return []
        places, grids = self._whole.places, self._whole.grids
        shares = self._sum.new_zeros(len(places))
        shares[torch.searchsorted(places, self.places)] = self._sum / self._heads
        return [each.tolist() for each in shares.split([grid.tokens for grid in grids])]


@torch.no_grad()
def looks_of(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    plan: PruningPlan,
    batch: Batch,
    images: Sequence[Image.Image],
) -> list[View]:
    """Where the text of one prompt looks.

    Args:
        model: The dense model in memory.
        processor: Its processor.
        plan: The plan.
        batch: The prompt alone, without padding.
        images: Its decoded images.

    Returns:
        One view per image whose place among the tokens is known. None are where no head reads, or
        where tiles cannot be told apart by image.
    """
    dense = full_plan(plan.model, plan.workload)
    whole = _Watcher(plan, dense)
    watchers = (whole, _Watcher(plan, plan, whole))
    for running, watcher in zip((dense, plan), watchers, strict=True):
        with pruned(model, running, check=False), watching(watcher):
            model.base_model(**batch.inputs, use_cache=False)
    maps = [watcher.maps() for watcher in watchers]
    if not all(maps):
        return []
    seen = _seen(processor, batch.inputs.get("pixel_values"), images, whole.grids)
    return [
        View(image, whole.grids[place], maps[0][place], maps[1][place])
        for place, image in seen.items()
    ]


def _seen(
    processor: ProcessorMixin,
    pixels: torch.Tensor | None,
    images: Sequence[Image.Image],
    grids: Sequence[Grid],
) -> dict[int, Image.Image]:
    """Number of a grid -> the picture under it.

    Processors crop images (LLaVA) or cut tiles out of them, so where the model gets pictures, these
    are shown. Where it gets patches (Qwen), every image is whole.
    """
    if pixels is None or pixels.dim() < 4:
        return dict(enumerate(images)) if len(grids) == len(images) else {}
    if pixels.dim() == 5 and len(grids) == 2 * len(images) == 2 * len(pixels):
        # (images, tiles, channels, height, width): a scaled-down image, then tiles of one grid
        return {2 * place: _as_image(processor, each[0]) for place, each in enumerate(pixels)}
    if pixels.dim() == 5:  # (prompts, crops, channels, height, width)
        pixels = pixels.flatten(0, 1)
    patches = [place for place, grid in enumerate(grids) if grid.tokens > 1]  # no class tokens
    if len(pixels) == len(images) == len(patches):
        return {
            place: _as_image(processor, each) for place, each in zip(patches, pixels, strict=True)
        }
    if len(images) == 1 and len(pixels) == len(grids):  # tiles, and last the whole image
        return {len(grids) - 1: _as_image(processor, pixels[-1])}
    return {}


def _as_image(processor: ProcessorMixin, pixels: torch.Tensor) -> Image.Image:
    """Normalised (channels, height, width) pixels as a picture."""
    mean, deviation = (
        torch.tensor(getattr(processor.image_processor, name)).view(-1, 1, 1)
        for name in ("image_mean", "image_std")
    )
    levels = (pixels.float().cpu() * deviation + mean).clamp(0, 1) * 255
    return Image.fromarray(levels.round().byte().permute(1, 2, 0).numpy())
