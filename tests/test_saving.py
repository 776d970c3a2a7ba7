"""``save_pretrained`` of a pruned model writes a directory that is pruned in yopo, else dense."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny import PICTURE, Subject
from torch import nn
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments
from transformers.utils import hub

import yopo
from yopo.checkpoint.bake import bake
from yopo.plans.schema import PruningPlan
from yopo.plans.storage import read_plan
from yopo.runtime.install import fitted_parameters, pruned
from yopo.support.errors import CheckpointError, ModelError

INPUTS = tiny.batch([[1, 5, 6, *PICTURE, 7, 8, 9, 10], [1, *PICTURE, 3, 4, *PICTURE, 9]])
KINDS = ("refit", "mean", "none")
"""Compensation of the three plans that are baked together."""
LOADERS: dict[str, Callable[..., nn.Module]] = {
    "yopo.load": yopo.load,
    "remote code": lambda path, **options: AutoModelForImageTextToText.from_pretrained(
        path, trust_remote_code=True, **options
    ),
}
SHARDS = {"one file": {}, "shards": {"max_shard_size": "100KB"}}


def three_plans(subject: Subject) -> list[PruningPlan]:
    """Make plans of one calibration: fitted, with means, and neither; all in one neuron order."""
    plans = [
        subject.random_plan(seed, compensation=compensation, baked=False)
        for seed, compensation in enumerate(KINDS, start=7)
    ]
    order = plans[0].tensors.neuron_order
    return [replace(plan, tensors=replace(plan.tensors, neuron_order=order)) for plan in plans]


@pytest.fixture(scope="module")
def baked(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    subject.model.save_pretrained(folder / "source")
    (folder / "source" / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    first, *others = three_plans(subject)
    bake(first, folder / "source", folder / "baked", also=others)
    return folder / "baked"


def budgets(folder: Path) -> dict[str, float]:
    """Return the budgets of a checkpoint's plans by compensation."""
    plans = [read_plan(path) for path in folder.glob("yopo_plan*.yaml")]
    return {plan.compensation: plan.budget.reached for plan in plans}


