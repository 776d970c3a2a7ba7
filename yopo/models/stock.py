"""Type declarations for the modules of transformers' decoders. Nothing runs here.

torch types every attribute of a module as a tensor or a module, and ``get_decoder`` returns
``Any``. These are the attributes that the supported backbones share; where their names differ (see
``family.Backbone``) they are looked up by name. The classes only exist for type checking: import
them under ``TYPE_CHECKING``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Generic, TypeVar, overload

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    Item = TypeVar("Item", bound=nn.Module)

    class ModuleListOf(nn.ModuleList, Generic[Item]):
        """A module list whose items are of one class."""

        def __iter__(self) -> Iterator[Item]: ...

        @overload
        def __getitem__(self, idx: slice) -> nn.ModuleList: ...

        @overload
        def __getitem__(self, idx: int) -> Item: ...

        def __getitem__(self, idx: int | slice) -> Item | nn.ModuleList: ...

    class Projection(nn.Module):
        """A linear layer, possibly wrapped by PEFT."""

        in_features: int
        out_features: int
        weight: torch.Tensor

    class StockAttention(nn.Module):
        """``self_attn``; only Qwen3 has head norms, only Phi-3 the fused projection."""

        layer_idx: int
        head_dim: int
        num_key_value_groups: int
        scaling: float
        attention_dropout: float
        q_norm: nn.Module
        k_norm: nn.Module
        qkv_proj: nn.Module
        o_proj: nn.Module

    class StockFFN(nn.Module):
        """``mlp``; only Phi-3 has the fused projection and its activation."""

        gate_proj: nn.Module
        up_proj: nn.Module
        down_proj: nn.Module
        act_fn: Callable[[torch.Tensor], torch.Tensor]
        gate_up_proj: nn.Module
        activation_fn: Callable[[torch.Tensor], torch.Tensor]

    class StockLayer(nn.Module):
        """A pre-norm decoder layer."""

        self_attn: StockAttention
        mlp: StockFFN
        input_layernorm: nn.Module
        post_attention_layernorm: nn.Module
        _gradient_checkpointing_func: Callable[..., Any]

    class StockDecoder(PreTrainedModel):
        """A text decoder without its head."""

        embed_tokens: nn.Module
        layers: ModuleListOf[StockLayer]
        norm: nn.Module
        rotary_emb: nn.Module
