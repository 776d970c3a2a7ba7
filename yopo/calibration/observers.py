"""Hooks that observe a dense model reading images, without forming its attention matrix.

The model keeps its fast attention kernel; in addition, queries are scored against the keys in
chunks, in float32, and only sums are kept. Everything that is switched on here is switched off when
the ``with`` block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from yopo.calibration.batch_view import BatchView
from yopo.calibration.inner_text import InnerText
from yopo.calibration.running import Running
from yopo.calibration.statistics import MAX_DISTANCE, refuse_not_finite
from yopo.models.family import Backbone, Family
from yopo.models.layout import LayoutProbe
from yopo.models.shortened import Shortened, shorten
from yopo.plans.schema import ModelShape
from yopo.reduction.method import Method

if TYPE_CHECKING:
    from yopo.models.stock import StockAttention

IMPLEMENTATION = "yopo_observe"

QUERIES = ("text", "all", "last")
"""Queries that head activity sums over: text after the image, all, or the last prompt token."""


_FLOAT_BYTES = 8 << 20
"""Bytes of weights or activations that are converted to float32 at a time."""


class Observer(Running):
    """Adds what a forward shows to running sums.

    Args:
        shape: The decoder's dimensions.
        queries: One of ``QUERIES``.
        probe: Provides the layout of the forward in progress.
        output: Name of the output projection under ``self_attn``.
    """

    def __init__(self, shape: ModelShape, queries: str, probe: LayoutProbe, output: str):
        super().__init__(shape)
        self.queries, self.probe = queries, probe
        self._output = output
        self._rho_of_batch: list[torch.Tensor] = []
        self._batch: BatchView | None = None
        self._shortened: Shortened | None = None

    def begin(self, attention_mask: torch.Tensor) -> None:
        """Announce a batch: (batch, sequence) mask, 0 on padding."""
        self._rho_of_batch = []
        self._batch = self._shortened = None
        self._real = attention_mask.bool()

    def shorten(self, shortened: Shortened) -> None:
        """Announce that the layers of this batch get fewer visual tokens."""
        self._shortened, self._real = shortened, shortened.mask.bool()

    def finish(self) -> None:
        """Add the batch's sums.

        Raises:
            DataError: They are not finite.
        """
        self.rho.append(torch.stack(self._rho_of_batch, dim=1))  # (batch, layers, heads)
        view = self.view()
        self.visual_tokens += view.num_visual
        self.text_queries += view.num_after
        self.text_tokens += int(self._real.sum()) - view.num_visual
        self.text_before += view.num_before
        whole = view.layout if self._shortened is None else self._shortened.whole
        self.grids.update(whole.grids)
        for grids, positions in zip(whole.grids, whole.visual.by_row(), strict=True):
            known = self.inner_text.get(grids, InnerText.nowhere(grids))
            self.inner_text[grids] = known.plus(grids, positions)
        refuse_not_finite([*self.sums.values(), self.rho[-1].transpose(0, 1)])

    def take(self) -> Running:
        """The sums since the last time, which begin anew."""
        taken = Running(self.shape)
        empty = Running(self.shape)
        for name in vars(empty):
            setattr(taken, name, getattr(self, name))
            setattr(self, name, getattr(empty, name))
        return taken

    def view(self) -> BatchView:
        """The batch in progress."""
        if self._batch is None:
            layout = self.probe.layout
            if layout is None:
                raise ValueError("no forward with visual tokens is in progress")
            cells = None if self._shortened is None else self._shortened.cells
            self._batch = BatchView(layout, self._real, self.queries, cells)
        return self._batch

    def on_attention(
        self,
        module: StockAttention,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Score queries (batch, heads, sequence, head_dim) against keys of all KV heads."""
        view, layer = self.view(), module.layer_idx
        masses = torch.zeros(queries.shape[0], self.shape.heads, 2, device=queries.device)
        cross_modal = torch.zeros((), device=queries.device)
        gram = self._gram(module)
        for chunk in view.text_chunks:
            weights = _softmax(module, queries, keys, chunk.positions, view.allowed(chunk))
            mass = weights @ view.kinds[:, None].to(weights.dtype)  # (batch, heads, queries, 2)
            masses += (mass * chunk.counted[:, None, :, None]).sum(dim=2)
            cross_modal += (mass[..., 0].mean(dim=1) * chunk.after).sum()
            effect = _reading_effect(weights, mass, values, view.kinds, gram)
            self.sums["head_effect_sum"][layer] += (
                (effect * chunk.after[:, None]).sum((0, 2)).double().cpu()
            )
        locality = torch.zeros(MAX_DISTANCE + 2, device=queries.device)
        for chunk in view.visual_chunks:
            weights = _softmax(module, queries, keys, chunk.positions, view.allowed(chunk))
            if self.queries == "all":
                mass = weights @ view.kinds[:, None].to(weights.dtype)
                masses += (mass * chunk.counted[:, None, :, None]).sum(dim=2)
            locality += view.by_distance(chunk, weights.mean(dim=1))
        self._rho_of_batch.append((masses[..., 0] / masses[..., 1]).cpu())
        for row, positions in enumerate(view.visual_positions):
            some = keys[row].index_select(1, positions).float()
            self.sums["key_square_sum"][layer] += some.square().sum(dim=1).double().cpu()
        self.sums["cross_modal_sum"][layer] += cross_modal.double().cpu()
        self.sums["locality_sum"][layer] += locality.double().cpu()

    def on_input(self, layer: int, hidden: torch.Tensor) -> None:
        """Add squared norms of a layer's input (batch, sequence, hidden) at reading queries."""
        for chunk in self.view().text_chunks:
            place = chunk.positions[..., None].expand(-1, -1, hidden.shape[-1])
            norms = hidden.gather(1, place).float().square().sum(dim=-1)
            self.sums["text_norm_sum"][layer] += (norms * chunk.after).sum().double().cpu()

    def _gram(self, module: StockAttention) -> torch.Tensor:
        """(heads, head_dim, head_dim) float32: W_o^T W_o of every head.

        Recomputed for every batch: this is 1-2 % of a layer's work on a single prompt, while
        keeping all layers' matrices would need as much memory as a whole forward.
        """
        weight = getattr(module, self._output).weight.detach()
        by_head = weight.unflatten(1, (self.shape.heads, self.shape.head_dim)).transpose(0, 1)
        few = max(1, _FLOAT_BYTES // (4 * weight.shape[0] * self.shape.head_dim))
        parts = (part.float() for part in by_head.split(few))  # (few heads, hidden, head_dim)
        return torch.cat([part.transpose(1, 2) @ part for part in parts])

    def on_heads(self, layer: int, outputs: torch.Tensor) -> None:
        """Add attention outputs (batch, sequence, heads * head_dim) of visual tokens."""
        for row, positions in enumerate(self.view().visual_positions):
            picked = outputs[row].index_select(0, positions)
            total = picked.sum(dim=0, dtype=torch.float32).double().cpu()
            self.sums["head_sum"][layer] += total.unflatten(0, (self.shape.heads, -1))

    def on_neurons(self, layer: int, activations: torch.Tensor) -> None:
        """Add FFN activations (batch, sequence, neurons) of visual tokens."""
        few = max(1, _FLOAT_BYTES // (4 * activations.shape[-1]))
        for row, positions in enumerate(self.view().visual_positions):
            norms, sums = [], []
            for part in positions.split(few):
                picked = activations[row].index_select(0, part)
                precise = torch.promote_types(picked.dtype, torch.float32)
                norms.append(torch.linalg.vector_norm(picked, dim=0, dtype=precise))
                sums.append(picked.sum(dim=0, dtype=torch.float32))
            self.sums["neuron_square"][layer] += (
                torch.stack(norms).cpu().double().square().sum(dim=0)
            )
            self.sums["neuron_sum"][layer] += torch.stack(sums).cpu().double().sum(dim=0)


def _softmax(
    module: StockAttention,
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    allowed: torch.Tensor,
) -> torch.Tensor:
    """Attention weights (batch, heads, chosen queries, keys), at least in float32."""
    batch, heads, _, head_dim = queries.shape
    place = positions[:, None, :, None].expand(-1, heads, -1, head_dim)
    precise = torch.promote_types(queries.dtype, torch.float32)
    chosen = queries.gather(2, place).to(precise) * module.scaling
    grouped = chosen.reshape(batch, keys.shape[1], -1, head_dim)
    scores = grouped @ keys.to(precise).transpose(-1, -2)
    scores = scores.reshape(batch, heads, positions.shape[1], -1)
    return scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)


def _reading_effect(
    weights: torch.Tensor,
    mass: torch.Tensor,
    values: torch.Tensor,
    kinds: torch.Tensor,
    gram: torch.Tensor,
) -> torch.Tensor:
    """Squared output change when a head's visual keys are hidden from it.

    Args:
        weights: (batch, heads, queries, keys) attention.
        mass: (batch, heads, queries, 2) visual and text mass.
        values: (batch, kv_heads, keys, head_dim).
        kinds: (batch, keys, 2) one-hot of (visual, text).
        gram: (heads, head_dim, head_dim) of the output projection.

    Returns:
        (batch, heads, queries) float32.
    """
    batch, heads, queries, _ = weights.shape
    values, gram = values.to(weights.dtype), gram.to(weights.dtype)

    def mix(chosen: torch.Tensor) -> torch.Tensor:
        grouped = chosen.reshape(batch, values.shape[1], -1, chosen.shape[-1])
        return (grouped @ values).reshape(batch, heads, queries, -1)

    text_only = mix(weights * kinds[:, None, None, :, 1]) / mass[..., 1:].clamp(min=1e-12)
    change = mix(weights) - text_only
    return ((change @ gram) * change).sum(dim=-1)


def _observing_attention(
    module: StockAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    observer: Observer | None = getattr(module, "_yopo_observer", None)
    if observer is not None and observer.probe.layout is not None:
        observer.on_attention(module, query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def observing(
    model: PreTrainedModel,
    shape: ModelShape,
    family: Family,
    queries: str = "text",
    reduction: Method | None = None,
) -> Iterator[Observer]:
    """Observe every forward of a dense model inside a ``with`` block.

    Args:
        model: A multimodal model in memory.
        shape: Its decoder's dimensions.
        family: Its family: where images are, and what the decoder's modules are called.
        queries: One of ``QUERIES``.
        reduction: Drops visual tokens before the first layer; None: all are observed.

    Yields:
        The observer; call ``begin`` before and ``finish`` after every forward.
    """
    decoder = model.get_decoder()
    AttentionInterface.register(IMPLEMENTATION, _observing_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    with ExitStack() as stack:
        names = family.backbone(model.config)
        probe = LayoutProbe(model.base_model, family.grids_of, family.token_ids(model.config))
        stack.callback(probe.remove)
        observer = Observer(shape, queries, probe, names.output)
        before = decoder.config._attn_implementation
        stack.callback(decoder.set_attn_implementation, before)
        decoder.set_attn_implementation(IMPLEMENTATION)
        for layer, block in enumerate(decoder.layers):
            block.self_attn._yopo_observer = observer
            stack.callback(delattr, block.self_attn, "_yopo_observer")
            for module, hook in (
                (block, observer.on_input),
                (getattr(block.self_attn, names.output), observer.on_heads),
                (getattr(block.mlp, names.down), observer.on_neurons),
            ):
                handle = module.register_forward_pre_hook(_input_hook(layer, hook, probe))
                stack.callback(handle.remove)
        if reduction is not None:
            shortening = _shortening(observer, reduction, names)
            handle = decoder.register_forward_pre_hook(shortening, with_kwargs=True)
            stack.callback(handle.remove)
        yield observer


def _shortening(
    observer: Observer, reduction: Method, names: Backbone
) -> Callable[[nn.Module, tuple, dict[str, Any]], tuple[tuple, dict[str, Any]] | None]:
    """A pre-hook of a decoder that drops tokens and tells the observer."""

    def before(
        module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        shortened = shorten(reduction, observer.probe, names, kwargs)
        if shortened is None:
            return None
        observer.shorten(shortened)
        return args, shortened.arguments

    return before


def _input_hook(
    layer: int, hook: Callable[[int, torch.Tensor], None], probe: LayoutProbe
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if probe.layout is not None:
            hook(layer, args[0])

    return before
