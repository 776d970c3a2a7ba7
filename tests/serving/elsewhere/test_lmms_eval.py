"""lmms-eval scores a baked checkpoint as ``yopo eval`` does, with a local task of 50 pairs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (see scripts/README.md)")

from damaged_model import PAIRS, Damaged
from lmms_eval.models import get_model

from yopo.support.errors import ModelError

COMMAND = "from lmms_eval.cli.dispatch import main; main()"
"""The command ``lmms-eval``."""

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
def task(damaged: Damaged, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a task of lmms-eval."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "task.yaml").write_text(TASK.format(pairs=damaged.pairs))
    (folder / "utils.py").write_text(UTILS)
    return folder


def score(task: Path, output: Path, **arguments: object) -> float:
    """The score that lmms-eval's command reports."""
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = [sys.executable, "-c", COMMAND, "--model", "yopo", "--model_args", given]
    command += ["--tasks", "yopo_local", "--include_path", str(task)]
    command += ["--batch_size", "8", "--output_path", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=task)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(next(output.rglob("*results.json")).read_text())
    return found["results"]["yopo_local"]["right,none"]


def test_the_score_is_that_of_yopo_eval(damaged: Damaged, task: Path, tmp_path: Path) -> None:
    accuracy = damaged.accuracy
    assert accuracy.pruned < accuracy.dense
    assert score(task, tmp_path / "1", pretrained=damaged.baked) == accuracy.pruned / PAIRS
    dense = score(task, tmp_path / "2", pretrained=damaged.baked, budget="dense")
    assert dense == accuracy.dense / PAIRS


def test_wrong_arguments_are_one_sentence(damaged: Damaged) -> None:
    made = get_model("yopo")
    for arguments, sentence in (
        ({"budget": "much"}, "budget is 'much', expected a visual budget"),
        ({"bugdet": 0.1}, "found bugdet, expected pretrained, budget"),
        ({"batch_size": "auto"}, "--batch_size is 'auto'"),
    ):
        with pytest.raises(ModelError, match=sentence):
            made(pretrained=str(damaged.baked), **arguments)
