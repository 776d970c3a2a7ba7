"""Pairs from JSON files and the demo, and how their images are decoded."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from yopo.data.pairs import ImageRef
from yopo.data.sources import check_exists, open_pairs
from yopo.support.errors import DataError


def write_image(path: Path, *, mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 100, 50)).convert(mode).save(path)
    return path


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(number: int = 0, **changes: object) -> dict[str, object]:
    return {"image": "a.png", "question": f"What is {number}?", "answer": "it", **changes}


def test_jsonl_rows_become_pairs(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = write_rows(
        tmp_path / "own.jsonl", [row(0, id="x7", kind="color", extra=[1]), row(1, answer=None)]
    )
    pairs = open_pairs(str(path), samples=None, seed=0)
    first, second = pairs
    assert (first.question, first.answers, first.kind, first.id) == (
        "What is 0?",
        ("it",),
        "color",
        "x7",
    )
    assert (second.answers, second.kind, second.id) == ((), None, "1")
    assert first.where == f"{path}:1"
    assert first.images[0].load().size == (7, 5)
    assert (pairs.name, pairs.total) == ("own.jsonl", 2)
    assert pairs.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(pairs) == [first, second], "a second iteration must yield the same"


def test_two_images_stay_in_order(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", size=(3, 2))
    write_image(tmp_path / "b.png", size=(2, 3))
    path = write_rows(tmp_path / "p.jsonl", [row(images=["b.png", "a.png"], image=None)])
    (pair,) = open_pairs(str(path), samples=None, seed=0)
    assert [ref.load().size for ref in pair.images] == [(2, 3), (3, 2)]


def test_relative_paths_survive_chdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "data" / "deep" / "a.png")
    write_rows(tmp_path / "data" / "p.jsonl", [row(image="deep/a.png")])
    monkeypatch.chdir(tmp_path)
    (pair,) = open_pairs("data/p.jsonl", samples=None, seed=0)
    monkeypatch.chdir("/")
    assert pair.images[0].load().size == (7, 5)


def test_json_list_and_lines_are_told_apart_by_content(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    rows = [row(number, note="é ] [ , }") for number in range(3)]
    (tmp_path / "pretty.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    (tmp_path / "compact.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "bom.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    write_rows(tmp_path / "lines.json", rows)
    read = {
        name: list(open_pairs(str(tmp_path / f"{name}.json"), samples=None, seed=0))
        for name in ("pretty", "compact", "bom", "lines")
    }
    questions = [[pair.question for pair in pairs] for pairs in read.values()]
    assert questions == [["What is 0?", "What is 1?", "What is 2?"]] * 4
    lines = [pair.where.rsplit(":", 1)[1] for pair in read["pretty"]]
    assert lines == ["2", "8", "14"]
    assert [pair.where.rsplit(":", 1)[1] for pair in read["lines"]] == ["1", "2", "3"]


def test_blank_lines_count_as_lines(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = tmp_path / "p.jsonl"
    path.write_text("\n" + json.dumps(row()) + "\n\n", encoding="utf-8")
    (pair,) = open_pairs(str(path), samples=None, seed=0)
    assert (pair.where, pair.id) == (f"{path}:2", "0")


def test_sample_is_seeded_nested_and_in_file_order(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = str(write_rows(tmp_path / "p.jsonl", [row(number) for number in range(50)]))

    def ids(samples: int | None, seed: int) -> list[int]:
        pairs = open_pairs(path, samples=samples, seed=seed)
        assert pairs.total == len(list(pairs))
        return [int(pair.id) for pair in pairs]

    eight = ids(8, 3)
    assert eight == ids(8, 3)
    assert eight == sorted(set(eight)) and len(eight) == 8
    assert set(eight) < set(ids(20, 3))
    assert eight != ids(8, 4)
    assert eight != list(range(8)), "the first rows of a file are no sample"
    assert ids(None, 3) == list(range(50))


def test_too_many_samples_use_all_and_warn_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "a.png")
    path = write_rows(tmp_path / "p.jsonl", [row(0), row(1)])
    pairs = open_pairs(str(path), samples=9, seed=0)
    assert len(list(pairs)) == len(list(pairs)) == pairs.total == 2
    expected = f"warning: {path}: 9 samples were requested, but there are 2; using all.\n"
    assert capsys.readouterr().err == expected


def expect_error(data: str | None, start: str, remedy: str = "", **options: object) -> None:
    with pytest.raises(DataError) as caught:
        list(open_pairs(data, **{"samples": None, "seed": 0, **options}))
    assert caught.value.message.startswith(start), caught.value.message
    assert remedy in (caught.value.remedy or "")
    assert "\n" not in caught.value.message


def test_missing_sources_are_refused(tmp_path: Path) -> None:
    expect_error(f"{tmp_path}/no.jsonl", f"{tmp_path}/no.jsonl: no such file.", "Give a .jsonl")
    expect_error(f"{tmp_path}/nothing", f"{tmp_path}/nothing: no such file or directory.", "hub id")
    expect_error("nothing", "nothing: no such file or directory.", "demo:calibration")
    (tmp_path / "pairs.txt").write_text("x")
    expect_error(f"{tmp_path}/pairs.txt", f"{tmp_path}/pairs.txt: pairs cannot be read", "Give a")


def test_bad_json_names_its_line(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    lines, listed = tmp_path / "p.jsonl", tmp_path / "p.json"
    lines.write_text(json.dumps(row()) + "\n{'image'\n", encoding="utf-8")
    listed.write_text("[\n" + json.dumps(row()) + ",\n{]\n", encoding="utf-8")
    expect_error(str(lines), f"{lines}:2: not JSON: ", "one object per line")
    expect_error(str(listed), f"{listed}:3: not JSON: ", "one object per line")
    lines.write_bytes(b"\xff\xfe\x00")
    expect_error(str(lines), f"{lines}:1: is not UTF-8 text.")
    for text in ("", "\n\n", "[]"):
        lines.write_text(text)
        expect_error(str(lines), f"{lines}: holds no pairs.")


def test_first_bad_pair_is_an_error_even_outside_the_sample(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = tmp_path / "p.jsonl"
    for bad, start in [
        (row(image=None), ": the pair has no image (columns found: image, question, answer)."),
        (row(image=[]), ": the pair has no image"),
        (row(question=" <image>\n"), ": the pair has no question"),
        (row(question=5), ": the question must be text, found 5."),
        (row(image=5), ": the image must be a path or an image, found 5."),
        (row(answer={"a": 1}), ": an answer must be text or a list of texts, found {'a': 1}."),
        (row(image="https://x.org/a.png"), ": the image is a URL ('https://x.org/a.png')"),
        ("a text", ": a pair must be an object with an image and a question, found 'a text'."),
    ]:
        write_rows(path, [row(), row(), bad, row()])
        expect_error(str(path), f"{path}:3{start}", strict=True)
        expect_error(str(path), f"{path}:3{start}", strict=True, samples=1)


def test_a_missing_image_is_found_before_anything_runs(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(image="gone.png")])
    with pytest.raises(DataError) as caught:
        open_pairs(str(path), samples=None, seed=0)
    assert caught.value.message == (
        f"{path}:1: image gone.png: there is no file {tmp_path / 'gone.png'}."
    )
    assert "relative to the folder" in str(caught.value.remedy)


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "broken chunk"])
def test_a_corrupt_image_names_its_file_and_row(tmp_path: Path, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(
        {
            "text": b"<html>",
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "broken chunk": whole[:60] + b"\x00" * 40 + whole[100:],
        }[damage]
    )
    path = write_rows(tmp_path / "p.jsonl", [row()])
    with pytest.raises(DataError) as caught:
        open_pairs(str(path), samples=None, seed=0)
    assert caught.value.message.startswith(f"{path}:1: image a.png: cannot be decoded: ")
    assert "Replace the file" in str(caught.value.remedy)


def test_meaningless_options_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    path = write_rows(tmp_path / "p.jsonl", [row()])
    expect_error(str(path), "The number of samples must be at least 1, found 0.", samples=0)
    expect_error(str(path), f"{path}: a single file has no splits", split="train")
    expect_error("demo:trian", "The demo pairs have no split 'trian'.", "Did you mean 'train'")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK"])
def test_every_mode_decodes_to_rgb(mode: str, tmp_path: Path) -> None:
    suffix = "tiff" if mode == "CMYK" else "png"
    path = write_image(tmp_path / f"a.{suffix}", mode=mode)
    image = ImageRef(path, "a").load()
    assert image.mode == "RGB" and image.size == (7, 5)
    for source in (Image.open(path), path.read_bytes()):
        assert ImageRef(source, "a").load().tobytes() == image.tobytes()
    if mode == "RGBA":
        assert image.getpixel((0, 0)) == (200, 100, 50)


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "a.png")
    assert ImageRef(tmp_path / "a.png", "a").load().getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (6, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    held = io.BytesIO()
    image.save(held, "JPEG", exif=exif)
    assert ImageRef(held.getvalue(), "a").load().size == (3, 6)


def test_demo_pairs_are_a_source() -> None:
    pytest.importorskip("yopo.demo.scenes")
    pairs = open_pairs(None, samples=6, seed=0)
    first = list(pairs)
    assert (pairs.name, pairs.total, pairs.digest) == ("demo:calibration", 6, None)
    assert len(first) == 6 and all(pair.answers and pair.kind for pair in first)
    assert [pair.id for pair in first] == [pair.id for pair in pairs]
    assert first[0].images[0].load().mode == "RGB"
    other = list(open_pairs("demo:heldout", samples=6, seed=0))
    assert not {pair.id for pair in first} & {pair.id for pair in other}
    assert open_pairs("demo:train", samples=None, seed=0).total == 256


MIX = 40
"""Rows of a mix in which some cannot be used."""


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    """A LLaVA mix on one line: every tenth row without an image, row 3 with a corrupt one."""
    write_image(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    listed: list[object] = []
    for number in range(MIX):
        turns = [{"from": "human", "value": f"<image>\nWhat is {number}?"}]
        image = {} if number % 10 == 5 else {"image": "cut.png" if number == 3 else "a.png"}
        listed.append({"id": str(number), "conversations": turns, **image})
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(listed), encoding="utf-8")
    return path


def test_rows_that_cannot_be_used_are_counted_and_left_out(
    mix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = open_pairs(str(mix), samples=None, seed=0)
    assert pairs.total == len(list(pairs)) == MIX - 5
    assert not {"3", "5", "15", "25", "35"} & {pair.id for pair in pairs}
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {mix}: left out 5 of {MIX} rows: 4 without an image (")
    assert f"(first: {mix} row 5: the pair has no image" in warning
    assert f"; 1 with an image that cannot be decoded (first: {mix} row 3: image cut" in warning
    assert warning.endswith("Use --strict to refuse them.")


def test_other_pairs_are_drawn_instead(mix: Path) -> None:
    pairs = open_pairs(str(mix), samples=MIX - 5, seed=0)
    assert pairs.total == len(list(pairs)) == MIX - 5
    fewer = {pair.id for pair in open_pairs(str(mix), samples=MIX // 2, seed=0)}
    assert len(fewer) == MIX // 2 and fewer < {pair.id for pair in pairs}


def test_strict_refuses_the_first_row_that_cannot_be_used(mix: Path) -> None:
    expect_error(str(mix), f"{mix} row 5: the pair has no image", strict=True)
    rows = [json.loads(mix.read_text())[number] for number in (0, 3)]
    mix.write_text(json.dumps(rows))
    expect_error(str(mix), f"{mix} row 1: image cut.png: cannot be decoded", strict=True)


def test_a_source_without_a_usable_row_is_refused(mix: Path) -> None:
    mix.write_text(json.dumps([{"question": "q"}] * 7))
    start = f"{mix}: none of its 7 rows can be used; the first problem: {mix} row 0: the pair has"
    expect_error(str(mix), start, "Name the image in one of the columns")


def test_a_sample_holds_as_many_of_each_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "a.png")
    kinds = ["common"] * 90 + ["rare"] * 4 + ["other"] * 6
    path = write_rows(tmp_path / "p.jsonl", [row(kind=kind) for kind in kinds])
    drawn = [pair.kind for pair in open_pairs(str(path), samples=24, seed=0)]
    counts = {kind: drawn.count(kind) for kind in set(kinds)}
    assert counts == {"common": 14, "rare": 4, "other": 6}
    expected = f"{path}: using 24 of 100 pairs, evenly over 3 kinds (--samples N, or all).\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_file_becomes_pairs(tmp_path: Path, separator: str) -> None:
    write_image(tmp_path / "a.png")
    lines = [
        separator.join(cells)
        for cells in (
            ["image", "question", "answer", "kind"],
            ["a.png", f'"What{separator} then?\nThis?"', "007", "long"],
            ["", "Without an image", "x", "y"],
            ["a.png", "Why?", "NA", ""],
        )
    ]
    path = tmp_path / "own.csv"
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    pairs = open_pairs(str(path), samples=None, seed=0)
    first, second = pairs
    assert first.question == f"What{separator} then?\nThis?" and first.answers == ("007",)
    assert (second.answers, second.where) == (("NA",), f"{path}:5")
    assert pairs.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"\xff\xfe\x00")
    expect_error(str(path), f"{path}: is not UTF-8 text.")
    path.write_text("image,question\n")
    expect_error(str(path), f"{path}: holds no pairs.")


def test_several_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [row(id=f"{name}{n}") for n in range(40)])
    named = [f"{tmp_path}/a.jsonl:0.7", f"{tmp_path}/b.jsonl:0.3"]
    pairs = open_pairs(named, samples=20, seed=0)
    ids = [pair.id[0] for pair in pairs]
    assert (ids.count("a"), ids.count("b"), pairs.total) == (14, 6, 20)
    assert pairs.name == "a.jsonl (70%) + b.jsonl (30%)" and pairs.digest is not None
    equal = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert open_pairs(equal, samples=None, seed=0).total == 80
    with pytest.raises(DataError, match="Weights of several sources have no meaning"):
        open_pairs(named, samples=None, seed=0)
    with pytest.raises(DataError, match="must be positive"):
        open_pairs([*equal, f"{tmp_path}/b.jsonl:0"], samples=9, seed=0)
    (tmp_path / "b.jsonl:2").write_text((tmp_path / "b.jsonl").read_text())
    expect_error(f"{tmp_path}/b.jsonl:2", f"{tmp_path}/b.jsonl:2: pairs cannot be read from")


def test_existence_is_checked_without_reading(tmp_path: Path) -> None:
    check_exists(["demo:heldout", "org/name:train", str(tmp_path), f"{tmp_path}:train:0.5"])
    for name, start in (
        ("gone.jsonl", "gone.jsonl: no such file."),
        ("gone", "gone: no such file or directory."),
        ("demo:gone", "The demo pairs have no split"),
    ):
        with pytest.raises(DataError) as caught:
            check_exists([str(tmp_path), name])
        assert caught.value.message.startswith(start)
