"""A calibration that ended early goes on where it was, with the same bytes, in its own directory.

``test_kills.py`` ends them at random moments, ``test_work_faults.py`` damages what they keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from yopo.cli.main import main
from yopo.fitting import fitter, refit
from yopo.pipeline.commands import calibrate
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.pipeline.work_status import note_begun
from yopo.planning.request import BudgetRequest, PlanRequest, ToleranceRequest
from yopo.plans.schema import PruningPlan
from yopo.plans.storage import plan_files
from yopo.reduction.method import Method
from yopo.reduction.registry import parse_method
from yopo.support.errors import OutputError
from yopo.support.work_dir import Stage, WorkDir, open_work


class Killed(BaseException):
    """Ends a run as abruptly as an exception can."""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few plans, and sums kept after every batch."""
    monkeypatch.setattr("yopo.planning.weightings.VISUAL_WEIGHTS", (1.0, 10.0))
    monkeypatch.setattr("yopo.planning.allocations.near", lambda weighting: ())
    monkeypatch.setattr("yopo.planning.allocations.GENERATIONS", 0)
    monkeypatch.setattr("yopo.planning.weightings.near", lambda weighting: ())
    monkeypatch.setattr("yopo.calibration.measure.PERIOD", 0.0)


NOTES = ("totals", "totals-plans", "finished")
"""Stages for ``--status`` only, which every run writes."""

REPEATED = (*NOTES, "statistics-part")
"""Stages that are written more than once."""

REQUEST = BudgetRequest(0.3, compensation="refit")


def make(
    work: Path | None,
    request: PlanRequest = REQUEST,
    *,
    samples: int = 32,
    batch_size: int = 4,
    reduction: Method | None = None,
) -> PruningPlan:
    options = RunOptions(samples=samples, batch_size=batch_size, max_new_tokens=3)
    fit_options = FitOptions(measure_pairs=8, fit_pairs=8, work_dir=work, reduction=reduction)
    return calibrate("llava-tiny", request, options=options, fit_options=fit_options).plan


def bytes_of(plan: PruningPlan) -> list[bytes]:
    return [*plan_files(plan, "plan.yaml", "{sha256}").values()]


@pytest.mark.usefixtures("few")
def test_ended_after_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, saved = bytes_of(make(None)), []
    original = WorkDir.save

    def save(work: WorkDir, name: str, stage: Stage) -> None:
        """End after every third result; nothing finished may be done again."""
        assert name not in saved or name in REPEATED
        original(work, name, stage)
        saved.append(name)
        results = [each for each in saved if each not in NOTES]
        if name not in NOTES and len(results) % 3 == 0:
            raise Killed

    monkeypatch.setattr(WorkDir, "save", save)
    ends = 0
    plan = None
    while plan is None and ends < 100:
        try:
            plan = make(tmp_path / "work")
        except Killed:
            ends += 1
    assert plan is not None and ends > 10
    assert bytes_of(plan) == expected
    kinds = ("statistics-part", "statistics", "profile-", "profile", "layer-", "answers-")
    for kind in (*kinds, "comparison-", "finished"):
        assert any(name.startswith(kind) for name in saved), kind


@pytest.mark.usefixtures("few")
def test_finished_work_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bytes_of(make(tmp_path))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("repeated")

    monkeypatch.setattr("yopo.calibration.measure._observe", never)
    monkeypatch.setattr("yopo.evaluation.fidelity.generate_answers", never)
    monkeypatch.setattr("yopo.pipeline.judge.compare", never)
    monkeypatch.setattr(fitter, "profile", never)
    monkeypatch.setattr(fitter, "refit", never)
    assert bytes_of(make(tmp_path)) == first


@pytest.mark.usefixtures("few")
def test_lost_layers_are_fitted_again(tmp_path: Path) -> None:
    first = bytes_of(make(tmp_path))
    layers = sorted(tmp_path.glob("layer-*"))
    assert layers
    layers[-1].unlink()
    assert bytes_of(make(tmp_path)) == first


