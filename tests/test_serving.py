"""A baked directory is dense in stock transformers, and pruned in yopo or with remote code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import PICTURE, Subject
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForImageTextToText

import yopo
from yopo.calibration.measure import identify
from yopo.checkpoint.bake import bake
from yopo.checkpoint.sidecar_files import auto_map
from yopo.models.registry import FAMILIES, resolve
from yopo.plans.tensors import PlanTensors
from yopo.runtime.install import pruned
from yopo.runtime.sliced_linear import SlicedLinear
from yopo.serving.loading import load_dense, read_baked_plan, torch_dtype
from yopo.support.errors import CheckpointError, ModelError, YopoError

ROWS = [[1, 5, 6, *PICTURE, 7, 8, 9, 10], [1, *PICTURE, 3, 4, *PICTURE, 9]]


@pytest.fixture(scope="module", params=["hub layout", "module names"])
def baked(request: pytest.FixtureRequest, subject: Subject, tmp_path_factory):
    """Return (baked directory, plan, subject) in both key layouts."""
    folder = tmp_path_factory.mktemp("baked")
    is_hub = request.param == "hub layout"
    subject.model.save_pretrained(folder / "source", save_original_format=is_hub)
    plan = subject.random_plan(7, compensation="mean", baked=False)
    bake(plan, folder / "source", folder / "out")
    return folder / "out", plan, subject


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a single-file checkpoint."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def check_pruned(found: torch.nn.Module, plan, subject: Subject) -> None:
    inputs = tiny.batch(ROWS)
    with pruned(subject.model, plan):
        usual = tiny.logits(subject.model, inputs)
    with pruned(subject.oracle, plan, check=False):
        oracle = tiny.logits(subject.oracle, inputs)
    where = tiny.real_text(inputs)
    tiny.assert_close(tiny.logits(found, inputs), usual, oracle, where)
    assert not torch.allclose(usual[where], tiny.logits(subject.model, inputs)[where], atol=1e-3)


def test_yopo_load_gives_the_pruned_model(baked) -> None:
    path, plan, subject = baked
    check_pruned(yopo.load(path), plan, subject)


def test_remote_code_gives_the_pruned_model_and_no_random_weight(baked) -> None:
    path, plan, subject = baked
    model, report = AutoModelForImageTextToText.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    check_pruned(model, plan, subject)


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"cuda_graphs": False}])
def test_graphs_can_be_switched_off(baked, options: dict[str, bool]) -> None:
    path = baked[0]
    remote = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, **options)
    for model in (yopo.load(path, **options), remote):
        has_graphs = model.get_decoder().yopo.recordings is not None
        assert has_graphs == options.get("cuda_graphs", True)


def test_stock_load_is_the_original_model(baked) -> None:
    path, _, subject = baked
    inputs = tiny.batch(ROWS)
    stock = AutoModelForImageTextToText.from_pretrained(path)
    assert not hasattr(stock.get_decoder(), "yopo")
    usual, oracle = (tiny.logits(each, inputs) for each in (subject.model, subject.oracle))
    tiny.assert_close(tiny.logits(stock, inputs), usual, oracle, tiny.real(inputs))


def test_slices_of_baked_weights_are_views_not_copies(baked) -> None:
    path, _, subject = baked
    if subject.shape.group > 1:
        pytest.skip("ragged groups of query heads are gathered")
    state = yopo.load(path).get_decoder().yopo
    held = [name for name, _ in state.named_buffers()]
    assert held and all(name.endswith("mean") for name in held)
    for layer in state.visual:
        for sliced in (each for each in layer.children() if isinstance(each, SlicedLinear)):
            own = sliced.source.weight.untyped_storage().data_ptr()
            assert sliced.matrix()[0].untyped_storage().data_ptr() == own


STOCK = """
import sys
from transformers import AutoModelForImageTextToText
for line in sys.stdin:
    AutoModelForImageTextToText.from_pretrained(line.strip())
    assert not any(name.split(".")[0] == "yopo" for name in sys.modules)
    print("dense", flush=True)
"""


@pytest.fixture(scope="module")
def stock() -> Iterator[subprocess.Popen[str]]:
    """A process of stock transformers: loads the directories named on its input."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", STOCK], stdin=pipe, stdout=pipe, text=True)
    with process:
        yield process


