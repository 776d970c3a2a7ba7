"""Specimens of the families' zoo for the planner: one of every kind of decoder, and batches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import zoo
from zoo_llava import Llava

from yopo.data.prompts import Batch

NAMES = ("llava-mha", "qwen2-vl", "qwen3-vl", "internvl-phi3")
ENTRIES = [Llava("gqa"), *(entry for entry in zoo.all_entries() if entry.name in NAMES)]


def encoded(inputs: dict[str, Any]) -> Batch:
    """Wrap inputs as calibration passes them on."""
    return Batch(inputs, None, (None,) * len(inputs["input_ids"]))


def make_batches(specimen: zoo.Specimen, prompts: Sequence[Sequence[zoo.Row]]) -> list[Batch]:
    """Make one batch per prompt, each with different pixels."""
    return [encoded(specimen.inputs(rows, seed)) for seed, rows in enumerate(prompts)]
