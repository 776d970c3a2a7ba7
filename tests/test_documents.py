"""Strict YAML: every mistake is reported with file, line and key."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from yopo.support.documents import Document, describe, dump, read_text
from yopo.support.errors import PlanError

TEXT = """\
name: some
sizes:
  rows: 3
  cols: [1, 2]
"""


@pytest.fixture
def document() -> Document:
    return Document("plan.yaml", TEXT)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ((), "plan.yaml:1: document is odd."),
        (("name",), "plan.yaml:1: name is odd."),
        (("sizes", "rows"), "plan.yaml:3: sizes.rows is odd."),
        (("sizes", "cols", 1), "plan.yaml:4: sizes.cols[1] is odd."),
        (("sizes", "missing"), "plan.yaml:2: sizes.missing is odd."),
        (("absent", "deep"), "plan.yaml:1: absent.deep is odd."),
    ],
)
def test_errors_name_line_and_key(document: Document, path: tuple, where: str) -> None:
    assert str(document.error(path, "is odd")) == where


def test_unknown_keys_suggest_the_known_one(document: Document) -> None:
    with pytest.raises(PlanError, match="plan.yaml:3: sizes.rows is not a known key") as caught:
        document.check_keys(("sizes",), document.data["sizes"], ("row", "height"))
    assert caught.value.remedy == "Did you mean 'row'?"
    with pytest.raises(PlanError, match="name must be a mapping, found 'some'"):
        document.check_keys(("name",), document.data["name"], ())


@pytest.mark.parametrize("key", ["null", "1.5", "2026-01-01", "true", "7"])
def test_keys_that_are_not_text_are_unknown_keys(key: str) -> None:
    document = Document("plan.yaml", f"{key}: 1\n")
    with pytest.raises(PlanError, match="is not a known key"):
        document.check_keys((), document.data, ("name",))


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (2.5, float, 2.5),
        (True, bool, True),
        ("a", str, "a"),
        (None, (int, type(None)), None),
        ([1], list, [1]),
    ],
)
def test_values_of_the_right_type_pass(
    document: Document, value: object, kind: type, expected: object
) -> None:
    found = document.typed(("name",), value, kind)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("3", int, "name must be a whole number, found '3'"),
        (3.0, int, "name must be a whole number, found 3.0"),
        (True, int, "name must be a whole number, found True"),
        (True, float, "name must be a number, found True"),
        (1, bool, "name must be true or false, found 1"),
        (None, str, "name must be text, found null"),
        ("a", (int, type(None)), "name must be a whole number or null, found 'a'"),
        ("x" * 99, list, r"name must be a list, found 'x{56}\.\.\."),
    ],
)
def test_values_of_a_wrong_type_are_named(
    document: Document, value: object, kind: type, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        document.typed(("name",), value, kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("", "expected a YAML mapping, found nothing"),
        ("- 1\n- 2\n", "expected a YAML mapping, found list"),
        ("just words\n", "expected a YAML mapping, found str"),
        ("a: 1\nb: 2\na: 3\n", r"f.yaml:3: a appears twice \(first on line 1\)"),
        ("a:\n  b: 1\n  b: 2\n", r"f.yaml:3: a.b appears twice \(first on line 2\)"),
        ("a:\n- {c: 1, c: 2}\n", r"a\[0\].c appears twice"),
        ("a: &x\n  b: *x\n", "an alias contains itself"),
        ("a: " + "[" * 900 + "]" * 900, "nests too deeply"),
    ],
)
def test_invalid_documents_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Document("f.yaml", text)


def test_text_comes_from_files_and_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("a: ä\n", encoding="utf-8")
    assert read_text(path) == (str(path), "a: ä\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("b: 2\n"))
    assert read_text("-") == ("<stdin>", "b: 2\n")


def test_unreadable_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4\n")
    for name, message in (
        ("none.yaml", "no such file"),
        (".", "is a directory"),
        ("latin.yaml", "not UTF-8"),
        ("latin.yaml/inside.yaml", "cannot be read"),
    ):
        with pytest.raises(PlanError, match=message):
            read_text(tmp_path / name)
    stdin = io.TextIOWrapper(io.BytesIO(b"a: \xe4\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(PlanError, match="<stdin>: is not UTF-8"):
        read_text("-")


def test_dump_keeps_order_and_writes_leaves_on_one_line() -> None:
    assert dump({"b": 1, "a": [1, 2], "c": {"x": None}}) == "b: 1\na: [1, 2]\nc: {x: null}\n"


def test_descriptions_are_short() -> None:
    assert describe(None) == "null" and describe("a") == "'a'"
    assert len(describe("x" * 1000)) == 60


def test_keys_next_to_a_merge_keep_their_lines() -> None:
    document = Document("plan.yaml", "one: &one\n  rows: 3\ntwo:\n  <<: *one\n  cols: 4\n")
    assert document.data["two"] == {"rows": 3, "cols": 4}
    assert str(document.error(("two", "cols"), "is odd")) == "plan.yaml:5: two.cols is odd."
