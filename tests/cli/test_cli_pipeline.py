"""Calibrate, inspect, apply, evaluate: the commands on a real (tiny) model, end to end."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import DRAWINGS, FAST, FFN, LAYERS, Yopo, side_file
from transformers import AutoModelForImageTextToText

import yopo as library
from yopo.cli.results import SHOWN
from yopo.plans.storage import read_plan

BIN = Path(sys.executable).parent


def in_shell(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    path = f"{BIN}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line],
        cwd=directory,
        env={**os.environ, "PATH": path, "YOPO_CACHE": str(directory / "cache")},
        capture_output=True,
        text=True,
    )


def test_a_report_is_made_in_a_shell_pipeline(model: Path, tmp_path: Path) -> None:
    options = map(str, (*FAST, *DRAWINGS))
    calibrate = shlex.join(["yopo", "calibrate", "--model", str(model), *options, "-o", "-"])
    done = in_shell(f"set -o pipefail; {calibrate} | yopo report - -o -", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<!DOCTYPE html>") and done.stdout.endswith("</html>\n")
    assert f"{model.name} runs on" in done.stdout and "logit KL" in done.stdout
    assert "Traceback" not in done.stderr and "<!DOCTYPE" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["cache"]


def test_commands_work_in_a_shell_pipeline(model: Path, tmp_path: Path) -> None:
    options = map(str, (*FAST, *DRAWINGS))
    calibrate = shlex.join(["yopo", "calibrate", "--model", str(model), *options, "-o", "-"])
    line = f"set -o pipefail; {calibrate} | yopo inspect --json - | python -m json.tool"
    done = in_shell(line, tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["model"]["name"] == model.name and len(document["layers"]) == LAYERS
    assert document["budget"]["asked"] == 0.25
    assert document["visual_flops"]["ratio"] == pytest.approx(document["budget"]["reached"], 1e-5)
    assert 0.2 < document["visual_flops"]["ratio"] <= 0.25
    assert "logit KL" in done.stderr and "Plan: visual budget" in done.stderr
    lines = done.stderr.splitlines()
    steps = [line for line in lines if re.match(r"plan \d+ of at most 40: \w+, visual", line)]
    assert len(steps) > 10 and steps[0].startswith("plan 1 of at most 40: ")
    more = re.search(r"and (\d+) more, which -v and the plan list", done.stderr)
    assert more is not None and int(more[1]) == len(steps) - SHOWN
    for chatter in ("\x1b", "warning", "loading", "it/s"):
        assert chatter not in done.stderr.lower()
    assert [each.name for each in tmp_path.iterdir()] == ["cache"]


def test_calibrate_writes_what_it_says(yopo: Yopo, model: Path, pairs: Path) -> None:
    done = yopo(
        *("calibrate", "--model", model, "--data", pairs, *FAST, "--preset", "yopo-25"),
        *("-o", "p.yaml", "--stats", "s.safetensors"),
    )
    assert (done.code, done.out) == (0, "")
    assert re.fullmatch(
        r".*/pairs.jsonl: using 32 of 40 pairs, evenly over 6 kinds \(--samples N, or all\)\.\n"
        r"This takes about \d+ MB of memory \([\d.]+ GB are free\) and \d+ s\.\n"
        r"s.safetensors: statistics of 32 pairs\.\n"
        r"p.yaml: visual budget [\d.]+ %, prefill FLOPs [\d.]+ %\.\n"
        r"next: yopo apply p.yaml, or `yopo inspect` to see what it prunes\n",
        done.err,
    )
    side = side_file(Path("p.yaml"))
    assert sorted(os.listdir()) == [side.name, "p.yaml", "s.safetensors"]
    plan = read_plan("p.yaml")
    assert plan.provenance["preset"] == "yopo-25" and plan.provenance["pairs"] == "pairs.jsonl"
    assert plan.budget.asked is None and len(plan.layers[0].read_heads) == 2
    first = Path("p.yaml").read_bytes(), side.read_bytes()
    again = ("calibrate", "--model", model, "--data", pairs, *FAST, "--preset", "yopo-25")
    assert yopo(*again, "-o", "p.yaml").code == 1
    assert yopo("-q", *again, "-o", "p.yaml", "--force").err == ""
    assert (Path("p.yaml").read_bytes(), side.read_bytes()) == first


def test_demo_pairs_come_with_a_note(yopo: Yopo) -> None:
    arguments = ("calibrate", "--model", "llava-tiny", *FAST, "--preset", "yopo-12")
    said = "Using the demo pairs included with yopo (demo:calibration)."
    assert said in yopo(*arguments).err
    assert yopo(*arguments, "--force", "--quiet").err == ""


def test_plan_needs_no_model(yopo: Yopo, calibrated: Path) -> None:
    stats = calibrated / "stats.safetensors"
    done = yopo("plan", stats, "--budget", 0.5)
    assert (done.code, done.out) == (0, "") and "not measured" in done.err
    assert read_plan("plan.yaml").provenance["template"] == "reader-heads"
    done = yopo("plan", stats, "--head-ratio", 0.5, "--visual-layers", 2, "-o", "-")
    assert done.code == 0 and done.out.startswith("yopo_plan: 1\n")
    Path("two.yaml").write_text(done.out)
    plan = read_plan("two.yaml")  # the tensors are in the cache
    assert plan.layers[1].neurons == FFN and plan.layers[2].is_empty
    assert plan.tensors.neuron_order.shape == (LAYERS, FFN)


def test_inspect_shows_a_plan(yopo: Yopo, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = yopo("inspect", plan)
    assert tables.code == 0 and tables.err == f"next: yopo apply {plan}\n"
    for part in ("fingerprint", "visual FLOPs", "per layer", "head activity", "profile"):
        assert part in tables.out
    document = json.loads(yopo("inspect", plan, "--json").out)
    assert document["measured"]["rho"]
    with plan.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert yopo("inspect", "-").out == tables.out
    done = yopo("inspect", plan, "--html", "page.html")
    assert (done.code, done.out) == (0, "")
    assert "visual FLOPs" in Path("page.html").read_text()
    assert yopo("inspect", plan, "--html", "page.html").is_sentence


def test_apply_verifies_a_checkpoint_that_loads(yopo: Yopo, plan: Path, model: Path) -> None:
    dry = yopo("apply", plan, "--model", model, "--dry-run")
    assert (dry.code, dry.out) == (0, "") and "(dry run)" in dry.err and not os.listdir()
    done = yopo("apply", plan, "--model", model, "--verify")
    assert (done.code, done.out) == (0, "tiny-llava-yopo\n")
    assert "visual KV" in done.err and "Verified in float32" in done.err
    assert os.listdir() == ["tiny-llava-yopo"]
    stock = AutoModelForImageTextToText.from_pretrained("tiny-llava-yopo")
    pruned = library.load("tiny-llava-yopo")
    assert hasattr(pruned.get_decoder(), "yopo") and not hasattr(stock.get_decoder(), "yopo")
    assert yopo("-q", "apply", plan, "--model", model, "-o", "other").err == ""


def test_apply_finds_the_model_by_the_name_in_the_plan(yopo: Yopo, plan: Path, model: Path) -> None:
    hint = re.search("  path: .*\n", plan.read_text())
    assert hint is not None, "a plan leads to a model that is no alias"
    plan.write_text(plan.read_text().replace(hint[0], "  path: ../moved\n"))
    done = yopo("apply", plan)
    assert done.is_sentence and "--model" in done.err and "no longer in ../../moved" in done.err
    plan.write_text(plan.read_text().replace("  path: ../moved\n", ""))
    done = yopo("apply", plan)
    assert done.is_sentence and "--model" in done.err and "no longer" not in done.err
    Path("tiny-llava").symlink_to(model)
    assert yopo("apply", plan).out == "tiny-llava-yopo\n"


def test_a_plan_leads_to_the_model_that_it_was_made_for(
    yopo: Yopo, sharded: Path, tmp_path: Path
) -> None:
    """From another folder than the model's, and after both moved together."""
    own = shutil.copytree(sharded, tmp_path / "home" / "my llava")
    folder = tmp_path / "home" / "plans"
    folder.mkdir()
    options = (*FAST, *DRAWINGS, "--preset", "yopo-25", "-o", folder / "plan.yaml")
    done = yopo("calibrate", "--model", own, *options, "--stats", folder / "stats.safetensors")
    assert done.code == 0
    assert done.err.endswith(
        f"next: yopo apply {folder}/plan.yaml, or `yopo inspect` to see what it prunes\n"
    )
    text = (folder / "plan.yaml").read_text()
    assert "  path: ../my llava\n" in text and str(tmp_path) not in text
    (tmp_path / "home").rename(tmp_path / "moved")
    folder = tmp_path / "moved" / "plans"
    done = yopo("apply", folder / "plan.yaml")
    assert (done.code, done.out) == (0, "my llava-yopo\n")
    assert done.err.endswith("next: yopo eval 'my llava-yopo' --data PAIRS\n")
    assert "path" not in Path("my llava-yopo/yopo_plan.yaml").read_text().split("shape")[0]
    assert yopo("plan", folder / "stats.safetensors", "--preset", "yopo-12").code == 0
    done = yopo("apply", "plan.yaml", "-o", "other")
    assert (done.code, done.out) == (0, "other\n"), "statistics lead to the model, too"


