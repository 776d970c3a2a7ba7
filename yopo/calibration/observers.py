"""Hooks that observe a dense model reading images, without forming its attention matrix.

The model keeps its fast attention kernel; in addition, queries are scored against the keys in
chunks, in float32, and only sums are kept. Everything that is switched on here is switched off when
the ``with`` block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from yopo.calibration.batch_view import BatchView
from yopo.calibration.inner_text import InnerText
from yopo.calibration.reading import reading_effect, softmax
from yopo.calibration.running import Running
from yopo.calibration.statistics import MAX_DISTANCE, refuse_not_finite
from yopo.models.family import Backbone, Family
from yopo.models.layout import LayoutProbe
from yopo.models.shortened import Shortened, shorten
from yopo.models.tower_attention import attention_path
from yopo.plans.schema import ModelShape
from yopo.reduction.method import Method
from yopo.support.context import PerContext

if TYPE_CHECKING:
    from yopo.models.stock import StockAttention

IMPLEMENTATION = "yopo_observe"

QUERIES = ("text", "all", "last")
"""Queries that head activity sums over: text after the image, all, or the last prompt token."""


_FLOAT_BYTES = 8 << 20
"""Bytes of weights or activations that are converted to float32 at a time."""


@dataclass
class _Seen:
    """What an observer has seen of one batch.

    Attributes:
        real: (batch, sequence) bool, False on padding.
        part: Its sums.
        rho: (batch, heads) head activity of the layers so far.
        views: The batch in the form that sums need, by device.
        shortened: How its visual tokens got fewer; None: all are there.
    """

    real: torch.Tensor
    part: Running
    rho: list[torch.Tensor] = field(default_factory=list)
    views: dict[torch.device, BatchView] = field(default_factory=dict)
    shortened: Shortened | None = None


_SEEN: PerContext[Observer, _Seen] = PerContext("yopo_seen")


class Observer:
    """Adds up what forwards show (see ``Statistics`` for what sums mean), each call on its own.

    Args:
        shape: The decoder's dimensions.
        queries: One of ``QUERIES``.
        probe: Provides the layout of the forward in progress.
        output: Name of the output projection under ``self_attn``.
    """

    def __init__(self, shape: ModelShape, queries: str, probe: LayoutProbe, output: str):
        self.shape, self.queries, self.probe = shape, queries, probe
        self._output = output

    def begin(self, attention_mask: torch.Tensor) -> None:
        """Announce this call's batch: (batch, sequence) mask, 0 on padding."""
        _SEEN.set(self, _Seen(attention_mask.bool(), Running(self.shape)))

    def shorten(self, shortened: Shortened) -> None:
        """Announce that the layers of this batch get fewer visual tokens."""
        seen = self._seen
        seen.shortened, seen.real = shortened, shortened.mask.bool()

    @property
    def _seen(self) -> _Seen:
        """What this call has seen of its batch; others may be in progress."""
        found = _SEEN.get(self)
        assert found is not None, "begin() announces a batch"
        return found

    @property
    def _sums(self) -> dict[str, torch.Tensor]:
        return self._seen.part.sums

    def finish(self) -> Running:
        """The batch's sums.

        Raises:
            DataError: They are not finite.
        """
        seen, view = self._seen, next(iter(self._seen.views.values()))  # of any device
        part = seen.part
        part.rho.append(torch.stack(seen.rho, dim=1))  # (batch, layers, heads)
        part.visual_tokens += view.num_visual
        part.text_queries += view.num_after
        part.text_tokens += int(seen.real.sum()) - view.num_visual
        part.text_before += view.num_before
        whole = view.layout if seen.shortened is None else seen.shortened.whole
        part.grids.update(whole.grids)
        for grids, positions in zip(whole.grids, whole.visual.by_row(), strict=True):
            known = part.inner_text.get(grids, InnerText.nowhere(grids))
            part.inner_text[grids] = known.plus(grids, positions)
        refuse_not_finite([*part.sums.values(), part.rho[-1].transpose(0, 1)])
        return part

    def view(self, device: torch.device) -> BatchView:
        """The batch in progress in this call, for a layer on a device."""
        seen = self._seen
        if device not in seen.views:
            layout = self.probe.layout
            if layout is None:
                raise ValueError("no forward with visual tokens is in progress")
            cells = None if seen.shortened is None else seen.shortened.cells.to(device)
            seen.views[device] = BatchView(
                layout.to(device), seen.real.to(device), self.queries, cells
            )
        return seen.views[device]

    def on_attention(
        self,
        module: StockAttention,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Score queries (batch, heads, sequence, head_dim) against keys of all KV heads."""
        view, layer = self.view(queries.device), module.layer_idx
        masses = torch.zeros(queries.shape[0], self.shape.heads, 2, device=queries.device)
        cross_modal = torch.zeros((), device=queries.device)
        gram = self._gram(module)
        for chunk in view.text_chunks:
            weights = softmax(module, queries, keys, chunk.positions, view.allowed(chunk))
            mass = weights @ view.kinds[:, None].to(weights.dtype)  # (batch, heads, queries, 2)
            masses += (mass * chunk.counted[:, None, :, None]).sum(dim=2)
            cross_modal += (mass[..., 0].mean(dim=1) * chunk.after).sum()
            effect = reading_effect(weights, mass, values, view.kinds, gram)
            self._sums["head_effect_sum"][layer] += (
                (effect * chunk.after[:, None]).sum((0, 2)).double().cpu()
            )
        locality = torch.zeros(MAX_DISTANCE + 2, device=queries.device)
        for chunk in view.visual_chunks:
            weights = softmax(module, queries, keys, chunk.positions, view.allowed(chunk))
            if self.queries == "all":
                mass = weights @ view.kinds[:, None].to(weights.dtype)
                masses += (mass * chunk.counted[:, None, :, None]).sum(dim=2)
            locality += view.by_distance(chunk, weights.mean(dim=1))
        self._seen.rho.append((masses[..., 0] / masses[..., 1]).cpu())
        for row, positions in enumerate(view.visual_positions):
            some = keys[row].index_select(1, positions).float()
            self._sums["key_square_sum"][layer] += some.square().sum(dim=1).double().cpu()
        self._sums["cross_modal_sum"][layer] += cross_modal.double().cpu()
        self._sums["locality_sum"][layer] += locality.double().cpu()

    def on_input(self, layer: int, hidden: torch.Tensor) -> None:
        """Add squared norms of a layer's input (batch, sequence, hidden) at reading queries."""
        for chunk in self.view(hidden.device).text_chunks:
            place = chunk.positions[..., None].expand(-1, -1, hidden.shape[-1])
            norms = hidden.gather(1, place).float().square().sum(dim=-1)
            self._sums["text_norm_sum"][layer] += (norms * chunk.after).sum().double().cpu()

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
        for row, positions in enumerate(self.view(outputs.device).visual_positions):
            picked = outputs[row].index_select(0, positions)
            total = picked.sum(dim=0, dtype=torch.float32).double().cpu()
            self._sums["head_sum"][layer] += total.unflatten(0, (self.shape.heads, -1))

    def on_neurons(self, layer: int, activations: torch.Tensor) -> None:
        """Add FFN activations (batch, sequence, neurons) of visual tokens."""
        few = max(1, _FLOAT_BYTES // (4 * activations.shape[-1]))
        for row, positions in enumerate(self.view(activations.device).visual_positions):
            norms, sums = [], []
            for part in positions.split(few):
                picked = activations[row].index_select(0, part)
                precise = torch.promote_types(picked.dtype, torch.float32)
                norms.append(torch.linalg.vector_norm(picked, dim=0, dtype=precise))
                sums.append(picked.sum(dim=0, dtype=torch.float32))
            self._sums["neuron_square"][layer] += (
                torch.stack(norms).cpu().double().square().sum(dim=0)
            )
            self._sums["neuron_sum"][layer] += torch.stack(sums).cpu().double().sum(dim=0)


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
        attention = attention_path(reduction, family, model.config)
        tokens = family.token_ids(model.config)
        probe = LayoutProbe(model.base_model, family.grids_of, tokens, attention)
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
