"""Malicious and broken files are refused in one sentence, at once and at no cost."""

from __future__ import annotations

import hashlib
import io
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from yopo.data.pairs import ImageRef
from yopo.data.rows import pair_from_row
from yopo.data.sources import open_pairs
from yopo.plans.file import TensorsFile, parse_plan, to_yaml
from yopo.plans.flops import visual_budget
from yopo.plans.schema import Budget, ModelIdentity, ModelShape, PruningPlan
from yopo.plans.storage import read_plan, to_bytes
from yopo.support import console
from yopo.support.documents import MAX_BYTES, read_text
from yopo.support.errors import DataError, PlanError, YopoError, printable

SHAPE = ModelShape(layers=3, hidden=60, heads=6, kv_heads=2, head_dim=16, ffn=50)
IDENTITY = ModelIdentity("some-model", "llava", SHAPE, "f" * 64)


@pytest.fixture
def plan() -> PruningPlan:
    plan = tiny.random_plan(IDENTITY, random.Random(2), compensation="mean", baked=False)
    return replace(plan, tensors=tiny.random_tensors(plan, 1))


def text_of(plan: PruningPlan) -> str:
    return to_yaml(plan, TensorsFile("plan.safetensors", "a" * 64))


@contextmanager
def at_no_cost() -> Iterator[None]:
    """Fail if the block takes long or uses much memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    yield
    assert time.perf_counter() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10, "400 MB"


def refused(call: Callable[[], object], sentence: str) -> YopoError:
    with at_no_cost(), pytest.raises(YopoError) as caught:
        call()
    assert sentence in caught.value.message
    assert len(caught.value.message) < 1100 and caught.value.message.isprintable()
    return caught.value


# Plans


def test_aliases_cannot_multiply() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    refused(lambda: parse_plan("plan.yaml", text), "holds more than 250,000 values")
    text = "a0: &a0 {k0: 1, k1: 1}\n"
    for level in range(1, 30):
        text += f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n"
    refused(lambda: parse_plan("plan.yaml", text), "holds more than 250,000 values")


def test_a_few_aliases_are_accepted(plan: PruningPlan) -> None:
    text = text_of(replace(plan, layers=(plan.layers[0],) * 3))
    head, _, _ = text.partition("layers:\n")
    layer = "{read_heads: [0, 1], attend_heads: true, radius: 1, neurons: 50}"
    found, _ = parse_plan("plan.yaml", f"{head}layers: [&full {layer}, *full, *full]\n")
    assert found.layers[0] == found.layers[2] and "*" not in to_yaml(found)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("heads: 6", "heads: 300000000", "model.shape.heads must be at most 1024"),
        ("layers: 3", "layers: 300000000", "model.shape.layers must be at most 512"),
        ("ffn: 50", f"ffn: {'9' * 90}", "model.shape.ffn must be at most"),
        ("ffn: 50", f"ffn: {'9' * 5000}", "a number of 5000 characters"),
        ("ffn: 50", f"ffn: 0x{'f' * 5000}", "a number of 5002 characters"),
        ("ffn: 50", "ffn: 0b_", "not valid YAML"),
        ("ffn: 50", "ffn: !!int 50", "tags are not allowed"),
        ("text: 10", "text: 99999999999", "workload.text must be at most"),
        ("- [6, 6]", "- [30000, 30000]", "workload.grids must hold at most 131072 visual tokens"),
        ("- [6, 6]", "- [1, 1]\n  " * 5000, "workload.grids must hold at most 1024 images"),
        ("name: some-model", r'name: "a\x1b[31mb"', "model.name holds a control character"),
        ("name: some-model", "name: [" + "[" * 5000, "nests too deeply"),
        ("asked: null", "asked: .nan", "a number that is not finite"),
        ("asked: null", "asked: 1.0e+999", "a number that is not finite"),
        ("compensation: mean", f"{'k' * 1000}: 1", "is not a known key"),
    ],
)
def test_impossible_sizes_are_refused(plan: PruningPlan, old: str, new: str, sentence: str) -> None:
    text = text_of(replace(plan, workload=tiny.workload(side=6)))
    assert old in text
    refused(lambda: parse_plan("plan.yaml", text.replace(old, new, 1)), sentence)


def test_names_that_look_like_dates_are_names(plan: PruningPlan) -> None:
    text = text_of(plan).replace("name: some-model", "name: 2026-99-99")
    assert parse_plan("plan.yaml", text)[0].model.name == "2026-99-99"


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../plan.safetensors", "a/b", "..", ".", "", "a\\b", "x" * 300]
)
def test_a_side_file_must_be_a_plain_file_name(plan: PruningPlan, name: str) -> None:
    text = to_yaml(plan, TensorsFile(name, "0" * 64))
    refused(lambda: parse_plan("plan.yaml", text), "tensors.file must be a file name")
    text = to_yaml(plan, TensorsFile("plan.safetensors", "../" * 3))
    refused(lambda: parse_plan("plan.yaml", text), "tensors.sha256 must be 64 hex digits")


def write(plan: PruningPlan, folder: Path, side: Path | None = None) -> Path:
    """Write a plan and its tensors as files; ``side`` is where the tensors really are."""
    content = to_bytes(plan.tensors)
    path = folder / "plan.yaml"
    (side or folder / "plan.safetensors").write_bytes(content)
    named = TensorsFile("plan.safetensors", hashlib.sha256(content).hexdigest())
    path.write_text(to_yaml(plan, named))
    return path


def test_a_side_file_must_not_link_out_of_the_folder(plan: PruningPlan, tmp_path: Path) -> None:
    folder, outside = tmp_path / "plans", tmp_path / "outside.safetensors"
    folder.mkdir()
    path = write(plan, folder, outside)
    (folder / "plan.safetensors").symlink_to(outside)
    refused(lambda: read_plan(path), "is a link that leads out of its folder")


def test_side_files_may_link_to_blobs_of_the_hub_cache(plan: PruningPlan, tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    for each in (blobs, folder):
        each.mkdir(parents=True)
    path = write(plan, folder, blobs / "b10b")
    (folder / "plan.safetensors").symlink_to("../../blobs/b10b")
    assert read_plan(path) == plan


def test_an_oversized_side_file_is_not_read(plan: PruningPlan, tmp_path: Path) -> None:
    path = write(plan, tmp_path)
    os.truncate(tmp_path / "plan.safetensors", 1 << 40)  # a sparse file: it takes no space
    refused(lambda: read_plan(path), "plan.safetensors: has 1,099,511,627,776 bytes")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a_side_file_must_hold_finite_values(
    tmp_path: Path, value: float, kind: torch.dtype
) -> None:
    plan = tiny.random_plan(IDENTITY, random.Random(3), compensation="refit", baked=False)
    plan = replace(plan, tensors=tiny.random_tensors(plan, 1))
    layer, weights = next((layer, each) for layer, each in plan.tensors.refit.items() if each)
    name = next(iter(weights))
    weights[name] = weights[name].to(kind)
    read_plan(write(plan, tmp_path))
    weights[name].view(-1)[-1] = value
    refused(
        lambda: read_plan(write(plan, tmp_path)),
        f"layer {layer}'s fitted '{name}' holds values that are not finite",
    )


def test_an_edited_plan_has_the_budget_of_its_layers(
    plan: PruningPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse_plan("plan.yaml", text_of(plan))[0].budget == plan.budget
    assert capsys.readouterr().err == "", "rounding is no edit"
    stale = replace(plan, budget=Budget(0.5, 0.01))
    found, _ = parse_plan("plan.yaml", text_of(stale))
    assert found.budget == Budget(0.5, round(visual_budget(plan), 6))
    assert "states a visual budget of 0.01" in capsys.readouterr().err


# Files


def test_anything_but_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    os.mkfifo(tmp_path / "fifo.jsonl")
    os.mkfifo(tmp_path / "fifo.png")
    refused(lambda: read_plan(tmp_path / "fifo.yaml"), "is a pipe, expected a regular file")
    refused(lambda: read_plan("/dev/zero"), "/dev/zero: is a device, expected a regular file")
    refused(lambda: read_plan("a\0b"), "cannot be read")
    refused(
        lambda: open_pairs(str(tmp_path / "fifo.jsonl"), samples=None, seed=0), "is a pipe, expect"
    )
    refused(ImageRef(tmp_path / "fifo.png", "row 1").load, "there is no file")


@pytest.mark.skipif(not os.path.exists("/proc/kmsg"), reason="not on Linux")
def test_files_of_proc_do_not_hang() -> None:
    refused(lambda: read_plan("/proc/kmsg"), "/proc/kmsg: ")
    refused(ImageRef(Path("/proc/kmsg"), "row 1").load, "row 1: ")


def test_an_endless_document_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.yaml"
    path.touch()
    os.truncate(path, 1 << 40)
    refused(lambda: read_text(path), "long.yaml: has 1,099,511,627,776 bytes")
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * (MAX_BYTES + 1)))
    refused(lambda: read_text("-"), "<stdin>: is longer than the limit of 8,388,608 characters")


# Images and rows


def bomb(size: tuple[int, int], kind: str = "PNG") -> bytes:
    """Write a small file with a large image, which must never be decoded."""
    file = io.BytesIO()
    Image.new("1", size).save(file, kind)
    return file.getvalue()


def test_a_small_file_with_many_pixels_is_not_decoded() -> None:
    content = bomb((13_000, 13_000))
    assert len(content) < 100_000
    refused(ImageRef(content, "p.jsonl:3: image a.png").load, "p.jsonl:3: image a.png: cannot be")
    refused(ImageRef(bomb((30_000, 9)), "row 1").load, "it is too narrow with 30000 x 9 pixels")


def test_an_image_that_is_a_program_is_not_run() -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "EPS")
    refused(ImageRef(file.getvalue(), "row 1").load, "EPS files are programs")


ROW = {"image": "a.png", "question": "what?"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**ROW, "video_url": "v.mp4"}, "also about a video"),
        ({**ROW, "video": {"bytes": b"RIFF"}}, "the video must be the path of a file"),
        ({**ROW, "videos": ["https://x/v.mp4"]}, "the video must be the path of a file"),
        ({**ROW, "question": "<image>\n<video>\nwhat?"}, "also about a video"),
        ({**ROW, "audio": {"path": "a.wav"}}, "also about audio"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "path": "a.png"},
                            {"type": "video", "video": "v.mp4"},
                            {"type": "text", "text": "what?"},
                        ],
                    }
                ]
            },
            "also about a video",
        ),
        ({**ROW, "image": {"bytes": 10**12}}, "an image's bytes must be bytes"),
        ({**ROW, "image": "zip://a::https://x/y.zip"}, "the image is a URL"),
        ({**ROW, "question": "x" * (1 << 21)}, "the question has 2,097,152 characters"),
        ({**ROW, "answer": [[[[[["it"]]]]]]}, "an answer must be text or a list"),
        ({f"\x1b[31m{n}": 1 for n in range(1000)}, "has no question (columns found: "),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(row: dict, sentence: str, tmp_path: Path) -> None:
    refused(lambda: pair_from_row(row, where="p:1", number=0, folder=tmp_path), sentence)


def test_empty_video_columns_are_ignored(tmp_path: Path) -> None:
    row = {**ROW, "video": None, "videos": [], "audio": ""}
    assert pair_from_row(row, where="p:1", number=0, folder=tmp_path).question == "what?"


def test_images_in_openai_messages_are_found(tmp_path: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    content.append({"type": "text", "text": "what?"})
    row = {"messages": [{"role": "user", "content": content}]}
    (image,) = pair_from_row(row, where="p:1", number=0, folder=tmp_path).images
    assert image.source == tmp_path / "a.png"


# Names


def test_names_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b[31m\x9b2J\nerror: forged\r\u202e.yaml"
    shown = printable(name)
    assert shown.isprintable() and r"\x1b[31m" in shown and r"\u202e" in shown
    error = refused(lambda: read_plan(tmp_path / name), shown)
    assert "\n" not in str(error)
    console.set_quiet(False)
    console.note(name)
    console.warn(name)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [shown, f"warning: {shown}"]


def test_overlong_names_are_truncated() -> None:
    message = PlanError("x" * 10**6 + " is wrong.").message
    assert len(message) < 1010 and message.endswith("is wrong.")
    assert DataError("short").message == "short"
