"""The pages match the code: tables agree, links lead somewhere, commands run.

Commands that take seconds on the demo model run as printed; all others go through the parser
of their program, which refuses unknown options and choices.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import tiny
import yaml

import yopo
from yopo.cli.calibrate import command as calibrate
from yopo.cli.config import _NOT_IN_FILES
from yopo.cli.group import cli
from yopo.cli.main import main
from yopo.data.pairs import Pair
from yopo.data.prompts import encode_for, load_processor
from yopo.data.sources import open_pairs
from yopo.demo import LLAVA_TINY
from yopo.demo.pair_files import write_pairs
from yopo.models.registry import ALIASES, FAMILIES, resolve
from yopo.plans.file import _KEYS
from yopo.plans.layer_file import _FORMER_KEYS
from yopo.plans.layer_plan import LayerPlan
from yopo.serving.loading import load_dense

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "scripts/README.md", "yopo/README.md", "configs/README.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README, SCRIPTS, DESIGN, CONFIGS = PAGES.values()
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def card(folder: str) -> str:
    return (ROOT / "yopo" / "demo" / folder / "README.md").read_text(encoding="utf-8")


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading line."""
    (_, after) = page.split(f"{heading}\n", 1)
    lines = after.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def keys(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


# What the tables say.


def test_the_supported_models_match_the_registry() -> None:
    found = {
        (name, architecture, frozenset(texts.split(", ")), frozenset(aliases.split(", ")))
        for name, architecture, texts, aliases in rows(
            README, "| family | transformers class | text decoders | aliases |"
        )
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


def test_the_demo_models_table_matches_its_card() -> None:
    table = card("llava_tiny")
    assert table[table.index("| kind |") :].strip() in SCRIPTS


@pytest.mark.parametrize(("folder", "kind"), [("qwen2_vl_tiny", "grid"), ("internvl_tiny", "all")])
def test_the_other_demo_models_figures_match_their_cards(folder: str, kind: str) -> None:
    about, _, _ = card(folder).partition("## Other pictures")
    (short,) = re.findall(r"all short answers\*\* \| \d+ \| \*\*([\d.]+)%", about)
    (long,) = re.findall(rf"^\| {kind} \| \d+ \| ([\d.]+)%", about, re.M)
    text = " ".join(SCRIPTS.split())
    assert f"{short} % of held-out short questions, and {long} % of the requests" in text


def test_the_headline_figures_are_in_the_tables() -> None:
    (at_12,) = [line for line in README.splitlines() if "of the visual FLOPs keep" in line]
    kept = SCRIPTS[SCRIPTS.index("## What a visual budget keeps") : SCRIPTS.index("### Compared")]
    models = re.findall(r"^`([a-z0-9-]+)` \(", kept, re.M)
    at_5, other = (re.findall(rf"^\| {b}% \| ([\d.]+) ", kept, re.M) for b in (5, 12))
    assert [f"`{model}`" for model in models] == re.findall(r"`[a-z0-9]+-(?:vl-)?tiny`", at_12)
    assert "12 % of the visual FLOPs keep {}, {} and {} % of".format(*other) in at_12
    assert "5 % keep {}, {} and {} %".format(*at_5) in at_12
    for label, share in (("paper's shape, scores", "55.8"), ("VTW", "22.3")):
        assert f"{share} %" in README
        assert re.search(rf"^\| {label} \|[^|]*\| {share}", SCRIPTS, re.M)
    (yopo_12,) = re.findall(r"^\| yopo-12 \| ([\d.]+)% \|[^|]*\| ([\d.]+)% ", SCRIPTS, re.M)
    assert "{} % of the FLOPs takes {} % of the time".format(*yopo_12) in README


def test_models_and_configurations_are_listed() -> None:
    heading = "| alias | hub id | weights | dtype | batch size | budget |"
    found = {re.findall(r"\[(.*?)\]", row[0])[0]: row[1:] for row in rows(CONFIGS, heading)}
    assert set(found) == set(ALIASES)
    for alias, (hub, weights, dtype, size, budget) in found.items():
        text = (ROOT / "configs" / f"{alias}.yaml").read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        is_here = ALIASES[alias].startswith("package:")
        assert hub == ("comes with yopo" if is_here else f"`{ALIASES[alias]}`")
        assert is_here or f"weights alone: {weights}" in text
        assert (dtype, int(size)) == (values["dtype"], values["batch_size"])
        paper = ", paper" if values.get("template") == "paper" else ""
        assert budget == f"{values['budget']:g}{paper}"


def test_the_keys_of_files_are_listed() -> None:
    of_configs = [key for row in rows(CONFIGS, "| keys | meaning |") for key in keys(row[0])]
    taken = {each.name for each in calibrate.params} - set(_NOT_IN_FILES)
    assert sorted(of_configs) == sorted(taken)
    of_plans = [keys(row[0])[0] for row in rows(CONFIGS, "| key | meaning |")]
    assert of_plans == list(_KEYS)
    layer = rows(CONFIGS, "| key | value | formerly |")
    names = [each.name for each in fields(LayerPlan)]
    assert [key for row in layer for key in keys(row[0])] == names
    former = {key: keys(row[0])[0] for row in layer for key in keys(row[2])}
    assert former == _FORMER_KEYS
    for page, heading in ((README, "| key | column | meaning |"), (DESIGN, "| key | meaning |")):
        assert [key for row in rows(page, heading) for key in keys(row[0])] == names


def test_the_figure_draws_the_rooms() -> None:
    (figure,) = re.findall(r"```mermaid\n(.*?)```", DESIGN, re.S)
    rooms = {path.parent.name for path in (ROOT / "yopo").glob("*/__init__.py")}
    assert set(re.findall(r"^ +(\w+)\[", figure, re.M)) == rooms
    arrows = set(re.findall(r"^ +(\w+) --> (\w+)$", figure, re.M))
    assert len(arrows) == figure.count("-->")
    for above, below in arrows:
        assert any(
            re.search(rf"^\s*from yopo\.{below}\b", path.read_text(encoding="utf-8"), re.M)
            for path in (ROOT / "yopo" / above).rglob("*.py")
        ), f"{above} does not import {below}"
    order = TopologicalSorter()
    for above, below in arrows:
        order.add(above, below)
    assert set(order.static_order()) == rooms  # no cycle, and every room has an arrow


# How the pages look, and where they lead.


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("name", NAMES)
def test_lines_have_at_most_120_characters(name: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[name], flags=re.S)
    prose = [each for each in text.splitlines() if not each.startswith(("|", "    "))]
    assert [each for each in prose if len(each) > 120] == []


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[name])
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name: str) -> None:
    for path in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|sh|md|yml|txt|png))`", PAGES[name]):
        places = (ROOT, ROOT / "yopo", (ROOT / name).parent)
        assert any((place / path).is_file() for place in places), path


# The commands.


def listings(page: str) -> str:
    """Return indented code and shell blocks, with one command per line."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    blocks += re.findall(r"(?:^ {4}.*\n)+", page, re.M)
    return "\n".join(blocks).replace("\\\n", " ")


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of every command on a page, and of each command in a pipeline.

    ``...`` before flags repeats the command above.
    """
    above: list[str] = []
    spans = re.findall(r"`((?:yopo|python|scripts/)[^`\n]*)`", page)
    for line in [*listings(page).splitlines(), *spans]:
        for part in re.split(r"[|>]", re.sub(r"[\[\]]", "", line)):
            words = shlex.split(part.replace("PLAN...", "PLAN"), comments=True)
            if words[:1] == ["..."]:
                words = above + words
            words = [word for word in words if word != "..."]
            if words[:1] in (["yopo"], ["python"]) or words[:1] == ["pip"]:
                above = words
                yield words


COMMANDS = {shlex.join(words): words for page in PAGES.values() for words in commands(page)}


def test_the_pages_show_every_command() -> None:
    programs = {tuple(words[:2]) for words in COMMANDS.values()}
    assert {("yopo", name) for name in cli.list_commands(click.Context(cli))} <= programs
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("line", [each for each in COMMANDS if each.startswith("yopo ")])
def test_the_command_line_accepts_every_yopo_command(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # configurations are named from there
    _, name, *arguments = COMMANDS[line]
    if "--help" in (name, *arguments):
        return
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    try:
        command.make_context(name, arguments)
    except click.MissingParameter:  # the text mentions some options by themselves
        assert len(arguments) <= 1 or "-o" in arguments


class Parsed(Exception):
    """Raised when a script has parsed its arguments."""


@pytest.mark.parametrize("line", [each for each in COMMANDS if each.startswith("python ")])
def test_scripts_accept_every_python_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = COMMANDS[line]
    if words[1] == "-c":  # the end of a pipeline, which is run below
        return
    if words[1:3] == ["-m", "pytest"]:
        (file,) = [word for word in words if word.endswith(".py")]
        assert (ROOT / file).is_file()
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", words[1:])
    script = import_module(Path(words[1]).stem)
    with pytest.raises(Parsed):
        script.main()


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_shell_scripts_are_executable(script: str) -> None:
    assert f"scripts/{script}" in README and os.access(ROOT / "scripts" / script, os.X_OK)


# Those that run as printed.


def run(command: str, folder: Path) -> str:
    """Run a command in a shell and return what it prints."""
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PATH": TOOLS, "YOPO_CACHE": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_demo(code: str) -> str:
    """Replace the reader's model and pairs in code by the demo model and its pairs."""
    for theirs, ours in (
        ("llava-1.5-7b", "llava-tiny"),
        ("heldout.jsonl", "heldout/held.jsonl"),
        ("pairs.jsonl", "calibration/pairs.jsonl"),
    ):
        code = code.replace(theirs, ours)
    return code


def test_pipelines_run_as_printed(tmp_path: Path) -> None:
    found = re.findall(r"```bash\n([^`]*)```\n\nprints `(.*?)`", README)
    assert found
    for command, printed in found:
        assert run(command, tmp_path).strip() == printed


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's first commands were run, all in this process."""
    folder = tmp_path_factory.mktemp("walk")
    for split in ("calibration", "heldout"):
        write_pairs(folder / split, split, 24, seed=0)
    (folder / "heldout" / "pairs.jsonl").rename(folder / "heldout" / "held.jsonl")
    section = README[README.index("## Your model and your data") :]
    block = with_demo(re.search(r"```bash\n.*?```", section, re.S)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("YOPO_CACHE", str(folder / "cache"))
        tiny.try_few_plans(patch)
        for program, *words in commands(block):
            assert program == "yopo" and main(words) == 0, words
    return folder


def test_the_first_commands_run_as_printed(walked: Path) -> None:
    assert (walked / "llava-tiny-yopo" / "yopo_plan.yaml").is_file()
    assert yopo.read_plan(walked / "plan.yaml").budget.reached <= 0.12
    assert yopo.read_plan(walked / "other.yaml").budget.reached < 0.13


def test_the_python_examples_run(walked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(walked)
    tiny.try_few_plans(monkeypatch)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    model = load_dense(resolve(str(LLAVA_TINY)))
    pairs: list[Pair] = list(open_pairs("demo:heldout", samples=1, seed=0))
    inputs = encode_for(model, load_processor(str(LLAVA_TINY)), pairs).inputs
    space: dict[str, Any] = {"yopo": yopo, "model_in_memory": model, "inputs": inputs}
    for block in blocks:
        if "yopo.calibrate" in block and "calibrate" not in yopo.__all__:
            continue
        exec(compile(with_demo(block), "README.md", "exec"), space)
    assert yopo.is_pruned(space["model"]) and not yopo.is_pruned(model)
