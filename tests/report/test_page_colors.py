"""The page's colors, computed from its style sheet: legible in light, dark and print."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

import yopo.report.page as page

STYLE = (Path(page.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
TEXT, GRAPHICS = 4.5, 3.0
"""The least contrasts of WCAG 2.2, level AA (1.4.3 and 1.4.11)."""


def themes() -> dict[str, dict[str, str]]:
    """Theme -> its custom properties, the later rules over the earlier ones."""
    found = {}
    light, dark, printed = (
        dict(re.findall(r"--(\w+):(#[0-9a-f]+)", rule))
        for rule in re.findall(r":root\{([^}]*)\}", STYLE)
    )
    found["light"], found["dark"], found["print"] = light, light | dark, light | printed
    assert "@media screen and (prefers-color-scheme:dark)" in STYLE  # never on paper
    return found


def rules() -> list[tuple[str, str]]:
    """(selector, declarations) of the style sheet."""
    return re.findall(r"([^{}]+)\{([^{}]*)\}", STYLE)


def luminance(color: str) -> float:
    """The relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    levels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (
        level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def text_colors() -> set[str]:
    found = set()
    for selector, declared in rules():
        found.update(re.findall(r"(?<![\w-])color:var\(--(\w+)\)", declared))
        if re.search(r"text|\.tick", selector):
            found.update(re.findall(r"fill:var\(--(\w+)\)", declared))
    return found


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.478, abs=1e-3)


@pytest.mark.parametrize("theme", themes())
def test_text_is_legible(theme: str) -> None:
    colors = themes()[theme]
    assert text_colors() == {"ink", "soft"}
    for text, below in product(text_colors(), ("bg", "card")):
        assert contrast(colors[text], colors[below]) >= TEXT, (text, below)


@pytest.mark.parametrize("theme", themes())
def test_bars_lines_and_frames_are_visible(theme: str) -> None:
    colors = themes()[theme]
    marks = ("pruned", "dense", "projections", "bottleneck", "attention", "ffn", "map", "kv")
    for mark in (*marks, "warn"):
        for below in ("bg", "card"):
            assert contrast(colors[mark], colors[below]) >= GRAPHICS, (mark, below)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_head_activity_gets_stronger_step_by_step(theme: str) -> None:
    colors = themes()[theme]
    steps = [contrast(colors[f"h{level}"], colors["card"]) for level in range(7)]
    assert steps == sorted(steps) and steps[-1] > GRAPHICS


def test_no_other_color_is_written() -> None:
    outside = re.sub(r":root\{[^}]*\}", "", STYLE)
    assert set(re.findall(r"#[0-9a-f]{3,6}\b", outside)) == {"#fff", "#17202b"}  # dots on cells
    assert contrast("#fff", "#17202b") >= TEXT
