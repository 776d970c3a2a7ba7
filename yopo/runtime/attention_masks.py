"""Which tokens may attend to which in one forward: positions, masks and blocks for all layers.

The semantics are those of yopo/README.md: query q may attend to key k if and only if k is not later
than q, and either k is text; or q is text, in the heads that read; or both are visual and k is a
neighbor of q, in the heads that attend. Heads are left to the attention calls; the rest is computed
here once per forward and shared by all layers.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch

from yopo.models.devices import moved
from yopo.models.streams import Stream, TokenLayout
from yopo.plans.grid import TOKENS_PER_LARGE_BLOCK, Block, row_blocks, shared_blocks
from yopo.runtime.inputs import checked_mask
from yopo.runtime.kernel_masks import KernelMasks
from yopo.runtime.token_index import TokenIndex


@dataclass(frozen=True)
class VisualBlock:
    """A block of visual queries and the keys they attend to.

    Attributes:
        start, stop: Queries along this forward's visual stream.
        key_start, key_stop: Visual keys along the cached visual stream; or, ``in_sequence``, keys
            of both kinds in the order of the prompt.
        num_text: How many of the first text keys are attended to as well.
        mask: (1 or batch, 1, queries, visual keys + text keys) bool; None: everything allowed.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    num_text: int
    mask: torch.Tensor | None
    in_sequence: bool = False


