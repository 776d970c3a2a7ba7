"""A plugin for vLLM: serves a baked checkpoint, and skips the visual work that its plan prunes.

vLLM finds :func:`yopo.serving.vllm.plugin.register` by itself (entry point
``vllm.general_plugins``). Nothing else imports this package, and only its modules import vLLM.
"""
