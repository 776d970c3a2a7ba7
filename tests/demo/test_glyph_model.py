"""The glyph reader is built as documented, and the shipped weights read held-out grids."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from chat import user
from demo_training.glyphs_build import (
    IMAGE,
    MAX_NEW_TOKENS,
    build_model,
    build_processor,
    save_processor,
)
from demo_training.glyphs_packing import LABELS, Packer, Patches, token_labels
from demo_training.rows import IGNORED
from demo_training.score import answer, overall, score, table
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2VLProcessor

from yopo.data.prompts import load_processor
from yopo.demo import QWEN2_VL_TINY
from yopo.demo.glyphs.font import GLYPHS
from yopo.demo.glyphs.grids import CELL_SIZE, SHIFTED, TASK, pairs
from yopo.demo.glyphs.questions import COLORS, GRID, KINDS
from yopo.demo.task import Turn

SIDE = 8
TOKEN = 12


@pytest.fixture(scope="module")
def processor() -> Qwen2VLProcessor:
    return build_processor()


def test_the_prompt_has_qwens_form(processor: Qwen2VLProcessor) -> None:
    pair = next(pairs("train", 1))
    prompt = processor.apply_chat_template(
        [user(pair.image, pair.question)], add_generation_prompt=True
    )
    assert prompt == (
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{pair.question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_every_word_is_known_and_survives_the_tokenizer(processor: Qwen2VLProcessor) -> None:
    tokenizer = processor.tokenizer
    for task in (TASK, SHIFTED):
        for pair in task.pairs("train", 320, kinds=KINDS):
            for text in (pair.question, pair.answer):
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
            if pair.kind == "grid":
                assert 50 <= len(ids) < MAX_NEW_TOKENS


def test_training_rows_match_processor_and_model(
    processor: Qwen2VLProcessor,
) -> None:
    grid, asked = next(TASK.turns("train"))
    chat = []
    for index, turn in enumerate(asked):
        chat.append(user(*([grid.render()] if not index else []), turn.question))
        chat.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    expected = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )
    batch = Packer(processor).batch([asked] * 4)
    length = expected["input_ids"].shape[1]
    talk = batch["input_ids"][3]  # the fourth row is a plain conversation
    assert talk[:length].tolist() == expected["input_ids"][0].tolist()
    assert set(talk[length:].tolist()) == {processor.tokenizer.pad_token_id}
    images = Patches(processor)([grid])
    assert torch.equal(images["pixel_values"], expected["pixel_values"])
    assert torch.equal(images["image_grid_thw"], expected["image_grid_thw"])
    told = {name: each for name, each in expected.items() if name != "pixel_values"}
    positions, _ = build_model().model.get_rope_index(**told)  # (3, row, token)
    assert torch.equal(batch["position_ids"][:, 3, :length], positions[:, 0])


def test_conversations_fit_their_rows(processor: Qwen2VLProcessor) -> None:
    packer = Packer(processor)
    for _, asked in itertools.islice(TASK.turns("train"), 200):
        _, labels, _, _ = packer.row(asked, True)
        assert (labels == packer.form.end).sum() == len(asked)


def test_a_packed_turn_gives_the_same_result_as_by_itself(processor: Qwen2VLProcessor) -> None:
    model, packer = build_model().eval(), Packer(processor)
    grid, asked = next(TASK.turns("train"))

    def logits_of_answers(rows: list[tuple[Turn, ...]]) -> torch.Tensor:
        batch = packer.batch(rows)
        labels = batch.pop("labels")
        with torch.inference_mode():
            output = model(**Patches(processor)([grid] * len(rows)), **batch)
        return output.logits[labels != IGNORED]

    packed = logits_of_answers([asked])
    alone = torch.cat([logits_of_answers([(turn,)]) for turn in asked])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_token_labels_name_the_cell_under_the_token() -> None:
    firsts = set()
    for grid in itertools.islice(TASK.split_pictures("train"), 10):
        labels = token_labels(grid)
        assert labels.shape == (SIDE**2, len(LABELS))
        assert (labels >= 0).all() and (labels < torch.tensor(list(LABELS.values()))).all()
        for token, (glyph, color, row, col, first) in enumerate(labels.tolist()):
            center = [TOKEN * part + TOKEN // 2 for part in divmod(token, SIDE)]
            assert [row, col] == [part // CELL_SIZE for part in center]
            cell = grid.cells[row * GRID + col]
            assert bool(glyph) == bool(color) == (cell is not None)
            if cell:
                assert (GLYPHS[glyph - 1], list(COLORS)[color - 1]) == (cell.glyph, cell.color)
            if first:
                firsts.add((row, col, token))
    assert len(firsts) == GRID**2  # one token of each cell, the same in all grids


def test_the_seed_fixes_the_untrained_weights() -> None:
    one, other, moved = (build_model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], moved[name]) for name in one)


def test_grids_count_as_long_answers() -> None:
    asked = list(pairs("heldout", 16, kinds=KINDS))
    given = [pair.answer for pair in asked]
    given[7] = given[7].replace("row", "line", 1)
    scores = {s.kind: s for s in score(asked, given)}
    assert scores["grid"].accuracy == 0.5 and scores["grid"].mean_tokens == 54
    assert overall(list(scores.values())) == 1
    assert "| **all short answers** | 14 | **100.0%** |" in table(list(scores.values()))


def test_the_shipped_directory_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in QWEN2_VL_TINY.iterdir()}
    assert {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    } == set(files)
    assert sum(files.values()) <= 6 * 2**20


def test_the_shipped_processor_is_the_built_one(
    processor: Qwen2VLProcessor, tmp_path: Path
) -> None:
    save_processor(processor, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (QWEN2_VL_TINY / path.name).read_text(), path.name
    loaded = load_processor(str(QWEN2_VL_TINY))
    assert isinstance(loaded, Qwen2VLProcessor)
    pair = next(pairs("heldout", 1))
    chat = [user(pair.image, pair.question)]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    one, other = (each.apply_chat_template(chat, **options) for each in (processor, loaded))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert (one["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE)).sum() == SIDE**2


def test_images_have_no_more_tokens_than_a_grid(processor: Qwen2VLProcessor) -> None:
    for size in ((96, 96), (500, 300), (20, 60), (2000, 1000)):
        made = processor.image_processor(Image.new("RGB", size), return_tensors="pt")
        _, rows, cols = made["image_grid_thw"][0].tolist()
        assert 0 < rows * cols // 4 <= SIDE**2


def test_the_video_half_cuts_patches_as_the_image_half_does() -> None:
    video = json.loads((QWEN2_VL_TINY / "video_preprocessor_config.json").read_text())
    image = json.loads((QWEN2_VL_TINY / "processor_config.json").read_text())["image_processor"]
    for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
        assert video[name] == image[name]
    assert video["video_processor_type"] == "Qwen2VLVideoProcessor"


def test_the_shipped_model_answers_held_out_questions() -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(
        QWEN2_VL_TINY, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
    processor = load_processor(str(QWEN2_VL_TINY))
    asked = list(pairs("heldout", 210, seed=7))
    scores = score(asked, list(answer(model, processor, asked)))
    assert overall(scores) >= 0.9, table(scores)
    for kind in scores:
        assert kind.accuracy > kind.majority + 0.25, table(scores)
    asked = list(pairs("heldout", 32, seed=7, kinds=("grid",)))
    (long,) = score(asked, list(answer(model, processor, asked)))
    assert long.token_accuracy >= 0.95 and long.mean_tokens == 54
