"""Options come from files and flags: defaults < file < command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import Run, Yopo

from yopo.pipeline.session import FitOptions, RunOptions
from yopo.planning.request import plan_request


@pytest.fixture
def called(yopo: Yopo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs ``calibrate`` with a configuration up to the library call; returns its arguments."""

    class Called(Exception):
        pass

    got: dict[str, Any] = {}

    def calibrate(model: str, request: Any, options: Any, fit_options: Any, **_: Any) -> None:
        got.update(model=model, request=request, options=options, fit_options=fit_options)
        raise Called

    monkeypatch.setattr("yopo.pipeline.commands.calibrate", calibrate)
    monkeypatch.setattr("yopo.cli.calibrate.check_named", lambda *_: None)  # no model is read

    def run(text: str | None, *flags: object) -> tuple[dict[str, Any], Run]:
        got.clear()
        file = []
        if text is not None:
            (tmp_path / "config.yaml").write_text(text)
            file = ["--config", tmp_path / "config.yaml"]
        return got, yopo("calibrate", *file, *flags)

    return run


def test_defaults_reach_the_library_call(called) -> None:
    got, _ = called(None, "--model", "m", "--device", "cpu")
    assert got["request"] == plan_request(budget=0.25)
    assert got["options"] == RunOptions(device="cpu", offload="auto")
    assert got["fit_options"] == FitOptions("text", measure_pairs=64, fit_pairs=256)


def test_file_overrides_defaults_and_flags_override_the_file(called) -> None:
    text = "model: a\nsamples: 7\nbatch_size: 3\ndtype: bfloat16\nbudget: 0.5\nqueries: last\n"
    got, _ = called(text)
    assert (got["model"], got["options"].samples, got["options"].batch_size) == ("a", 7, 3)
    assert got["request"] == plan_request(budget=0.5) and got["fit_options"].queries == "last"
    flags = ("--model", "b", "--samples", 9, "--budget", 0.75, "--queries", "all")
    got, _ = called(text, *flags)
    assert (got["model"], got["options"].samples, got["options"].batch_size) == ("b", 9, 3)
    assert got["request"] == plan_request(budget=0.75) and got["fit_options"].queries == "all"


def test_shares_may_be_in_percent_and_samples_all(called) -> None:
    got, _ = called("model: a\nbudget: 12.5%\nkv_budget: 50%\nsamples: all\n")
    assert got["request"] == plan_request(budget=0.125, kv_budget=0.5)
    assert got["options"].samples is None
    got, _ = called(None, "--model", "a", "--budget", "7%", "--samples", "all")
    assert got["request"] == plan_request(budget=0.07) and got["options"].samples is None
    got, _ = called(None, "--model", "a", "--head-ratio", "50%")
    assert got["request"] == plan_request(head_ratio=0.5)


def test_the_processor_has_options(called) -> None:
    got, _ = called("model: a\nmax_pixels: 9\nprocessor: [max_patches=4, do_resize=false]\n")
    expected = {"max_pixels": 9, "max_patches": 4, "do_resize": False}
    assert got["options"].image_options == expected
    got, _ = called(None, "--model", "a", "--processor", "max_patches=4", "--min-pixels", 3)
    assert got["options"].image_options == {"min_pixels": 3, "max_patches": 4}


