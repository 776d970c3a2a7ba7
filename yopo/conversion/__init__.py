"""Checkpoints that transformers cannot load, made into ones that it can; tensor by tensor."""
