"""Rows about videos, through calibration and evaluation of the Qwen families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from demo_training.glyphs_build import build_processor
from PIL import Image
from test_processors import IDS, KINDS, MERGE, PATCH, TEMPLATE, make_model, make_tokenizer
from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

import yopo
from yopo.cli.main import main
from yopo.data.left_out import BadPair
from yopo.data.prompts import encode_for, load_processor
from yopo.data.rows import pair_from_row
from yopo.data.sources import open_pairs
from yopo.data.videos import Frames, VideoRef, chosen
from yopo.models.pillow_videos import PillowVideos
from yopo.models.processors import image_class
from yopo.plans.storage import read_plan
from yopo.support.errors import DataError

HIGH, WIDE = 32, 48
WITH_VIDEOS = TEMPLATE.replace(
    "{% else %}",
    "{% elif item['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}",
    1,
)


def write_video(path: Path, frames: int, *, rate: int = 8, seed: int = 0) -> None:
    """Write frames of one color each, which codecs keep."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDE, HIGH, "yuv420p"
        for number in range(frames):
            level = (40 * seed + 16 * number) % 256
            image = Image.new("RGB", (WIDE, HIGH), (level, 255 - level, 128))
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


# Frames.


@pytest.mark.parametrize(
    ("total", "rate", "fps", "most", "expected"),
    [
        (16, 8.0, 2.0, 64, [0, 4, 8, 12]),
        (16, 8.0, 8.0, 64, list(range(16))),
        (16, 8.0, 8.0, 4, [0, 4, 8, 12]),
        (16, 8.0, 8.0, 5, [0, 4, 8, 12]),
        (3, 8.0, 100.0, 64, [0, 0, 1, 2]),
        (1, 8.0, 2.0, 64, [0, 0]),
        (300, 30.0, 0.1, 64, [0, 150]),
    ],
)
def test_frames_lie_evenly_over_the_video(
    total: int, rate: float, fps: float, most: int, expected: list[int]
) -> None:
    assert chosen(total, rate, fps, most) == expected


def test_frames_are_those_that_pyav_decodes(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    write_video(tmp_path / "a.mp4", 16)
    found = VideoRef(tmp_path / "a.mp4", "p:1: video a.mp4").load(fps=2.0)
    assert (found.indices, found.fps, found.total) == ([0, 4, 8, 12], 8.0, 16)
    with av.open(str(tmp_path / "a.mp4")) as file:
        every = [frame.to_image() for frame in file.decode(video=0)]
    for index, image in zip(found.indices, found.images, strict=True):
        assert image.tobytes() == every[index].tobytes()


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadPair, match="there is no file"):
        VideoRef(tmp_path / "none.mp4", "p:1: video none.mp4").load()
    (tmp_path / "text.mp4").write_text("no video")
    try:
        import av  # noqa: F401
    except ImportError:
        with pytest.raises(BadPair, match="needs PyAV") as caught:
            VideoRef(tmp_path / "text.mp4", "p:1: video").load()
        assert "yopo[video]" in caught.value.remedy
        return
    with pytest.raises(BadPair, match="cannot be decoded"):
        VideoRef(tmp_path / "text.mp4", "p:1: video").load()


# Rows.


def test_rows_name_videos_by_path(tmp_path: Path) -> None:
    def read(**row: Any) -> Any:
        return pair_from_row(row, where="p:1", number=0, folder=tmp_path)

    one = read(video="a.mp4", question="<video>\nwhat happens?")
    assert one.images == () and one.question == "what happens?"
    assert [each.source for each in one.videos] == [tmp_path / "a.mp4"]
    two = read(videos=["a.mp4", "/b.mp4"], image="c.png", question="what?")
    assert [each.source for each in two.videos] == [tmp_path / "a.mp4", Path("/b.mp4")]
    assert len(two.images) == 1
    parts = [{"type": "video"}, {"type": "text", "text": "what?"}]
    chat = read(videos=["a.mp4"], messages=[{"role": "user", "content": parts}])
    assert len(chat.videos) == 1 and chat.question == "what?"
    for row in (
        {"image": "c.png", "question": "<video> what?"},
        {"image": "c.png", "messages": [{"role": "user", "content": parts}]},
        {"image": "c.png", "video_url": "https://a.b/c.mp4", "question": "what?"},
    ):
        with pytest.raises(BadPair, match="also about a video"):
            read(**row)
    with pytest.raises(BadPair, match="must be the path of a file"):
        read(video="https://a.b/c.mp4", question="what?")


