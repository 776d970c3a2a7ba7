"""Safetensors checkpoints: reading, checking, and baking a plan into one by streaming."""
