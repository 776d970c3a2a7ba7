"""The embedded demo: a tiny trained LLaVA, and generated pictures with questions to ask it."""

from pathlib import Path

LLAVA_TINY = Path(__file__).parent / "llava_tiny"  # any from_pretrained takes this directory
