"""Start-up is fast, usage errors are explained, and unexpected failures are handled."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from command_line import Yopo

from yopo import __version__
from yopo.cli.calibrate import command as calibrate
from yopo.cli.help_groups import GROUPS

YOPO = str(Path(sys.executable).with_name("yopo"))
HEAVY = ("torch", "transformers", "datasets", "rich", "yaml", "numpy")
COMMANDS = ("calibrate", "plan", "inspect", "compare", "apply", "eval", "bench", "convert", "pairs")


def test_help_takes_less_than_300_ms() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([YOPO, "--help"], check=True, capture_output=True)
        return time.perf_counter() - started

    seconds()  # writes bytecode
    assert median(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize("arguments", [["--help"], ["calibrate", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from yopo.cli.main import main; code = main(sys.argv[1:]); "
        f"print([name for name in {HEAVY} if name in sys.modules], code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    imported = done.stdout.splitlines()[-1]
    assert imported == ("[] 0" if arguments == ["--help"] else "['yaml'] 0")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "gone.jsonl"],
        ["--data", "demo:gone"],
        ["--dtype", "float17"],
        ["--budget", "0"],
        ["--processor", "patches"],
        ["--model", "m/x"],
        ["--tolerance", "0.1", "--budget", "0.2"],
    ],
)
def test_mistakes_are_found_before_torch_is_imported(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from yopo.cli.main import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules], code)"
    )
    model = [] if "--model" in arguments else ["--model", "llava-tiny"]
    done = subprocess.run(
        [sys.executable, "-c", code, "calibrate", *model, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout == "[] 1\n" and done.stderr.startswith("error: "), done.stderr


def test_the_help_groups_options(yopo: Yopo) -> None:
    said = yopo("calibrate", "-h").out
    titles = [*GROUPS, "Other options"]
    places = [said.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    at = said.index("  --head-ratio")
    assert places[3] < at < places[4], "the paper's knobs are together"
    known = {each.name for each in calibrate.params}
    assert {name for names in GROUPS.values() for name in names} <= known
    assert "\nOptions:\n" in yopo("inspect", "--help").out


def test_the_shell_completes_commands_and_options() -> None:
    for words, expected in (("yopo cal", "calibrate"), ("yopo calibrate --tolerance-", "--toler")):
        asked = {"_YOPO_COMPLETE": "bash_complete", "COMP_WORDS": words}
        environment = {**os.environ, **asked, "COMP_CWORD": str(len(words.split()) - 1)}
        done = subprocess.run([YOPO], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.startswith(f"plain,{expected}")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(yopo: Yopo, name: str) -> None:
    assert name in yopo("--help").out
    done = yopo(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: yopo {name}" in done.out and "--quiet" in done.out


def test_the_version_is_printed(yopo: Yopo) -> None:
    assert yopo("--version").out == f"yopo {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["calibrat"], "calibrate"),
        (["calibrate"], "--model"),
        (["calibrate", "--model", "m", "--budgett", "1"], "--budget"),
        (["calibrate", "--model", "m", "--budget", "much"], "--budget"),
        (["calibrate", "--model", "m", "--batch-size", "0"], "--batch-size"),
        (["inspect"], "PLAN"),
        (["compare"], "Give 2 to 8 plans or checkpoints, found 0"),
        (["compare", "a.yaml", "b.yaml", "--json", "--html", "c.html"], "--html"),
        (["apply", "plan.yaml", "--dry-run", "--verify"], "--verify"),
        (["inspect", "plan.yaml", "--json", "--html", "page.html"], "--html"),
    ],
)
def test_usage_errors_exit_with_2(yopo: Yopo, arguments: list[str], expected: str) -> None:
    done = yopo(*arguments)
    assert (done.code, done.out) == (2, "")
    assert expected in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ZeroDivisionError("by\nzero."), "unexpected error: ZeroDivisionError: by zero; run with"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), "x.bin: disk full."),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), "x.bin: Permission denied."),
        (MemoryError(), "Out of memory."),
    ],
)
def test_unexpected_failures_are_single_sentences(
    yopo: Yopo, plan: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(source: str) -> None:
        raise error

    monkeypatch.setattr("yopo.plans.places.read_document", fail)
    done = yopo("inspect", plan)
    assert (done.code, done.out) == (1, "") and sentence in done.err
    assert "Traceback" not in done.err
    for arguments in (("-vv", "inspect", plan), ("inspect", plan, "-v", "-v")):
        assert "Traceback" in yopo(*arguments).err


def test_a_closed_pipe_is_quiet(plan: Path) -> None:
    with subprocess.Popen(
        [YOPO, "inspect", "--json", plan], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_a_terminal_without_unicode_gets_ascii(plan: Path) -> None:
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([YOPO, "inspect", plan], capture_output=True, env=environment)
    assert done.returncode == 0 and done.stdout.isascii()
    assert b"?" not in done.stdout and b"  ###  " in done.stdout  # other signs, not lost ones


def test_the_package_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "yopo", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "yopo")
