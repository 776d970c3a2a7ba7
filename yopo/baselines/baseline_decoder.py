"""The decoder of baselines: stock layers, called in a custom loop over a custom cache."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from yopo.baselines.baseline_cache import Record, adopt
from yopo.baselines.forward import BaselineState, Run
from yopo.models.streams import TokenLayout
from yopo.runtime.inputs import refuse_captures, refuse_window
from yopo.support.errors import ModelError


class BaselineDecoder:
    """Forward of a text decoder under a baseline; mixed into the decoder's own class.

    Expects ``self.baseline``, a :class:`BaselineState`.
    """

    runs_alone = True  # the method's hooks hold the state of one forward (see ``models.turns``)

    baseline: BaselineState
    config: PreTrainedConfig
    layers: nn.ModuleList
    embed_tokens: nn.Module
    rotary_emb: nn.Module
    norm: nn.Module

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Run all layers; arguments as in the stock decoder.

        Returns:
            ``last_hidden_state`` (batch, sequence, hidden), zero at visual tokens that are gone
            before the last layer, and the cache.

        Raises:
            ModelError: The batch, cache, mask or attention implementation is not supported.
        """
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        keep = bool(use_cache) or past_key_values is not None
        cache = DynamicCache() if past_key_values is None else past_key_values
        held = adopt(cache, len(self.layers), self.baseline)
        record = held[0].record
        batch, length, _ = embeds.shape
        if position_ids is None:
            place = torch.arange(length, device=embeds.device) + record.length
            position_ids = place.expand(batch, -1)
        layout, total = self.baseline.probe.layout, record.length + length
        _check_config(self.config, kwargs, total)
        _check_layout(layout, record)
        real = _padding(attention_mask, batch, total)
        run = Run(self, self.baseline, cache, held, layout, real)
        record.is_open = True
        try:
            hidden = run(embeds, position_ids, self.baseline.names.added_features(kwargs))
        finally:
            record.is_open = False
            self.baseline.hooks.leave()
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=cache if keep else None
        )


def _check_config(config: PreTrainedConfig, kwargs: dict[str, object], length: int) -> None:
    refuse_captures(config, kwargs, "A baseline")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ModelError(
            f"A baseline needs sdpa or eager attention, found {config._attn_implementation}.",
            remedy="Load the model with attn_implementation='sdpa'.",
        )
    refuse_window(config, length, "a baseline")


def _check_layout(layout: TokenLayout | None, record: Record) -> None:
    if layout is None:
        return
    if record.length:
        raise ModelError(
            "A baseline takes images only in the first turn.",
            remedy="Prefill the whole conversation at once.",
        )
    if layout.visual.mask is not None:
        raise ModelError(
            "A baseline needs the same number of visual tokens in all rows of a batch.",
            remedy="Use batches of one prompt.",
        )


def _padding(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """(batch, length) bool, False on padding; None: no padding."""
    if mask is None:
        return None
    if tuple(mask.shape) != (batch, length):
        raise ModelError(
            f"A baseline takes an attention mask of shape {(batch, length)}, "
            f"found {tuple(mask.shape)}."
        )
    mask = mask.bool()
    return None if bool(mask.all()) else mask
