"""Progress bars appear only on a terminal, one at a time, and items come through unchanged."""

from __future__ import annotations

import io
import sys

import pytest

from yopo.support import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_newlines_in_names_are_escaped_but_lines_stay_separate(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_quiet", False)
    console.note("a name: x\ny", "  and how to mend it")
    assert capsys.readouterr().err == "a name: x\\ny\n  and how to mend it\n"


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Open it inside the test, because pytest replaces stderr after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "_quiet", False)
    return stream


def bar(label: str, items: range) -> list[int]:
    return list(console.track(items, label=label, total=None, unit="things"))


def test_nested_tracking_shows_no_second_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = open_terminal(monkeypatch)
    found = [bar("inner", range(each)) for each in console.track([2, 3], **OUTER)]
    assert found == [[0, 1], [0, 1, 2]]
    shown = terminal.getvalue()
    assert "outer" in shown and "2/2" in shown and "inner" not in shown


def test_a_bar_after_a_failure_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    bars = console.track([0, 1], **OUTER)
    next(bars)
    bars.close()  # as if an exception had left the loop
    assert bar("later", range(3)) == [0, 1, 2] and "3/?" in terminal.getvalue()


def test_without_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.track([1, 2], **OUTER)) == [1, 2]
    assert capsys.readouterr().err == ""


OUTER = {"label": "outer", "total": 2, "unit": "things"}


def test_without_a_terminal_long_work_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    assert list(console.track([[1], [2, 3], [4], [5]], label="a", total=5, unit="pairs"))
    assert capsys.readouterr().err == "a: 3 of 5 pairs in 0:40, about 0:27 left\n"


def test_steps_are_lines_in_a_file_and_one_line_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.step("plan 1")
    console.step("plan 2")
    assert capsys.readouterr().err == "plan 1\nplan 2\n"
    terminal = open_terminal(monkeypatch)
    console.step("plan 1")
    console.step("plan 2")
    console.note("done")
    assert terminal.getvalue() == "\r\x1b[Kplan 1\r\x1b[Kplan 2\r\x1b[Kdone\n"
    monkeypatch.setattr(console, "_quiet", True)
    console.step("plan 3")
    assert "plan 3" not in terminal.getvalue()


def test_durations() -> None:
    found = [console.duration(seconds) for seconds in (5, 65, 3600, 7325.4)]
    assert found == ["0:05", "1:05", "1:00:00", "2:02:05"]