def test_data_may_be_several_sources(called, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("")
    one, two = f"{tmp_path}/a.jsonl:0.7", f"{tmp_path}/b.jsonl:0.3"
    got, _ = called(None, "--model", "m", "--data", one, "--data", two)
    assert got["options"].data == [one, two]
    got, _ = called(f"model: m\ndata: [{one!r}, {two!r}]\n")
    assert got["options"].data == [one, two]
    got, _ = called(f"model: m\ndata: {one!r}\n")
    assert got["options"].data == one


def test_null_means_unset_and_whole_numbers_are_numbers(called) -> None:
    got, _ = called("model: a\ndata: null\nbudget: 1\nbidirectional: true\n")
    assert got["options"].data is None
    assert got["request"] == plan_request(budget=1.0, bidirectional=True)
    got, _ = called("model: a\nbidirectional: true\n", "--causal")
    assert got["request"] == plan_request(budget=0.25)


def test_a_flag_overrides_an_alternative_option_in_the_file(called) -> None:
    for key in ("template", "shape"):
        got, _ = called(f"model: a\nbudget: 0.25\n{key}: paper\n", "--preset", "yopo-12")
        assert got["request"] == plan_request(preset="yopo-12")
    got, _ = called("model: a\npreset: yopo-25\nradius: 1\n", "--budget", 0.1)
    assert got["request"] == plan_request(budget=0.1)
    got, _ = called("model: a\nhead_ratio: 0.5\nneuron_ratio: 0.5\n", "--alpha", 0.02)
    assert got["request"] == plan_request(alpha=0.02, neuron_ratio=0.5)
    got, _ = called("model: a\npreset: yopo-25\n", "--head-ratio", 0.1)
    assert got["request"] == plan_request(preset="yopo-25", head_ratio=0.1)


def test_a_former_name_of_an_option_is_read(called) -> None:
    for key in ("template", "shape"):
        got, _ = called(f"model: a\nbudget: 0.5\n{key}: paper\n")
        assert got["request"] == plan_request(budget=0.5, template="paper")
        got, _ = called(None, "--model", "a", "--budget", 0.5, f"--{key}", "paper")
        assert got["request"] == plan_request(budget=0.5, template="paper")
        got, done = called(f"model: a\nbudget: 0.5\n{key}: 3\n")
        assert not got and f"config.yaml:3: {key} must be text, found 3" in done.err
    got, done = called("model: a\nbudget: 0.5\ntemplate: paper\nshape: paper\n")
    sentence = "config.yaml:4: shape is another name for template, which is also given."
    assert not got and done.is_sentence and sentence in done.err


def test_contradictions_within_one_source_are_refused(called) -> None:
    got, done = called("model: a\nbudget: 0.25\npreset: yopo-12\n")
    assert not got and done.is_sentence and "exclude one another" in done.err
    got, done = called(None, "--model", "a", "--budget", 0.25, "--radius", 2)
    assert not got and done.is_sentence and "exclude one another" in done.err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: a\nbugdet: 0.25\n", "config.yaml:2: bugdet is not a known key.\n  Did you mean"),
        ("model: a\nconfig: b\n", "config.yaml:2: config is not a known key"),
        ("model: a\nbudget: lots\n", "config.yaml:2: budget is wrong: expected a share such as"),
        ("model: a\n\nsamples: 2.5\n", "config.yaml:3: samples must be a whole number or text"),
        ("model: a\nsamples: some\n", "config.yaml:2: samples is wrong: expected a number of"),
        ("model: a\ndata: [b, 3]\n", "config.yaml:2: data[1] must be text, found 3"),
        ("model: 7\n", "config.yaml:1: model must be text, found 7"),
        ("model: a\nforce: 1\n", "config.yaml:2: force must be true or false"),
        ("model: a\nbatch_size: 0\n", "config.yaml:2: batch_size is out of range: 0 is not in"),
        ("model: a\nqueries: some\n", "config.yaml:2: queries is out of range: 'some' is not one"),
        ("model: a\nmodel: b\n", "config.yaml:2: model appears twice"),
        ("- model\n", "config.yaml: expected a YAML mapping"),
        ("", "config.yaml: expected a YAML mapping, found nothing"),
        ("model: [\n", "config.yaml: not valid YAML"),
    ],
)
def test_errors_in_files_name_the_line(called, text: str, sentence: str) -> None:
    got, done = called(text)
    assert not got and done.is_sentence and sentence in done.err


def test_a_missing_configuration_file_is_refused(yopo: Yopo) -> None:
    done = yopo("calibrate", "--config", "nowhere.yaml")
    assert done.is_sentence and "nowhere.yaml: no such file." in done.err
