"""Bad input gives one sentence on stderr, exit code 1, no traceback and no leftovers."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from command_line import FAST, Yopo, save_model, side_file
from demo_training.build import build_processor
from PIL import Image

from yopo.plans.file import read_document


@pytest.fixture
def calibrate(yopo: Yopo, model: Path) -> Callable[..., str]:
    """Calibrates on some data, expects one sentence and no output, and returns the sentence."""

    def run(*arguments: object, of: Path | str = model) -> str:
        given = arguments if "--data" in arguments else ("--data", "demo:calibration", *arguments)
        done = yopo("calibrate", "--model", of, *FAST, "--preset", "yopo-25", *given)
        assert done.is_sentence, done
        assert not os.listdir()
        return done.err

    return run


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """Writes pairs.jsonl from rows, next to a valid image."""

    def write(*rows: object) -> Path:
        Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
        path = tmp_path / "pairs.jsonl"
        path.write_text(
            "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
        )
        return path

    return write


GOOD = {"image": "red.png", "question": "what color is the circle?", "answer": "red"}


# Plans


@pytest.mark.parametrize("command", ["inspect", "apply", "eval"])
def test_an_unreadable_plan_file_is_refused(yopo: Yopo, tmp_path: Path, command: str) -> None:
    def sentence(name: str) -> str:
        done = yopo(command, tmp_path / name)
        assert done.is_sentence, done
        return done.err

    assert "no such file" in sentence("nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in sentence("binary.yaml")
    (tmp_path / "broken.yaml").write_text("layers: [")
    assert "not valid YAML" in sentence("broken.yaml")
    (tmp_path / "other.yaml").write_text("name: value\n")
    assert "is not a yopo plan" in sentence("other.yaml")
    (tmp_path / "folder").mkdir()
    expected = "is a directory" if command == "apply" else "is not a pruned checkpoint"
    assert expected in sentence("folder")


def test_a_plan_on_stdin_that_is_not_text_is_refused(
    yopo: Yopo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"))
    assert "<stdin>: is not UTF-8 text" in yopo("inspect", "-").err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = yopo("inspect", "-")
    assert done.is_sentence and "<stdin>: expected a YAML mapping, found nothing" in done.err


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("compensation:", "compensatoin:", "compensatoin is not a known key"),
        ("heads: all", "heads: [0, 99]", "names head 99, but the heads are 0 to 3"),
        ("heads: all", "heads: [1, 0]", "must be ascending"),
        ("asked: 0.25", "asked: 1.5", "budget.asked must lie in (0, 1], found 1.5"),
        ("bidirectional: false", "bidirectional: 0", "must be true or false"),
        ("yopo_plan: 1", "yopo_plan: 99", "this yopo reads version 1"),
    ],
)
def test_a_mistake_in_a_plan_is_named(
    yopo: Yopo, plan: Path, before: str, after: str, sentence: str
) -> None:
    text = plan.read_text()
    assert before in text
    line = text[: text.index(before)].count("\n") + 1
    plan.write_text(text.replace(before, after, 1))
    done = yopo("inspect", plan)
    assert done.is_sentence and sentence in done.err and f"plan.yaml:{line}: " in done.err


def test_a_plan_with_missing_or_wrong_tensors_is_refused(
    yopo: Yopo, plan: Path, model: Path
) -> None:
    side = side_file(plan)
    side.write_bytes(side.read_bytes()[:-1] + b"\x01")
    done = yopo("apply", plan, "--model", model)
    assert done.is_sentence and "is not the file that the plan names" in done.err
    side.unlink()
    done = yopo("apply", plan, "--model", model)
    assert done.is_sentence and "tensors are missing" in done.err and not os.listdir()


def test_a_plan_of_another_model_is_refused(yopo: Yopo, plan: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=1)
    done = yopo("apply", plan, "--model", other)
    assert done.is_sentence and "fingerprint" in done.err and not os.listdir()
    demo = ("--data", "demo:heldout")
    done = yopo("eval", plan, "--model", other, "--samples", 1, "--max-new-tokens", 1, *demo)
    assert done.is_sentence and "fingerprint" in done.err


# Data


def test_unreadable_data_is_refused(calibrate, tmp_path: Path, data) -> None:
    assert "no such file" in calibrate("--data", tmp_path / "nowhere.jsonl")
    assert "holds no pairs" in calibrate("--data", data())
    assert "pairs.jsonl:1: not JSON" in calibrate("--data", data("{"))
    assert "no split 'held'" in calibrate("--data", "demo:held")
    assert "at least 1" in calibrate("--samples", 0)


def test_a_pair_without_image_or_question_is_refused(calibrate, data) -> None:
    assert "pairs.jsonl:2" in calibrate("--strict", "--data", data(GOOD, {"question": "what?"}))
    assert "pairs.jsonl:1" in calibrate("--data", data({"image": "red.png"}))


def test_missing_and_corrupt_images_are_named(calibrate, data, tmp_path: Path) -> None:
    missing = calibrate("--strict", "--data", data(GOOD, {**GOOD, "image": "blue.png"}))
    assert "pairs.jsonl:2: image blue.png: there is no file" in missing
    whole = data(GOOD, {**GOOD, "image": "cut.png"})
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    assert "pairs.jsonl:2: image cut.png: cannot be decoded" in calibrate(
        "--strict", "--data", whole
    )
    (tmp_path / "cut.png").write_text("no image")
    assert "pairs.jsonl:2: image cut.png: cannot be decoded" in calibrate(
        "--strict", "--data", whole
    )


def test_a_question_longer_than_the_context_is_refused(calibrate, data) -> None:
    long = {**GOOD, "question": "what color is the circle? " * 500}
    said = calibrate("--strict", "--data", data(GOOD, long))
    assert "pairs.jsonl:2: the prompt has " in said and "context of 2,048" in said
    said = calibrate("--data", data(long))
    assert "pairs.jsonl:1: the prompt has " in said


def test_pairs_that_cannot_be_used_are_counted_before_the_model_is_loaded(
    calibrate, yopo: Yopo, model: Path, data, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**GOOD, "id": str(number)} for number in range(20)]
    rows[3] = {"question": "without an image?"}
    rows[7]["question"] = "what color is the circle? " * 500
    path = data(*rows)
    done = yopo("calibrate", "--model", model, "--data", path, *FAST, "--preset", "yopo-25")
    assert done.code == 0
    assert f"{path}: left out 1 of 20 rows: 1 without an image (first: {path}:4: " in done.err
    assert (
        "pairs.jsonl: left out 1 of 19 rows: 1 whose prompt is longer than the model's" in done.err
    )
    assert read_document(Path("plan.yaml"))[0].provenance["samples"] == 18
    monkeypatch.setattr("yopo.pipeline.model_handle.load_dense", None)  # is not called
    done = yopo("calibrate", "--model", model, "--data", path, "--strict", "-o", "other.yaml")
    assert done.is_sentence and f"{path}:4: the pair has no image" in done.err


def test_a_real_model_is_not_calibrated_on_drawings(yopo: Yopo, model: Path, plan: Path) -> None:
    done = yopo("calibrate", "--model", model)
    assert done.is_sentence and "tiny-llava: no pairs are given" in done.err
    command = f"yopo calibrate --model {model} --data HuggingFaceM4/the_cauldron:aokvqa:train"
    assert command in done.err
    done = yopo("calibrate", "--model", "qwen2-vl-7b")
    assert done.is_sentence and "--data HuggingFaceM4/the_cauldron:docvqa:train" in done.err
    done = yopo("eval", plan)
    assert done.is_sentence
    assert f"yopo eval {plan} --data lmms-lab/VQAv2:validation" in done.err


def test_names_in_data_cannot_command_the_terminal(calibrate, data) -> None:
    said = calibrate("--data", data({**GOOD, "image": "\x1b[31m[red].png"}))
    assert "\x1b[31m[red]" not in said and "\\x1b[31m[red].png" in said


def test_prompts_without_visual_tokens_are_refused(calibrate, model: Path, tmp_path: Path) -> None:
    blind = shutil.copytree(model, tmp_path / "blind")
    processor = build_processor()
    processor.chat_template = "{% for m in messages %}USER: what? ASSISTANT:{% endfor %}"
    processor.save_pretrained(blind)
    rejected, unnoticed = "Found total 0 <image> tokens", "made a prompt without visual tokens"
    assert (rejected if tiny.processors_count_images() else unnoticed) in calibrate(of=blind)


# Requests


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, "nan"])
def test_a_budget_outside_0_to_1_is_refused(
    yopo: Yopo, model: Path, calibrated: Path, budget: object
) -> None:
    for command in (("calibrate", "--model", model), ("plan", calibrated / "stats.safetensors")):
        done = yopo(*command, "--budget", budget)
        assert done.is_sentence and "budget must lie in (0, 1]" in done.err and not os.listdir()


def test_impossible_requests_are_refused(yopo: Yopo, calibrated: Path) -> None:
    cases = {
        ("--budget", 1e-4): "fits a visual budget of 0.0001",
        ("--budget", 0.5, "--template", "readr"): "Did you mean 'reader'",
        ("--preset", "yopo-24"): "Did you mean 'yopo-25'",
        ("--visual-layers", 9): "the model has 3 layers",
        ("--head-ratio", 2): "head_ratio must lie in [0, 1]",
        ("--alpha", 0.1, "--head-ratio", 0.5): "exclude one another",
        ("--template", "reader", "--radius", 1): "template needs a budget",
        ("--shape", "reader", "--radius", 1): "template needs a budget",  # its former name
    }
    for arguments, sentence in cases.items():
        done = yopo("plan", calibrated / "stats.safetensors", *arguments)
        assert done.is_sentence and sentence in done.err and not os.listdir(), done


def test_a_file_that_holds_no_statistics_is_refused(yopo: Yopo, plan: Path, tmp_path: Path) -> None:
    assert "no such statistics" in yopo("plan", tmp_path / "nowhere.safetensors").err
    done = yopo("plan", side_file(plan))
    assert done.is_sentence and "holds no yopo statistics" in done.err
    done = yopo("plan", plan)
    assert done.is_sentence and "is not a safetensors file" in done.err


# Models


def test_an_unknown_alias_is_refused(calibrate) -> None:
    assert "Did you mean 'llava-tiny'" in calibrate(of="lava-tiny")
    assert "no such model directory" in calibrate(of="./nowhere")


def test_an_unreachable_hub_is_reported(calibrate) -> None:  # HF_HUB_OFFLINE is set for all tests
    error = calibrate(of="no-such-org/no-such-model")
    assert "no-such-org/no-such-model" in error and "reached" in error


def test_unknown_devices_and_dtypes_are_refused(calibrate) -> None:
    assert "Device 'gpu' cannot be used" in calibrate("--device", "gpu")
    assert "Unknown dtype 'float17'" in calibrate("--dtype", "float17")


def test_a_directory_without_a_model_is_refused(calibrate, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in calibrate(of=tmp_path / "empty")


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "index"])
def test_a_damaged_shard_is_refused(
    yopo: Yopo, calibrate, plan: Path, sharded: Path, tmp_path: Path, damage: str
) -> None:
    broken = shutil.copytree(sharded, tmp_path / "broken")
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "garbage":
        shard.write_bytes(b"\xff" * 200)
    else:
        (broken / "model.safetensors.index.json").write_text("{")
    assert "broken" in calibrate(of=broken)
    done = yopo("apply", plan, "--model", broken)
    assert done.is_sentence and not os.listdir()
    expected = "index.json" if damage == "index" else shard.name
    assert expected in done.err


def test_a_model_of_an_unsupported_family_is_refused(
    calibrate, model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["model_type"] = "llama"
    (other / "config.json").write_text(json.dumps(config))
    assert "not supported" in calibrate(of=other)


# Outputs


def test_outputs_are_checked_before_the_expensive_work(calibrate, model: Path, yopo: Yopo) -> None:
    assert "its folder does not exist" in calibrate("-o", "nowhere/plan.yaml")
    assert "two outputs" in calibrate("--stats", "./plan.yaml")
    assert ".safetensors is for tensors" in calibrate("-o", "plan.safetensors")
    Path("plan.yaml").write_text("mine")
    done = yopo("calibrate", "--model", "never-looked-at")
    assert done.is_sentence and "plan.yaml: exists already" in done.err and "--force" in done.err
    assert Path("plan.yaml").read_text() == "mine"


def test_an_existing_output_directory_is_refused(yopo: Yopo, plan: Path, model: Path) -> None:
    Path("out").mkdir()
    Path("out/note.txt").write_text("mine")
    done = yopo("apply", plan, "--model", model, "-o", "out")
    assert done.is_sentence and "exists already" in done.err
    done = yopo("apply", plan, "--model", model, "-o", "out", "--force")
    assert done.is_sentence and "was not written by yopo" in done.err
    assert os.listdir() == ["out"] and os.listdir("out") == ["note.txt"]
    done = yopo("apply", plan, "--model", model, "-o", model, "--force")
    assert done.is_sentence and "source" in done.err


def test_a_full_disk_while_baking_is_reported(
    yopo: Yopo, plan: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yopo.checkpoint import weights

    written = []

    def write(source: Path, target: Path, *rest: object, **options: object) -> Iterator[None]:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        written.append(target)
        target.write_bytes(b"some")
        yield from ()

    monkeypatch.setattr(weights, "write_shard", write)
    done = yopo("apply", plan, "--model", sharded)
    assert done.is_sentence and "disk full" in done.err
    assert written and not os.listdir()


def test_a_full_disk_while_writing_a_plan_is_reported(
    calibrate, yopo: Yopo, calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("yopo.support.durable.os.fsync", full)  # before it has its name
    assert "No space left on device" in calibrate("--stats", "s.safetensors")
    done = yopo("plan", calibrated / "stats.safetensors")
    assert done.is_sentence and not os.listdir()


def test_a_full_disk_while_writing_pairs_is_reported(
    yopo: Yopo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    done = yopo("pairs", "mine")
    assert done.is_sentence and "disk full" in done.err and not os.listdir()
