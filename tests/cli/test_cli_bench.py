"""``yopo bench`` prints a table for people and one JSON document for machines."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import thinning
from click.testing import CliRunner
from command_line import LAYERS, Yopo

from yopo.baselines.registry import BASELINES
from yopo.bench import random_model
from yopo.cli.verbosity import Verbosity
from yopo.plans.flops import dense_prefill_flops, prefill_flops
from yopo.plans.schema import ModelShape, Workload
from yopo.plans.storage import read_plan

FAST = ("--runs", 2, "--decode-steps", 1, "--device", "cpu")
NEXT = "next: yopo calibrate --model llava-1.5-7b --data PAIRS\n"
SPREAD = {"median", "low", "high"}
COMPARED = {"dense", "pruned", "ratio"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published shapes, in small."""
    shape = ModelShape(layers=6, hidden=32, heads=4, kv_heads=4, head_dim=8, ffn=64)
    monkeypatch.setitem(random_model.SHAPES, "llava-1.5-7b", shape)


def test_json_output_is_one_complete_document(yopo: Yopo) -> None:
    sizes = ("--visual-tokens", 16, "--text-tokens", 8, "--batch", 2, "--threads", 1)
    done = yopo("bench", "--preset", "yopo-25", "--layers", 4, *sizes, *FAST, "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert set(found) == {
        *("model", "weights", "stand_in", "plan", "visual_budget", "shape", "layers", "prompt"),
        *("device", "dtype", "threads", "cuda_graphs", "options", "prefill_ms", "prefill_flops"),
        *("time_ratio_over_flops_ratio", "decode_ms_per_token", "peak_bytes_above_weights"),
        *("visual_kv_bytes", "contenders", "left_out", "contexts"),
        *("as_shipped", "rates", "shares_above_the_bound"),
    }
    for what in ("prefill_ms", "decode_ms_per_token"):
        assert set(found[what]) == COMPARED
        for spread in found[what].values():
            assert set(spread) == SPREAD
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert (found["model"], found["weights"]) == ("llava-1.5-7b", "random")
    assert found["layers"]["total"] == 6 and len(found["layers"]["used"]) == 4
    assert found["prompt"]["visual"] == 16 and found["prompt"]["batch"] == 2
    assert (found["device"], found["dtype"], found["threads"]) == ("cpu", "float32", 1)
    flops = found["prefill_flops"]
    assert flops["ratio"] == flops["pruned"] / flops["dense"]
    quotient = found["prefill_ms"]["ratio"]["median"] / flops["ratio"]
    assert found["time_ratio_over_flops_ratio"] == pytest.approx(quotient)
    shipped = found["as_shipped"]  # so small a model runs on the same kernels
    assert not shipped["other_kernels"] and shipped["prefill_ms"] == found["prefill_ms"]
    assert shipped["decode_ms_per_token"] == found["decode_ms_per_token"]
    assert shipped["time_ratio_over_flops_ratio"] == found["time_ratio_over_flops_ratio"]
    assert found["shares_above_the_bound"] == {}
    kept = found["visual_kv_bytes"]
    assert kept["pruned"] == kept["planned"] < kept["dense"]
    assert list(found["contenders"]) == ["dense", "pruned"]
    assert found["contexts"] == [] and found["left_out"] == {}


def test_text_output_is_a_table(yopo: Yopo) -> None:
    done = yopo("bench", "--preset", "yopo-12", "--visual-tokens", 16, *FAST)
    assert (done.code, done.err) == (0, NEXT)
    for expected in (
        "llava-1.5-7b, yopo-12, visual budget",
        "1 x (16 visual + 64 text tokens), float32, cpu",
        "time / FLOPs",
        "decode, per token",
        "visual KV",
        "weights: random",
        "median of 2 pairs",
        "peak memory: during prefill, without the weights",
    ):
        assert expected in done.out
    assert "speed" not in done.out
    reached = [line for line in done.out.splitlines() if line.startswith("  bound reached")]
    assert len(reached) == 3  # prefill, decode, and the cache, which is exact
    assert reached[2].split()[-2:] == ["100.0", "%"]


