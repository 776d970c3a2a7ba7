"""What is lost is shown wherever what is saved is: inspect, compare, the card, a loaded model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from command_line import Yopo

import yopo as library
from yopo.cli.main import main
from yopo.demo import LLAVA_TINY
from yopo.models.registry import resolve
from yopo.plans.quality import quality_of
from yopo.plans.storage import read_plan
from yopo.serving.loading import load_dense

QUICK = ("--model", "llava-tiny", "--samples", 32, "--measure-pairs", 8, "--fit-pairs", 8)


def run(*arguments: object) -> str:
    """Run a command that succeeds, and return its output."""
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr("sys.stdout", out)
        assert main(["-q", *map(str, arguments)]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plans at two budgets, one for the paper's shape, and the first two baked."""
    folder = tmp_path_factory.mktemp("compare")
    light = ("--template", "reader", "--compensation", "none", "--max-new-tokens", 4)
    run("calibrate", *QUICK, *light, "--budgets", "30%,10%", "-o", folder / "plan.yaml")
    run("calibrate", *QUICK, "--preset", "yopo-12", "-o", folder / "paper.yaml")
    few = ("--samples", 8, "--timing-runs", 0, "--max-new-tokens", 4, "--json")
    (folder / "eval.json").write_text(run("eval", folder / "plan-0.3.yaml", *few))
    plans = (folder / "plan-0.3.yaml", folder / "plan-0.1.yaml")
    run("apply", *plans, "--eval", folder / "eval.json", "-o", folder / "baked")
    return folder


def test_a_plan_records_its_quality(front: Path) -> None:
    plan = read_plan(front / "plan-0.3.yaml")
    found = quality_of(plan)
    assert found is not None and found.is_current and found.pairs == 8
    assert found.kl == plan.provenance["candidates"][0]["kl"]
    assert found.whole_answers == plan.provenance["candidates"][0]["whole_answers"]
    assert sum(each.pairs for each in found.kinds.values()) == 8
    assert quality_of(read_plan(front / "paper.yaml")) is None


def test_inspect_shows_the_quality_of_plans_and_of_checkpoints(yopo: Yopo, front: Path) -> None:
    kl = f"{read_plan(front / 'plan-0.3.yaml').provenance['quality']['kl']:.3g}"
    for target in ("plan-0.3.yaml", "baked"):
        done = yopo("inspect", front / target)
        assert done.code == 0, done.err
        (row,) = [line for line in done.out.splitlines() if line.startswith("all pairs")]
        assert row.split()[:4] == ["all", "pairs", "8", kl]
    assert "evaluated on 8 pairs: " in done.out
    assert "holds plans at" in done.err and "(--budget F)" in done.err
    assert done.err.endswith(f"next: yopo eval {front}/baked --data PAIRS\n")
    done = yopo("inspect", front / "paper.yaml")
    assert "quality: not measured" in done.out
    document = json.loads(yopo("inspect", front / "baked", "--budget", "20%", "--json").out)
    assert document["baked"] and document["budget"]["asked"] == 0.1
    assert yopo("inspect", front / "baked", "--budget", "0.1%").is_sentence
    assert yopo("inspect", front / "plan-0.3.yaml", "--budget", "20%").is_sentence
    assert yopo("inspect", ".").is_sentence


def test_compare_takes_plans_and_checkpoints(
    yopo: Yopo, front: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(front)  # long paths would be folded
    done = yopo("compare", "plan-0.3.yaml", "paper.yaml", "baked")
    assert done.code == 0, done.err
    for part in ("visual FLOPs", "visual KV", "logit KL", "accuracy kept", "layers: "):
        assert part in done.out
    assert "yopo_plan-1.yaml" in " ".join(done.out.split()), "each budget is a plan"
    document = json.loads(yopo("compare", front / "baked", "--json").out)
    assert [each["template"] for each in document["plans"]] == ["reader", "reader"]
    assert sorted(each["evaluated"] is None for each in document["plans"]) == [False, True]
    done = yopo("compare", front / "plan-0.3.yaml", front / "paper.yaml", "--html", "page.html")
    assert (done.code, done.out) == (0, "") and "logit KL" in Path("page.html").read_text()
    assert yopo(
        "compare", front / "plan-0.3.yaml", front / "baked", "--html", "page.html"
    ).is_sentence
    assert yopo("compare", front / "plan-0.3.yaml", "gone.yaml").is_sentence


def test_the_model_card_says_what_is_lost(front: Path) -> None:
    card = (front / "baked" / "README.md").read_text()
    found, right = read_plan(front / "plan-0.3.yaml").provenance["quality"], "Right answers: "
    assert f"| all | 8 | {found['kl']:.3g} | {found['whole_answers']:.1%} |" in card
    evaluated = json.loads((front / "eval.json").read_text())
    assert f"Evaluated on 8 pairs: logit KL {evaluated['kl']:.3g}" in card
    assert f"{right}{evaluated['accuracy']['pruned']} of {evaluated['accuracy']['total']}" in card


def test_a_model_says_whether_and_how_it_is_pruned(front: Path) -> None:
    said = library.describe(library.load(front / "baked"))
    plan = read_plan(front / "plan-0.3.yaml")
    budget = f"{100 * plan.budget.reached:.1f} % of the visual FLOPs"
    first, *rest = said.splitlines()
    assert first == f"LlavaForConditionalGeneration, pruned by yopo: llava-tiny at {budget}"
    assert len(rest) == 3 and "plan: reader, compensation none" in said
    assert f"logit KL {plan.provenance['quality']['kl']:.3g} nats" in said
    dense = load_dense(resolve(str(LLAVA_TINY)))
    expected = "LlavaForConditionalGeneration, dense: yopo prunes nothing of it"
    assert library.describe(dense) == expected
    with library.pruned(dense, plan):
        assert budget in library.describe(dense)


def test_another_evaluation_is_refused_before_anything_is_written(yopo: Yopo, front: Path) -> None:
    done = yopo("apply", front / "paper.yaml", "--eval", front / "eval.json", "-o", "out")
    assert done.is_sentence and "evaluates a plan for llava-tiny at" in done.err
    assert not Path("out").exists()
