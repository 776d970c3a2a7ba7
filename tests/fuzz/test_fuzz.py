"""Whatever a file holds, reading it ends soon, in a result or in one of our own errors.

Seeds are fixed, so a failure repeats; ``cases`` may be raised to search for longer.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutations
import pytest
import statistics_maker
import tiny
import yaml
from PIL import Image
from rich.console import Console

from yopo.calibration.statistics_file import load_statistics
from yopo.checkpoint.headers import read_shard
from yopo.checkpoint.reader import read_shards
from yopo.data.rows import pair_from_row
from yopo.data.sources import open_pairs
from yopo.plans.file import TensorsFile, parse_plan, to_yaml
from yopo.plans.schema import Measured, ModelIdentity, ModelShape
from yopo.plans.storage import read_plan, to_bytes
from yopo.report.json import plan_document
from yopo.report.summary import plan_report
from yopo.support.console import set_quiet
from yopo.support.errors import YopoError

SHAPE = ModelShape(layers=3, hidden=60, heads=6, kv_heads=2, head_dim=16, ffn=50)
IDENTITY = ModelIdentity("some-model", "llava", SHAPE, "f" * 64)

SECONDS = 5.0
"""What one case may take; the usual one takes milliseconds."""

MEGABYTES = 300
"""What all cases of a test may add to the process's largest size."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    set_quiet(True)
    yield
    set_quiet(False)


def hunt(case: Callable[[random.Random], None], cases: int, *, first: int = 0) -> int:
    """Run a case for many seeds.

    Returns:
        How many were accepted; the others were refused in a sentence.
    """
    accepted, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, first + cases):
        started = time.perf_counter()
        try:
            case(random.Random(seed))
            accepted += 1
        except YopoError as error:
            assert str(error).isascii() or "\x1b" not in str(error), seed
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - started < SECONDS, f"seed {seed} took too long"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB more"
    return accepted


def some_plan_text(rng: random.Random) -> str:
    layers = range(SHAPE.layers)
    measured = Measured(
        rho=tuple(tuple(rng.random() for _ in range(SHAPE.heads)) for _ in layers),
        cross_modal=tuple(rng.random() for _ in layers),
        concentration=tuple(rng.random() for _ in layers),
        locality=tuple(rng.randrange(9) for _ in layers),
    )
    key = rng.choice(["template", "shape"])  # the latter in old plans
    candidates = [{key: "reader", "compensation": "none", "budget": 0.5, "kl": None}]
    about = {"pairs": "own.jsonl", "samples": 4, key: "reader", "candidates": candidates}
    plan = tiny.random_plan(IDENTITY, rng, measured=measured, provenance=about)
    return to_yaml(plan, TensorsFile("plan.safetensors", "a" * 64))


def use_plan(text: str) -> None:
    plan, named = parse_plan("plan.yaml", text)
    again = parse_plan("plan.yaml", to_yaml(plan, named))
    assert again[0].layers == plan.layers and again[1] == named
    Console(file=io.StringIO(), width=100).print(plan_report(plan))
    json.dumps(plan_document(plan), allow_nan=False)


def damaged_plan(rng: random.Random) -> None:
    text = some_plan_text(rng)
    if rng.random() < 0.6:
        changed = mutations.of_structure(yaml.safe_load(text), rng)
        text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=False)
        use_plan(text)
    else:
        use_plan(mutations.of_bytes(text.encode(), rng).decode("utf-8", "replace"))


def damaged_plan_file(folder: Path) -> Callable[[random.Random], None]:
    def case(rng: random.Random) -> None:
        (folder / "plan.yaml").write_bytes(mutations.of_bytes(some_plan_text(rng).encode(), rng))
        read_plan(folder / "plan.yaml")

    return case


