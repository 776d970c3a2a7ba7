"""Statistics: sums merge exactly, derived scores follow their formulas, files round-trip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import statistics_maker
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from yopo.calibration.statistics import LEAST_SCALE, MAX_DISTANCE
from yopo.calibration.statistics_file import load_statistics
from yopo.plans.extent import Extent
from yopo.plans.grid import Grid
from yopo.support.errors import DataError


@pytest.fixture
def statistics():
    return statistics_maker.make(seed=1)


def test_importance_is_column_norm_times_second_moment(statistics) -> None:
    expected = statistics.down_norm * statistics.neuron_square / statistics.visual_tokens
    assert torch.equal(statistics.importance, expected)
    assert torch.equal(statistics.neuron_mean, statistics.neuron_sum / statistics.visual_tokens)


def test_merging_adds_sums_and_keeps_every_sample(statistics) -> None:
    other = statistics_maker.make(seed=2)
    both = statistics.merge(other)
    assert torch.equal(both.rho, torch.cat([statistics.rho, other.rho]))
    assert both.visual_tokens == statistics.visual_tokens + other.visual_tokens
    assert both.provenance["samples"] == len(both.rho)
    weighted = statistics.cross_modal * statistics.text_queries
    weighted = weighted + other.cross_modal * other.text_queries
    assert torch.allclose(both.cross_modal, weighted / both.text_queries)
    order = other.merge(statistics)
    assert torch.equal(both.neuron_square, order.neuron_square)


def test_another_models_statistics_do_not_merge(statistics) -> None:
    stranger = replace(statistics.model, fingerprint="other")
    with pytest.raises(DataError, match="fingerprints differ"):
        statistics.merge(replace(statistics, model=stranger))


def test_statistics_of_zero_samples_are_refused(statistics) -> None:
    with pytest.raises(DataError, match="No visual token"):
        _ = replace(statistics, visual_tokens=0).importance
    with pytest.raises(DataError, match="No text query"):
        _ = replace(statistics, text_queries=0).cross_modal


def test_order_is_by_importance_and_locality_is_cumulative(statistics) -> None:
    order = statistics.plan_tensors().neuron_order
    ranked = statistics.importance.gather(1, order)
    assert (ranked[:, :-1] >= ranked[:, 1:]).all()
    locality = statistics.locality
    assert locality.shape[1] == MAX_DISTANCE + 2
    assert torch.allclose(locality[:, -1], torch.ones_like(locality[:, -1]))
    assert (locality.diff(dim=1) >= 0).all()


def test_concentration_counts_neurons_for_90_percent() -> None:
    statistics = statistics_maker.make(seed=3)
    flat = torch.ones_like(statistics.neuron_square)
    peaked = torch.full_like(flat, 1e-12)
    peaked[:, 5] = 1.0
    ones = torch.ones_like(statistics.down_norm)
    even = replace(statistics, neuron_square=flat, down_norm=ones).measured.concentration
    single = replace(statistics, neuron_square=peaked, down_norm=ones).measured.concentration
    width = flat.shape[1]
    assert even[0] == pytest.approx(0.9, abs=1 / width)
    assert single[0] == pytest.approx(1 / width)


def test_a_file_round_trip_is_exact(statistics, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    path.write_bytes(statistics.to_bytes())
    found = load_statistics(path)
    assert found.to_bytes() == statistics.to_bytes()
    assert found.model == statistics.model and found.workload == statistics.workload
    assert torch.equal(found.rho, statistics.rho)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a safetensors file", "is not a safetensors file"), (None, "no such statistics file")],
)
def test_unreadable_files_are_refused_in_one_sentence(
    content, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "stats.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_statistics(path)


def test_other_safetensors_files_are_refused_as_statistics(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="holds no yopo statistics"):
        load_statistics(tmp_path / "other.safetensors")


def test_the_extent_is_kept_and_merged(statistics, tmp_path: Path) -> None:
    one = replace(statistics, extent=Extent(Grid(4, 4), Grid(8, 8), 1))
    other = replace(statistics, extent=Extent(Grid(6, 6), Grid(9, 8), 3))
    assert one.merge(other).extent == Extent(Grid(4, 4), Grid(9, 8), 3)
    assert one.merge(statistics).extent is None  # of one half nothing is known
    path = tmp_path / "s.safetensors"
    path.write_bytes(one.to_bytes())
    assert load_statistics(path).extent == one.extent
    path.write_bytes(statistics.to_bytes())  # as former versions wrote them
    assert load_statistics(path).extent is None
    path.write_bytes(replace(one, extent=Extent(Grid(4, 4), Grid(0, 8), 1)).to_bytes())
    with pytest.raises(DataError, match="calibrated must hold positive sizes"):
        load_statistics(path)


def test_key_scale_is_each_channels_share_of_its_head(statistics) -> None:
    assert statistics.key_scale is None
    squares = torch.rand_like(statistics.key_square_sum)
    squares[0, 0], squares[1, 0, 0] = 0.0, 0.0
    scale = replace(statistics, key_square_sum=squares).key_scale
    expected = (squares / squares.mean(dim=2, keepdim=True)).sqrt()
    assert torch.equal(scale[0, 0], torch.ones_like(scale[0, 0]))
    assert scale[1, 0, 0] == torch.tensor(LEAST_SCALE)
    assert torch.allclose(scale[2:], expected[2:].float())
    again = replace(statistics, key_square_sum=3 * squares).key_scale
    assert torch.allclose(again, scale)


def test_older_files_lack_keys_and_are_read(statistics, tmp_path: Path) -> None:
    tensors = load(statistics.to_bytes())
    del tensors["key_square_sum"]
    path = tmp_path / "old.safetensors"
    (tmp_path / "new.safetensors").write_bytes(statistics.to_bytes())
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        path.write_bytes(save(tensors, metadata=file.metadata()))
    found = load_statistics(path)
    assert found.key_scale is None and torch.equal(found.rho, statistics.rho)
    assert found.merge(statistics).key_scale is None
