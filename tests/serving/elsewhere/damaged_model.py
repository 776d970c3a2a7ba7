"""A baked checkpoint at a budget that costs accuracy, so that scores tell it from the dense one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yopo
from yopo.data.sources import open_pairs
from yopo.evaluation.evaluate import Accuracy

PAIRS = 50
TOKENS = 8
"""Of an answer."""


@dataclass(frozen=True)
class Damaged:
    """A checkpoint, pairs to ask it about, and what ``yopo eval`` finds.

    Attributes:
        baked: Its directory.
        pairs: A file of pairs with one image each, by path.
        accuracy: Of both models on these pairs.
    """

    baked: Path
    pairs: Path
    accuracy: Accuracy

    @classmethod
    def make(cls, folder: Path) -> Damaged:
        """Calibrate, bake and evaluate; everything is written into a directory."""
        found = yopo.calibrate(
            "llava-tiny",
            yopo.PaperRequest(preset="yopo-12"),
            options=yopo.RunOptions(data="demo:calibration", samples=16),
        )
        yopo.apply(found.plan, output=folder / "baked")
        rows = []
        for number, pair in enumerate(open_pairs("demo:heldout", samples=PAIRS, seed=0)):
            name = folder / f"{number}.png"
            pair.images[0].load().save(name)
            rows.append({"image": str(name), "question": pair.question, "answer": pair.answers[0]})
        pairs = folder / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = yopo.RunOptions(data=str(pairs), samples=PAIRS, max_new_tokens=TOKENS)
        kept = yopo.evaluate(str(folder / "baked"), options=options, timing_runs=0).kept
        assert kept.accuracy is not None
        return cls(folder / "baked", pairs, kept.accuracy)
