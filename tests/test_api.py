"""``import yopo`` offers typed names, and the examples in its docstrings run in sequence."""

from __future__ import annotations

import ast
import doctest
import inspect
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

import yopo
from yopo.demo import LLAVA_TINY
from yopo.demo.scenes import pairs
from yopo.support.errors import ModelError

EXAMPLES = (
    "calibrate",
    "plan",
    "write_plan",
    "read_plan",
    "PruningPlan",
    "apply",
    "load",
    "is_pruned",
    "pruned",
    "evaluate",
)
"""In the order in which they build on one another."""


@pytest.fixture
def images() -> list[object]:
    return [pair.image for pair in pairs("calibration", 32, seed=1)]


def test_the_examples_of_the_docstrings_work(
    images: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"yopo": yopo, "images": images}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    for name in EXAMPLES:
        text = inspect.getdoc(getattr(yopo, name)) or ""
        example = doctest.DocTestParser().get_doctest(text, space, name, None, None)
        assert example.examples, f"yopo.{name} has no example"
        problems: list[str] = []
        runner.run(example, out=problems.append, clear_globs=False)
        space = example.globs
        assert not problems, "".join(problems)


def test_every_public_name_exists_and_is_typed() -> None:
    listed = set(yopo.__all__) - {"__version__"}
    assert all(getattr(yopo, name) is not None for name in listed)
    assert (Path(yopo.__file__).parent / "py.typed").is_file()
    tree = ast.parse(Path(yopo.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    typed.discard("__version__")
    assert typed == listed, "what is offered at run time is what type checkers see"
    with pytest.raises(AttributeError, match="no attribute 'calibrat'"):
        yopo.calibrat  # noqa: B018


def test_a_model_in_memory_needs_its_processor_and_keeps_it_as_it_was() -> None:
    model = AutoModelForImageTextToText.from_pretrained(LLAVA_TINY)
    with pytest.raises(ModelError, match="needs its processor"):
        yopo.calibrate(model)
    processor = AutoProcessor.from_pretrained(LLAVA_TINY)
    processor.patch_size = 3
    options = yopo.RunOptions(samples=16)
    made = yopo.calibrate(
        model, yopo.PaperRequest(preset="yopo-25"), processor=processor, options=options
    )
    assert processor.patch_size == 3
    assert made.plan.model.name == "llava_tiny" and "/" not in made.plan.model.name
    found = yopo.evaluate(
        made.plan, model=model, processor=processor, options=options, timing_runs=0
    )
    assert found.pairs == 16


def test_a_plan_in_memory_equals_the_one_read_from_its_file(tmp_path: Path) -> None:
    made = yopo.calibrate("llava-tiny", 0.4, options=yopo.RunOptions(samples=32))
    assert made.plan.needs_order or made.plan.tensors.num_bytes
    yopo.write_plan(made.plan, str(tmp_path / "plan.yaml"))
    again = yopo.read_plan(tmp_path / "plan.yaml")
    assert again.layers == made.plan.layers and again.tensors == made.plan.tensors
    model = AutoModelForImageTextToText.from_pretrained(LLAVA_TINY)
    with yopo.pruned(model, made.plan):
        assert yopo.is_pruned(model)
    assert not yopo.is_pruned(model)
