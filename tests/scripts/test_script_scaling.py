"""``scripts/scaling.py`` measures once and draws as often as requested."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def saved(script, tiny_shape: str, tmp_path: Path) -> Path:
    """Saved figures for two token counts."""
    file = tmp_path / "scaling.json"
    small = ["--layers", "2", "--runs", "2", "--visual-tokens", "64", "16", "--text-tokens", "9"]
    script("scaling").main(["--shape-of", tiny_shape, "--save-data", str(file), *small])
    return file


def test_times_and_flops_of_every_curve_are_kept(saved: Path) -> None:
    found = json.loads(saved.read_text())
    assert found["about"]["layers"] == 2
    assert [point["visual"] for point in found["points"]] == [16, 64]
    for point in found["points"]:
        assert list(point["ms"]) == ["dense", "yopo-25", "reader-12"]
        assert all(len(times) == 2 and min(times) > 0 for times in point["ms"].values())
        dense = point["flops"]["dense"]
        assert all(0 < point["flops"][name] < dense for name in ("yopo-25", "reader-12"))


def test_a_picture_is_drawn_from_saved_figures(script, saved: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "scaling.png"
    script("scaling").main([str(picture), "--data", str(saved)])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed[2:]] == ["| 16", "| 64"]
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800 and height > 500


def test_lines_show_measured_and_predicted_values(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    scaling, axes = script("scaling"), []
    monkeypatch.setattr(scaling, "_furnish", lambda drawn, *rest: axes.append(drawn))
    points = [
        {"visual": n, "ms": {"dense": [1e3 * n] * 3, "x": [5e2 * n] * 3}, "flops": flops}
        for n, flops in ((64, {"dense": 10, "x": 4}), (256, {"dense": 40, "x": 12}))
    ]
    scaling.draw({"points": points, "about": {}}, tmp_path / "scaling.png")
    (drawn,) = axes
    assert drawn.get_xscale() == drawn.get_yscale() == "log"
    lines = {(line.get_linestyle(), tuple(line.get_ydata())) for line in drawn.get_lines()}
    assert lines == {(":", (25.6, 76.8)), ("-", (64, 256)), ("-", (32, 128))}
    assert {text.get_text() for text in drawn.texts} == {"dense", "x (50%)"}


def test_without_matplotlib_the_error_says_what_to_install(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install 'yopo\[pictures\]'"):
        script("scaling").main([str(tmp_path / "scaling.png")])


@pytest.mark.parametrize("text", ["", "[]", '{"points": []}', "no JSON"])
def test_files_that_it_did_not_save_are_refused(script, tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match="other.json is not a file that --save-data wrote"):
        script("scaling").read_data(file)


def test_labels_are_moved_apart(script) -> None:
    placed = script("scaling")._apart({"high": 10.0, "low": 1.0, "close": 1.1})
    assert placed["low"] == 1.0 and placed["high"] == 10.0
    assert placed["close"] == pytest.approx(1.22)


def test_a_run_without_output_is_an_error(script, capsys) -> None:
    with pytest.raises(SystemExit):
        script("scaling").main([])
    assert "--save-data" in capsys.readouterr().err
