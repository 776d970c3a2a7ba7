"""Every advertised way loads a baked checkpoint on the hub, from a cache and without network.

The cache is laid out like huggingface_hub's; a separate process loads from it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from yopo.calibration.measure import identify
from yopo.checkpoint.bake import bake
from yopo.models.registry import resolve
from yopo.plans.file import BUDGET_DIGITS
from yopo.serving.loading import load_dense

MAIN, OTHER = "1" * 40, "2" * 40
"""Commits of the made-up repository."""

SCRIPT = """
import json, sys
import torch, transformers, yopo
from transformers import pipeline
from PIL import Image
from yopo.pipeline import commands
from yopo.serving.loading import load_dense

def told(load):
    try:
        model = load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    plan = yopo.plan_of(model)
    return None if plan is None else plan.budget.reached

def auto(name, **options):
    kind = getattr(transformers, name)
    return told(lambda: kind.from_pretrained("me/x", **options))

found = {
    "load": told(lambda: yopo.load("me/x")),
    "load at": told(lambda: yopo.load("me/x@v2")),
    "load revision": told(lambda: yopo.load("me/x", revision="v2")),
    "load subfolder": told(lambda: yopo.load("me/x", revision="v2", subfolder="inside/it")),
    "load dense": told(lambda: yopo.load("me/dense")),
    "revision": auto("AutoModelForImageTextToText", revision="v2", trust_remote_code=True),
}
for name in json.loads(sys.argv[1]):
    found[name] = auto(name, trust_remote_code=True)
    found[f"{name} dense"] = auto(name)
pipe = pipeline("image-text-to-text", model="me/x", trust_remote_code=True)
found["pipeline"] = told(lambda: pipe.model)
found["answers"] = bool(pipe(text="<image>shape?", images=Image.new("RGB", (64, 64)),
                             generate_kwargs={"max_new_tokens": 2}))
plan = commands.read_target("me/x")
found["target"] = plan.budget.reached
source = commands.source_of_target("me/x", plan, None)
found["target dense"] = told(lambda: load_dense(source))
found["name"] = yopo.load("me/x").config.name_or_path
print(json.dumps(found))
"""

AUTO = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForPreTraining",
    "AutoModel",
)


def add_snapshot(cache: Path, name: str, revision: str, commit: str, files: Path) -> None:
    """Put a directory's files into a hub cache: blobs, and a snapshot that links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for file in sorted(path for path in files.rglob("*") if path.is_file()):
        inside = file.relative_to(files)
        blob = repository / "blobs" / f"{commit[:4]}-{str(inside).replace('/', '-')}"
        shutil.copyfile(file, blob)
        link = repository / "snapshots" / commit / inside
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Findings of a process without network: way of loading -> budget, None (dense) or error."""
    folder = tmp_path_factory.mktemp("hub")
    source = resolve("llava-tiny")
    identity = identify(load_dense(source), "llava-tiny")
    budgets = {}
    for name, seed in (("first", 3), ("second", 4)):
        plan = tiny.random_plan(identity, random.Random(seed), compensation="mean", baked=False)
        budgets[name] = round(plan.budget.reached, BUDGET_DIGITS)
        plan = replace(plan, tensors=tiny.random_tensors(plan, 3))
        bake(plan, source.location, folder / name)
    shutil.copytree(folder / "first", folder / "second" / "inside" / "it")
    cache = folder / "home" / "hub"
    add_snapshot(cache, "me/x", "main", MAIN, folder / "first")
    add_snapshot(cache, "me/x", "v2", OTHER, folder / "second")
    add_snapshot(cache, "me/dense", "main", MAIN, Path(source.location))
    paths = os.pathsep.join(path for path in sys.path if path)
    settings = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(AUTO)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | settings,
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr
    assert budgets["first"] != budgets["second"]
    return json.loads(run.stdout.splitlines()[-1]) | budgets


def test_yopo_load_takes_a_hub_id_a_revision_and_a_subfolder(told) -> None:
    assert told["load"] == told["first"] and told["name"] == "me/x"
    assert told["load at"] == told["load revision"] == told["second"]
    assert told["load subfolder"] == told["first"]


def test_a_dense_repository_is_distinguished_from_a_pruned_one(told) -> None:
    assert "me/dense: is not a pruned checkpoint (no yopo_plan.yaml)" in told["load dense"]


@pytest.mark.parametrize("name", AUTO)
def test_every_auto_class_is_pruned_with_trust_and_stock_without(told, name: str) -> None:
    assert told[name] == told["first"] and told[f"{name} dense"] is None


def test_eval_and_bench_take_a_hub_id(told) -> None:
    assert told["target"] == told["first"] and told["target dense"] is None


def test_remote_code_comes_from_its_revision(told) -> None:
    assert told["revision"] == told["second"]


def test_a_pipeline_is_pruned_and_answers(told) -> None:
    assert told["pipeline"] == told["first"] and told["answers"]
