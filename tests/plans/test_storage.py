"""A side file is named by its hash, found next to the plan or in the cache, and never partial."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from yopo.plans.file import TensorsFile, read_document, to_yaml
from yopo.plans.flops import visual_budget
from yopo.plans.schema import Budget, LayerPlan, ModelIdentity, ModelShape, PruningPlan
from yopo.plans.storage import cache_directory, from_bytes, read_plan, to_bytes, write_plan
from yopo.plans.tensors import PlanTensors
from yopo.support.errors import OutputError, PlanError

SHAPE = ModelShape(layers=3, hidden=60, heads=6, kv_heads=2, head_dim=16, ffn=50)
IDENTITY = ModelIdentity("some", "llava", SHAPE, "0" * 64)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("YOPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def plan() -> PruningPlan:
    """A plan that needs both orders and means."""
    plan = tiny.random_plan(IDENTITY, random.Random(2), compensation="mean", baked=False)
    assert plan.needs_order
    return replace(plan, tensors=tiny.random_tensors(plan, 1))


def assert_same(one: PlanTensors, other: PlanTensors) -> None:
    mine, yours = dict(one.named()), dict(other.named())
    assert mine.keys() == yours.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == yours[name].dtype and torch.equal(tensor, yours[name]), name
    assert one == other


def side_file(folder: Path) -> Path:
    """Return the only side file of ``plan.yaml`` in a folder."""
    (path,) = folder.glob("plan.????????.safetensors")
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_bytes_round_trip(plan: PruningPlan) -> None:
    tensors = plan.tensors
    assert_same(from_bytes(to_bytes(tensors)), tensors)
    some = replace(tensors, neuron_order=None, head_mean=None)
    assert_same(from_bytes(to_bytes(some)), some)
    copies = replace(tensors, neuron_order=tensors.neuron_order.clone())
    assert to_bytes(copies) == to_bytes(tensors)


def test_tensors_are_equal_by_value(plan: PruningPlan) -> None:
    tensors = plan.tensors
    copies = replace(tensors, **{name: each.clone() for name, each in tensors.named()})
    assert copies == tensors and replace(plan, tensors=copies) == plan
    assert replace(tensors, head_mean=None) != tensors
    assert replace(tensors, neuron_mean=tensors.neuron_mean + 1) != tensors
    assert replace(plan, tensors=PlanTensors()) != plan
    assert tensors != "tensors" and PlanTensors() == PlanTensors() != tensors


def test_files_round_trip(plan: PruningPlan, tmp_path: Path) -> None:
    target = tmp_path / "half.yaml"
    write_plan(plan, str(target), force=False)
    sha256 = hashlib.sha256(to_bytes(plan.tensors)).hexdigest()
    named = TensorsFile(f"half.{sha256[:8]}.safetensors", sha256)
    assert read_document(target) == (plan.without_tensors(), named)
    assert files(tmp_path) == [named.file, "half.yaml"]
    assert (tmp_path / named.file).read_bytes() == to_bytes(plan.tensors)
    again = read_plan(target)
    assert_same(again.tensors, plan.tensors)
    assert again == plan
    assert to_yaml(again, named) == target.read_text() == to_yaml(plan, named)


def test_plan_and_side_file_can_be_moved_together(plan: PruningPlan, tmp_path: Path) -> None:
    write_plan(plan, str(tmp_path / "plan.yaml"), force=False)
    (tmp_path / "plan.yaml").read_text().index("file: plan.")  # no path in it
    other = tmp_path / "other"
    other.mkdir()
    for name in files(tmp_path):
        (tmp_path / name).rename(other / name)
    assert_same(read_plan(other / "plan.yaml").tensors, plan.tensors)


def test_a_plan_without_tensors_has_no_side_file(plan: PruningPlan, tmp_path: Path) -> None:
    layers = [replace(layer, neurons=0) for layer in plan.layers]
    bare = replace(plan, layers=tuple(layers), tensors=PlanTensors(), compensation="none")
    bare = replace(bare, budget=Budget(None, round(visual_budget(bare), 6)))
    write_plan(bare, str(tmp_path / "plan.yaml"), force=False)
    assert files(tmp_path) == ["plan.yaml"]
    assert read_document(tmp_path / "plan.yaml") == (bare, None)
    assert read_plan(tmp_path / "plan.yaml") == bare


def test_a_plan_on_stdout_leaves_its_tensors_in_the_cache(
    plan: PruningPlan,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    write_plan(plan, "-", force=False)
    text = capsys.readouterr().out
    sha256 = hashlib.sha256(to_bytes(plan.tensors)).hexdigest()
    named = TensorsFile(f"{sha256}.safetensors", sha256)
    assert text == to_yaml(plan, named)
    assert files(cache) == [named.file]
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    again = read_plan("-")
    assert_same(again.tensors, plan.tensors)
    assert again == plan and to_yaml(again, named) == text
    (tmp_path / "saved.yaml").write_text(text)  # and through a file, redirected by the shell
    assert_same(read_plan(tmp_path / "saved.yaml").tensors, plan.tensors)
    write_plan(plan, "-", force=False)  # the same content again is no conflict
    assert len(files(cache)) == 1


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == Path(os.environ["YOPO_CACHE"])
    monkeypatch.setenv("YOPO_CACHE", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_directory() == Path("/home/someone/.cache/yopo")


def altered(plan: PruningPlan) -> PruningPlan:
    neuron_mean = plan.tensors.neuron_mean + 1
    return replace(plan, tensors=replace(plan.tensors, neuron_mean=neuron_mean))


def test_existing_files_need_force(plan: PruningPlan, tmp_path: Path) -> None:
    target = tmp_path / "plan.yaml"
    write_plan(plan, str(target), force=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"plan\.yaml: exists already") as caught:
        write_plan(altered(plan), str(target), force=False)
    assert "--force" in caught.value.remedy
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_plan(altered(plan), str(target), force=True)
    assert_same(read_plan(target).tensors, altered(plan).tensors)
    assert len(files(tmp_path)) == 2  # the replaced plan's tensors are gone


def test_replacing_a_plan_leaves_its_copies_their_tensors(
    plan: PruningPlan, tmp_path: Path
) -> None:
    write_plan(plan, str(tmp_path / "plan.yaml"), force=False)
    (tmp_path / "mine.yaml").write_bytes((tmp_path / "plan.yaml").read_bytes())
    write_plan(altered(plan), str(tmp_path / "plan.yaml"), force=True)
    assert_same(read_plan(tmp_path / "mine.yaml").tensors, plan.tensors)
    assert_same(read_plan(tmp_path / "plan.yaml").tensors, altered(plan).tensors)


@pytest.mark.parametrize("broken", ["yopo_plan: 1\nlayers: [", "yopo_plan: 1\n"])
def test_force_replaces_a_plan_that_was_broken_by_hand(
    plan: PruningPlan, tmp_path: Path, broken: str
) -> None:
    (tmp_path / "plan.yaml").write_text(broken)
    write_plan(plan, str(tmp_path / "plan.yaml"), force=True)
    assert_same(read_plan(tmp_path / "plan.yaml").tensors, plan.tensors)


def test_a_side_files_name_is_never_taken_from_another_file(
    plan: PruningPlan, tmp_path: Path
) -> None:
    write_plan(plan, str(tmp_path / "plan.yaml"), force=False)
    (tmp_path / "plan.yaml").unlink()
    side = side_file(tmp_path)
    former = side.stat().st_ino
    write_plan(plan, str(tmp_path / "plan.yaml"), force=False)
    assert side.stat().st_ino == former  # the same content is there: nothing to write
    (tmp_path / "plan.yaml").unlink()
    side.write_bytes(b"mine")
    with pytest.raises(OutputError, match="does not match the hash in its name"):
        write_plan(plan, str(tmp_path / "plan.yaml"), force=True)
    assert side.read_bytes() == b"mine" and files(tmp_path) == [side.name]


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_plan_cannot_be_written_among_a_models_weights(
    plan: PruningPlan, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(OutputError, match="its folder holds a model's weights"):
        write_plan(plan, str(tmp_path / "model.yaml"), force=True)
    assert files(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"weights"


def test_unwritable_targets_are_refused(plan: PruningPlan, tmp_path: Path) -> None:
    for target, message in (
        (tmp_path / "none" / "plan.yaml", "folder does not exist"),
        (tmp_path, "is a directory"),
        (tmp_path / "plan.safetensors", ".safetensors is for tensors"),
    ):
        with pytest.raises(OutputError, match=message):
            write_plan(plan, str(target), force=True)
    assert files(tmp_path) == []


class Killed(BaseException):
    """Simulates a process that ends here, so that no cleanup runs."""


@pytest.mark.parametrize("step", range(8))
def test_plan_and_tensors_match_at_every_moment(
    plan: PruningPlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    """After a kill before any step that changes a name, the old or the new pair can be read."""
    target, new = tmp_path / "plan.yaml", altered(plan)
    write_plan(plan, str(target), force=False)
    steps: list[str] = []

    def stop_at(function):
        def stop(*arguments):
            if len(steps) == step:
                raise Killed
            steps.append(function.__name__)
            return function(*arguments)

        return stop

    monkeypatch.setattr("yopo.support.scratch._remove", lambda folder: True)
    monkeypatch.setattr(os, "fsync", stop_at(os.fsync))
    monkeypatch.setattr(os, "replace", stop_at(os.replace))
    monkeypatch.setattr(Path, "unlink", stop_at(Path.unlink))
    with pytest.raises(Killed) if step < 7 else contextlib.nullcontext():
        write_plan(new, str(target), force=True)
    assert_same(read_plan(target).tensors, (plan if step < 5 else new).tensors)
    # The tensors, then the plan: file synced, renamed, folder synced; what nothing names goes last.
    assert steps == [*["fsync", "replace", "fsync"] * 2, "unlink"][:step]


def test_a_missing_side_file_is_named(plan: PruningPlan, tmp_path: Path) -> None:
    write_plan(plan, str(tmp_path / "plan.yaml"), force=False)
    side_file(tmp_path).unlink()
    with pytest.raises(
        PlanError, match=r"plan\.\w{8}\.safetensors: the plan's tensors are missing"
    ):
        read_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?"])
def test_an_altered_side_file_is_refused(plan: PruningPlan, tmp_path: Path, damage: object) -> None:
    write_plan(plan, str(tmp_path / "plan.yaml"), force=False)
    side = side_file(tmp_path)
    side.write_bytes(damage(side.read_bytes()))
    with pytest.raises(PlanError, match="is not the file that the plan names"):
        read_plan(tmp_path / "plan.yaml")


def rename_in(plan: PruningPlan, folder: Path) -> Path:
    """Write a plan that names the content of ``odd.safetensors`` by its true hash."""
    sha256 = hashlib.sha256((folder / "odd.safetensors").read_bytes()).hexdigest()
    path = folder / "odd.yaml"
    path.write_text(to_yaml(plan, TensorsFile("odd.safetensors", sha256)))
    return path


def test_a_side_file_of_another_format_is_refused(plan: PruningPlan, tmp_path: Path) -> None:
    (tmp_path / "odd.safetensors").write_bytes(b"not tensors")
    with pytest.raises(PlanError, match="is not a safetensors file"):
        read_plan(rename_in(plan, tmp_path))


WRONG = {
    "lacks neuron_order": {"neuron_order": None},
    "lacks the means": {"head_mean": None},
    r"neuron_order has shape \(3, 49\), expected \(3, 50\)": {
        "neuron_order": torch.arange(49, dtype=torch.int32).repeat(3, 1)
    },
    r"head_mean has shape \(3, 6, 8\)": {"head_mean": torch.zeros(3, 6, 8)},
    "neuron_order is not a permutation": {"neuron_order": torch.zeros(3, 50, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_side_file_that_does_not_fit_is_refused(
    plan: PruningPlan, tmp_path: Path, message: str
) -> None:
    wrong = replace(plan.tensors, **WRONG[message])
    (tmp_path / "odd.safetensors").write_bytes(to_bytes(wrong))
    with pytest.raises(PlanError, match=f"odd.safetensors: {message}"):
        read_plan(rename_in(plan, tmp_path))
    with pytest.raises(PlanError, match=f"The plan: {message}"):
        write_plan(replace(plan, tensors=wrong), str(tmp_path / "plan.yaml"))
    assert not (tmp_path / "plan.yaml").exists()


@pytest.fixture
def fitted() -> PruningPlan:
    """A plan with bottlenecks, maps and subsets of attending heads, and its fitted weights."""
    layers = (
        LayerPlan((0, 1, 4), (1, 4), 2, 20, qkv_rank=7, map_rank=3),
        LayerPlan(tuple(range(6)), tuple(range(6)), None, 50),  # nothing is fitted here
        LayerPlan((3,), (), None, 0, map_rank=2),
    )
    plan = tiny.random_plan(
        IDENTITY, random.Random(2), layers=layers, compensation="refit", baked=False
    )
    return replace(plan, tensors=tiny.random_tensors(plan, 1))


def assert_same_refit(one: PlanTensors, other: PlanTensors) -> None:
    mine, yours = ({k: v for k, v in each.refit.items() if v} for each in (one, other))
    assert list(mine) == list(yours) == [0, 2]
    for index, weights in mine.items():
        assert weights.keys() == yours[index].keys()
        for name, weight in weights.items():
            assert weight.dtype == yours[index][name].dtype, name
            assert torch.equal(weight, yours[index][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fitted_weights_round_trip(fitted: PruningPlan, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {
        index: {name: each.to(dtype) for name, each in layer.items()}
        for index, layer in fitted.tensors.refit.items()
    }
    tensors = replace(fitted.tensors, refit=weights)
    again = from_bytes(to_bytes(tensors))
    assert_same(again, tensors)
    assert_same_refit(again, tensors)
    assert to_bytes(again) == to_bytes(tensors)
    plan = replace(fitted, tensors=tensors)
    write_plan(plan, str(tmp_path / "plan.yaml"), force=False)
    found = read_plan(tmp_path / "plan.yaml")
    assert found.layers == plan.layers and found == plan
    assert_same_refit(found.tensors, tensors)


def test_a_plan_takes_the_tensors_of_its_own_compensation(
    fitted: PruningPlan, plan: PruningPlan
) -> None:
    both = replace(plan.tensors, refit=fitted.tensors.refit)
    needed = replace(fitted, tensors=both).needed_tensors
    assert needed.refit is fitted.tensors.refit and needed.neuron_mean is None
    needed = replace(plan, tensors=both).needed_tensors
    assert needed.refit == {} and needed.neuron_mean is not None


SPOILED = {
    "layer 0's fitted 'down' has shape None, expected (60, 20)": (0, "down", None),
    "layer 0's fitted 'reduce' has shape (7, 59), expected (7, 60)": (0, "reduce", (7, 59)),
    "layer 0's fitted 'key' has shape (16, 7), expected (32, 7)": (0, "key", (16, 7)),
    "layer 0's fitted 'output' has shape (60, 48), expected (60, 32)": (0, "output", (60, 48)),
    "layer 1's fitted 'down' has shape (60, 50), expected None": (1, "down", (60, 50)),
    "layer 2's fitted 'map_out' has shape (60, 3), expected (60, 2)": (2, "map_out", (60, 3)),
}


@pytest.mark.parametrize("message", SPOILED)
def test_a_fitted_weight_of_the_wrong_size_is_refused(
    fitted: PruningPlan, tmp_path: Path, message: str
) -> None:
    index, name, size = SPOILED[message]
    layers = {number: dict(weights) for number, weights in fitted.tensors.refit.items()}
    layers[index].pop(name, None)
    if size is not None:
        layers[index][name] = torch.zeros(size)
    wrong = replace(fitted.tensors, refit=layers)
    (tmp_path / "odd.safetensors").write_bytes(to_bytes(wrong))
    with pytest.raises(PlanError) as caught:
        read_plan(rename_in(fitted, tmp_path))
    assert f"odd.safetensors: {message}" in str(caught.value)
    assert "calibrate again" in caught.value.remedy
    with pytest.raises(PlanError) as caught:
        write_plan(replace(fitted, tensors=wrong), str(tmp_path / "plan.yaml"))
    assert f"The plan: {message}" in str(caught.value)


def test_a_refit_plan_without_any_weight_is_refused(fitted: PruningPlan, tmp_path: Path) -> None:
    bare = replace(fitted, tensors=replace(fitted.tensors, refit={}))
    (tmp_path / "odd.safetensors").write_bytes(to_bytes(bare.tensors))
    with pytest.raises(PlanError, match="odd.safetensors: layer 0's fitted '.*' has shape None"):
        read_plan(rename_in(bare, tmp_path))
    with pytest.raises(PlanError, match="The plan: layer 0's fitted '.*' has shape None"):
        write_plan(bare, str(tmp_path / "plan.yaml"))


def test_a_plan_without_its_required_tensors_is_not_written(
    plan: PruningPlan, fitted: PruningPlan, tmp_path: Path
) -> None:
    for each, what in ((plan, "neuron_order"), (fitted, "neuron_order")):
        with pytest.raises(PlanError, match=f"The plan: lacks {what}"):
            write_plan(each.without_tensors(), str(tmp_path / "plan.yaml"))
    assert files(tmp_path) == []
