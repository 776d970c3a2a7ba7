"""lmms-eval scores a baked checkpoint as ``yopo eval`` does, with a local task of 50 pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (see scripts/README.md)")

from lmms_eval.models import get_model

import yopo
from yopo.data.sources import open_pairs
from yopo.support.errors import ModelError

PAIRS = 50
TASK = """
task: yopo_local
dataset_path: json
dataset_kwargs:
  data_files: {{test: {pairs}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function utils.right
generation_kwargs: {{max_new_tokens: 8}}
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image
from yopo.evaluation.accuracy import is_correct

def visual(doc):
    return [Image.open(doc["image"])]

def right(doc, results):
    return {"right": float(is_correct(results[0], [doc["answer"]]))}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baked checkpoint at a budget that costs accuracy, pairs, and a task of lmms-eval."""
    folder = tmp_path_factory.mktemp("lmms_eval")
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
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(lines)
    (folder / "task").mkdir()
    (folder / "task" / "task.yaml").write_text(TASK.format(pairs=folder / "pairs.jsonl"))
    (folder / "task" / "utils.py").write_text(UTILS)
    return folder


def score(folder: Path, output: Path, **arguments: object) -> float:
    """The score that lmms-eval's command reports."""
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [sys.executable, "-m", "lmms_eval", "--model", "yopo", "--model_args", given]
    command += ["--tasks", "yopo_local", "--include_path", str(folder / "task")]
    command += ["--batch_size", "8", "--output_path", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(next(output.rglob("*results.json")).read_text())
    return found["results"]["yopo_local"]["right,none"]


def test_the_score_is_that_of_yopo_eval(folder: Path, tmp_path: Path) -> None:
    baked = folder / "baked"
    kept = yopo.evaluate(
        str(baked),
        options=yopo.RunOptions(data=str(folder / "pairs.jsonl"), samples=PAIRS, max_new_tokens=8),
        timing_runs=0,
    ).kept
    assert kept.accuracy is not None and kept.accuracy.pruned < kept.accuracy.dense
    assert score(folder, tmp_path / "1", pretrained=baked) == kept.accuracy.pruned / PAIRS
    dense = score(folder, tmp_path / "2", pretrained=baked, budget="dense")
    assert dense == kept.accuracy.dense / PAIRS


def test_wrong_arguments_are_one_sentence(folder: Path) -> None:
    made = get_model("yopo")
    for arguments, sentence in (
        ({"budget": "much"}, "budget is 'much', expected a visual budget"),
        ({"bugdet": 0.1}, "found bugdet, expected pretrained, budget"),
        ({"batch_size": "auto"}, "--batch_size is 'auto'"),
    ):
        with pytest.raises(ModelError, match=sentence):
            made(pretrained=str(folder / "baked"), **arguments)