def with_header(content: bytes, change: Callable[[Any], Any], rng: random.Random) -> bytes:
    """Build a safetensors file with another header, whose length may be wrong."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    said = rng.choice([len(header)] * 8 + [0, length, 2**40, 2**63])
    return said.to_bytes(8, "little") + header + content[8 + length :]


def damaged_tensors(content: bytes, rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.5:
        return with_header(content, lambda header: mutations.of_structure(header, rng), rng)
    if kind < 0.8:
        length = 8 + int.from_bytes(content[:8], "little")
        return mutations.of_bytes(content[:length], rng) + content[length:]
    return mutations.of_bytes(content, rng)


def damaged_side_file(folder: Path) -> Callable[[random.Random], None]:
    def case(rng: random.Random) -> None:
        plan = tiny.random_plan(IDENTITY, rng)
        content = damaged_tensors(to_bytes(tiny.random_tensors(plan, 1)), rng)
        (folder / "plan.safetensors").write_bytes(content)
        named = TensorsFile("plan.safetensors", hashlib.sha256(content).hexdigest())
        (folder / "plan.yaml").write_text(to_yaml(plan, named))
        read_plan(folder / "plan.yaml")

    return case


def damaged_shard(folder: Path) -> Callable[[random.Random], None]:
    plan = tiny.random_plan(IDENTITY, random.Random(1), compensation="mean", baked=False)
    content = to_bytes(tiny.random_tensors(plan, 1))
    index = {"weight_map": dict.fromkeys(("neuron_order", "neuron_mean", "head_mean"), "a")}

    def case(rng: random.Random) -> None:
        (folder / "a").write_bytes(damaged_tensors(content, rng) if rng.random() < 0.6 else content)
        read_shard(folder / "a")
        text = json.dumps(mutations.of_structure(index, rng)).encode()
        text = mutations.of_bytes(text, rng) if rng.random() < 0.3 else text
        (folder / "model.safetensors.index.json").write_bytes(text)
        read_shards(folder)

    return case


def damaged_statistics(folder: Path) -> Callable[[random.Random], None]:
    content = statistics_maker.make(layers=2, heads=2, kv_heads=2).to_bytes()

    def change(header: Any, rng: random.Random) -> Any:
        about = mutations.of_structure(json.loads(header["__metadata__"]["yopo"]), rng)
        return {**header, "__metadata__": {"yopo": json.dumps(about)}}

    def case(rng: random.Random) -> None:
        changed = (
            with_header(content, lambda header: change(header, rng), rng)
            if rng.random() < 0.6
            else damaged_tensors(content, rng)
        )
        (folder / "stats.safetensors").write_bytes(changed)
        statistics = load_statistics(folder / "stats.safetensors")
        assert statistics.measured.rho and statistics.plan_tensors().neuron_order is not None

    return case


ROWS: tuple[dict[str, Any], ...] = (
    {"image": "a.png", "question": "what?", "answer": ["it", "that"], "kind": "color", "id": 3},
    {"images": ["a.png", "b.png"], "query": "<image> what?", "answers": [{"answer": "it"}]},
    {
        "id": "x",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "it"},
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "it"}]},
        ]
    },
    {"images": [{"bytes": b"", "path": "a.png"}], "texts": [{"user": "what?", "assistant": "it"}]},
)

PYTHON_VALUES = (b"", b"x", datetime.date(2026, 1, 1), {1, 2}, object(), (), range(3), 1j)


def damaged_row(folder: Path) -> Callable[[random.Random], None]:
    """Build rows as tables give them, with values that JSON does not have."""
    Image.new("RGB", (3, 2)).save(folder / "a.png")

    def case(rng: random.Random) -> None:
        row = mutations.of_structure(rng.choice(ROWS), rng)
        if rng.random() < 0.3 and isinstance(row, dict) and row:
            row[rng.choice(list(row))] = rng.choice(PYTHON_VALUES)
        pair = pair_from_row(row, where="row 1", number=1, folder=folder)
        assert pair.question and (pair.images or pair.videos)
        assert all(isinstance(each, str) for each in pair.answers)
        for image in pair.images:
            image.load()

    return case


def damaged_rows(folder: Path) -> Callable[[random.Random], None]:
    """Files of rows."""
    image = io.BytesIO()
    Image.new("RGB", (9, 5), "red").save(image, "PNG")

    def case(rng: random.Random) -> None:
        content = image.getvalue()
        is_bad = rng.random() < 0.3
        (folder / "a.png").write_bytes(mutations.of_bytes(content, rng) if is_bad else content)
        rows = [mutations.of_structure(rng.choice(ROWS[:4]), rng) for _ in range(2)]
        is_list = rng.random() < 0.5
        text = json.dumps(rows) if is_list else "\n".join(map(json.dumps, [ROWS[0], *rows]))
        data = mutations.of_bytes(text.encode(), rng) if rng.random() < 0.4 else text.encode()
        path = folder / ("rows.json" if is_list else "rows.jsonl")
        path.write_bytes(data)
        for pair in open_pairs(str(path), samples=2, seed=rng.randrange(9)):
            for each in pair.images:
                each.load()

    return case


def test_damaged_plans_end_in_a_result_or_an_error() -> None:
    assert 20 < hunt(damaged_plan, 250) < 230


def test_damaged_plan_files_end_in_a_result_or_an_error(tmp_path: Path) -> None:
    assert hunt(damaged_plan_file(tmp_path), 120) < 110


def test_damaged_side_files_end_in_a_result_or_an_error(tmp_path: Path) -> None:
    assert 5 < hunt(damaged_side_file(tmp_path), 400) < 390


def test_damaged_shards_end_in_a_result_or_an_error(tmp_path: Path) -> None:
    assert 5 < hunt(damaged_shard(tmp_path), 400) < 390


def test_damaged_statistics_end_in_a_result_or_an_error(tmp_path: Path) -> None:
    assert 5 < hunt(damaged_statistics(tmp_path), 400) < 390


def test_damaged_rows_end_in_a_result_or_an_error(tmp_path: Path) -> None:
    assert 20 < hunt(damaged_row(tmp_path), 800) < 780


def test_damaged_files_of_rows_end_in_a_result_or_an_error(tmp_path: Path) -> None:
    assert 5 < hunt(damaged_rows(tmp_path), 400) < 390
