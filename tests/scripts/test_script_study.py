"""Studies measure every method at its budget and resume, and reports show the results."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import thinning
import tiny

from yopo.baselines import registry
from yopo.baselines.registry import with_own_budget

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "scripts" / "figures" / "study.jsonl"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one seed and one budget on a handful of pairs."""
    path = tmp_path_factory.mktemp("study") / "study.jsonl"
    run_study(path)
    return path


def options(path: Path) -> Namespace:
    """Return the options of a study of one seed and one budget."""
    return Namespace(
        model="llava-tiny",
        calibration="demo:calibration",
        heldout="demo:heldout",
        kind=None,
        samples=16,
        pairs=6,
        seeds=[0],
        budgets=[0.3],
        methods=None,
        heldout_scale=1.0,
        scales=["1"],
        max_new_tokens=4,
        output=path,
    )


def run_study(path: Path) -> ModuleType:
    study = script("study")
    study.SEARCH_RUNS = 4
    with pytest.MonkeyPatch.context() as patch:
        tiny.try_few_plans(patch)
        study.methods(study.Study(options(path)))
        study.deeper(study.Study(options(path)))
    return study


def test_every_method_keeps_the_budget(results: Path) -> None:
    study, found = script("study"), {}
    for line in results.read_text().splitlines():
        result = json.loads(line)
        found[result["key"]["method"]] = result
    assert set(found) == {*study.METHODS, "allocated+search", *with_own_budget()}
    assert not set(study.METHODS) & set(with_own_budget())  # results are distinguished by name
    for name, result in found.items():
        summary = result["summary"]
        assert 0 < summary["reached"] <= 0.3, name
        assert summary["kl"] >= 0 and 0 <= summary["agreement"] <= 1 and result["pairs"] == 6


def test_a_new_baseline_appears_once_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "BASELINES", thinning.LINE)
    study, path = script("study"), tmp_path / "study.jsonl"
    study.METHODS.clear()
    study.methods(study.Study(options(path)))
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["key"]["method"] == "thinning" and "summary" in json.loads(line)
    report = script("study_report")
    report.report(report.read(path))
    assert "| Thinning |" in capsys.readouterr().out and "thinning" in report.COLORS


def test_existing_results_are_not_run_again(results: Path) -> None:
    before = results.read_text()
    run_study(results)
    assert results.read_text() == before


def test_the_report_shows_every_method(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    report = script("study_report")
    report.report(report.read(results))
    printed = capsys.readouterr().out
    assert all(f"| {label} |" in printed for label in report.METHODS.values())
    report.draw(report.read(results), tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


def test_seeds_become_a_mean_and_a_spread() -> None:
    cell = script("study_report").cell
    found = [{"kl": 0.1}, {"kl": 0.2}, {"kl": 0.6}]
    assert cell(found, "kl", "{:.1f}") == "0.3 ± 0.3"
    assert cell(found[:1], "kl", "{:.1f}") == "0.1" and cell(None, "kl", "{:.1f}") == ""


def test_the_page_shows_the_recorded_results(capsys: pytest.CaptureFixture[str]) -> None:
    report = script("study_report")
    report.report(report.read(FOUND))
    page = (ROOT / "scripts" / "README.md").read_text()
    tables = [each for each in capsys.readouterr().out.split("\n\n") if each.startswith("| |")]
    assert tables
    assert [each for each in tables if each.strip() not in page] == []


def test_neuron_orders_are_permutations() -> None:
    import torch

    selection = script("selection")
    from yopo.fitting.least_squares import Moments

    torch.manual_seed(0)
    moments = Moments(20, 0)
    moments.add(torch.randn(100, 20) @ torch.randn(20, 20))
    down = torch.randn(6, 20).double()
    for order in selection.ORDERS.values():
        assert sorted(order(moments.gram(), down).tolist()) == list(range(20))
    # The greedy order's last neuron is the one that removing all others one by one leaves.
    dead = down.clone()
    dead[:, 3] = 0
    assert selection.obs_greedy(moments.gram(), dead)[-1] == 3