def test_loading_needs_no_prompt_and_no_yopo_when_dense(baked, stock) -> None:
    path, *_ = baked
    stock.stdin.write(f"{path}\n")
    stock.stdin.flush()
    assert stock.stdout.readline() == "dense\n"


@pytest.mark.parametrize(
    ("part", "problem"),
    [("mlp.down_proj.weight", "lacks mlp.down_proj"), ("linear_1.weight", "1 weights are missing")],
)
def test_a_missing_weight_is_an_error_not_a_random_tensor(
    baked, part: str, problem: str, tmp_path: Path
) -> None:
    path, *_ = baked
    broken = shutil.copytree(path, tmp_path / "broken")

    def lose(weights: dict[str, torch.Tensor]) -> None:
        del weights[next(name for name in weights if name.endswith(part) and "vision" not in name)]

    edit_weights(broken, lose)
    with pytest.raises(CheckpointError, match=problem):
        load_dense(resolve(str(broken)))
    with pytest.raises(YopoError, match=r"lacks|weights are not those"):
        yopo.load(broken)


def test_weights_other_than_the_plans_are_refused(baked, tmp_path: Path) -> None:
    path, _, subject = baked
    other = shutil.copytree(path, tmp_path / "other")
    stranger = tiny.llava("mha")
    if subject.shape != tiny.make_subject("mha").shape:
        pytest.skip("one shape is enough")
    stranger.save_pretrained(tmp_path / "stranger")
    shutil.copy(tmp_path / "stranger" / "model.safetensors", other / "model.safetensors")
    with pytest.raises(ModelError, match="fingerprint"):
        yopo.load(other)


def test_a_dense_directory_is_not_loaded_as_pruned(mha: Subject, tmp_path: Path) -> None:
    mha.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no yopo_plan\.yaml"):
        yopo.load(tmp_path)