class AttentionMasks:
    """Positions of one forward's tokens and of everything cached before them.

    Args:
        layout: Text and visual streams; None if there is no visual token in this forward.
        batch, length: Size of this forward's batch and sequence.
        attention_mask: (batch, cached + length) with 0 on padding, or None.
        index: The cache's token index; extended by this forward's tokens here.
        bidirectional: Whether visual tokens also attend to neighbors after them.
        device: Device of the masks.
        segments: (batch, length) int64, the sample that each token of a packed row belongs to:
            tokens attend only to their own sample. None: every row is one sample.

    Raises:
        ModelError: A 4-D attention mask, or one of another length.
    """

    def __init__(
        self,
        layout: TokenLayout | None,
        batch: int,
        length: int,
        attention_mask: torch.Tensor | None,
        index: TokenIndex,
        *,
        bidirectional: bool,
        device: torch.device,
        segments: torch.Tensor | None = None,
    ):
        layout = None if layout is None else layout.to(device)
        self.layout = layout
        self.past = index.length
        self.past_text = 0 if index.text is None else index.text.shape[1]
        self.past_visual = index.num_visual
        self._bidirectional = bidirectional
        self._segments = moved(segments, device)
        self.kernel = KernelMasks(device)
        self._blocks: dict[int | None, list[VisualBlock]] = {}
        if layout is None:
            everything = torch.arange(length, device=device).expand(batch, length)
            text, visual = Stream(everything, None, shared=True), None
        else:
            text, visual = layout.text, layout.visual
        self.text, self.visual = text, visual
        streams = (text,) if visual is None else (text, visual)
        self._padding = moved(checked_mask(attention_mask, batch, index.length + length), device)
        places = (self._absolute(stream) for stream in streams)
        self._text_keys = index.extend(*places, num_tokens=length)
        index.is_padded |= any(stream.mask is not None for stream in streams)
        self._is_padded = index.is_padded
        self._visual_keys = index.visual
        self.elsewhere: dict[torch.device, AttentionMasks] = {}

    def on(self, device: torch.device) -> AttentionMasks:
        """The same masks on a device, where they are made when they are first used."""
        if device == self.text.index.device:
            return self
        if device not in self.elsewhere:
            self.elsewhere[device] = self._moved(device)
        return self.elsewhere[device]

    def _moved(self, device: torch.device) -> AttentionMasks:
        other = copy(self)
        for name in [each for each in vars(self) if hasattr(type(self), each)]:
            delattr(other, name)  # computed from the rest
        other._blocks, other.layout = {}, moved(self.layout, device)
        other.kernel = KernelMasks(device)
        if other.layout is None:
            other.text = moved(self.text, device)
        else:
            other.text, other.visual = other.layout.text, other.layout.visual
        for name in ("_segments", "_padding", "_text_keys", "_visual_keys"):
            setattr(other, name, moved(getattr(self, name), device))
        return other

    def fixed(
        self,
        text: torch.Tensor | None,
        reading: torch.Tensor | None,
        blocks: dict[int | None, list[VisualBlock]],
        sequence: torch.Tensor | None,
    ) -> AttentionMasks:
        """The same with masks, blocks and a sequence that layers read as they are given."""
        other = copy(self)
        vars(other).update(text_mask=text, reading_mask=reading, sequence=sequence)
        other._blocks, other.kernel = blocks, KernelMasks(self.text.index.device)
        return other

    def _absolute(self, stream: Stream) -> torch.Tensor:
        positions = stream.index + self.past
        return positions if stream.mask is None else positions.masked_fill(~stream.mask, -1)

    @cached_property
    def text_keys_ok(self) -> torch.Tensor | None:
        """(batch, text keys) bool, False on padding; None if all are real."""
        return self._real(self._text_keys)

    @cached_property
    def visual_keys_ok(self) -> torch.Tensor | None:
        """(batch, visual keys) bool, False on padding; None if all are real."""
        return None if self._visual_keys is None else self._real(self._visual_keys)

    def _real(self, positions: torch.Tensor) -> torch.Tensor | None:
        real = None
        if self._padding is not None:
            real = self._padding.gather(1, positions.clamp(min=0))
        if not self._is_padded:
            return real
        inside = positions >= 0
        if real is None:
            return None if bool(inside.all()) else inside
        return real & inside

    @cached_property
    def text_is_causal(self) -> bool:
        """Whether text over text is plain causal attention: no padding, nothing cached."""
        is_plain = self.text_keys_ok is None and self._segments is None
        return self.past == 0 and self.text.length > 1 and is_plain

    @cached_property
    def text_mask(self) -> torch.Tensor | None:
        """(batch, 1, text, text keys) bool for text over text; None if causal or all allowed."""
        if self.text_is_causal:
            return None
        own = self.past_text
        return self._reads(self._text_keys, self.text_keys_ok, own)

    @cached_property
    def reading_mask(self) -> torch.Tensor | None:
        """(batch, 1, text, visual + text keys) bool for reading heads, visual keys first.

        None if everything is allowed; equal to ``text_mask`` if nothing visual is cached.
        """
        if self._visual_keys is None:
            return self.text_mask if not self.text_is_causal else self._causal()
        visual = self._reads(self._visual_keys, self.visual_keys_ok, None)
        text = self._causal() if self.text_is_causal else self.text_mask
        if visual is None and text is None:
            return None
        sizes = (self._visual_keys.shape[1], self._text_keys.shape[1])
        parts = [
            self._all(size) if part is None else part
            for part, size in zip((visual, text), sizes, strict=True)
        ]
        batch = max(part.shape[0] for part in parts)
        return torch.cat([part.expand(batch, -1, -1, -1) for part in parts], dim=-1)

    def _causal(self) -> torch.Tensor:
        size = self.text.length
        ones = torch.ones(size, size, dtype=torch.bool, device=self.text.index.device)
        return ones.tril()[None, None]

    def _all(self, size: int) -> torch.Tensor:
        device = self.text.index.device
        return torch.ones(1, 1, self.text.length, size, dtype=torch.bool, device=device)

    def _reads(
        self, keys: torch.Tensor, real: torch.Tensor | None, own: int | None
    ) -> torch.Tensor | None:
        """Mask of text queries over ``keys``; ``own`` is where their own keys start (text only)."""
        if self.text.length == 1 and self.visual is None:  # a decode step: every key is earlier
            return None if real is None else real[:, None, None, :]
        queries = self._absolute(self.text)
        if real is None and self.text.shared and self._segments is None:
            queries, keys = queries[:1], keys[:1]
        allowed = (keys[:, None, :] <= queries[:, :, None]) & self._together(queries, keys)
        if real is not None:
            allowed = allowed & real[:, None, :]
        if own is not None:  # padding attends to itself to stay finite
            diagonal = torch.arange(self.text.length, device=keys.device)
            allowed[:, diagonal, own + diagonal] = True
        return allowed[:, None]

    @cached_property
    def _seen(self) -> tuple[TokenLayout, torch.Tensor]:
        """The layout and the positions of all visual keys, for a forward with visual queries."""
        if self.layout is None or self._visual_keys is None:
            raise ValueError("this forward has no visual tokens")
        return self.layout, self._visual_keys

    def visual_blocks(self, radius: int | None) -> list[VisualBlock]:
        """Blocks of the visual self-attention at this radius, computed once per forward."""
        if radius not in self._blocks:
            cuts = self._cuts(radius)
            is_causal = radius is None and not self._bidirectional
            if is_causal and len(cuts) > 1 and self._rows_agree and not self.past:
                self._blocks[radius] = [self._prefix(cut) for cut in cuts]
            else:
                self._blocks[radius] = [self._block(cut, radius) for cut in cuts]
        return self._blocks[radius]

    @cached_property
    def sequence(self) -> torch.Tensor:
        """(keys,) int64: prompt order of the cached keys, up to the last visual token.

        Visual keys are cached first. In prompt order a causal block's keys are a prefix: no copy.
        """
        visual = self._seen[0].visual.index[0]
        stop = int(self._rank(visual[-1:])) + 1
        return self._places.argsort()[:stop]

    @cached_property
    def _places(self) -> torch.Tensor:
        """(keys,) int64: positions of all tokens of the first row, visual ones first."""
        layout, _ = self._seen
        return torch.cat([layout.visual.index[0], layout.text.index[0]])

    def _rank(self, places: torch.Tensor) -> torch.Tensor:
        """How many tokens are before some; a reduction leaves gaps between positions."""
        return torch.searchsorted(self._places.sort().values, places.contiguous())

    def _prefix(self, cut: Block) -> VisualBlock:
        layout, _ = self._seen
        places = self._rank(layout.visual.index[:1, cut.start : cut.stop])
        stop = int(places[0, -1]) + 1
        mask = torch.arange(stop, device=places.device) <= places[..., None]
        return VisualBlock(cut.start, cut.stop, 0, stop, 0, mask[:, None], in_sequence=True)

    def _cuts(self, radius: int | None) -> list[Block]:
        layout, _ = self._seen
        tokens = TOKENS_PER_LARGE_BLOCK if self.kernel.in_few_calls else None
        if layout.has_uniform_grids:
            return list(row_blocks(layout.grids[0], radius, self._bidirectional, tokens))
        return list(shared_blocks(layout.grids, radius, self._bidirectional, tokens))

    @cached_property
    def _cells(self) -> torch.Tensor:
        return self._seen[0].coordinates()

    def _together(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | bool:
        """(rows, queries, keys) bool: whether both positions belong to the same sample."""
        if self._segments is None:
            return True
        of_queries, of_keys = (
            self._segments.gather(1, each.clamp(min=0)) for each in (queries, keys)
        )
        return of_queries[:, :, None] == of_keys[:, None, :]

    @cached_property
    def _rows_agree(self) -> bool:
        layout, _ = self._seen
        shared = layout.text.shared and layout.visual.shared and layout.has_uniform_grids
        is_plain = self.text_keys_ok is None and self.visual_keys_ok is None
        return shared and is_plain and self._segments is None

    def _block(self, cut: Block, radius: int | None) -> VisualBlock:
        layout, visual_keys = self._seen
        rows = slice(0, 1) if self._rows_agree else slice(None)
        queries = self._absolute(layout.visual)[rows, cut.start : cut.stop]
        text_keys = self._text_keys[rows]
        before = text_keys[:, None, :] < queries[:, :, None]  # (rows, queries, text keys)
        before = before & self._together(queries, text_keys)
        if self.text_keys_ok is not None:
            before = before & self.text_keys_ok[rows, None, :]
        used = before.any(dim=0).any(dim=0)
        places = torch.arange(1, len(used) + 1, device=used.device)
        num_text = int((used * places).max()) if len(used) else 0
        near = self._near(cut, radius, rows)
        if self._segments is not None:
            near = near & self._together(queries, visual_keys[:, cut.key_start : cut.key_stop])
        key_start = self.past_visual + cut.key_start
        if radius is None and self.past_visual:  # images of earlier turns
            key_start = 0
            earlier = self._earlier(rows, near.shape[1])
            near = torch.cat([earlier.expand(near.shape[0], -1, -1), near], dim=-1)
        mask = torch.cat([near, before[:, :, :num_text].expand(near.shape[0], -1, -1)], dim=-1)
        return VisualBlock(
            cut.start,
            cut.stop,
            key_start,
            self.past_visual + cut.key_stop,
            num_text,
            None if bool(mask.all()) else mask[:, None],
        )

    def _near(self, cut: Block, radius: int | None, rows: slice) -> torch.Tensor:
        """(rows, queries, keys) bool: real neighbors, later ones if bidirectional, self always."""
        queries = self._cells[rows, cut.start : cut.stop, None]
        keys = self._cells[rows, None, cut.key_start : cut.key_stop]
        same_image = queries[..., 0] == keys[..., 0]
        device = queries.device
        query_place = torch.arange(cut.start, cut.stop, device=device)[:, None]
        key_place = torch.arange(cut.key_start, cut.key_stop, device=device)[None]
        allowed = (key_place <= query_place).expand(same_image.shape)
        if self._bidirectional:
            allowed = allowed | same_image
        if radius is not None:
            distance = (queries[..., 1:] - keys[..., 1:]).abs().amax(dim=-1)
            allowed = allowed & same_image & (distance <= radius)
        if self.visual_keys_ok is not None:
            place = slice(self.past_visual + cut.key_start, self.past_visual + cut.key_stop)
            allowed = allowed & self.visual_keys_ok[rows, None, place]
        return allowed | (query_place == key_place)

    def _earlier(self, rows: slice, num_queries: int) -> torch.Tensor:
        keys = self._seen[1][rows, : self.past_visual]
        real = (
            keys >= 0 if self.visual_keys_ok is None else self.visual_keys_ok[rows, : keys.shape[1]]
        )
        return real[:, None, :].expand(-1, num_queries, -1)
