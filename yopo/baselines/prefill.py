"""The information that a method receives while prompts are prefilled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from yopo.baselines.token_stream import TokenStream
from yopo.models.family import Backbone
from yopo.models.streams import TokenLayout


class Decoder(Protocol):
    """The parts of a stock text decoder that baselines call.

    Attributes:
        config: The text configuration.
        layers: Decoder layers.
        embed_tokens, rotary_emb, norm: Token embedding, rotary embedding and final norm.
    """

    config: PreTrainedConfig
    layers: nn.ModuleList
    embed_tokens: nn.Module
    rotary_emb: nn.Module
    norm: nn.Module


@dataclass(frozen=True)
class Prompt:
    """The prompts of one batch.

    Attributes:
        layout: Where text and visual tokens are; all rows hold the same number of both, padding
            included.
        ends: (batch,) int64, position of each prompt's last token; an answer may follow.
        real: (batch, sequence) bool, False on padding; None: no padding.
    """

    layout: TokenLayout
    ends: torch.Tensor
    real: torch.Tensor | None

    @property
    def lengths(self) -> torch.Tensor:
        """(batch,) int64, number of each prompt's tokens, without padding and answer."""
        if self.real is None:
            return self.ends + 1
        place = torch.arange(self.real.shape[1], device=self.ends.device)
        return (self.real & (place <= self.ends[:, None])).sum(dim=1)


@dataclass(frozen=True)
class FinishedLayer:
    """A layer that has just run, after which tokens may be dropped.

    Attributes:
        module: The stock decoder layer.
        names: Names of its modules.
        entered: Its input stream, of the same tokens as its output.
        keys: (batch, kv_heads, length, head_dim), its keys of these tokens, RoPE applied.
    """

    module: nn.Module
    names: Backbone
    entered: TokenStream
    keys: torch.Tensor


@dataclass(frozen=True)
class Between:
    """A place between two layers of a prefill.

    Attributes:
        number: The layer that comes next.
        prompt: The prompts that are prefilled.
        stream: That layer's input, unless tokens are dropped here.
        previous: The layer before it; None before the first layer.
    """

    number: int
    prompt: Prompt
    stream: TokenStream
    previous: FinishedLayer | None

    @property
    def num_visual(self) -> int:
        """Remaining visual tokens per row."""
        return self.stream.visual.shape[1]

    @property
    def ends(self) -> torch.Tensor:
        """(batch,) int64, where in the stream each prompt's last token is."""
        return torch.searchsorted(self.stream.places, self.prompt.ends[:, None].contiguous())[:, 0]

    @property
    def real(self) -> torch.Tensor | None:
        """(batch, length) bool, False on the stream's padding; None: no padding."""
        real = self.prompt.real
        return None if real is None else real.gather(1, self.stream.places)
