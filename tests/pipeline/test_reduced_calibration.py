"""A plan on reduced tokens from calibration to an answer, on both demo decoders."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import yopo
from yopo.cli.main import main
from yopo.data.prompts import encode_for, load_processor
from yopo.data.sources import open_pairs
from yopo.models.registry import resolve
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.plans.flops import prefill_flops, visual_budget, visual_kv_bytes
from yopo.plans.quality import quality_of
from yopo.plans.schema import PruningPlan, Workload
from yopo.plans.storage import read_plan
from yopo.reduction.methods.par import PAR
from yopo.reduction.registry import make_method, parse_method
from yopo.runtime.install import pruned
from yopo.serving.loading import load_dense

MODELS = {"llava-tiny": "demo:heldout", "qwen2-vl-tiny": "demo:glyphs-heldout"}
OPTIONS = RunOptions(samples=32, max_new_tokens=12)


@dataclass(frozen=True)
class Made:
    """A model's name, its plan's file, the plan, and the checkpoint that it was baked into."""

    model: str
    file: Path
    plan: PruningPlan
    baked: Path


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Calibrate and bake through the command line."""
    folder = tmp_path_factory.mktemp(request.param)
    file, baked = folder / "plan.yaml", folder / "baked"
    asked = ["--model", request.param, "--reduce", "par:0.5", "--budget", "0.05", "-o", str(file)]
    few = ["--samples", "32", "--max-new-tokens", "12", "--compensation", "refit"]
    with pytest.MonkeyPatch.context() as patch:
        tiny.try_few_plans(patch)
        assert main(["calibrate", *asked, *few]) == 0
    assert main(["apply", str(file), "-o", str(baked)]) == 0
    return Made(request.param, file, read_plan(file), baked)


def prompt(made: Made, count: int = 1) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    source = resolve(made.model)
    model, processor = load_dense(source), load_processor(source.location)
    pairs = tuple(open_pairs(MODELS[made.model], samples=count, seed=1))
    return model, encode_for(model, processor, pairs).inputs


def test_the_plan_carries_the_reduction_within_its_budget(made: Made) -> None:
    found = made.plan.reduction
    assert isinstance(found, PAR) and replace(found, common=()) == make_method("par", 0.5)
    assert found.common  # the template's tokens, and words that most questions have
    assert made.plan.workload.visual == 64 and made.plan.seen.visual == 32
    assert 0.045 < visual_budget(made.plan) <= 0.05
    assert made.plan.compensation == "refit"
    quality = quality_of(made.plan)
    assert quality is not None and quality.is_current and quality.kl < 1.0


def test_executed_flops_are_the_formula(made: Made) -> None:
    model, inputs = prompt(made)
    workload = made.plan.workload
    text = inputs["input_ids"].shape[1] - workload.visual
    is_visual = inputs["input_ids"][0] == model.config.image_token_id
    before = int(is_visual.nonzero()[0])
    exact = Workload(workload.grids, text, before)
    plan = replace(made.plan, workload=exact)
    counter = FlopCounterMode(display=False)
    with pruned(model, plan), torch.no_grad():
        with counter, sdpa_kernel(SDPBackend.MATH):
            cache = model(**inputs, use_cache=True).past_key_values
    counts = counter.get_flop_counts()
    (decoder,) = (each for each in counts if each.endswith("model.language_model"))
    assert sum(counts[decoder].values()) == pytest.approx(prefill_flops(plan), rel=0.01)
    assert sum(each.visual_bytes() for each in cache.layers) == visual_kv_bytes(plan, itemsize=4)


def test_a_baked_model_answers_as_the_plan_in_memory(made: Made) -> None:
    model, inputs = prompt(made, 3)
    options = {"max_new_tokens": 8, "do_sample": False}
    with pruned(model, made.plan):
        expected = model.generate(**inputs, **options)
    loaded = yopo.load(made.baked)
    assert torch.equal(loaded.generate(**inputs, **options), expected)
    said = yopo.describe(loaded)
    assert "reduction: PAR (re-implemented from its description) at 50 % of the tokens" in said
    assert "32 of 64 per prompt" in said


def test_stock_transformers_load_the_dense_original(made: Made) -> None:
    model, inputs = prompt(made)
    stock = AutoModelForImageTextToText.from_pretrained(made.baked).eval()
    with torch.no_grad():
        found, dense = stock(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)