def test_verify_refuses_a_checkpoint_that_computes_something_else(
    yopo: Yopo, plan: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yopo.checkpoint import bake

    monkeypatch.setattr(bake, "find_reorders", lambda *arguments: {})
    done = yopo("apply", plan, "--model", model, "--verify")
    assert done.is_sentence and "does not compute what the plan in memory does" in done.err


def test_eval_takes_a_plan_or_a_checkpoint(
    yopo: Yopo, plan: Path, model: Path, pairs: Path
) -> None:
    options = ("--samples", 4, "--max-new-tokens", 2, "--timing-runs", 1, "--data", pairs)
    table = yopo("eval", plan, "--model", model, *options)
    assert table.code == 0 and table.err.endswith(f"next: yopo apply {plan}\n")
    rows = ("accuracy", "same answer", "same next token", "logit KL", "visual FLOPs")
    for row in (*rows, "prefill FLOPs", "decoder prefill time", "visual KV"):
        assert row in table.out
    assert "4 pairs of pairs.jsonl" in table.out
    assert yopo("-q", "apply", plan, "--model", model, "-o", "baked").code == 0
    found = json.loads(yopo("eval", "baked", *options, "--json").out)
    assert found["pairs"] == 4 and found["accuracy"]["total"] == 4
    again = json.loads(yopo("eval", plan, "--model", model, *options, "--json").out)
    assert found["kl"] == pytest.approx(again["kl"], rel=1e-3)
    assert found["prefill"]["runs"] == 1


def test_pairs_writes_demo_pairs(yopo: Yopo, model: Path) -> None:
    done = yopo("pairs", "mine", "--count", 3, "--split", "calibration", "--seed", 5)
    assert (done.code, done.out) == (0, "mine/pairs.jsonl\n") and os.listdir() == ["mine"]
    lines = Path("mine/pairs.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(
        (Path("mine") / json.loads(line)["image"]).is_file() for line in lines
    )
    assert yopo("pairs", "mine").is_sentence
    assert yopo("pairs", "nowhere/mine").is_sentence
    assert os.listdir() == ["mine"]


def test_a_plan_for_an_engine(yopo: Yopo, model: Path, pairs: Path) -> None:
    asked = ("calibrate", "--model", model, "--data", pairs, *FAST, "--budget", 0.2)
    assert yopo(*asked, "--engine", "vllm", "-o", "p.yaml").code == 0
    found = json.loads(yopo("inspect", "p.yaml", "--json").out)
    assert found["servable"] == {"vllm": True, "because": None}
    assert found["provenance"]["engine"] == "vllm"
