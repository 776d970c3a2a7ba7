"""The demo model is built as documented, and the shipped weights answer held-out questions."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from chat import user
from demo_training.build import MAX_NEW_TOKENS, build_model, build_processor
from demo_training.packing import Packer, Pixels, patch_labels
from demo_training.rows import IGNORED
from demo_training.score import answer, overall, score, table
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

from yopo.demo import LLAVA_TINY
from yopo.demo.scenes import KINDS, pairs, split_scenes, turns
from yopo.demo.task import Turn
from yopo.demo.vocabulary import COLORS, GRID, SHAPES

NUM_VISUAL = 64


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


def test_the_prompt_has_llavas_form(processor: LlavaProcessor) -> None:
    pair = next(pairs("train", 1))
    prompt = processor.apply_chat_template(
        [user(pair.image, pair.question)], add_generation_prompt=True
    )
    assert prompt == f"USER: <image>\n{pair.question} ASSISTANT:"


def test_every_word_is_known_and_survives_the_tokenizer(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    for pair in pairs("train", 700, kinds=KINDS):
        for text in (pair.question, pair.answer):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        if pair.kind == "description":
            assert 30 <= len(ids) < MAX_NEW_TOKENS


def test_several_turns_and_images_become_one_prompt(processor: LlavaProcessor) -> None:
    one, two, three = (pair.image for pair in pairs("train", 3))
    chat = [
        user(one, two, "is there a red circle?"),
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        user(three, "describe the scene."),
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == (
        "USER: <image>\n<image>\nis there a red circle? ASSISTANT: yes</s>"
        "USER: <image>\ndescribe the scene. ASSISTANT:"
    )
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    tokenizer = processor.tokenizer
    assert inputs["pixel_values"].shape[0] == 3
    assert ids.count(processor.image_token_id) == 3 * NUM_VISUAL
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1


def test_training_rows_match_the_processor(processor: LlavaProcessor) -> None:
    scene, asked = next(turns("train"))
    chat = []
    for index, turn in enumerate(asked):
        chat.append(user(*([scene.render()] if not index else []), turn.question))
        chat.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    expected = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )
    batch = Packer(processor).batch([asked] * 4)
    length = expected["input_ids"].shape[1]
    talk = batch["input_ids"][3]  # the fourth row is a plain conversation
    assert talk[:length].tolist() == expected["input_ids"][0].tolist()
    assert set(talk[length:].tolist()) == {processor.tokenizer.pad_token_id}
    assert torch.equal(Pixels(processor)([scene]), expected["pixel_values"])


def test_a_packed_turn_gives_the_same_result_as_by_itself(processor: LlavaProcessor) -> None:
    model, packer = build_model().eval(), Packer(processor)
    scene, asked = next(turns("train"))
    pixels = Pixels(processor)([scene])

    def logits_of_answers(rows: list[tuple[Turn, ...]]) -> torch.Tensor:
        batch = packer.batch(rows)
        labels = batch.pop("labels")
        with torch.inference_mode():
            output = model(pixel_values=pixels.expand(len(rows), -1, -1, -1), **batch)
        return output.logits[labels != IGNORED]

    packed = logits_of_answers([asked])
    alone = torch.cat([logits_of_answers([(turn,)]) for turn in asked])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_patch_labels_name_the_object_that_covers_the_patch() -> None:
    for scene in itertools.islice(split_scenes("train"), 30):
        labels = patch_labels(scene)
        indices = np.asarray(scene.render_indices())
        assert labels.shape == (NUM_VISUAL, 3)
        for patch, (color, shape, cell) in enumerate(labels.tolist()):
            row, col = 8 * (patch // 8), 8 * (patch % 8)
            pixels = np.bincount(indices[row : row + 8, col : col + 8].ravel())[1:]
            assert bool(color) == bool(len(pixels) and pixels.max() >= 5)
            if color:
                item = scene.objects[pixels.argmax()]
                assert (list(COLORS)[color - 1], SHAPES[shape - 1]) == (item.color, item.shape)
                assert cell - 1 == item.row * GRID + item.col


def test_the_seed_fixes_the_untrained_weights() -> None:
    one, other, moved = (build_model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], moved[name]) for name in one)


def test_scores_count_whole_answers_and_leave_descriptions_out_of_the_total() -> None:
    asked = list(pairs("heldout", 14, kinds=KINDS))
    given = [pair.answer for pair in asked]
    given[0] = "nothing"
    given[6] = given[6].replace(".", "")
    scores = {s.kind: s for s in score(asked, given)}
    assert scores["color"].accuracy == 0.5 and scores["shape"].accuracy == 1
    assert scores["description"].accuracy == 0.5
    assert 0.9 < scores["description"].token_accuracy < 1
    assert overall(list(scores.values())) == pytest.approx(11 / 12)
    assert "| **all short answers** | 12 | **91.7%** |" in table(list(scores.values()))


def test_the_shipped_directory_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in LLAVA_TINY.iterdir()}
    assert {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(files)
    assert sum(files.values()) <= 16 * 2**20


def test_the_shipped_processor_is_the_built_one(processor: LlavaProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (LLAVA_TINY / path.name).read_text(), path.name


def test_the_shipped_model_answers_held_out_questions() -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(
        LLAVA_TINY, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 3e6
    asked = list(pairs("heldout", 240, seed=7))
    scores = score(asked, list(answer(model, AutoProcessor.from_pretrained(LLAVA_TINY), asked)))
    assert overall(scores) >= 0.9, table(scores)
    for kind in scores:
        assert kind.accuracy > kind.majority + 0.25, table(scores)
    described = list(pairs("heldout", 32, seed=7, kinds=("description",)))
    given = list(answer(model, AutoProcessor.from_pretrained(LLAVA_TINY), described))
    (long,) = score(described, given)
    assert long.token_accuracy >= 0.9 and long.mean_tokens >= 30