def test_models_without_videos_leave_such_rows_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    rows = [{"image": "c.png", "question": "what?"}, {"video": "a.mp4", "question": "what?"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_pairs(tmp_path / "p.jsonl", samples=None, seed=0)
    assert len(list(found)) == 1 and "about a video" in capsys.readouterr().err
    with pytest.raises(DataError, match="also about a video"):
        open_pairs(tmp_path / "p.jsonl", samples=None, seed=0, strict=True)


# Patches.


def test_two_frames_share_a_patch() -> None:
    """A video of equal frames has the patches of their image; other frames fill the second half."""
    images = build_processor().image_processor
    side = images.patch_size * images.merge_size
    plain, other = (Image.new("RGB", (3 * side, 2 * side), (level,) * 3) for level in (50, 200))
    about = [Frames([], [0, 1], 8.0, 2)]
    still = PillowVideos(images, about)([[plain, plain]])
    as_image = images([plain], return_tensors="pt")
    assert torch.equal(still["pixel_values_videos"], as_image["pixel_values"])
    assert still["video_grid_thw"].tolist() == as_image["image_grid_thw"].tolist()
    moving = PillowVideos(images, about)([[plain, other]])["pixel_values_videos"]
    halves = moving.unflatten(1, (3, 2, -1))
    assert torch.equal(halves[:, :, 0], as_image["pixel_values"].unflatten(1, (3, 2, -1))[:, :, 0])
    assert torch.all(halves[:, :, 1] > halves[:, :, 0])
    long = PillowVideos(images, about)([[plain, plain, other, other]])
    assert long["video_grid_thw"].tolist() == [[2, *as_image["image_grid_thw"][0, 1:].tolist()]]


# End to end.


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its processor, and rows about videos and images."""
    pytest.importorskip("av")
    home = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param)
    model.generation_config.suppress_tokens = [IDS["<|image_pad|>"], IDS["<|video_pad|>"]]
    model.save_pretrained(home / "tiny")
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, min_pixels=64)
    stock = getattr(transformers, f"{request.param}Processor")
    made = image_class(stock)(images, make_tokenizer(), chat_template=WITH_VIDEOS)
    made.save_pretrained(home / "tiny")
    rows: list[dict[str, Any]] = []
    for number in range(32):
        name = f"{number}.mp4"
        write_video(home / name, 12 + 4 * (number % 2), seed=number)
        rows.append({"video": name, "question": "what is this ?", "answer": "that"})
    Image.new("RGB", (40, 24), (10, 200, 30)).save(home / "still.png")
    rows += [{"image": "still.png", "question": "is this that ?", "answer": "this"}]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


def test_videos_are_calibrated_applied_evaluated_and_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    tiny.try_few_plans(monkeypatch)
    monkeypatch.setenv("YOPO_CACHE", str(folder / "cache"))

    def run(*arguments: object) -> None:
        assert main([str(each) for each in ("-q", *arguments)]) == 0

    few = ("--batch-size", 3, "--max-new-tokens", 2)
    run("calibrate", "--model", "tiny", "--data", "rows.jsonl", *few, "--budget", 0.5,
        "--processor", "fps=4", "--processor", "max_frames=6")  # fmt: skip
    plan = read_plan("plan.yaml")
    assert len(plan.workload.grids) == 3  # six frames, two to a step
    assert plan.provenance["processor"] == {"fps": 4, "max_frames": 6}
    run("apply", "plan.yaml", "--verify", "--force")
    run("eval", "tiny-yopo", "--data", "rows.jsonl", *few, "--timing-runs", 0)
    pairs = list(open_pairs("rows.jsonl", samples=None, seed=0, videos=True))
    pruned, dense = yopo.load("tiny-yopo"), AutoModelForImageTextToText.from_pretrained("tiny")
    inputs = encode_for(pruned, load_processor("tiny-yopo"), pairs[:2] + pairs[-1:]).inputs
    assert inputs["video_grid_thw"].tolist() == [[2, *inputs["video_grid_thw"][0, 1:].tolist()]] * 2
    with torch.no_grad():
        found, usual = (each(**inputs).logits[:, -1] for each in (pruned, dense))
    assert found.isfinite().all() and not torch.allclose(found, usual, atol=1e-4)
    said = pruned.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 3
