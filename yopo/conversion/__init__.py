"""Converts checkpoints that transformers cannot load into ones that it can, tensor by tensor."""
