"""JSON files read in pieces give the same rows as the whole text, in constant memory."""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from yopo.data import json_rows
from yopo.data.json_rows import JsonRows
from yopo.data.sources import open_pairs
from yopo.support.errors import DataError

TEXTS = ("a", "é\n", "\u2028x", '"]},[', "", "\x85\xa0")


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind < 5:
        return (None, rng.randint(-(10**6), 10**6), rng.choice(TEXTS), rng.random(), True)[kind]
    items = [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return items if kind == 5 else {f"é{place}": each for place, each in enumerate(items)}


def some_list(rng: random.Random) -> bytes:
    """A JSON list in any layout, damaged in half of all cases."""
    rows = [some_value(rng) for _ in range(rng.randrange(6))]
    text = json.dumps(rows, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 0, 1]))
    content = bytearray((f"\n {text}\n\n" if rng.random() < 0.3 else text).encode())
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 2)):
            content[rng.randrange(len(content))] = rng.choice(b'[]{},":\\ \n1x\xff')
    return (b"\xef\xbb\xbf" if rng.random() < 0.3 else b"") + bytes(content)


def test_reading_a_list_in_pieces_gives_the_same_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, refused = tmp_path / "rows.json", 0
    for seed in range(600):
        rng = random.Random(seed)
        content = some_list(rng)
        if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            continue
        monkeypatch.setattr(json_rows, "CHUNK", rng.choice([1, 2, 3, 7, 50, 1000]))
        path.write_bytes(content)
        rows = JsonRows(path)
        try:
            expected = json.loads(content.decode("utf-8-sig"))
        except ValueError:
            with pytest.raises(DataError):
                list(rows.scan())
            refused += 1
            continue
        found = list(rows.scan())
        assert [value for _, value in found] == expected, content
        assert [(line, value) for _, line, value in rows.read(range(len(rows)))] == found
        assert rows.digest == hashlib.sha256(content).hexdigest()
    assert 100 < refused < 500


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_memory_does_not_grow_with_the_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", 1 << 15)
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    row = json.dumps({"image": "a.png", "question": "what? " + "x" * 400})
    inside = (",\n" if name.endswith("json") else "\n").join([row] * 4000)
    (tmp_path / name).write_text(f"[{inside}]" if name.endswith("json") else inside)
    (tmp_path / "one.jsonl").write_text(row)
    list(open_pairs(str(tmp_path / "one.jsonl"), samples=1, seed=0))  # imports decoders
    tracemalloc.start()
    try:
        pairs = open_pairs(str(tmp_path / name), samples=3, seed=0)
        assert len(list(pairs)) == 3
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = (tmp_path / name).stat().st_size
    assert most < size / 4, "rows were held"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'[{"a": 1}\n,\n\n{"a" 2}]', ":4: not JSON: Expecting ':' delimiter (column 6)"),
        (b"[1, 2", ":1: not JSON: Expecting ','"),
        (b"[1, 2] 3", ":1: not JSON: Extra data"),
        (b"[1,]", ":1: not JSON: Expecting value"),
        (b"[" * 100_000, ":1: not JSON: it nests too deeply"),
        (b'{"a": ' * 100_000, ":1: not JSON: it nests too deeply"),
        (b"[1" + b"1" * 5000 + b"]", ":1: not JSON: a number has too many digits"),
        (b"\n1" + b"1" * 5000, ":2: not JSON: a number has too many digits"),
        (b'{"a": 1}\n{"\xff": 1}', ":2: is not UTF-8 text"),
        (b'[{"a": "\xff"}]', ":1: is not UTF-8 text"),
        (b"", ": holds no pairs"),
        (b"[]", ": holds no pairs"),
    ],
)
def test_invalid_json_names_its_line(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        for _ in JsonRows(path).scan():
            pass
        open_pairs(str(path), samples=None, seed=0)
    assert f"{path}{sentence}" in caught.value.message


def test_an_endless_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW", 100)
    monkeypatch.setattr(json_rows, "CHUNK", 10)
    path = tmp_path / "rows.json"
    path.write_text('{"question": "' + "x" * 200 + '"}')
    with pytest.raises(
        DataError, match="rows.json:1: the row is longer than the limit of 100 bytes"
    ):
        list(JsonRows(path).scan())
    for text in ('["' + "x" * 5000 + '"]', '["' + "x" * 5000):
        path.write_text(text)
        with pytest.raises(DataError, match="rows.json:1: not JSON"):
            list(JsonRows(path).scan())


def test_a_file_that_changes_between_two_reads_is_refused(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "a.png", "question": "what?"}\n' * 2)
    pairs = open_pairs(str(path), samples=1, seed=0)
    assert len(list(pairs)) == 1
    path.write_text('{"image": "b.png", "question": "which one?"}\n')
    with pytest.raises(DataError, match="changed while it was in use"):
        list(pairs)
