"""A baked checkpoint is the original model, reordered, with the plan next to it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import yopo
from yopo.checkpoint import bake as bake_module
from yopo.checkpoint import shards
from yopo.checkpoint.bake import bake
from yopo.checkpoint.order import order_layers
from yopo.checkpoint.reader import Checkpoint, fingerprint
from yopo.checkpoint.writer import format_bytes
from yopo.models.fingerprint import fingerprint_of_decoder, is_same
from yopo.plans.file import read_document
from yopo.plans.schema import LayerPlan
from yopo.plans.storage import read_plan
from yopo.plans.tensors import PlanTensors
from yopo.runtime.install import pruned
from yopo.serving.loading import PrunedForConditionalGeneration
from yopo.support.errors import CheckpointError, ModelError, OutputError, PlanError

IMAGE_TOKEN = 63

CASES = [
    (kind, hub, sharded)
    for kind in ("mha", "gqa", "qwen2")
    for hub, sharded in ((True, True), (False, True), (True, False))
]


@pytest.fixture
def baked(saved, make_plan, tmp_path):
    """Factory: bake a fixture model; returns (source, plan, report)."""

    def make(kind: str = "mha", *, compensation: str = "none", **layout):
        source = saved(kind, **layout)
        plan = make_plan(source.model, compensation=compensation)
        return source, plan, bake(plan, source.path, tmp_path / "out")

    return make


def load(path: Path, dtype: torch.dtype = torch.float64) -> LlavaForConditionalGeneration:
    """Load in stock transformers; no weight may be missing, invented or left over."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, output_loading_info=True
    )
    assert type(model) is LlavaForConditionalGeneration
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()


@torch.no_grad()
def logits(model, inputs) -> torch.Tensor:
    """Logits in the model's own precision."""
    pixels = inputs["pixel_values"].to(model.dtype)
    return model(**{**inputs, "pixel_values": pixels}).logits


def read_all(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in path.glob("model*.safetensors")
        for name, tensor in load_file(file).items()
    }


def contents(path: Path) -> dict[str, bytes]:
    return {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*.*")}


@pytest.mark.parametrize("compensation", ["none", "refit"])
@pytest.mark.parametrize(("kind", "hub_layout", "sharded"), CASES)
def test_stock_transformers_loads_the_original_function(
    baked, inputs, kind, hub_layout, sharded, compensation
) -> None:
    layout = {"hub_layout": hub_layout, "sharded": sharded}
    source, _, report = baked(kind, compensation=compensation, **layout)
    original, reordered = load(source.path), load(report.output)
    before, after = logits(original, inputs), logits(reordered, inputs)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-11)
    # The tolerance is meaningful: two FFN columns in the wrong place are far outside it.
    weight = reordered.get_decoder().layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[:, [0, 1]] = weight[:, [1, 0]]
    assert (logits(reordered, inputs) - before).abs().max() > 1e-4


def test_float32_logits_are_as_close_to_the_oracle_as_the_originals(baked, inputs) -> None:
    source, _, report = baked()
    oracle = logits(load(source.path), inputs)
    error = (logits(load(source.path, torch.float32), inputs) - oracle).abs().max()
    found = (logits(load(report.output, torch.float32), inputs) - oracle).abs().max()
    assert found <= 4 * error


@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen2"])
def test_every_decoder_tensor_is_in_the_plans_order(baked, kind) -> None:
    source, plan, report = baked(kind)
    before, after = read_all(source.path), read_all(report.output)
    assert before.keys() == after.keys()
    orders = order_layers(plan)
    head_dim = plan.model.shape.head_dim

    def rows(order) -> torch.Tensor:
        return torch.cat([torch.arange(old * head_dim, (old + 1) * head_dim) for old in order])

    changed = 0
    for name, tensor in before.items():
        expected = tensor
        if "language_model.model.layers." in name:
            order = orders[int(name.split("layers.")[1].split(".")[0])]
            if "q_proj" in name:
                expected = tensor[rows(order.head_order)]
            elif "k_proj" in name or "v_proj" in name:
                expected = tensor[rows(order.kv_order)]
            elif "o_proj" in name:
                expected = tensor[:, rows(order.head_order)]
            elif "gate_proj" in name or "up_proj" in name:
                expected = tensor[order.neuron_order]
            elif "down_proj" in name:
                expected = tensor[:, order.neuron_order]
        assert torch.equal(after[name], expected), name
        changed += not torch.equal(after[name], tensor)
    # Every layer is reordered, K/V heads of a GQA layer only where its groups change places.
    assert changed == report.num_reordered >= 3 * 5
    assert report.num_tensors == len(before)