def test_the_card_and_inspect_name_it(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    card = (made.baked / "README.md").read_text()
    assert "PAR (re-implemented from its description) at 50 % of the tokens" in card
    assert "(arXiv 2410.07278) are kept: 32 of 64" in card
    assert main(["inspect", str(made.file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "reduction PAR (re-implemented from its description)" in said
    assert "32 of 64 tokens enter the first layer" in said


def test_it_is_evaluated(made: Made) -> None:
    found = yopo.evaluate(made.baked, options=OPTIONS, timing_runs=0)
    assert found.pairs == 32 and 0 < found.fidelity.kl < 1.0
    assert found.fidelity.agreement > 0.7


def test_it_is_benched(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--device", "cpu", "--runs", "1", "--decode-steps", "1"]
    assert main(["bench", str(made.file), *quick, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    flops = found["prefill_flops"]["pruned"]
    assert flops == prefill_flops(made.plan)


def test_front_and_statistics_carry_it(tmp_path: Path) -> None:
    """Several budgets share the reduction, and plans from saved statistics have it."""
    asked = ["--model", "llava-tiny", "--reduce", "divprune:25%", "--budgets", "0.1,0.05"]
    few = ["--samples", "16", "--template", "reader-heads", "--compensation", "none"]
    plan, stats = tmp_path / "p.yaml", tmp_path / "s.safetensors"
    assert main(["calibrate", *asked, *few, "-o", str(plan), "--stats", str(stats)]) == 0
    again = tmp_path / "again.yaml"
    assert main(["plan", str(stats), "--budget", "0.07", "-o", str(again)]) == 0
    for name in ("p-0.1.yaml", "p-0.05.yaml", "again.yaml"):
        found = read_plan(tmp_path / name)
        assert found.reduction == make_method("divprune", 0.25) and found.seen.visual == 16


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("pra:0.5", "Unknown reduction 'pra'"),
        ("par:", "NAME:SHARE"),
        ("par:2", "keep must lie in"),
    ],
)
def test_bad_reductions_are_refused_in_a_sentence(
    text: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "p.yaml"
    asked = ["--model", "llava-tiny", "--reduce", text, "--budget", "0.1", "-o", str(output)]
    assert main(["calibrate", *asked]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert problem in said and "Traceback" not in said
    assert not output.exists()


def test_a_tolerance_is_met_with_reduced_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.try_few_plans(monkeypatch)
    fit = FitOptions(reduction=parse_method("divprune:0.5"))
    request = yopo.ToleranceRequest(0.3)
    options = RunOptions(samples=40, max_new_tokens=12)
    found = yopo.calibrate("llava-tiny", request, options=options, fit_options=fit).plan
    assert found.reduction == fit.reduction and found.budget.reached < 0.5


FEW = ["--samples", "24", "--max-new-tokens", "8", "--compensation", "none"]


def test_the_share_of_tokens_is_chosen_by_measured_kl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One plan per share, all on the same pairs against the same answers; the best is kept."""
    output, stats = tmp_path / "p.yaml", tmp_path / "s.safetensors"
    asked = ["--model", "llava-tiny", "--reduce", "random", "--budget", "0.2", "-o", str(output)]
    more = ["--stats", str(stats), "--template", "reader-heads", *FEW]
    assert main(["calibrate", *asked, *more]) == 0
    found = read_plan(output)
    tried = found.provenance["shares"]
    assert sorted(each["keep"] for each in tried) == [0.25, 0.5, 0.75, 1.0]
    assert [each["kl"] for each in tried] == sorted(each["kl"] for each in tried)
    chosen = tried[0]["keep"]
    expected = None if chosen == 1 else make_method("random", chosen)
    assert found.reduction == expected
    assert found.provenance["candidates"][0]["kl"] == tried[0]["kl"]
    assert "Best of 100% (KL" in " ".join(capsys.readouterr().err.split())
    for each in tried:  # as if each had been calibrated by itself
        own = tmp_path / "own.yaml"
        reduce = [] if each["keep"] == 1 else ["--reduce", f"random:{each['keep']}"]
        one = ["--model", "llava-tiny", *reduce, "--budget", "0.2", "-o", str(own), "--force"]
        assert main(["calibrate", *one, "--template", "reader-heads", *FEW]) == 0
        assert read_plan(own).provenance["candidates"][0]["kl"] == each["kl"]
    assert main(["plan", str(stats), "--budget", "0.1", "-o", str(tmp_path / "q.yaml")]) == 0
    assert read_plan(tmp_path / "q.yaml").reduction == found.reduction


def test_a_share_without_a_plan_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single reader of all tokens costs more than the budget, but not of a quarter of them."""
    asked = ["--model", "llava-tiny", "--reduce", "random:auto", "--template", "reader"]
    output = tmp_path / "p.yaml"
    assert main(["calibrate", *asked, "--budget", "0.008", *FEW, "-o", str(output)]) == 0
    found = read_plan(output)
    assert found.reduction is not None and found.reduction.keep < 1
    assert any(each["kl"] is None for each in found.provenance["shares"])
    assert "100% of the tokens: No plan" in " ".join(capsys.readouterr().err.split())
    assert main(["calibrate", *asked, "--budget", "0.0001", *FEW, "-o", f"{output}2"]) == 1
    assert "No share of the tokens has a plan" in " ".join(capsys.readouterr().err.split())


def test_work_on_every_share_goes_on(tmp_path: Path) -> None:
    asked = ["--model", "llava-tiny", "--reduce", "grid", "--budget", "0.2", "--work-dir"]
    more = ["--template", "reader-heads", *FEW]
    plan, written = tmp_path / "p.yaml", []
    for _ in range(2):
        where = [str(tmp_path / "work"), "-o", str(plan), "--force"]
        assert main(["calibrate", *asked, *where, *more]) == 0
        written.append(plan.read_bytes())
    names = sorted(each.name for each in (tmp_path / "work").iterdir())
    assert names == ["share-0.25", "share-0.5", "share-0.75", "share-1"]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--budgets", "0.1,0.2"], "keep the same tokens"),
        (["--tolerance", "0.1"], "compared at one budget"),
        (["--visual-layers", "4"], "compared at one budget"),
        (["--budget", "0.2", "--samples", "8"], "to compare shares of the tokens"),
    ],
)
def test_shares_need_one_budget_and_pairs(
    more: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "p.yaml"
    assert main(["calibrate", "--model", "llava-tiny", "--reduce", "par", *more, "-o", str(output)])
    said = " ".join(capsys.readouterr().err.split())
    assert problem in said and "Traceback" not in said