@pytest.mark.usefixtures("few")
def test_kept_weights_are_used_not_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path)
    for path in tmp_path.glob("comparison-*"):
        path.unlink()
    solved: list[int] = []
    original = refit.LayerFit.ffn

    def ffn(self: refit.LayerFit, *arguments: object) -> dict[str, torch.Tensor]:
        solved.append(self.number)
        return original(self, *arguments)

    monkeypatch.setattr(refit.LayerFit, "ffn", ffn)
    assert bytes_of(make(tmp_path)) == bytes_of(first)
    fitted = sum("ffn_bias" in weights for weights in first.tensors.refit.values())
    assert solved and len(solved) <= fitted  # only those of the other, forgotten plan


@pytest.mark.usefixtures("few")
def test_a_tolerance_goes_on(tmp_path: Path) -> None:
    request = ToleranceRequest(0.2)
    plain = make(None, request, samples=48, batch_size=8)
    for _ in range(2):
        assert bytes_of(make(tmp_path, request, samples=48, batch_size=8)) == bytes_of(plain)


@pytest.mark.usefixtures("few")
def test_work_on_reduced_tokens_goes_on(tmp_path: Path) -> None:
    half = parse_method("divprune:0.5")
    plain = make(None, reduction=half)
    assert plain.reduction == half
    for lost in ("comparison-*", "profile*"):
        assert bytes_of(make(tmp_path, reduction=half)) == bytes_of(plain)
        for path in tmp_path.glob(lost):
            path.unlink()
    with pytest.raises(OutputError, match="its reduction is"):
        make(tmp_path)


@pytest.mark.usefixtures("few")
def test_another_command_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(OutputError, match="its batch_size is 4, not 8") as caught:
        make(tmp_path, batch_size=8)
    assert "another directory" in str(caught.value)
    with pytest.raises(OutputError, match="its request is"):
        make(tmp_path, BudgetRequest(0.5, compensation="refit"))
    with pytest.raises(OutputError, match="its data is"):
        make(tmp_path, samples=33)


def test_a_directory_is_for_one_process(tmp_path: Path) -> None:
    work = open_work(tmp_path, {"a": 1})
    with pytest.raises(OutputError, match="another process"):
        open_work(tmp_path, {"a": 1})
    work.close()
    open_work(tmp_path, {"a": 1}).close()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(OutputError, match="holds other files"):
        open_work(tmp_path, {})
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_damaged_stage_is_named(tmp_path: Path) -> None:
    work = open_work(tmp_path, {})
    work.save("one", Stage({"x": torch.arange(3)}, {"y": [1]}))
    kept = work.load("one")
    assert kept is not None and kept.tensors["x"].tolist() == [0, 1, 2] and kept.about == {"y": [1]}
    path = tmp_path / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(OutputError, match="one.safetensors: is damaged"):
        work.load("one")


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    def status(folder: Path) -> tuple[int, list[str], str]:
        code = main(["calibrate", "--status", str(folder)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    yield status


@pytest.mark.usefixtures("few")
def test_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: object) -> None:
    assert lines(tmp_path)[0] == 1
    assert "holds no work" in lines(tmp_path)[2]

    def fail(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("yopo.fitting.fitter.refit", fail)
        with pytest.raises(Killed):
            make(tmp_path)
    code, out, _ = lines(tmp_path)
    assert code == 0 and "interrupted" in out[0]
    assert out[1:4] == ["statistics: done", "dense answers: 0 of 8 pairs", "profile: done"]
    make(tmp_path)
    _, out, _ = lines(tmp_path)
    assert "finished" in out[0] and out[2] == "dense answers: done"
    assert out[4].startswith("plans: 2 of at most")
    for path in tmp_path.glob("comparison-*"):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("yopo.pipeline.judge.compare", fail)
        with pytest.raises(Killed):
            make(tmp_path)
    assert "interrupted" in lines(tmp_path)[1][0], "it is not finished any more"


def test_status_of_several_shares(tmp_path: Path, lines: object) -> None:
    for share in ("share-0.5", "share-1"):
        work = open_work(tmp_path / share, {})
        note_begun(work, {"statistics": 4, "comparison": 8, "holdout": 0, "layers": 2})
        if share == "share-1":
            assert lines(tmp_path)[1][6:8] == [
                f"{tmp_path / share}: in progress",
                "statistics: 0 of 4 pairs",
            ]
        work.close()
    code, out, _ = lines(tmp_path)
    assert code == 0 and len(out) == 12
    assert out[0] == f"{tmp_path / 'share-0.5'}: interrupted; the same command goes on"