@pytest.mark.parametrize("sharded", [True, False])
def test_names_dtypes_and_shard_layout_are_the_sources(baked, sharded) -> None:
    source, _, report = baked(sharded=sharded)
    before, after = Checkpoint.open(source.path), Checkpoint.open(report.output)
    assert before.shards == after.shards
    assert report.num_bytes == before.num_bytes
    for shard in before.shards:
        start = min(entry.start for entry in shard.tensors)
        old, new = ((c.path / shard.file).read_bytes()[:start] for c in (before, after))
        assert old == new
    if sharded:
        index = "model.safetensors.index.json"
        assert (report.output / index).read_bytes() == (source.path / index).read_bytes()


def test_bfloat16_stays_bfloat16(baked, inputs) -> None:
    source, plan, report = baked(dtype=torch.bfloat16)
    tensors = read_all(report.output)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    before, after = (logits(load(path), inputs) for path in (source.path, report.output))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-11)


def test_a_process_without_yopo_loads_the_original_model(baked, inputs, tmp_path) -> None:
    """Without importing yopo, the result is the original model, and no question is asked."""
    source, _, report = baked("gqa")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys, torch
from transformers import AutoModelForImageTextToText
inputs = torch.load("inputs.pt")
model = AutoModelForImageTextToText.from_pretrained("out", dtype=torch.float64).eval()
inputs["pixel_values"] = inputs["pixel_values"].double()
with torch.no_grad():
    torch.save(model(**inputs).logits, "logits.pt")
assert not [name for name in sys.modules if name.startswith("yopo")]
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, logits(load(source.path), inputs), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("kind", ["mha", "gqa"])
def test_the_baked_plan_belongs_to_the_checkpoint(baked, kind) -> None:
    source, plan, report = baked(kind)
    found = read_plan(report.output / "yopo_plan.yaml")
    assert not (report.output / "yopo.safetensors").exists()
    assert found.baked and found.tensors == PlanTensors()
    assert found.layers == report.plan.layers
    if kind == "mha":
        assert [layer.read_heads for layer in found.layers] == [(0, 1, 2, 3), (0, 1), (0,)]
    loaded = load(report.output, torch.float32)
    assert is_same(found.model.fingerprint, fingerprint_of_decoder(loaded.get_decoder()))
    assert found.model.fingerprint == fingerprint(Checkpoint.open(report.output))
    assert found.model.fingerprint != plan.model.fingerprint
    assert found.provenance["baked_from"] == plan.model.fingerprint


def test_means_travel_in_a_side_file(baked) -> None:
    source, plan, report = baked(compensation="mean")
    tensors, means = plan.tensors, read_plan(report.output / "yopo_plan.yaml").tensors
    assert read_document(report.output / "yopo_plan.yaml")[1].file == "yopo.safetensors"
    assert means.neuron_order is None and means == report.plan.tensors
    order = order_layers(plan)[1]
    assert torch.equal(means.neuron_mean[1], tensors.neuron_mean[1, order.neuron_order])
    assert torch.equal(means.head_mean[1, 0], tensors.head_mean[1, order.head_order[0]])
    assert "yopo.safetensors" not in (report.output / "model.safetensors.index.json").read_text()
    load(report.output)  # stock transformers does not see it


@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen2"])
@pytest.mark.parametrize("compensation", ["none", "mean", "refit"])
def test_baked_and_loaded_is_the_pruned_model_in_memory(baked, inputs, kind, compensation) -> None:
    source, plan, report = baked(kind, compensation=compensation)
    found_plan = read_plan(report.output / "yopo_plan.yaml")
    original, reordered = load(source.path), load(report.output)
    with pruned(original, plan, check=False):
        expected = logits(original, inputs)
    with pruned(reordered, found_plan, check=False):
        found = logits(reordered, inputs)
    text = inputs["input_ids"] != IMAGE_TOKEN
    torch.testing.assert_close(found[text], expected[text], rtol=1e-10, atol=1e-9)
    assert (expected - logits(original, inputs))[text].abs().max() > 1e-2  # pruning does something
    with_yopo = yopo.load(str(report.output))
    usual = with_yopo(**inputs).logits[text].double()
    torch.testing.assert_close(usual, expected[text], rtol=1e-3, atol=1e-3)


