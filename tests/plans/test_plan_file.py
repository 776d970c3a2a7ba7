"""A plan.yaml is read back byte for byte as written, and every mistake names its line."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from yopo.plans.file import TensorsFile, parse_plan, read_document, to_yaml
from yopo.plans.flops import visual_budget
from yopo.plans.grid import Grid
from yopo.plans.schema import (
    Budget,
    LayerPlan,
    Measured,
    ModelIdentity,
    ModelShape,
    PruningPlan,
    Workload,
)
from yopo.plans.tensors import PlanTensors
from yopo.support.errors import PlanError

SHAPE = ModelShape(layers=3, hidden=60, heads=6, kv_heads=2, head_dim=16, ffn=50)
IDENTITY = ModelIdentity("some-model", "llava", SHAPE, "f" * 64)
SIDE_FILE = TensorsFile("plan.safetensors", "a" * 64)

YAML_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex("[a-z_]{1,9}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)


def measured(rng: random.Random) -> Measured:
    layers = range(SHAPE.layers)
    return Measured(
        rho=tuple(tuple(rng.uniform(0, 2) for _ in range(SHAPE.heads)) for _ in layers),
        cross_modal=tuple(rng.random() for _ in layers),
        concentration=tuple(rng.random() for _ in layers),
        locality=tuple(rng.randrange(24) for _ in layers),
    )


def some_plan(rng: random.Random) -> PruningPlan:
    grids = tuple(Grid(rng.randint(1, 30), rng.randint(1, 30)) for _ in range(rng.randint(1, 3)))
    between = tuple(rng.randint(1, 9) for _ in grids[1:]) if rng.random() < 0.5 else ()
    place = {"text_before": rng.randint(0, 5), "row_ends": rng.randint(0, 2)}
    inner = Workload(grids, 0, text_between=between, **place)
    text = inner.text_before + inner.text_inside + rng.randint(5, 99)
    return tiny.random_plan(
        IDENTITY,
        rng,
        workload=replace(inner, text=text),
        budget=Budget(rng.choice([None, 0.25, 1.0]), rng.random()),
        measured=rng.choice([None, measured(rng)]),
    )


def parsed(text: str) -> PruningPlan:
    return parse_plan("plan.yaml", text)[0]


FORMER_KEYS = {
    "read_heads": "heads",
    "attend_heads": "attend",
    "qkv_rank": "rank",
    "map_rank": "linear",
}


def in_former_words(text: str) -> str:
    """Return a document, a part of one or a message with the former keys of layers."""
    for key, former in FORMER_KEYS.items():
        text = text.replace(key, former)
    return text


@settings(max_examples=40)
@given(rng=st.randoms(use_true_random=False), provenance=YAML_VALUES)
def test_a_written_plan_is_read_back_unchanged(rng: random.Random, provenance: object) -> None:
    plan = replace(some_plan(rng), provenance={"pairs": provenance})
    plan = replace(plan, budget=replace(plan.budget, reached=visual_budget(plan)))
    side_file = rng.choice([SIDE_FILE, None]) if plan.baked or not plan.needs_order else SIDE_FILE
    text = to_yaml(plan, side_file)
    again, named = parse_plan("plan.yaml", text)
    assert to_yaml(again, named) == text
    assert named == side_file and again.tensors == PlanTensors()
    assert again.layers == plan.layers and again.model == plan.model
    assert again.workload == plan.workload and again.provenance == plan.provenance
    assert (again.compensation, again.bidirectional, again.baked) == (
        plan.compensation,
        plan.bidirectional,
        plan.baked,
    )
    assert again.budget.asked == plan.budget.asked
    assert again.budget.reached == pytest.approx(visual_budget(plan), abs=1e-6)
    assert (again.measured is None) == (plan.measured is None)


@settings(max_examples=40)
@given(rng=st.randoms(use_true_random=False), name=st.text(min_size=1))
def test_any_model_name_survives_or_is_refused(rng: random.Random, name: str) -> None:
    """YAML cannot hold every character; none may come back as another."""
    plan = replace(some_plan(rng), model=replace(IDENTITY, name=name))
    try:
        text = to_yaml(plan, SIDE_FILE)
        text.encode("utf-8")
        again, _ = parse_plan("plan.yaml", text)
    except (PlanError, yaml.YAMLError, UnicodeError):
        return
    assert again.model.name == name


def test_the_same_plan_gives_the_same_bytes() -> None:
    texts = {to_yaml(some_plan(random.Random(5)), SIDE_FILE) for _ in range(3)}
    assert len(texts) == 1


def test_fits_and_attending_heads_are_written_only_if_present() -> None:
    layers = (
        LayerPlan((0, 1, 4), (1, 4), 2, 20, qkv_rank=7, map_rank=3),
        LayerPlan((0, 1), (0, 1), None, 50),
        LayerPlan((3,), (), None, 0, map_rank=2),
    )
    plan = replace(some_plan(random.Random(5)), layers=layers, compensation="refit")
    text = to_yaml(plan, SIDE_FILE)
    assert "attend_heads: [1, 4]" in text and text.count("attend_heads: true") == 1
    assert text.count("attend_heads: false") == 1
    assert text.count("qkv_rank: ") == text.count("map_rank: ") == 2
    assert "qkv_rank: 7" in text and "qkv_rank: null" in text
    assert parsed(text).layers == layers
    plain = replace(plan, layers=(layers[1],) * 3)
    assert "rank" not in to_yaml(plain)


def test_attending_heads_may_be_a_list_or_a_switch() -> None:
    listed = parsed(GOOD.replace("attend_heads: true", "attend_heads: [5]"))
    assert listed.layers[0].attend_heads == (5,)
    assert parsed(GOOD).layers[0].attend_heads == (0, 5)
    nobody = parsed(GOOD.replace("attend_heads: true", "attend_heads: []"))
    assert nobody.layers[0].attend_heads == ()


def test_numbers_are_written_with_few_digits() -> None:
    rho = ((1 / 3,) * SHAPE.heads,) * SHAPE.layers
    thirds = Measured(rho, (2 / 3,) * 3, (1 / 3,) * 3, (1,) * 3)
    plan = replace(some_plan(random.Random(5)), budget=Budget(None, 1 / 3), measured=thirds)
    text = to_yaml(plan)
    assert "reached: 0.333333}" in text
    assert "[0.3333, 0.3333, 0.3333, 0.3333, 0.3333, 0.3333]" in text
    assert "cross_modal: [0.6667, 0.6667, 0.6667]" in text


def test_a_file_may_omit_defaults(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD, encoding="utf-8")
    plan, named = read_document(path)
    assert named == SIDE_FILE
    first = LayerPlan((0, 5), attend_heads=(0, 5), radius=2, neurons=7)
    assert plan.layers[0] == first
    assert plan.layers[1] == LayerPlan(tuple(range(6)), attend_heads=(), radius=None, neurons=50)
    assert plan.layers[2] == LayerPlan((), attend_heads=(), radius=None, neurons=0)
    assert plan.compensation == "none" and not plan.bidirectional and not plan.baked
    assert plan.budget == Budget(None, round(visual_budget(plan), 6))
    assert plan.measured is None and plan.provenance == {}


GOOD = """\
yopo_plan: 1
model:
  name: some-model
  family: llava
  shape: {layers: 3, hidden: 60, heads: 6, kv_heads: 2, head_dim: 16, ffn: 50}
  fingerprint: abc
