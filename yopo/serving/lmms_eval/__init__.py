"""A model class for lmms-eval: ``--model yopo --model_args pretrained=DIR``.

lmms-eval finds :func:`yopo.serving.lmms_eval.plugin.manifest` by itself (entry point
``lmms_eval.models``). Its own classes load stock ones, which run a baked checkpoint as the dense
model. Nothing else imports this package, and only its modules import lmms-eval.
"""
