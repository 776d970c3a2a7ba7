"""Pairs through the datasets library: parquet, directories, hub."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from yopo.data import tables
from yopo.data.listed import QUESTIONS
from yopo.data.sources import open_pairs
from yopo.models.hub import Probe, probe
from yopo.support.errors import DataError

COUNT = 12


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(width: int) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (width, 4), (10 * width, 0, 0)).save(held, "PNG")
    return held.getvalue()


def columns() -> dict[str, list[Any]]:
    """Columns of pairs whose image width identifies the row: number + 1."""
    return {
        "image": [{"bytes": png(number + 1), "path": None} for number in range(COUNT)],
        "question": [f"q{number}" for number in range(COUNT)],
        "answers": [[{"answer": f"a{number}"}] for number in range(COUNT)],
    }


def dataset(*, is_image: bool = True) -> datasets.Dataset:
    made = datasets.Dataset.from_dict(columns())
    return made.cast_column("image", datasets.Image()) if is_image else made


def check_all(pairs: Any) -> None:
    read = list(pairs)
    assert [pair.question for pair in read] == [f"q{number}" for number in range(COUNT)]
    assert [pair.images[0].load().size[0] for pair in read] == list(range(1, COUNT + 1))
    assert read[3].answers == ("a3",) and read[3].id == "3"
    assert [pair.question for pair in pairs] == [pair.question for pair in read]


@pytest.mark.parametrize("is_image", [True, False], ids=["image column", "raw struct"])
def test_a_parquet_file_becomes_pairs(tmp_path: Path, is_image: bool) -> None:
    path = tmp_path / "own.parquet"
    dataset(is_image=is_image).to_parquet(path)
    pairs = open_pairs(str(path), samples=None, seed=0)
    check_all(pairs)
    assert (pairs.name, pairs.total) == ("own.parquet", COUNT)


def test_a_parquet_file_name_is_not_a_glob_pattern(tmp_path: Path) -> None:
    dataset().to_parquet(tmp_path / "x.parquet")
    path = (tmp_path / "x.parquet").rename(tmp_path / "own[1]*.parquet")
    assert open_pairs(str(path), samples=None, seed=0).total == COUNT


def test_sampling_parquet_keeps_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    dataset().to_parquet(path)
    pairs = open_pairs(str(path), samples=4, seed=1)
    numbers = [int(pair.id) for pair in pairs]
    assert len(numbers) == pairs.total == 4 and numbers != [0, 1, 2, 3]
    assert [pair.images[0].load().size[0] - 1 for pair in pairs] == numbers
    assert [pair.where for pair in pairs] == [f"{path} row {number}" for number in numbers]
    assert numbers == [int(pair.id) for pair in open_pairs(str(path), samples=4, seed=1)]


def test_parquet_may_hold_paths_and_several_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3))
    (tmp_path / "b.png").write_bytes(png(5))
    rows = {"images": [["b.png", "a.png"]], "question": ["q"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "paths.parquet")
    held = {"images": [[{"bytes": png(5), "path": None}, {"bytes": png(3), "path": None}]]}
    made = datasets.Dataset.from_dict({**held, "question": ["q"]})
    made = made.cast_column("images", datasets.List(datasets.Image()))
    made.to_parquet(tmp_path / "held.parquet")
    for name in ("paths", "held"):
        (pair,) = open_pairs(str(tmp_path / f"{name}.parquet"), samples=None, seed=0)
        assert [ref.load().size[0] for ref in pair.images] == [5, 3]


def test_parquet_may_hold_chat_rows(tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "q"}]
    reply = [{"type": "text", "text": "a"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    rows = [{"images": [{"bytes": png(2), "path": None}], "messages": messages}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    messages[1]["content"] = "a"  # text here and a list there: datasets stores JSON
    made = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(made.features)
    made.cast_column("images", datasets.List(datasets.Image())).to_parquet(
        tmp_path / "json.parquet"
    )
    for name in ("chat", "json"):
        (pair,) = open_pairs(str(tmp_path / f"{name}.parquet"), samples=None, seed=0)
        assert (pair.question, pair.answers) == ("q", ("a",))
        assert pair.images[0].load().size == (2, 4)


def test_a_parquet_directory_has_splits(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    dataset().to_parquet(home / "train-00000-of-00001.parquet")
    check_all(open_pairs(str(home), samples=None, seed=0))
    dataset().select(range(2)).to_parquet(home / "test-00000-of-00001.parquet")
    with pytest.raises(DataError) as caught:
        open_pairs(str(home), samples=None, seed=0)
    assert caught.value.message == f"{home}: has the splits train, test, and none was named."
    assert caught.value.remedy == f"Add one to the name: {home}:train."
    named = open_pairs(f"{home}:test", samples=None, seed=0)
    assert (named.name, named.total) == ("home:test", 2)
    assert open_pairs(str(home), samples=None, seed=0, split="test").total == 2
    with pytest.raises(DataError, match="has no split 'tset'"):
        open_pairs(f"{home}:tset", samples=None, seed=0)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_an_image_folder_becomes_pairs(tmp_path: Path, form: str) -> None:
    home = tmp_path / "folder"
    home.mkdir()
    (home / "a.png").write_bytes(png(3))
    (home / "b.png").write_bytes(png(5))
    if form == "jsonl":
        rows = [{"file_name": f"{name}.png", "question": name, "answer": "x"} for name in "ab"]
        (home / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (home / "metadata.csv").write_text("file_name,question,answer\na.png,a,x\nb.png,b,x\n")
    pairs = open_pairs(str(home), samples=None, seed=0)
    widths = {pair.question: pair.images[0].load().size[0] for pair in pairs}
    assert widths == {"a": 3, "b": 5} and pairs.name == "folder"


def test_saved_datasets_become_pairs(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "one")
    check_all(open_pairs(str(tmp_path / "one"), samples=None, seed=0))
    both = datasets.DatasetDict(train=dataset(), test=dataset().select(range(2)))
    both.save_to_disk(tmp_path / "both")
    assert open_pairs(f"{tmp_path}/both:test", samples=None, seed=0).total == 2
    with pytest.raises(DataError, match="has no splits"):
        open_pairs(f"{tmp_path}/one:test", samples=None, seed=0)


def expect_error(data: Path | str, start: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        open_pairs(str(data), samples=None, seed=0, **options)
    assert caught.value.message.startswith(start), caught.value.message
    assert "\n" not in caught.value.message


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.parquet"
    dataset().rename_column("question", "frage").to_parquet(wrong)
    first = f"{wrong} row 0: the pair has no question (columns found: image, frage, answers)."
    expect_error(wrong, f"{wrong}: none of its 12 rows can be used; the first problem: {first}")
    expect_error(wrong, first, strict=True)
    corrupt = tmp_path / "corrupt.parquet"
    corrupt.write_bytes(b"PAR1 nothing else")
    expect_error(corrupt, f"{corrupt}: cannot be read as parquet: ")
    empty = tmp_path / "empty.parquet"
    dataset().select([]).to_parquet(empty)
    expect_error(empty, f"{empty}: cannot be read as parquet: it holds no pairs.")
    bare = tmp_path / "bare"
    bare.mkdir()
    expect_error(bare, f"{bare}: the directory holds no pairs.")


def with_bad_rows() -> datasets.Dataset:
    """Row 2 has a corrupt image, row 5 none."""
    values = columns()
    values["image"][2] = {"bytes": b"no image", "path": "cat.png"}
    values["image"][5] = None
    return datasets.Dataset.from_dict(values).cast_column("image", datasets.Image())


def expect_left_out(err: str, name: str) -> None:
    assert f"warning: {name}: left out 2 of {COUNT} rows: " in err
    assert f"1 without an image (first: {name} row 5: " in err
    assert f"cannot be decoded (first: {name} row 2: image cat.png: cannot be decoded: " in err


def test_bad_rows_of_parquet_are_counted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.parquet"
    with_bad_rows().to_parquet(path)
    pairs = open_pairs(str(path), samples=None, seed=0)
    numbers = [int(pair.id) for pair in pairs]
    assert numbers == [each for each in range(COUNT) if each not in (2, 5)]
    assert pairs.total == len(numbers) == len(list(pairs))
    expect_left_out(capsys.readouterr().err, str(path))
    drawn = open_pairs(str(path), samples=COUNT - 2, seed=0)
    assert [int(pair.id) for pair in drawn] == numbers, "others are drawn instead"
    expect_error(path, f"{path} row 2: image cat.png: cannot be decoded", strict=True)


@pytest.mark.parametrize("samples", [None, COUNT - 2])
def test_bad_rows_of_a_stream_are_counted_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], samples: int | None
) -> None:
    hub_with(monkeypatch, {"train": with_bad_rows()})
    pairs = open_pairs("org/vqa", samples=samples, seed=0)
    for _ in range(2):
        assert len({pair.id for pair in pairs}) == COUNT - 2
        assert all(pair.images[0].load().size[1] == 4 for pair in pairs)
    err = capsys.readouterr().err
    assert err.count("left out 2 of 12 rows") == 1 and ("cat.png" in err)
    strict = open_pairs("org/vqa", samples=None, seed=0, strict=True)
    with pytest.raises(DataError, match="row 2: image cat.png: cannot be decoded"):
        list(strict)


def test_pictures_without_questions_are_asked_general_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "photos"
    for number in range(COUNT):
        file = home / ("deep" if number % 2 else ".") / f"{number:02}.PNG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number + 1) if number != 4 else b"no image")
    (home / "notes.txt").write_text("x")
    pairs = open_pairs(str(home), samples=None, seed=0)
    assert pairs.total == COUNT - 1 and pairs.name == "photos"
    assert {pair.question for pair in pairs} <= {question for _, question in QUESTIONS}
    assert len({pair.kind for pair in pairs}) == len(QUESTIONS)
    err = capsys.readouterr().err
    assert f"{home}: {COUNT} images and no metadata.jsonl: each is asked one of" in err
    assert "1 with an image that cannot be decoded" in err
    with pytest.raises(DataError, match="has no splits"):
        open_pairs(f"{home}:train", samples=None, seed=0)


def test_tables_are_sampled_evenly_over_kinds(tmp_path: Path) -> None:
    kinds = ["rare", "rare", *["common"] * (COUNT - 2)]
    dataset().add_column("Kind", kinds).to_parquet(tmp_path / "own.parquet")
    drawn = [each.kind for each in open_pairs(str(tmp_path / "own.parquet"), samples=4, seed=0)]
    assert sorted(map(str, drawn)) == ["common", "common", "rare", "rare"]


def test_an_offline_hub_fails_quickly_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        open_pairs("some-org/some-data:train", samples=4, seed=0)
    assert caught.value.message == (
        "some-org/some-data: not found locally, and cannot be opened on the hub: "
        "HF_HUB_OFFLINE is set."
    )
    assert "demo pairs" in str(caught.value.remedy)


def test_an_unreachable_hub_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    assert probe("a/b", kind="dataset") == Probe(
        False, None, "[Errno -2] Name or service not known"
    )
    assert not probe("../b", kind="dataset").commit


def hub_with(monkeypatch: pytest.MonkeyPatch, splits: dict[str, datasets.Dataset]) -> list[Any]:
    """Let the hub have these datasets; return the calls of load_dataset."""
    calls: list[Any] = []

    def load(*args: object, **kwargs: object) -> datasets.IterableDatasetDict:
        calls.append((args, kwargs))
        streams = {name: table.to_iterable_dataset() for name, table in splits.items()}
        return datasets.IterableDatasetDict(streams)

    monkeypatch.setattr(tables, "probe", lambda *_, **__: Probe(True, "c0ffee", None))
    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_hub_stream_is_sampled_and_pinned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = hub_with(monkeypatch, {"train": dataset(), "test": dataset()})
    pairs = open_pairs("org/vqa:small:test", samples=5, seed=2)
    assert calls == [(("org/vqa", "small"), {"revision": "c0ffee", "streaming": True})]
    assert (pairs.name, pairs.digest, pairs.total) == ("org/vqa:small:test", "c0ffee", 5)
    questions = [pair.question for pair in pairs]
    assert len(set(questions)) == 5 and questions != ["q0", "q1", "q2", "q3", "q4"]
    again = open_pairs("org/vqa:small:test", samples=5, seed=2)
    assert [pair.question for pair in again] == questions
    for pair in pairs:
        assert f"q{pair.images[0].load().size[0] - 1}" == pair.question
    assert "warning" not in capsys.readouterr().err
    assert len(list(open_pairs("org/vqa:test", samples=99, seed=2))) == COUNT
    assert "99 samples were requested, but there are 12" in capsys.readouterr().err


def test_a_hub_stream_can_be_read_whole_and_names_its_splits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub_with(monkeypatch, {"train": dataset(), "test": dataset()})
    pairs = open_pairs("org/vqa:train", samples=None, seed=0)
    assert pairs.total is None
    check_all(pairs)
    expect_error("org/vqa", "org/vqa: has the splits train, test, and none was named.")
    expect_error("org/vqa:dev", "org/vqa: has no split 'dev'.")
    monkeypatch.setattr(tables, "probe", lambda *_, **__: Probe(True, None, "it is gated"))
    expect_error("org/x", "org/x: not found locally, and cannot be opened on the hub: it is gated.")
