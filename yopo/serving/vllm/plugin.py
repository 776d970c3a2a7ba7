"""The entry point: vLLM calls :func:`register` in each of its processes.

The stock architecture names resolve to our classes, which are the stock ones for checkpoints
without a plan. So ``config.json`` names the stock architecture, and every other loader finds what
it knows; without this plugin vLLM serves the dense model.
"""

from __future__ import annotations

from typing import Any

from yopo.models.registry import FAMILIES
from yopo.serving.vllm.source import plan_to_serve, refuse_settings

_MODELS = "yopo.serving.vllm.models"


def register() -> None:
    """Register our model classes and what they require of vLLM's settings."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for family in FAMILIES:
        name = family.architecture
        for each in (name, f"Yopo{name}"):
            ModelRegistry.register_model(each, f"{_MODELS}:{name}")
            MODELS_CONFIG_MAP.setdefault(each, Settings)


class Settings:
    """What vLLM asks about an architecture before it builds a model."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse a plan that cannot be served, in the process that the user sees."""
        plan_to_serve(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Run prefills eagerly, as numbers of visual rows differ from batch to batch.

        Graphs remain for batches of decode steps only, which have no visual rows.
        """
        if plan_to_serve(vllm_config.model_config) is None:
            return
        refuse_settings(vllm_config)
        from vllm.config import CompilationMode, CUDAGraphMode

        compilation = vllm_config.compilation_config
        compilation.mode = CompilationMode.NONE
        if compilation.cudagraph_mode != CUDAGraphMode.NONE:
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
