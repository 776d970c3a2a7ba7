"""The results that a report is given beside its plans: documents of ``yopo eval`` and ``bench``.

They come from files that anyone may have written, so every value is checked before it is shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yopo.plans.evaluated import MAX_BYTES
from yopo.report.page.pictures import picture_problem
from yopo.support.errors import PlanError
from yopo.support.reading import read_bytes

MAX_EXAMPLES = 100
"""Examples that are shown at most."""

MAX_CELLS = 1 << 16
"""Tokens of a shown image at most."""

MAX_PICTURES = 16
"""Pictures of an example that are shown at most."""


@dataclass(frozen=True)
class Right:
    """Right answers of both models among ``total``."""

    dense: int
    pruned: int
    total: int


@dataclass(frozen=True)
class Part:
    """What an evaluation found on some pairs; ``right`` is None where none has an answer."""

    pairs: int
    kl: float
    agreement: float
    same: int
    right: Right | None


@dataclass(frozen=True)
class Look:
    """A picture, and where the text looks in it (see ``evaluation.examples``)."""

    picture: str
    rows: int
    cols: int
    dense: tuple[float, ...]
    pruned: tuple[float, ...]


@dataclass(frozen=True)
class Example:
    """One pair to show (see ``evaluation.examples``)."""

    question: str
    accepted: tuple[str, ...]
    kind: str
    dense: str
    pruned: str
    is_same: bool
    kl: float
    images: tuple[str, ...]
    num_images: int
    looks: tuple[Look, ...]


@dataclass(frozen=True)
class Evaluation:
    """A document of ``yopo eval``.

    Attributes:
        model, budget: What was evaluated.
        whole: All pairs.
        kinds: The pairs by kind.
        worst_kind: The kind of the largest KL.
        prefill: Decoder milliseconds, dense and pruned; None if not timed.
        examples: Pairs to show.
    """

    model: str
    budget: float
    whole: Part
    kinds: dict[str, Part]
    worst_kind: str
    prefill: tuple[float, float] | None
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Contender:
    """One contender of a benchmark: milliseconds, bytes; None where nothing was measured."""

    name: str
    budget: float
    prefill_ms: float
    prefill_ratio: float
    decode_ms: float | None
    peak_bytes: float | None
    kv_bytes: float


@dataclass(frozen=True)
class Bench:
    """A document of ``yopo bench``."""

    model: str
    budget: float
    weights: str
    device: str
    dtype: str
    batch: int
    visual: int
    text: int
    runs: int
    layers: tuple[int, int]
    flops_ratio: float
    contenders: tuple[Contender, ...]


def read_evaluation(path: str | Path) -> Evaluation:
    """Read what ``yopo eval -o`` or ``--json`` wrote.

    Raises:
        PlanError: The file holds none.
    """
    remedy = "Write one with `yopo eval PLAN_OR_DIR --data PAIRS -o FILE`."
    found: Evaluation = _read(path, _evaluation, "evaluation", remedy)
    return found


def read_bench(path: str | Path) -> Bench:
    """Read what ``yopo bench --json`` wrote.

    Raises:
        PlanError: The file holds none.
    """
    remedy = "Write one with `yopo bench PLAN_OR_DIR --json > FILE`."
    found: Bench = _read(path, _bench, "benchmark", remedy)
    return found


def _read(path: str | Path, make: Any, what: str, remedy: str) -> Any:
    data = read_bytes(path, limit=MAX_BYTES, error=PlanError)
    try:
        return make(_Entry(json.loads(data)))
    except _Wrong as wrong:
        raise PlanError(f"{path}: is no {what}: {wrong}.", remedy=remedy) from wrong
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: holds no {what}: not JSON.", remedy=remedy) from error


class _Wrong(Exception):
    """A missing or unusable value, as the rest of a sentence."""


class _Entry:
    """A JSON object whose values are checked as they are read."""

    def __init__(self, value: Any, where: str = ""):
        if not isinstance(value, Mapping):
            raise _Wrong(f"{where or 'the document'} is not an object")
        self._value, self._where = value, where

    def _get(self, key: str) -> Any:
        if key not in self._value:
            raise _Wrong(f"'{self._name(key)}' is missing")
        return self._value[key]

    def _name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def has(self, key: str) -> bool:
        return self._value.get(key) is not None

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise _Wrong(f"'{self._name(key)}' is not text")
        return value

    def number(self, key: str) -> float:
        return _number(self._get(key), self._name(key))

    def maybe(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def count(self, key: str) -> int:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
            raise _Wrong(f"'{self._name(key)}' is not a count")
        return value

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise _Wrong(f"'{self._name(key)}' is not true or false")
        return value

    def listed(self, key: str) -> list[Any]:
        value = self._get(key)
        if not isinstance(value, list):
            raise _Wrong(f"'{self._name(key)}' is not a list")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        found = self.listed(key)
        if not all(isinstance(each, str) for each in found):
            raise _Wrong(f"'{self._name(key)}' is not a list of texts")
        return tuple(found)

    def numbers(self, key: str) -> tuple[float, ...]:
        return tuple(_number(each, self._name(key)) for each in self.listed(key))

    def entry(self, key: str) -> _Entry:
        return _Entry(self._get(key), self._name(key))

    def entries(self, key: str) -> dict[str, _Entry]:
        value = self._get(key)
        if not isinstance(value, Mapping):
            raise _Wrong(f"'{self._name(key)}' is not an object")
        return {name: _Entry(each, f"{self._name(key)}.{name}") for name, each in value.items()}

    def picture(self, value: str) -> str:
        problem = picture_problem(value)
        if problem is not None:
            raise _Wrong(f"{self._where} holds a picture {problem}")
        return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Wrong(f"'{name}' is not a finite number")
    return float(value)


def _evaluation(entry: _Entry) -> Evaluation:
    kinds = {name: _part(each) for name, each in entry.entries("by_kind").items()}
    prefill = None
    if entry.has("prefill"):
        times = entry.entry("prefill")
        prefill = (times.number("dense_ms"), times.number("pruned_ms"))
    shown = entry.listed("examples")[:MAX_EXAMPLES] if entry.has("examples") else []
    return Evaluation(
        model=entry.text("model"),
        budget=entry.number("visual_budget"),
        whole=_part(entry),
        kinds=kinds,
        worst_kind=entry.text("worst_kind"),
        prefill=prefill,
        examples=tuple(_example(_Entry(each, "an example")) for each in shown),
    )


def _part(entry: _Entry) -> Part:
    right = None
    if entry.has("accuracy"):
        counts = entry.entry("accuracy")
        right = Right(counts.count("dense"), counts.count("pruned"), counts.count("total"))
    found = Part(
        pairs=entry.count("pairs"),
        kl=entry.number("kl"),
        agreement=entry.number("agreement"),
        same=entry.count("same_answers"),
        right=right if right is not None and right.total else None,
    )
    most = found.pairs if found.right is None else found.right.total
    counted = [found.same] if found.right is None else [found.right.dense, found.right.pruned]
    if not found.pairs or max(counted) > most or found.same > found.pairs:
        raise _Wrong("it counts more answers than pairs")
    return found


def _example(entry: _Entry) -> Example:
    return Example(
        question=entry.text("question"),
        accepted=entry.texts("accepted"),
        kind=entry.text("kind"),
        dense=entry.text("dense"),
        pruned=entry.text("pruned"),
        is_same=entry.flag("is_same"),
        kl=entry.number("kl"),
        images=tuple(map(entry.picture, entry.texts("images")[:MAX_PICTURES])),
        num_images=entry.count("num_images"),
        looks=tuple(_look(_Entry(each, "a map")) for each in entry.listed("looks")[:MAX_PICTURES]),
    )


def _look(entry: _Entry) -> Look:
    rows, cols = entry.count("rows"), entry.count("cols")
    maps = entry.numbers("dense"), entry.numbers("pruned")
    if not 0 < rows * cols <= MAX_CELLS or any(len(each) != rows * cols for each in maps):
        raise _Wrong("a map does not have one value per row and column")
    return Look(entry.picture(entry.text("picture")), rows, cols, *maps)


def _bench(entry: _Entry) -> Bench:
    prompt, layers = entry.entry("prompt"), entry.entry("layers")
    return Bench(
        model=entry.text("model"),
        budget=entry.number("visual_budget"),
        weights=entry.text("weights"),
        device=entry.text("device"),
        dtype=entry.text("dtype"),
        batch=prompt.count("batch"),
        visual=prompt.count("visual"),
        text=prompt.count("text"),
        runs=entry.entry("options").count("runs"),
        layers=(len(layers.listed("used")), layers.count("total")),
        flops_ratio=entry.entry("prefill_flops").number("ratio"),
        contenders=tuple(
            _contender(name, each) for name, each in entry.entries("contenders").items()
        ),
    )


def _contender(name: str, entry: _Entry) -> Contender:
    has_decode = entry.has("decode_ms_per_token")
    return Contender(
        name=name,
        budget=entry.number("visual_budget"),
        prefill_ms=entry.entry("prefill_ms").number("median"),
        prefill_ratio=entry.entry("prefill_time_ratio").number("median"),
        decode_ms=entry.entry("decode_ms_per_token").number("median") if has_decode else None,
        peak_bytes=entry.maybe("peak_bytes_above_weights"),
        kv_bytes=entry.number("visual_kv_bytes"),
    )