def shake(model: nn.Module) -> None:
    """Simulate training: change every parameter, including fitted ones if they are parameters."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def check_same(one: nn.Module, other: nn.Module) -> None:
    """Compare weights, and logits up to rounding, which depends on where shards begin."""
    torch.testing.assert_close(
        tiny.logits(one, INPUTS), tiny.logits(other, INPUTS), atol=1e-4, rtol=1e-4
    )
    weights = dict(other.state_dict())
    for name, weight in one.state_dict().items():
        assert name not in weights or torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(("loader", "shards"), zip(LOADERS, SHARDS, strict=True))
def test_an_untouched_model_is_saved_with_all_of_its_budgets(
    baked: Path, tmp_path: Path, loader: str, shards: str
) -> None:
    model = LOADERS[loader](baked)
    model.save_pretrained(tmp_path / "out", **SHARDS[shards])
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) > (shards == "shards")
    for budget in budgets(baked).values():
        check_same(yopo.load(tmp_path / "out", budget=budget), yopo.load(baked, budget=budget))
    for name in ("yopo_plan.yaml", "yopo_plan-1.yaml", "yopo.safetensors", "modeling_yopo.py"):
        assert (tmp_path / "out" / name).read_bytes() == (baked / name).read_bytes(), name
    check_same(LOADERS["remote code"](tmp_path / "out"), model)
    found, expected = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", baked)
    )
    assert found["yopo"] == expected["yopo"] and found["auto_map"] == expected["auto_map"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "no weight was removed or changed" in card
    assert (tmp_path / "out" / "README.original.md").is_file()
    dense = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    check_same(dense, AutoModelForImageTextToText.from_pretrained(baked))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("loader", "shards"), zip(LOADERS, reversed(SHARDS), strict=True))
def test_a_trained_model_is_saved_as_it_is(
    baked: Path,
    tmp_path: Path,
    loader: str,
    shards: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = LOADERS[loader](baked, budget=budgets(baked)[kind], trainable=True)
    if kind == "refit":
        assert fitted_parameters(model)
    shake(model)
    model.save_pretrained(tmp_path, **SHARDS[shards])
    assert "plans for other budgets" in capsys.readouterr().err
    check_same(yopo.load(tmp_path), model)
    check_same(LOADERS["remote code"](tmp_path), model)
    plans = list(tmp_path.glob("yopo_plan*.yaml"))
    assert [path.name for path in plans] == ["yopo_plan.yaml"]
    plan, before = read_plan(plans[0]), model.get_decoder().yopo.plan
    assert plan.model.fingerprint != before.model.fingerprint
    assert plan.provenance["trained_from"] == before.model.fingerprint
    assert "trained afterwards" in (tmp_path / "README.md").read_text()
    stock, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    trained = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_training_only_fitted_weights_keeps_the_other_budgets(baked: Path, tmp_path: Path) -> None:
    model = yopo.load(baked, trainable=True)
    with torch.no_grad():
        for parameter in fitted_parameters(model).values():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    check_same(yopo.load(tmp_path), model)
    for budget in (budgets(baked)[kind] for kind in KINDS[1:]):
        check_same(yopo.load(tmp_path, budget=budget), yopo.load(baked, budget=budget))
    again = yopo.load(tmp_path, trainable=True)
    for name, parameter in fitted_parameters(model).items():
        assert torch.equal(fitted_parameters(again)[name], parameter), name


def test_a_directory_can_be_saved_to_again(baked: Path, tmp_path: Path) -> None:
    path = shutil.copytree(baked, tmp_path / "again")
    model = yopo.load(path, budget=budgets(baked)["mean"])
    model.save_pretrained(path)
    for budget in budgets(baked).values():
        check_same(yopo.load(path, budget=budget), yopo.load(baked, budget=budget))
    shake(model)
    model.save_pretrained(path)
    check_same(yopo.load(path), model)
    assert not [*path.glob("yopo_plan-*"), *path.glob("yopo-*")]


def test_a_model_outlives_the_directory_that_it_came_from(baked: Path, tmp_path: Path) -> None:
    path = shutil.copytree(baked, tmp_path / "gone")
    model = yopo.load(path)
    shutil.rmtree(path)
    model.save_pretrained(tmp_path / "out")
    check_same(yopo.load(tmp_path / "out"), model)


def test_another_precision_is_saved_as_it_is(baked: Path, tmp_path: Path) -> None:
    model = yopo.load(baked, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = yopo.load(tmp_path)
    assert again.dtype == torch.bfloat16
    check_same(again, model)
    assert len(list(tmp_path.glob("yopo_plan*.yaml"))) == len(KINDS)


def push(model: nn.Module, way: str, folder: Path) -> None:
    if way == "push_to_hub":
        model.push_to_hub("me/mine")
    else:
        model.save_pretrained(folder / "local", push_to_hub=True, repo_id="me/mine")


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_an_upload_holds_everything_and_yopos_card(
    baked: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Api:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": name})

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("A card that says nothing.")

    def upload(self: Any, working_dir: str, *_: Any, **__: Any) -> None:
        shutil.copytree(working_dir, tmp_path / "uploaded")

    from transformers import modeling_utils

    for module in (hub, modeling_utils):
        monkeypatch.setattr(module, "hf_api", Api)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model = yopo.load(baked, trainable=True)
    shake(model)
    push(model, way, tmp_path)
    check_same(yopo.load(tmp_path / "uploaded"), model)
    assert 'yopo.load("' in (tmp_path / "uploaded" / "README.md").read_text()


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    labels = INPUTS["input_ids"].masked_fill(~tiny.real_text(INPUTS), -100)
    one = {name: value[:1] for name, value in (INPUTS | {"labels": labels}).items()}
    return [one] * count


def trainer(model: nn.Module, folder: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    return Trainer(model, arguments, train_dataset=rows(8), data_collator=lambda given: given[0])


def test_a_trainer_checkpoint_is_complete_and_training_resumes_from_it(
    mha: Subject, tmp_path: Path
) -> None:
    mha.model.save_pretrained(tmp_path / "source")
    first, *_ = three_plans(mha)
    bake(first, tmp_path / "source", tmp_path / "baked")
    model = yopo.load(tmp_path / "baked", trainable=True)
    trainer(model, tmp_path / "run", 4).train()
    final = tmp_path / "run" / "checkpoint-4"
    check_same(yopo.load(final), model.eval())
    middle = yopo.load(tmp_path / "run" / "checkpoint-2", trainable=True)
    resumed = trainer(middle, tmp_path / "run2", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    check_same(middle.eval(), model)


def test_a_trained_checkpoint_can_be_baked_again(mha: Subject, tmp_path: Path) -> None:
    mha.model.save_pretrained(tmp_path / "source")
    first, second, _ = three_plans(mha)
    bake(first, tmp_path / "source", tmp_path / "baked")
    model = yopo.load(tmp_path / "baked")
    shake(model)
    model.save_pretrained(tmp_path / "trained")
    found = read_plan(tmp_path / "trained" / "yopo_plan.yaml").model.fingerprint
    plan = replace(second, model=replace(second.model, fingerprint=found))
    bake(plan, tmp_path / "trained", tmp_path / "again")
    dense = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    with pruned(dense, plan):
        expected = tiny.logits(dense, INPUTS)
    found = tiny.logits(yopo.load(tmp_path / "again"), INPUTS)
    where = tiny.real_text(INPUTS)
    torch.testing.assert_close(found[where], expected[where], atol=1e-3, rtol=1e-3)


def test_a_plan_in_memory_is_not_saved(
    baked: Path, mha: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = three_plans(mha)[0]
    model = copy.deepcopy(mha.model)
    with pruned(model, plan):
        model.save_pretrained(tmp_path / "dense")
    assert "saved the dense model" in capsys.readouterr().err
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"yopo", "auto_map"} & config.keys()
    check_same(AutoModelForImageTextToText.from_pretrained(tmp_path / "dense"), mha.model)
    with pytest.raises(CheckpointError, match="not a pruned checkpoint"):
        yopo.load(tmp_path / "dense")
    with pruned(model, plan, trainable=True), pytest.raises(ModelError, match="be saved"):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    stock = AutoModelForImageTextToText.from_pretrained(baked)  # its configuration mentions yopo
    if stock.config.text_config.num_attention_heads == mha.shape.heads:
        with pruned(stock, read_plan(baked / "yopo_plan-2.yaml")):
            stock.save_pretrained(tmp_path / "claims")
        assert "yopo" not in json.loads((tmp_path / "claims" / "config.json").read_text())
        assert stock.config.yopo  # as it was


def test_unmerged_adapters_are_refused(baked: Path, tmp_path: Path) -> None:
    model = yopo.load(baked)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="unmerged adapters"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    peft_model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "yopo_plan.yaml").exists()