WITH_BASELINES = ("bench", "--preset", "yopo-25", "--visual-tokens", 64, *FAST, "--context", 200)


def test_json_output_holds_the_baselines(yopo: Yopo) -> None:
    done = yopo(*WITH_BASELINES, "--baselines", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    contenders = found["contenders"]
    runs = [name for name in BASELINES if name != "fastv"]
    assert list(contenders) == ["dense", "pruned", *runs]
    assert list(found["left_out"]) == ["fastv"]  # two of six layers exceed the budget
    for name, each in contenders.items():
        assert each["visual_kv_bytes"] == each["planned_visual_kv_bytes"]
        ideal = 1e3 * found["prefill_flops"]["dense"] * each["prefill_flops_ratio"]
        ideal /= found["rates"]["flops_per_second"]
        assert each["prefill_share_of_bound"] == pytest.approx(ideal / each["prefill_ms"]["median"])
        assert (each["setting"] is None) == (name in ("dense", "pruned"))
        assert each["visual_budget"] <= found["visual_budget"] or name in ("dense", "masked")
    assert contenders["dense"]["prefill_time_ratio"]["median"] == 1
    assert contenders["masked"]["prefill_flops_ratio"] == 1
    (at,) = found["contexts"]
    without_plan = [name for name in runs if name != "masked"]
    assert at["context"] == 200 and list(at["decode"]) == ["dense", "pruned", *without_plan]
    assert 0 < at["decode"]["pruned"]["bytes_ratio"] < at["decode"]["dense"]["bytes_ratio"] == 1


def test_the_table_shows_the_baselines(yopo: Yopo) -> None:
    done = yopo(*WITH_BASELINES, "--baseline", "vtw", "--baseline", "masked")
    assert (done.code, done.err) == (0, NEXT)
    lines = [line.split() for line in done.out.splitlines()]
    firsts = [line[0] for line in lines if line]
    for name in ("yopo", "VTW", "masks"):
        assert firsts.count(name) == 2  # prefill; decode and memory
    assert ["200", "tokens"] in [line[:2] for line in lines]
    assert "VTW: K = 1 of 6 layers (arXiv 2405.05803)" in done.out
    assert "nothing is skipped" in done.out
    assert max(map(len, done.out.splitlines())) <= 80 and "speed" not in done.out


def test_flags_of_the_previous_release_still_work(yopo: Yopo) -> None:
    """They are hidden, and give the same results as the new ones."""
    old = yopo(*WITH_BASELINES, "--rival", "vtw", "--baseline", "masked", "--json")
    assert (old.code, old.err) == (0, "")
    found = json.loads(old.out)
    assert found["options"]["baselines"] == ["masked", "vtw"]
    assert found["contenders"]["vtw"]["setting"] == {"name": "vtw", "layers": 1}
    all_of_them = yopo(*WITH_BASELINES, "--rivals", "--json")
    assert set(json.loads(all_of_them.out)["contenders"]) >= set(BASELINES) - {"fastv"}
    shown = yopo("bench", "--help").out
    assert "rival" not in shown and all(name in shown for name in BASELINES)


def test_a_new_baseline_appears_once_registered(
    yopo: Yopo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, where in thinning.LINE.items():
        monkeypatch.setitem(BASELINES, name, where)
    for flag in (("--baseline", "thinning"), ("--baselines",)):
        done = yopo(*WITH_BASELINES, *flag, "--json")
        assert (done.code, done.err) == (0, "")
        found = json.loads(done.out)["contenders"]["thinning"]
        assert found["setting"] == {"name": "thinning", "step": 64}
        assert found["visual_kv_bytes"] == found["planned_visual_kv_bytes"]
    shown = yopo(*WITH_BASELINES, "--baseline", "thinning").out
    assert "Thinning: one of 64, and again (here)" in shown
    assert "'thinning'" in yopo(*WITH_BASELINES, "--baseline", "thining").err
    assert "thinning" in fresh_help()


def fresh_help() -> str:
    """Return the ``--help`` of a newly started process."""
    spec = importlib.util.find_spec("yopo.cli.bench")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return CliRunner().invoke(module.command, ["--help"], obj=Verbosity()).output


def test_the_printed_flops_are_those_of_the_plan(yopo: Yopo, plan: Path, model: Path) -> None:
    done = yopo("bench", plan, "--model", model, "--text-tokens", 9, *FAST, "--json")
    assert (done.code, done.err) == (0, "")
    found, asked = json.loads(done.out), read_plan(plan)
    prompt = found["prompt"]
    grids, before = asked.workload.grids, prompt["text_before"]
    ran = Workload(grids, text=9, text_before=before)
    assert [list(pair) for pair in prompt["grids"]] == [[g.rows, g.cols] for g in grids]
    asked = type(asked)(
        asked.model, ran, asked.layers, asked.budget, asked.compensation, tensors=asked.tensors
    )
    assert found["prefill_flops"]["pruned"] == prefill_flops(asked)
    assert found["prefill_flops"]["dense"] == dense_prefill_flops(asked.model.shape, ran)
    assert found["weights"] == "checkpoint" and found["layers"]["used"] == list(range(LAYERS))


def test_a_plan_can_be_benched_without_its_model(yopo: Yopo, plan: Path) -> None:
    done = yopo("bench", plan, "--random-weights", "--layers", 2, *FAST)
    assert done.code == 0 and f"on 2 of {LAYERS} layers" in done.out
    assert "stands in" not in done.out


def test_a_baked_directory_can_be_benched(yopo: Yopo, plan: Path, model: Path) -> None:
    assert yopo("apply", plan, "--model", model, "-o", "baked").code == 0
    done = yopo("bench", "baked", *FAST)
    assert done.code == 0 and "time / FLOPs" in done.out and "random" not in done.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "TARGET or --preset"),
        (("plan.yaml", "--preset", "yopo-25"), "TARGET or --preset"),
        (("plan.yaml", "--shape-of", "llava-1.5-7b"), "--preset"),
        (("plan.yaml", "--layers", 2), "--random-weights"),
        (("plan.yaml", "--random-weights", "--model", "m"), "--model"),
        (("--preset", "yopo-25", "--runs", 0), "--runs"),
        (("--preset", "yopo-25", "--context", 99, "--decode-steps", 0), "--decode-steps"),
    ],
)
def test_usage_errors_exit_with_2(yopo: Yopo, arguments: tuple, expected: str) -> None:
    done = yopo("bench", *arguments)
    assert (done.code, done.out) == (2, "") and expected in done.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--preset", "yopo-26"), "yopo-25"),
        (("--preset", "yopo-25", "--shape-of", "llava-1.5-8b"), "llava-1.5-7b"),
        (("--preset", "yopo-25", "--visual-tokens", 7), "7 visual tokens do not form whole images"),
        (("--preset", "yopo-25", "--layers", 7), "7 layers from a plan with 6"),
        (("--preset", "yopo-25", "--baseline", "fastvv"), "fastv"),
        (("--preset", "yopo-25", "--baseline", "fastv"), "fastv needs at least"),
        (("--preset", "yopo-25", "--context", 9), "context of 9 tokens"),
        (("nowhere.yaml",), "nowhere.yaml"),
        (("--preset", "yopo-25", "--dtype", "float33"), "float33"),
    ],
)
def test_failures_are_single_sentences(yopo: Yopo, arguments: tuple, expected: str) -> None:
    done = yopo("bench", *arguments, *FAST)
    assert done.is_sentence and expected in done.err