workload:
  grids: [[3, 5], [2, 2]]
  text: 10
  text_before: 3
tensors:
  file: plan.safetensors
  sha256: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
layers:
- read_heads: [0, 5]
  attend_heads: true
  radius: 2
  neurons: 7
- {read_heads: all, attend_heads: false, radius: null, neurons: 50}
- {read_heads: none, attend_heads: false, radius: null, neurons: 0}
measured:
  rho: [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0.5]]
  cross_modal: [0.1, 0.2, 0.3]
  concentration: [0.1, 0.2, 0.3]
  locality: [1, 2, 3]
"""
GOOD = GOOD[: GOOD.index("measured")]
MEASURED = """\
measured:
  rho: [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0.5]]
  cross_modal: [0.1, 0.2, 0.3]
  concentration: [0.1, 0.2, 0.3]
  locality: [1, 2, 3]
"""

MISTAKES = {
    "unknown key": ("workload:", "worklod:", "7: worklod is not a known key", "'workload'"),
    "unknown layer key": ("  neurons: 7", "  neurns: 7", "18: layers[0].neurns is not a", "'neuro"),
    "unknown model key": ("  family", "  famly", "4: model.famly is not a known key", "'family'"),
    "text between no images": (
        "text_before: 3",
        "text_between: [1, 2]",
        "10: workload.text_between must have a number for each of the 1 gaps, found 2",
        None,
    ),
    "text between that is no list": (
        "text_before: 3",
        "text_between: 2",
        "10: workload.text_between must be a list",
        None,
    ),
    "text between of no number": (
        "text_before: 3",
        "text_between: [x]",
        "10: workload.text_between[0] must be a whole",
        None,
    ),
    "more text inside images than in all": (
        "text_before: 3",
        "row_ends: 4",
        "9: workload.text must be at least the 12 tokens",
        None,
    ),
    "wrong type": ("neurons: 7", "neurons: many", "18: layers[0].neurons must be a whole", None),
    "number for a switch": (
        "attend_heads: true",
        "attend_heads: 1",
        "16: layers[0].attend_heads must be true",
        None,
    ),
    "text for a radius": ("radius: 2", "radius: far", "17: layers[0].radius must be a wh", None),
    "head out of range": ("[0, 5]", "[0, 6]", "15: layers[0].read_heads names head 6", None),
    "a head that is no number": (
        "[0, 5]",
        "[0, x]",
        "15: layers[0].read_heads[1] must be a wh",
        None,
    ),
    "unknown word for heads": (
        "read_heads: all",
        "read_heads: some",
        "19: layers[1].read_heads must be 'all'",
        0,
    ),
    "heads of no kind": (
        "read_heads: all",
        "read_heads: 3",
        "19: layers[1].read_heads must be text or a li",
        0,
    ),
    "negative radius": ("radius: 2", "radius: -2", "17: layers[0].radius must be null or at", 0),
    "duplicate key": (
        "radius: 2",
        "attend_heads: true",
        "17: layers[0].attend_heads appears twice (fir",
        0,
    ),
    "duplicate root key": ("tensors:", "layers: []\ntensors:", "15: layers appears twice (f", 0),
    "missing key": ("  fingerprint: abc\n", "", "2: model lacks the key 'fingerprint'", None),
    "missing shape": ("  shape", "  # shape", "2: model lacks the key 'shape'", None),
    "missing size": (", ffn: 50", "", "5: model.shape lacks the key 'ffn'", None),
    "missing heads": ("read_heads: none, ", "", "20: layers[2] lacks the key 'read_heads'", None),
    "missing attend": (
        "attend_heads: false, radius: null, n",
        "n",
        "19: layers[1] lacks the key 'at",
        0,
    ),
    "missing root key": (GOOD[GOOD.index("layers:\n") :], "", "1: document lacks the key 'lay", 0),
    "too few layers": ("- {read_heads: none", "#", "14: layers must have 3 entries, found 2", None),
    "a layer that is no mapping": (
        "- {read_heads: none",
        "- none #",
        "20: layers[2] must be a map",
        0,
    ),
    "layers that are no list": (
        GOOD[GOOD.index("- read_heads") :],
        "  all",
        "14: layers must be a",
        0,
    ),
    "empty grids": ("[[3, 5], [2, 2]]", "[]", "8: workload.grids must hold at least one", None),
    "a grid of three": ("[2, 2]]", "[2, 2, 2]]", "8: workload.grids[1] must be [rows, col", None),
    "a grid of words": ("[3, 5]", "[a, 5]", "8: workload.grids[0] must be a whole number", None),
    "unknown compensation": ("layers:\n", "compensation: x\nlayers:\n", "14: compensation m", None),
    "budget over one": ("layers:\n", "budget: {asked: 2}\nlayers:\n", "14: budget.asked mu", None),
    "tensors left out": (
        GOOD[GOOD.index("tensors") : GOOD.index("layers:\n")],
        "",
        "1: tensors must name the file",
        None,
    ),
    "future version": ("plan: 1", "plan: 2", "1: yopo_plan is 2, this yopo reads version 1", "Upg"),
    "a version that is a switch": ("plan: 1", "plan: true", "1: yopo_plan must be a whole", None),
    "a version that is text": ("plan: 1", "plan: '1'", "1: yopo_plan must be a whole nu", None),
}


@pytest.mark.parametrize("spelled", [str, in_former_words])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_line_and_key(name: str, spelled: Callable[[str], str]) -> None:
    old, new, message, remedy = MISTAKES[name]
    assert old in GOOD
    with pytest.raises(PlanError) as caught:
        parse_plan("plan.yaml", spelled(GOOD.replace(old, new, 1)))
    if not name.startswith("missing"):  # a missing key is named by its present name
        message = spelled(message)
    assert f"plan.yaml:{message}" in str(caught.value)
    if remedy:
        assert remedy in caught.value.remedy


FITTED = GOOD.replace("layers:\n", "compensation: refit\nlayers:\n")

FITTED_MISTAKES = {
    "a head that does not read": (
        "attend_heads: true",
        "attend_heads: [1]",
        "layers[0].attend_heads must name hea",
    ),
    "a head twice": (
        "attend_heads: true",
        "attend_heads: [5, 5]",
        "layers[0].attend_heads must be ascending",
    ),
    "a head that is text": (
        "attend_heads: true",
        "attend_heads: [x]",
        "layers[0].attend_heads[0] must be a whole",
    ),
    "a rank of nothing": (
        "neurons: 7",
        "neurons: 7\n  qkv_rank: 0",
        "layers[0].qkv_rank must lie betwe",
    ),
    "a rank too wide": (
        "neurons: 7",
        "neurons: 7\n  qkv_rank: 61",
        "layers[0].qkv_rank must lie between",
    ),
    "a rank nobody reads": (
        "neurons: 0",
        "neurons: 0, qkv_rank: 3",
        "layers[2].qkv_rank must lie betwe",
    ),
    "a rank of text": (
        "neurons: 7",
        "neurons: 7\n  qkv_rank: x",
        "layers[0].qkv_rank must be a whole",
    ),
    "a negative map": (
        "neurons: 7",
        "neurons: 7\n  map_rank: -1",
        "layers[0].map_rank must lie betw",
    ),
    "a map too wide": (
        "neurons: 7",
        "neurons: 7\n  map_rank: 61",
        "layers[0].map_rank must lie betw",
    ),
    "a map in addition to everything": (
        "neurons: 50",
        "neurons: 50, map_rank: 2",
        "layers[1].map_rank must be 0 whe",
    ),
}


@pytest.mark.parametrize("spelled", [str, in_former_words])
@pytest.mark.parametrize("name", FITTED_MISTAKES)
def test_mistakes_in_fits_name_line_and_key(name: str, spelled: Callable[[str], str]) -> None:
    old, new, message = FITTED_MISTAKES[name]
    assert parsed(FITTED).compensation == "refit" and old in FITTED
    text = FITTED.replace(old, new, 1)
    line = 1 + next(n for n, line in enumerate(text.split("\n")) if line not in FITTED.split("\n"))
    with pytest.raises(PlanError) as caught:
        parse_plan("plan.yaml", spelled(text))
    assert f"plan.yaml:{line}: {spelled(message)}" in str(caught.value)


@pytest.mark.parametrize("key", ["qkv_rank", "map_rank", "rank", "linear"])
def test_fits_need_the_compensation_that_makes_them(key: str) -> None:
    text = FITTED.replace("neurons: 7", f"neurons: 7\n  {key}: 3")
    parse_plan("plan.yaml", text)
    for other in ("none", "mean"):
        with pytest.raises(PlanError, match=rf"layers\[0\].{key} needs 'compensation: refit'"):
            parse_plan("plan.yaml", text.replace("refit", other))


def test_former_keys_of_layers_are_read_and_written_by_their_present_names() -> None:
    layers = (
        LayerPlan((0, 1, 4), (1, 4), 2, 20, qkv_rank=7, map_rank=3),
        LayerPlan(tuple(range(6)), tuple(range(6)), None, 50),
        LayerPlan((3,), (), None, 0, map_rank=2),
    )
    plan = replace(some_plan(random.Random(5)), layers=layers, compensation="refit")
    plan = replace(plan, budget=Budget(None, visual_budget(plan)))
    text = to_yaml(plan, SIDE_FILE)
    former = in_former_words(text)
    for key, old in FORMER_KEYS.items():
        assert f" {key}: " in text and f" {old}: " in former and key not in former
    again = parse_plan("plan.yaml", former)
    assert again == parse_plan("plan.yaml", text) and again[0].layers == layers
    assert to_yaml(*again) == text


def test_a_layer_may_mix_former_and_present_keys() -> None:
    mixed = FITTED.replace("attend_heads: true", "attend: [5]").replace(
        "neurons: 7", "neurons: 7\n  rank: 3\n  map_rank: 2"
    )
    assert parsed(mixed).layers[0] == LayerPlan((0, 5), (5,), 2, 7, qkv_rank=3, map_rank=2)


@pytest.mark.parametrize("key", FORMER_KEYS)
def test_both_names_of_a_key_are_refused(key: str) -> None:
    """This holds even if they agree, because a later edit of one might not count."""
    former, value = FORMER_KEYS[key], {"read_heads": "[0, 5]", "attend_heads": "true"}.get(key, 3)
    alone = (
        FITTED if f"{key}: {value}" in FITTED else FITTED.replace("  ra", f"  {key}: 3\n  ra", 1)
    )
    parse_plan("plan.yaml", alone)
    both = alone.replace("  neurons: 7", f"  neurons: 7\n  {former}: {value}", 1)
    line = 1 + both.split("\n").index(f"  {former}: {value}")
    with pytest.raises(PlanError) as caught:
        parse_plan("plan.yaml", both)
    sentence = (
        f"plan.yaml:{line}: layers[0].{former} is the former name of {key}, which is also given."
    )
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1, 1, 1, 1, 1, 1], ", "", "measured.rho must have 3 entries, found 2"),
        ("[1, 1, 1, 1, 1, 1]", "[1, 1]", "measured.rho[0] must have 6 values, found 2"),
        ("0.5]]", "x]]", "measured.rho[2] must be a number, found 'x'"),
        ("[1, 2, 3]", "[1, 2, 3.5]", "measured.locality[2] must be a whole number"),
        ("locality", "localty", "measured.localty is not a known key"),
        ("  locality: [1, 2, 3]\n", "", "measured lacks the key 'locality'"),
    ],
)
def test_mistakes_in_measurements_are_refused(old: str, new: str, message: str) -> None:
    assert parsed(GOOD + MEASURED).measured.locality == (1, 2, 3)
    with pytest.raises(PlanError, match=re.escape(message)):
        parse_plan("plan.yaml", GOOD + MEASURED.replace(old, new, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid YAML"),
        ("a: 1\n", "is not a yopo plan"),
        ("", "found nothing"),
        ("yopo_plan: 1\n", "lacks the key 'model'"),
    ],
)
def test_documents_that_are_not_plans_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"plan.yaml.*{message}"):
        parse_plan("plan.yaml", text)


def test_plans_come_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(GOOD))
    assert read_document("-")[0].layers[0].read_heads == (0, 5)
    monkeypatch.setattr("sys.stdin", io.StringIO(GOOD.replace("radius: 2", "radius: x")))
    with pytest.raises(PlanError, match="<stdin>:17: layers"):
        read_document("-")


def test_any_cut_of_a_plan_is_a_plan_or_a_plan_error() -> None:
    """Truncated or hand-edited files give one sentence, whatever was lost."""
    plan = replace(some_plan(random.Random(1)), measured=measured(random.Random(1)))
    text = to_yaml(plan, SIDE_FILE)
    for end in range(0, len(text), 17):
        for cut in (text[:end], text[:end] + text[end + 17 :]):
            try:
                parse_plan("plan.yaml", cut)
            except PlanError:
                continue
