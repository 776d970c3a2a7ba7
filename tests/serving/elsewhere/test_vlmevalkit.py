"""VLMEvalKit, started by scripts/vlmevalkit.py, answers what ``yopo eval`` counts as right."""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from damaged_model import PAIRS, Damaged

import yopo
from yopo.evaluation.accuracy import is_correct

CLONE = os.environ.get("VLMEVALKIT", "")
if not CLONE:
    pytest.skip("VLMEVALKIT does not name a clone of VLMEvalKit", allow_module_level=True)


def test_the_score_is_that_of_yopo_eval(damaged: Damaged, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in damaged.pairs.read_text().splitlines()]
    lines = ["index\timage\tquestion\tanswer"]
    for number, row in enumerate(rows):
        image = base64.b64encode(Path(row["image"]).read_bytes()).decode()
        lines.append(f"{number}\t{image}\t{row['question']}\t{row['answer']}")
    (tmp_path / "yopo_local.tsv").write_text("\n".join(lines) + "\n")
    script = Path(yopo.__file__).parents[1] / "scripts" / "vlmevalkit.py"
    command = [sys.executable, str(script), str(damaged.baked), "--data", "yopo_local"]
    command += ["--mode", "infer", "--work-dir", str(tmp_path / "results")]
    settings = os.environ | {"LMUData": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=CLONE)
    assert run.returncode == 0, run.stderr[-3000:]
    found = next((tmp_path / "results").rglob("*yopo_local.pkl"))
    table = pickle.loads(found.read_bytes())
    answers = dict(zip(table["index"], table["prediction"], strict=True))
    assert len(answers) == PAIRS
    right = sum(is_correct(str(answers[n]), [row["answer"]]) for n, row in enumerate(rows))
    assert right == damaged.accuracy.pruned < damaged.accuracy.dense
