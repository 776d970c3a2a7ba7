"""Hooks that watch a dense model read images, without ever forming its attention matrix.

The model keeps its fast attention kernel; beside it, queries are scored against the keys in
chunks, in float32, and only sums survive. Everything that is switched on here is switched off when
the ``with`` block ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from yopo.calibration.statistics import MAX_DISTANCE
from yopo.errors import DataError
from yopo.families.family import Family
from yopo.grid import Grid
from yopo.layout import LayoutProbe, TokenLayout
from yopo.plan import ModelShape

IMPLEMENTATION = "yopo_observe"

QUERIES = ("text", "all", "last")
"""Which queries head activity sums over: text behind the image, all, or the last prompt token."""

CHUNK = 64
"""Queries scored at once: (batch, heads, 64, keys) float32 is the largest thing formed."""


class Observer:
    """Running sums of one calibration pass (see ``Statistics`` for what they mean).

    Args:
        shape: The decoder's dimensions.
        queries: One of ``QUERIES``.
        probe: Tells the layout of the forward in progress.
    """

    def __init__(self, shape: ModelShape, queries: str, probe: LayoutProbe):
        layers, double = shape.layers, torch.float64
        self.shape, self.queries, self.probe = shape, queries, probe
        self.rho: list[torch.Tensor] = []
        self.neuron_square = torch.zeros(layers, shape.ffn, dtype=double)
        self.neuron_sum = torch.zeros(layers, shape.ffn, dtype=double)
        self.head_sum = torch.zeros(layers, shape.heads * shape.head_dim, dtype=double)
        self.cross_modal_sum = torch.zeros(layers, dtype=double)
        self.locality_sum = torch.zeros(layers, MAX_DISTANCE + 2, dtype=double)
        self.visual_tokens = 0
        self.text_queries = 0
        self.text_tokens = 0
        self.text_before = 0
        self.grids: Counter[tuple[Grid, ...]] = Counter()
        self._rho_of_batch: list[torch.Tensor] = []
        self._batch: BatchView | None = None

    def begin(self, attention_mask: torch.Tensor) -> None:
        """Announce a batch: (batch, sequence) mask, 0 on padding."""
        self._rho_of_batch = []
        self._batch = None
        self._real = attention_mask.bool()

    def finish(self) -> None:
        """Take the batch's sums over."""
        view = self._batch
        self.rho.append(torch.stack(self._rho_of_batch, dim=1))  # (batch, layers, heads)
        self.visual_tokens += view.num_visual
        self.text_queries += view.num_behind
        self.text_tokens += int(self._real.sum()) - view.num_visual
        self.text_before += view.num_before
        self.grids.update(view.layout.grids)

    def view(self) -> BatchView:
        """The batch in progress."""
        if self._batch is None:
            self._batch = BatchView(self.probe.layout, self._real, self.queries)
        return self._batch

    def on_attention(self, module: nn.Module, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Score queries (batch, heads, sequence, head_dim) against keys of all KV heads."""
        view, layer = self.view(), module.layer_idx
        masses = torch.zeros(queries.shape[0], self.shape.heads, 2, device=queries.device)
        cross_modal = torch.zeros((), device=queries.device)
        for chunk in view.text_chunks:
            weights = _softmax(module, queries, keys, chunk.positions, view.allowed(chunk))
            mass = weights @ view.kinds[:, None]  # (batch, heads, queries, 2)
            masses += (mass * chunk.counted[:, None, :, None]).sum(dim=2)
            cross_modal += (mass[..., 0].mean(dim=1) * chunk.behind).sum()
        locality = torch.zeros(MAX_DISTANCE + 2, device=queries.device)
        for chunk in view.visual_chunks:
            weights = _softmax(module, queries, keys, chunk.positions, view.allowed(chunk))
            if self.queries == "all":
                mass = weights @ view.kinds[:, None]
                masses += (mass * chunk.counted[:, None, :, None]).sum(dim=2)
            locality += view.by_distance(chunk, weights.mean(dim=1))
        self._rho_of_batch.append((masses[..., 0] / masses[..., 1]).cpu())
        self.cross_modal_sum[layer] += cross_modal.double().cpu()
        self.locality_sum[layer] += locality.double().cpu()

    def on_heads(self, layer: int, outputs: torch.Tensor) -> None:
        """Add attention outputs (batch, sequence, heads * head_dim) of visual tokens."""
        for row, positions in enumerate(self.view().visual_positions):
            picked = outputs[row].index_select(0, positions)
            self.head_sum[layer] += picked.sum(dim=0, dtype=torch.float32).double().cpu()

    def on_neurons(self, layer: int, activations: torch.Tensor) -> None:
        """Add FFN activations (batch, sequence, neurons) of visual tokens."""
        for row, positions in enumerate(self.view().visual_positions):
            picked = activations[row].index_select(0, positions)
            norm = torch.linalg.vector_norm(picked, dim=0, dtype=torch.float32)
            self.neuron_square[layer] += norm.double().square().cpu()
            self.neuron_sum[layer] += picked.sum(dim=0, dtype=torch.float32).double().cpu()


class Chunk:
    """Some queries of a batch.

    Attributes:
        positions: (batch, queries) int64 positions in the sequence.
        counted: (batch, queries) float32, 1 where head activity counts the query.
        behind: (batch, queries) float32, 1 on real text behind the first image.
        span: Where the chunk lies along its stream.
    """

    def __init__(
        self, positions: torch.Tensor, counted: torch.Tensor, behind: torch.Tensor, span: slice
    ):
        self.positions, self.span = positions[:, span], span
        self.counted, self.behind = counted[:, span].float(), behind[:, span].float()


class BatchView:
    """Positions and masks of one batch, shared by all layers.

    Attributes:
        kinds: (batch, sequence, 2) float32, one-hot of (visual, text): attention weights times
            this are a query's visual and text mass.
    """

    def __init__(self, layout: TokenLayout, real: torch.Tensor, queries: str):
        self.layout, self._real = layout, real
        text, visual = layout.text, layout.visual
        batch, length = real.shape
        self.visual_positions = [
            visual.index[row] if visual.mask is None else visual.index[row][visual.mask[row]]
            for row in range(batch)
        ]
        is_visual = torch.zeros(batch, length, device=real.device)
        for row, positions in enumerate(self.visual_positions):
            is_visual[row, positions] = 1.0
        self.kinds = torch.stack([is_visual, 1.0 - is_visual], dim=-1)
        first_visual = torch.stack([positions[0] for positions in self.visual_positions])
        is_text = real.gather(1, text.index)
        if text.mask is not None:
            is_text = is_text & text.mask
        behind = is_text & (text.index > first_visual[:, None])
        last = text.index == torch.where(real, torch.arange(length, device=real.device), -1).amax(
            dim=1, keepdim=True
        )
        counted = {"text": behind, "all": is_text, "last": is_text & last}[queries]
        is_real_visual = torch.ones_like(visual.index, dtype=torch.bool)
        if visual.mask is not None:
            is_real_visual = visual.mask
        self.num_visual = int(is_real_visual.sum())
        self.num_behind, self.num_before = int(behind.sum()), int((is_text & ~behind).sum())
        if not bool(counted.any(dim=1).all()):
            raise DataError("A prompt has no text behind its image: nothing reads the image.")
        wanted = (counted | behind).any(dim=0)
        self.text_chunks = [
            Chunk(text.index, counted, behind, span)
            for span in _spans(text.length)
            if bool(wanted[span].any())
        ]
        nothing = torch.zeros_like(is_real_visual)
        self.visual_chunks = [
            Chunk(visual.index, is_real_visual, nothing, span) for span in _spans(visual.length)
        ]
        self._cells = layout.coordinates()

    def allowed(self, chunk: Chunk) -> torch.Tensor:
        """(batch, 1, queries, keys) bool: real keys that are not later than the query."""
        place = torch.arange(self._real.shape[1], device=self._real.device)
        not_later = place[None, None, :] <= chunk.positions[:, :, None]
        own = place[None, None, :] == chunk.positions[:, :, None]
        return ((not_later & self._real[:, None, :]) | own)[:, None]

    def by_distance(self, chunk: Chunk, weights: torch.Tensor) -> torch.Tensor:
        """Sum visual-to-visual attention (batch, queries, keys) per Chebyshev distance.

        Returns:
            (MAX_DISTANCE + 2,) float32; the last entry is other images.
        """
        keys = self.layout.visual.index[:, None, :].expand(-1, weights.shape[1], -1)
        mass = weights.gather(2, keys)
        queries, others = self._cells[:, chunk.span, None], self._cells[:, None]
        distance = (queries[..., 1:] - others[..., 1:]).abs().amax(dim=-1).clamp(max=MAX_DISTANCE)
        distance = distance.masked_fill(queries[..., 0] != others[..., 0], MAX_DISTANCE + 1)
        real = (queries[..., 0] >= 0) & (others[..., 0] >= 0)
        mass = (mass * real).flatten()
        return torch.bincount(distance.flatten(), weights=mass, minlength=MAX_DISTANCE + 2)


def _spans(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


def _softmax(
    module: nn.Module,
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    allowed: torch.Tensor,
) -> torch.Tensor:
    """Attention weights (batch, heads, chosen queries, keys) in float32."""
    batch, heads, _, head_dim = queries.shape
    place = positions[:, None, :, None].expand(-1, heads, -1, head_dim)
    chosen = queries.gather(2, place).float() * module.scaling
    grouped = chosen.reshape(batch, keys.shape[1], -1, head_dim)
    scores = grouped @ keys.float().transpose(-1, -2)
    scores = scores.reshape(batch, heads, positions.shape[1], -1)
    return scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)


def _observing_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    observer: Observer | None = getattr(module, "_yopo_observer", None)
    if observer is not None and observer.probe.layout is not None:
        observer.on_attention(module, query, key)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def observing(
    model: PreTrainedModel,
    shape: ModelShape,
    family: Family,
    queries: str = "text",
) -> Iterator[Observer]:
    """Observe every forward of a dense model inside a ``with`` block.

    Args:
        model: A multimodal model in memory.
        shape: Its decoder's dimensions.
        family: Its family: where images are, and what the decoder's modules are called.
        queries: One of ``QUERIES``.

    Yields:
        The observer; call ``begin`` before and ``finish`` behind every forward.
    """
    decoder = model.get_decoder()
    AttentionInterface.register(IMPLEMENTATION, _observing_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    with ExitStack() as stack:
        names = family.backbone(model.config)
        probe = LayoutProbe(model.base_model, family.grids_of, family.token_ids(model.config))
        stack.callback(probe.remove)
        observer = Observer(shape, queries, probe)
        before = decoder.config._attn_implementation
        stack.callback(decoder.set_attn_implementation, before)
        decoder.set_attn_implementation(IMPLEMENTATION)
        for layer, block in enumerate(decoder.layers):
            block.self_attn._yopo_observer = observer
            stack.callback(delattr, block.self_attn, "_yopo_observer")
            for module, hook in (
                (getattr(block.self_attn, names.output), observer.on_heads),
                (getattr(block.mlp, names.down), observer.on_neurons),
            ):
                handle = module.register_forward_pre_hook(_input_hook(layer, hook, probe))
                stack.callback(handle.remove)
        yield observer


def _input_hook(layer: int, hook, probe: LayoutProbe):
    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if probe.layout is not None:
            hook(layer, args[0])

    return before
