"""vLLM's model classes, pruned where the checkpoint has a plan, else exactly as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models import interns1, llava, llava_next, qwen2_5_vl, qwen2_vl, qwen3_vl

from yopo.serving.vllm.install import Installed
from yopo.serving.vllm.rows import BatchRows
from yopo.serving.vllm.shard import deal_neurons
from yopo.serving.vllm.source import plan_to_serve, plan_with_tensors, refuse_settings

if TYPE_CHECKING:
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration as _Stock
else:
    _Stock = nn.Module  # mixed into a class of vLLM's, which provides the rest

logger = init_logger("vllm.yopo")


class Pruned(_Stock):
    """Mixed into a vLLM model class; see :class:`yopo.serving.vllm.install.SplitModule`."""

    yopo: Installed | None = None
    rows: BatchRows

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        plan = plan_to_serve(vllm_config.model_config)
        if plan is None:
            return
        refuse_settings(vllm_config)
        self.rows, self._model_config = BatchRows(), vllm_config.model_config
        layers = self.get_language_model().model.layers
        self.yopo = Installed(layers, plan, self.rows)
        logger.info(
            "yopo: visual tokens are pruned to %.1f %% of their FLOPs.", 100 * plan.budget.reached
        )

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As in the stock class; remembers which tokens are visual."""
        if self.yopo is not None:
            self.rows.mark(is_multimodal)
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the stock class; visual rows skip what the plan prunes."""
        arguments = (input_ids, positions, intermediate_tensors, inputs_embeds)
        if self.yopo is None:
            return super().forward(*arguments, **kwargs)
        with self.rows.of_batch(positions.shape[-1], positions.device):
            return super().forward(*arguments, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint's weights, then the visual parts' from its plan."""
        if self.yopo is None:
            return super().load_weights(weights)
        loaded = super().load_weights(deal_neurons(weights, self.yopo.shard.size))
        self.yopo.fill(plan_with_tensors(self._model_config))
        return loaded | self.yopo.names(self)


class LlavaForConditionalGeneration(Pruned, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5, also with SigLIP and Pixtral towers."""


class LlavaNextForConditionalGeneration(Pruned, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


class InternVLForConditionalGeneration(Pruned, interns1.InternS1ForConditionalGeneration):
    """InternVL in the native format of transformers."""


class Qwen2VLForConditionalGeneration(Pruned, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class Qwen2_5_VLForConditionalGeneration(Pruned, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class Qwen3VLForConditionalGeneration(Pruned, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, whose DeepStack features vLLM adds between the layers."""