def test_fitted_weights_travel_in_a_side_file(baked) -> None:
    _, plan, report = baked("gqa", compensation="refit")
    tensors, own = plan.tensors, read_plan(report.output / "yopo_plan.yaml").tensors
    assert read_document(report.output / "yopo_plan.yaml")[1].file == "yopo.safetensors"
    assert own.neuron_order is None and own == report.plan.tensors
    assert {index: set(weights) for index, weights in own.refit.items()} == {
        index: set(weights) for index, weights in tensors.refit.items()
    }
    assert torch.equal(own.refit[1]["map_in"], tensors.refit[1]["map_in"])
    load(report.output)  # stock transformers does not see it


def test_companion_files_are_copied(baked) -> None:
    source, _, report = baked()
    found = {path.name for path in report.output.iterdir()}
    assert {"chat_template.jinja", "generation_config.json", "README.original.md"} <= found
    assert not {"pytorch_model.bin", ".git"} & found
    before = json.loads((source.path / "config.json").read_text())
    after = json.loads((report.output / "config.json").read_text())
    assert after.pop("yopo") == {"version": "0.1.0", "plan": "yopo_plan.yaml"}
    code = "modeling_yopo.YopoForConditionalGeneration"
    assert after.pop("auto_map") == {
        "AutoModel": "modeling_yopo.YopoModel",
        "AutoModelForImageTextToText": code,
        "AutoModelForMultimodalLM": code,
        "AutoModelForPreTraining": code,
    }
    assert after == before


def test_the_model_card_states_the_plan_and_its_savings(baked) -> None:
    _, plan, report = baked()
    card = (report.output / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "llama2"
    assert head["base_model"] == "llava-hf/llava-1.5-7b-hf"
    assert "| 1 | 2 | yes | radius 1 | 20 |" in card
    assert "| 2 | 1 | no | - | 7 |" in card
    # 2 K and V x heads x 8 wide x 4 tokens x 2 bytes: 3 layers of 4 heads, 4 + 2 + 1 kept.
    assert "| visual KV cache, 16 bit | 1.5 kB | 896 B | 58.3% |" in card
    assert plan.model.fingerprint in card
    assert str(report.output.parent) not in card


@pytest.mark.parametrize("compensation", ["mean", "refit"])
def test_the_model_card_names_the_compensation(baked, compensation) -> None:
    _, _, report = baked(compensation=compensation)
    card = (report.output / "README.md").read_text()
    size = format_bytes((report.output / "yopo.safetensors").stat().st_size)
    words = {"mean": "means", "refit": "separate weights, fitted to the original model"}
    assert f"Compensation: {words[compensation]} ({size} in `yopo.safetensors`)." in card
    rows = [line for line in card.splitlines() if line.startswith("| layers |")]
    assert ("bottleneck" in rows[0]) == ("rank of the linear map" in rows[0])
    assert ("bottleneck" in rows[0]) == (compensation == "refit")
    if compensation == "refit":
        assert "| 0 | 4 | in 2 heads | everything | 44 | 9 | - |" in card
        assert "| 1 | 3 | in 2 heads | radius 1 | 20 | 5 | 3 |" in card
        assert "| 2 | 1 | yes | everything | 0 | - | 4 |" in card


def test_no_license_is_invented(saved, make_plan, tmp_path) -> None:
    plan = make_plan(saved().model)
    source = tmp_path / "source"
    bake(plan, saved().path, source)
    for name in ("README.original.md", "README.md"):
        (source / name).unlink()
    again = replace(
        plan, model=replace(plan.model, fingerprint=fingerprint(Checkpoint.open(source)))
    )
    bake(again, source, tmp_path / "out")
    assert "license" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("compensation", ["mean", "refit"])
def test_the_same_input_gives_the_same_bytes(saved, make_plan, tmp_path, compensation) -> None:
    plan = make_plan(saved().model, compensation=compensation)
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        bake(plan, saved().path, folder / "model")
    assert contents(tmp_path / "a" / "model") == contents(tmp_path / "b" / "model")


@pytest.mark.parametrize("compensation", ["mean", "refit"])
def test_a_baked_checkpoint_can_be_baked_again(
    baked, make_plan, inputs, tmp_path, compensation
) -> None:
    source, _, first = baked("gqa", compensation=compensation)
    plan = make_plan(load(first.output, torch.float32))
    second = bake(plan, first.output, tmp_path / "again")
    before, after = logits(load(source.path), inputs), logits(load(second.output), inputs)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-11)
    assert not (second.output / "yopo.safetensors").exists()
    assert "license: llama2" in (second.output / "README.md").read_text()


