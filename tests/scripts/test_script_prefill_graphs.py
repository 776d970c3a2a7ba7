"""``scripts/prefill_graphs.py`` times four ways to prefill."""

from __future__ import annotations

from typing import Any


def test_a_row_for_every_way(script: Any, tiny_shape: str, tape: None, capsys: Any) -> None:
    small = ["--shape-of", tiny_shape, "--layers", "2", "--runs", "2", "--text", "9"]
    small += ["--prompts", "1x16", "2x64", "--dtype", "float32", "--device", "cpu"]
    script("prefill_graphs").main(small)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    ways = ["stock", "dense, replayed"]
    for preset in ("yopo-25", "yopo-12"):
        ways += [f"{preset}, no graphs", f"{preset}, replayed"]
    prompts = ("1x16 + 9", "2x64 + 9")
    assert [row[:2] for row in rows] == [[each, way] for each in prompts for way in ways]
    assert all(float(row[2]) >= float(row[3]) >= 0 for row in rows)
