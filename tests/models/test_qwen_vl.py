"""Grids of Qwen-VL's images and frames match the models' own positions; wrong ones are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import zoo
import zoo_qwen
from transformers import DynamicCache
from zoo import IMAGE, VIDEO, Specimen

from yopo.models.layout import LayoutProbe
from yopo.models.qwen_vl import QWEN2_VL, grids_of
from yopo.models.streams import TokenLayout
from yopo.plans.grid import Grid
from yopo.plans.schema import full_plan
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference
from yopo.support.errors import ModelError

CONFIG = SimpleNamespace(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_config=SimpleNamespace(spatial_merge_size=2),
)
ROWS = [[1, "A", 5, "V", 6], [3, "V", 4, "B", "C", 7, 8]]


@pytest.fixture(scope="module", params=zoo_qwen.ENTRIES, ids=lambda entry: entry.name)
def qwen(request: pytest.FixtureRequest) -> Specimen:
    return zoo.build(request.param)


def layout_of(specimen: Specimen, inputs: dict[str, Any]) -> TokenLayout:
    seen: list[TokenLayout] = []
    config = specimen.model.config
    probe = LayoutProbe(specimen.model.base_model, grids_of, specimen.family.token_ids(config))
    handle = specimen.model.get_decoder().register_forward_pre_hook(
        lambda *_: seen.append(probe.layout)
    )
    tiny.logits(specimen.model, inputs)
    handle.remove()
    probe.remove()
    return seen[0]


def test_coordinates_are_the_models_own_positions(qwen: Specimen) -> None:
    """M-RoPE gives time, row and column of every token; the layout must agree with it."""
    inputs = qwen.inputs(ROWS)
    layout = layout_of(qwen, inputs)
    told = {name: each for name, each in inputs.items() if not name.startswith("pixel")}
    positions, _ = qwen.model.base_model.get_rope_index(**told)  # (3, batch, sequence)
    for number, table in enumerate(layout.coordinates()):
        table = table[table[:, 0] >= 0]
        places = layout.visual.index[number, : len(table)]
        for image in table[:, 0].unique():
            mine = table[:, 0] == image
            time, rows, cols = positions[:, number, places[mine]]
            assert len(time.unique()) == 1
            assert torch.equal(rows - rows.min(), table[mine, 1])
            assert torch.equal(cols - cols.min(), table[mine, 2])
        letters = [each for each in ROWS[number] if isinstance(each, str)]
        count = sum(len(qwen.entry.pictures[each].grids) for each in letters)
        assert len(table[:, 0].unique()) == count


def test_an_unfilled_placeholder_is_text(qwen: Specimen) -> None:
    """A model may generate the video token; it is not a frame then, and the image is unaffected."""
    inputs = qwen.inputs([[1, "A", 5, VIDEO, 6]])
    inputs["mm_token_type_ids"] *= inputs["mm_token_type_ids"] != 2
    layout = layout_of(qwen, inputs)
    assert layout.grids == ((Grid(3, 2),),) and layout.visual.length == 6


def test_grids_of_an_earlier_prompt_are_not_reused(qwen: Specimen) -> None:
    with pruned(qwen.model, qwen.plan(1)):
        for row in (["V", 5, "C", 6], ["B", 7, 8], ["V", 9], ["A", 5]):
            inputs = qwen.inputs([[1, *row]])
            once = qwen.generate(qwen.model, inputs)
            with pruned_again(qwen) as fresh:
                assert torch.equal(once, qwen.generate(fresh, inputs))


def pruned_again(specimen: Specimen) -> Any:
    return pruned(zoo.build(specimen.entry).model, specimen.plan(1))


def test_two_rows_may_get_new_images_in_a_second_turn(qwen: Specimen) -> None:
    """Every row has its own offset between cache positions and M-RoPE positions."""
    oracle, plan, cache = qwen.oracle, qwen.plan(4), DynamicCache()
    rows, turn = [[1, 5, "A", 7], [1, 2, 3, "C", 7, 8]], [11, "B", 12]
    first, new = qwen.inputs(rows, seed=1), qwen.inputs([turn, turn], seed=2)
    with pruned(oracle, plan):
        said = qwen.generate(oracle, first, past_key_values=cache)
        answers = said[:, first["input_ids"].shape[1] :].tolist()
        both = zip(rows, answers, strict=True)
        whole = qwen.inputs([[*row, *answer, *turn] for row, answer in both])
        parts = [
            each["pixel_values"].split(each["image_grid_thw"].prod(dim=1).tolist())
            for each in (first, new)
        ]
        whole["pixel_values"] = torch.cat(
            [each for pair in zip(*parts, strict=True) for each in pair]
        )
        turn = qwen.entry.next_turn(oracle, whole, new)
        found = qwen.generate(oracle, turn, past_key_values=cache)
    with reference(oracle, plan):
        assert torch.equal(found, qwen.generate(oracle, whole, use_cache=False))
    assert len(oracle.base_model.rope_deltas.unique()) == 2


def test_a_batch_may_mix_rows_with_and_without_images() -> None:
    info = {
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 6, 4]]),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    rows = [[], [(IMAGE, 12), (VIDEO, 8)], []]
    images = (Grid(2, 3), Grid(3, 2), Grid(2, 2), Grid(2, 2))
    assert grids_of(CONFIG, rows, info) == [(), images, ()]
    framed = [[(VIDEO, 4), (IMAGE, 6), (VIDEO, 4)], [(IMAGE, 6)]]
    expected = [(Grid(2, 2), Grid(2, 3), Grid(2, 2)), (Grid(3, 2),)]
    assert grids_of(CONFIG, framed, info) == expected
    beams = [row for row in framed for _ in range(3)]
    assert grids_of(CONFIG, beams, info) == [row for row in expected for _ in range(3)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[(IMAGE, 5)]], r"visual tokens \(\[5\] per row\) do not match the images"),
        ([[(IMAGE, 6), (IMAGE, 6)]], "do not match the images"),
        ([[(IMAGE, 2), (IMAGE, 4)]], "not a whole number of images"),
        ([[(VIDEO, 4)]], "but the video_grid_thw of their images is missing"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(rows: list, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        grids_of(CONFIG, rows, {"image_grid_thw": torch.tensor([[1, 4, 6]])})


def test_chunks_that_split_an_image_are_refused(qwen: Specimen) -> None:
    tiny.skip_unless_takes_encoded(qwen.model)
    inputs = qwen.inputs([[1, 5, 6, "C", 7, 8]])
    with pruned(qwen.model, qwen.plan(0)), pytest.raises(ModelError, match="in one piece"):
        qwen.generate(qwen.model, inputs, prefill_chunk_size=8)


def test_images_encoded_by_hand_before_pruning_are_refused_not_guessed(qwen: Specimen) -> None:
    tiny.skip_unless_takes_encoded(qwen.model)
    inputs = qwen.inputs([[1, 5, "A", 7]])
    features = qwen.model.base_model.get_image_features(
        inputs.pop("pixel_values"), inputs["image_grid_thw"], return_dict=True
    )
    inputs["mm_encoder_outputs"] = {"image": features}
    with (
        pruned(qwen.model, qwen.plan(0)),
        pytest.raises(ModelError, match="of their images is missing"),
    ):
        qwen.model.generate(**inputs, max_new_tokens=1)


def test_images_encoded_before_others_are_not_taken_for_those(qwen: Specimen) -> None:
    """Two images have equally many tokens on different grids; each keeps its own grid."""
    tiny.skip_unless_takes_encoded(qwen.model)
    pixels = {name: qwen.inputs([[1, 5, name, 7]]) for name in "AB"}
    pixels["B"]["image_grid_thw"] = pixels["A"]["image_grid_thw"][:, [0, 2, 1]]
    pixels["B"]["pixel_values"] = pixels["A"]["pixel_values"].flip(0)
    pixels["B"]["input_ids"] = pixels["A"]["input_ids"]
    seen: list[object] = []
    with pruned(qwen.model, qwen.plan(0)):
        probe = qwen.model.get_decoder().yopo.probe
        encoded = {
            name: qwen.model.base_model.get_image_features(
                each["pixel_values"], each["image_grid_thw"], return_dict=True
            )
            for name, each in pixels.items()
        }
        handle = qwen.model.get_decoder().register_forward_pre_hook(
            lambda *_: seen.append(probe.layout.grids[0][0])
        )
        for name in "AB":
            outputs = {"image": encoded[name]}
            ids = pixels[name]["input_ids"]
            positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
            tiny.logits(
                qwen.model,
                {"input_ids": ids, "position_ids": positions, "mm_encoder_outputs": outputs},
            )
        handle.remove()
    first, second = seen
    assert (first.rows, first.cols) == (second.cols, second.rows) and first.rows != first.cols


@pytest.mark.parametrize("rows", [3, 4])
def test_packed_samples_are_distinguished_by_text_positions(qwen: Specimen, rows: int) -> None:
    """As in stock: a fourth row of positions counts tokens; three rows do not separate samples."""
    samples = [[1, 5, "A", 7, 8], [1, 2, "B", 9], [1, 3, 4]]
    inputs = qwen.inputs([[piece for sample in samples for piece in sample]])
    del inputs["attention_mask"]
    lengths = [qwen.inputs([sample])["input_ids"].shape[1] for sample in samples]
    counted = torch.cat([torch.arange(length) for length in lengths])
    inputs |= {"position_ids": counted.expand(rows, 1, -1), "use_cache": False}
    usual, oracle = (tiny.logits(each, inputs) for each in (qwen.model, qwen.oracle))
    whole = full_plan(qwen.identity, qwen.workload(samples[0]))
    with pruned(qwen.model, whole):
        found = tiny.logits(qwen.model, inputs)
    tiny.assert_close(found, usual, oracle, torch.ones_like(inputs["input_ids"]).bool())


def test_the_three_families_differ_only_in_data() -> None:
    assert QWEN2_VL.grids_of is grids_of
    assert QWEN2_VL.backbones[0].position_axes == 3