def test_remote_code_defines_the_class(baked) -> None:
    _, _, report = baked()
    name = json.loads((report.output / "config.json").read_text())["auto_map"]
    found = get_class_from_dynamic_module(
        name["AutoModelForImageTextToText"], str(report.output), local_files_only=True
    )
    assert found.__name__ == "YopoForConditionalGeneration"
    assert issubclass(found, PrunedForConditionalGeneration)


def test_remote_code_without_yopo_asks_to_install_it(baked, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "yopo.serving.loading", None)
    _, _, report = baked()
    with pytest.raises(ImportError, match="needs the Python package yopo: install it"):
        exec((report.output / "modeling_yopo.py").read_text(), {"__name__": "modeling_yopo"})


def test_a_dry_run_validates_and_writes_nothing(saved, make_plan, tmp_path) -> None:
    plan = make_plan(saved().model)
    report = bake(plan, saved().path, tmp_path / "out", dry_run=True)
    assert report.num_reordered > 0 and report.plan is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(OutputError, match="exists already"):
        bake(plan, saved().path, tmp_path / "out", dry_run=True)


def test_an_identity_plan_copies_every_byte(saved, make_plan, tmp_path) -> None:
    plan = make_plan(saved().model)
    shape = plan.model.shape
    full = LayerPlan(
        tuple(range(shape.heads)),
        attend_heads=tuple(range(shape.heads)),
        radius=None,
        neurons=shape.ffn,
    )
    plan = replace(plan.with_layers((full,) * shape.layers), measured=None, tensors=PlanTensors())
    report = bake(plan, saved().path, tmp_path / "out")
    assert report.num_reordered == 0
    assert is_same(report.plan.model.fingerprint, plan.model.fingerprint)
    for file in saved().path.glob("*.safetensors"):
        assert (report.output / file.name).read_bytes() == file.read_bytes()


def break_write(monkeypatch, error: BaseException, *, after: int) -> None:
    """Let the reordering write fail after this many calls have succeeded."""
    write, calls = os.pwrite, []

    def fail(*args):
        calls.append(args)
        if len(calls) > after:
            raise error
        return write(*args)

    monkeypatch.setattr(shards.os, "pwrite", fail)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "out: disk full"),
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
    ],
)
@pytest.mark.parametrize("force", [True, False])
def test_a_failure_halfway_leaves_nothing(
    saved, make_plan, tmp_path, monkeypatch, error, expected, message, force
) -> None:
    plan = make_plan(saved().model)
    out = tmp_path / "out"
    if force:
        bake(plan, saved().path, out)
    before = contents(tmp_path)
    break_write(monkeypatch, error, after=9)
    with pytest.raises(expected, match=message):
        bake(plan, saved().path, out, force=force)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if force else [])


