"""Batches on their way through the pruned decoder, layer by layer, beside a dense walk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from yopo.fitting.layerwise import DenseBatch, DenseWalk, real_rows
from yopo.models.devices import device_of, moved
from yopo.plans.schema import PruningPlan
from yopo.runtime.attention_masks import AttentionMasks
from yopo.runtime.cache import PrunedCacheLayer
from yopo.runtime.decoder import rotary_positions
from yopo.runtime.layer import LayerRun, VisualInput
from yopo.runtime.token_index import Rotary, TokenIndex
from yopo.runtime.weights import VisualLayer


@dataclass
class PrunedBatch:
    """One batch on its way through the pruned decoder: both streams, their positions and masks."""

    text: torch.Tensor
    visual: torch.Tensor
    text_rotary: Rotary
    visual_rotary: Rotary
    masks: AttentionMasks
    dense: DenseBatch

    def copy(self) -> PrunedBatch:
        """One that goes its own way: layers add to their states in place."""
        put = self.dense.room.put
        return replace(self, text=put(self.text.clone()), visual=put(self.visual.clone()))

    def on(self, device: torch.device) -> PrunedBatch:
        """This batch on the device of the next layer; the same states if they are there."""
        text, visual = moved((self.text, self.visual), device)
        text_rotary, visual_rotary = moved((self.text_rotary, self.visual_rotary), device)
        return replace(
            self, text=text, visual=visual, text_rotary=text_rotary, visual_rotary=visual_rotary
        )

    def settle(self, text: torch.Tensor | None, visual: torch.Tensor | None) -> None:
        """Let new states wait; None: unchanged."""
        put = self.dense.room.put
        if text is not None:
            self.text = put(text, self.text)
        if visual is not None:
            self.visual = put(visual, self.visual)
        self.masks.elsewhere.clear()

    def run(self, walk: DenseWalk, number: int, part: VisualLayer) -> LayerRun:
        """One layer on this batch, with a private cache."""
        index = TokenIndex()
        index.place(self.visual_rotary)
        cache = PrunedCacheLayer(part.split, index, is_first=False)
        masks = self.masks.on(self.text.device)
        return LayerRun(walk.decoder.layers[number], walk.names, masks, cache, part)

    def given(self, part: VisualLayer) -> VisualInput:
        """The visual tokens as input of a layer."""
        return VisualInput(self.visual, self.visual_rotary, part)

    def real(self, states: torch.Tensor) -> torch.Tensor:
        """(visual tokens, width) of (batch, visual, width) states."""
        return real_rows(moved(self.dense.layout.visual, states.device), states)


def pruned_batches(walk: DenseWalk, plan: PruningPlan) -> list[PrunedBatch]:
    """Split every batch of a walk that has not started into its two streams."""
    return [_split(walk, plan, batch) for batch in walk.batches]


@torch.no_grad()
def _split(walk: DenseWalk, plan: PruningPlan, batch: DenseBatch) -> PrunedBatch:
    hidden, put = batch.hidden, batch.room.put
    layout = moved(batch.layout, hidden.device)
    count, length, _ = hidden.shape
    masks = AttentionMasks(
        layout,
        count,
        length,
        moved(batch.mask, hidden.device),
        TokenIndex(),
        bidirectional=plan.bidirectional,
        device=hidden.device,
    )
    positions = batch.positions
    if positions is None:
        positions = torch.arange(length, device=hidden.device).expand(count, -1)
    positions = rotary_positions(positions.to(hidden.device), walk.names.position_axes)
    home = device_of(walk.decoder.layers[0])  # before transformers 5.19, Qwen-VL's works only there
    like, positions = hidden.new_empty(0, device=home), positions.to(home)
    rotary = moved(walk.decoder.rotary_emb(like, position_ids=positions), hidden.device)
    cosines, sines = (each.expand(count, -1, -1) for each in rotary)
    return PrunedBatch(
        text=put(layout.text.gather(hidden)),
        visual=put(layout.visual.gather(hidden)),
        text_rotary=(put(layout.text.gather(cosines)), put(layout.text.gather(sines))),
        visual_rotary=(put(layout.visual.gather(cosines)), put(layout.visual.gather(sines))),
        masks=masks,
        dense=batch,
    )