def test_unreachable_and_unsupported_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hub cannot be"):
        load_dense(replace(resolve("llava-1.5-7b"), location="nobody/nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="'bert' are not supported"):
        load_dense(resolve(str(tmp_path)))
    for short, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("FP32", "float32")):
        assert torch_dtype(short) is getattr(torch, name)
    with pytest.raises(ModelError, match="Unknown dtype 'float33'"):
        torch_dtype("float33")


@torch.no_grad()
def test_auto_model_is_the_pruned_one_without_its_head(baked) -> None:
    path, plan, subject = baked
    base = AutoModel.from_pretrained(path, trust_remote_code=True)
    assert type(base).__name__ == "LlavaModel" and yopo.is_pruned(base)
    inputs = tiny.batch(ROWS)
    where = tiny.real_text(inputs)
    found = subject.model.lm_head(base(**inputs).last_hidden_state)
    with pruned(subject.model, plan):
        usual = tiny.logits(subject.model, inputs)
    assert torch.allclose(found[where], usual[where], atol=1e-4)


def test_a_pruned_model_cannot_be_built_from_a_configuration(baked) -> None:
    path, *_ = baked
    config = AutoConfig.from_pretrained(path)
    with pytest.raises(ModelError, match="from its configuration alone"):
        AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    assert not yopo.is_pruned(AutoModelForImageTextToText.from_config(config))


def test_a_model_says_whether_it_is_pruned_and_how_far(baked) -> None:
    path, plan, subject = baked
    model = yopo.load(path)
    wrapped = torch.nn.ModuleDict({"inside": model})
    for each in (model, wrapped, torch.compile(model), model.get_decoder()):
        assert yopo.is_pruned(each)
        assert yopo.plan_of(each).budget.reached == plan.budget.reached
    assert not yopo.is_pruned(subject.model) and yopo.plan_of(subject.model) is None
    means = PlanTensors(neuron_mean=plan.tensors.neuron_mean, head_mean=plan.tensors.head_mean)
    with pruned(subject.model, plan):  # the order is in its layers
        assert yopo.plan_of(subject.model) == replace(plan, tensors=means)
    assert not yopo.is_pruned(subject.model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_of_any_precision_loads_in_any_other(
    mha: Subject, stored, loaded, tmp_path: Path
) -> None:
    model = tiny.llava("mha").to(stored)
    with torch.no_grad():  # values that float16 rounds to zero or to coarse steps
        for name, weight in model.get_decoder().named_parameters():
            if name.endswith("proj.weight"):
                weight[0] *= 1e-6
    model.save_pretrained(tmp_path / "source")
    source = resolve(str(tmp_path / "source"))
    identity = identify(load_dense(source, dtype=loaded), "tiny")  # as `calibrate --dtype` does
    plan = replace(mha, identity=identity).random_plan(7, baked=False)
    bake(plan, source.location, tmp_path / "out")
    found = yopo.load(tmp_path / "out", dtype=loaded)
    assert found.dtype == loaded and yopo.is_pruned(found)
    dense = load_dense(resolve(str(tmp_path / "out")), dtype=loaded)
    own = yopo.read_plan(tmp_path / "out" / "yopo_plan.yaml")
    assert own == read_baked_plan(tmp_path / "out")
    with pruned(dense, own):
        assert yopo.is_pruned(dense)  # a model in memory knows its files too


@pytest.mark.parametrize(
    "part", ["linear_1.weight", "lm_head.weight", "embed_tokens.weight", "mlp.up_proj.weight"]
)
def test_swapped_parts_and_inner_rows_are_noticed(baked, part: str, tmp_path: Path) -> None:
    path, _, subject = baked
    if subject.shape != tiny.make_subject("mha").shape:
        pytest.skip("one shape is enough")
    other = shutil.copytree(path, tmp_path / "other")

    def swap(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if name.endswith(part) and "vision" not in name)
        weights[name][1:-1] = weights[name][1:-1].flip(0)

    edit_weights(other, swap)
    with pytest.raises(ModelError, match="its weights are not those that its plan was baked into"):
        yopo.load(other)
    with pytest.raises(ModelError, match="its weights are not those that its plan was baked into"):
        AutoModelForImageTextToText.from_pretrained(other, trust_remote_code=True)


def test_the_index_names_the_weight_files_for_other_engines(baked) -> None:
    path, *_ = baked
    files = {file.name for file in path.glob("*.safetensors")}
    assert files == {"model.safetensors", "yopo.safetensors"}
    index = json.loads((path / "model.safetensors.index.json").read_text())
    weights = load_file(path / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(weights, "model.safetensors")
    sizes = [weight.numel() * weight.element_size() for weight in weights.values()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_auto_map_names_every_auto_class_of_a_family(family) -> None:
    config = CONFIG_MAPPING[family.model_type]()
    expected = {
        name
        for name in dir(transformers)
        if name.startswith("AutoModel")
        and (mapping := getattr(getattr(transformers, name), "_model_mapping", None)) is not None
        and type(config) in mapping
    }
    assert expected == set(auto_map(config))
    assert {"AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"} <= expected


def test_trust_remote_code_changes_nothing_for_yopo_load(baked) -> None:
    path, plan, *_ = baked
    assert yopo.plan_of(yopo.load(path, trust_remote_code=True)).layers
    assert not yopo.is_pruned(load_dense(resolve(str(path)), trust_remote_code=True))


HOSTILE = """
import pathlib
pathlib.Path(r"{}").touch()
"""


def test_a_baked_checkpoint_holds_only_our_code(mha: Subject, tmp_path: Path) -> None:
    source, mark = tmp_path / "source", tmp_path / "ran"
    mha.model.save_pretrained(source)
    (source / "theirs.py").write_text(HOSTILE.format(mark))
    config = json.loads((source / "config.json").read_text())
    theirs = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.C", "AutoModel": "theirs.C"}
    config["auto_map"] = theirs
    config["text_config"]["auto_map"] = theirs
    (source / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        about = {"kept": "é", "auto_map": {"AutoTokenizer": ["theirs.C", None]}}
        (source / name).write_text(json.dumps(about))
    plan = mha.random_plan(7, baked=False)
    out = tmp_path / "out"
    bake(plan, source, out)
    assert [path.name for path in out.rglob("*.py")] == ["modeling_yopo.py"]
    for path in out.glob("*.json"):
        assert "theirs" not in path.read_text()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"kept": "é"}
    for auto in (AutoModel, AutoModelForImageTextToText):
        assert yopo.is_pruned(auto.from_pretrained(out, trust_remote_code=True))
    assert not mark.exists()
