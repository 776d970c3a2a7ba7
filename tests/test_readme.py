"""README stays true: its model table is the registry, its pipeline runs as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from yopo.models.registry import FAMILIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_supported_models_are_those_of_the_registry() -> None:
    table = README.split(
        "| family | transformers class | text decoders | aliases |\n|---|---|---|---|\n"
    )
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", table[1].split("\n\n")[0], re.M)
    found = {
        (name, architecture, frozenset(texts.split(", ")), frozenset(aliases.split(", ")))
        for name, architecture, texts, aliases in rows
    }
    expected = {
        (
            family.name,
            family.architecture,
            frozenset(name for backbone in family.backbones for name in backbone.model_types),
            frozenset(family.aliases),
        )
        for family in FAMILIES
    }
    assert found == expected


def test_the_demo_models_table_is_its_cards() -> None:
    card = (ROOT / "yopo" / "demo" / "llava_tiny" / "README.md").read_text(encoding="utf-8")
    table = card[card.index("| kind |") :].strip()
    assert table in README


def test_the_second_demo_models_figures_are_its_cards() -> None:
    card = (ROOT / "yopo" / "demo" / "qwen2_vl_tiny" / "README.md").read_text(encoding="utf-8")
    card = card[: card.index("## Other pictures")]
    (short,) = re.findall(r"all short answers\*\* \| \d+ \| \*\*([\d.]+)%", card)
    (grid,) = re.findall(r"^\| grid \| \d+ \| ([\d.]+)%", card, re.M)
    text = " ".join(README.split())
    assert f"{short} % of held-out short questions, and {grid} % of the requests" in text


@pytest.mark.parametrize("block", re.findall(r"```bash\n(.*?)```\n\nprints `(.*?)`", README, re.S))
def test_pipelines_run_as_printed(block: tuple[str, str], tmp_path: Path) -> None:
    command, printed = block
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": tools, "YOPO_CACHE": str(tmp_path / "cache")},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == printed


def test_there_is_a_pipeline_to_run() -> None:
    assert re.search(r"```bash\n.*?```\n\nprints `", README, re.S)
