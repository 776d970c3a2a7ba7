"""Safetensors checkpoints: reading and checking them, and baking a plan into one by streaming."""