def test_force_replaces_the_previous_result(baked, saved, tmp_path) -> None:
    _, plan, first = baked()
    before, inode = contents(first.output), first.output.stat().st_ino
    bake(plan, saved().path, first.output, force=True)
    assert contents(first.output) == before and first.output.stat().st_ino != inode
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mine", ["notes.txt", "README.md", "my/notes.txt", "my/empty", ".git/x"])
def test_force_never_deletes_the_users_files(baked, saved, tmp_path, mine) -> None:
    _, plan, first = baked()
    path = first.output / mine
    path.parent.mkdir(exist_ok=True)
    if mine == "my/empty":
        path.mkdir()
    else:
        path.write_text("mine")
    with pytest.raises(OutputError, match=f"did not write, or that changed since: {mine}"):
        bake(plan, saved().path, first.output, force=True)
    assert path.is_dir() or path.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("file", ["config.json", "chat_template.jinja", "weights"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_source_that_changes_during_the_copy_is_refused(
    saved, make_plan, tmp_path, monkeypatch, file, how
) -> None:
    plan = make_plan(saved().model)
    source = shutil.copytree(saved().path, tmp_path / "source")
    path = next(source.glob("*.safetensors")) if file == "weights" else source / file
    write = bake_module.write_weights

    def write_and_change(*arguments) -> None:
        write(*arguments)
        if how == "in place":
            with path.open("r+b") as opened:
                opened.seek(-1, os.SEEK_END)
                opened.write(b" ")
        else:
            shutil.copy2(path, tmp_path / "other")
            os.replace(tmp_path / "other", path)

    monkeypatch.setattr(bake_module, "write_weights", write_and_change)
    with pytest.raises(CheckpointError, match=f"{path.name}: this file of the source changed"):
        bake(plan, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen2"])
def test_written_bytes_are_read_back_and_compared(
    saved, make_plan, tmp_path, monkeypatch, kind
) -> None:
    """A wrong last byte is found in any tensor, reordered or not."""
    plan = make_plan(saved(kind).model)
    checkpoint = Checkpoint.open(saved(kind).path)
    entries = [entry for shard in checkpoint.shards for entry in shard.tensors]
    write = bake_module.write_weights
    spoiled: list[str] = []

    def write_and_spoil(checkpoint, reorders, folder) -> None:
        write(checkpoint, reorders, folder)
        for shard in checkpoint.shards:
            if spoiled[-1] in {entry.name for entry in shard.tensors}:
                entry = checkpoint.tensors[spoiled[-1]]
                with (folder / shard.file).open("r+b") as file:
                    file.seek(entry.stop - 1)
                    last = file.read(1)
                    file.seek(entry.stop - 1)
                    file.write(bytes([last[0] ^ 1]))

    monkeypatch.setattr(bake_module, "write_weights", write_and_spoil)
    for entry in entries[:: len(entries) // 12]:
        spoiled.append(entry.name)
        with pytest.raises(OutputError, match=f"'{entry.name}' reads back differently"):
            bake(plan, saved(kind).path, tmp_path / "out")
    assert len(spoiled) >= 12 and not list(tmp_path.iterdir())


@pytest.fixture
def refused(saved, make_plan, tmp_path):
    """Factory: baking an altered plan must raise and write nothing."""

    def check(kind, match: str, alter=lambda plan: plan, *, on=None) -> None:
        plan = alter(make_plan(saved().model))
        with pytest.raises(kind, match=match):
            bake(plan, (on or saved()).path, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    return check


def test_a_baked_plan_is_refused(refused) -> None:
    refused(PlanError, "already baked", lambda plan: replace(plan, baked=True))


def test_a_plan_without_its_neuron_order_is_refused(refused) -> None:
    refused(PlanError, "The plan: lacks neuron_order", lambda plan: plan.without_tensors())


def test_compensation_without_means_is_refused(refused) -> None:
    refused(PlanError, "lacks the means", lambda plan: replace(plan, compensation="mean"))


def test_missing_or_foreign_fitted_weights_are_refused(refused) -> None:
    refused(PlanError, "layer 0's fitted 'output' has shape None", _refitted)

    def other(plan):
        weights = {"output": torch.zeros(1, 2), "output_bias": torch.zeros(32)}
        return replace(_refitted(plan), tensors=replace(plan.tensors, refit={0: weights}))

    refused(PlanError, r"fitted 'output' has shape \(1, 2\), expected \(32, 16\)", other)


def _refitted(plan):
    """The plan with two of four heads attending in its first layer."""
    first = replace(plan.layers[0], attend_heads=(1, 2))
    return replace(plan.with_layers((first, *plan.layers[1:])), compensation="refit")


def test_another_checkpoint_is_refused_and_both_are_named(refused) -> None:
    def other(plan):
        return replace(plan, model=replace(plan.model, fingerprint="abcdef"))

    refused(ModelError, r"fingerprint is [-0-9a-f]{97}, the plan's is abcdef", other)


def test_another_shape_is_refused(refused, saved) -> None:
    match = r"dimensions differ from those of the plan's model llava-1.5-7b: kv_heads 2 \(plan: 4\)"
    refused(ModelError, match, on=saved("gqa"))


def test_another_family_is_refused(refused) -> None:
    def other(plan):
        return replace(plan, model=replace(plan.model, family="qwen2_vl"))

    refused(ModelError, "is a llava model, but the plan was made for qwen2_vl", other)


def test_a_broken_source_is_refused(saved, make_plan, tmp_path) -> None:
    plan = make_plan(saved().model)
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        bake(plan, tmp_path / "nothing", tmp_path / "out")


def test_a_full_disk_is_refused_before_the_first_byte(refused, monkeypatch) -> None:
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr("yopo.checkpoint.writer.shutil.disk_usage", lambda path: usage)
    refused(OutputError, r"out: needs 1\.\d MB, but its file system has 1.0 kB left")
