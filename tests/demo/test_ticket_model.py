"""The ticket reader: how it is built, and that the shipped weights read held-out tickets."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from chat import user
from demo_training.recipes import RECIPES
from demo_training.rows import IGNORED
from demo_training.score import answer, overall, score, table
from demo_training.tickets_build import (
    IMAGE,
    MAX_NEW_TOKENS,
    build_model,
    build_processor,
    save_processor,
)
from demo_training.tickets_packing import (
    LABELS,
    Packer,
    decoder_batches,
    pixel_values,
    places,
    token_labels,
)
from demo_training.training import answer_loss, looking_loss
from PIL import Image
from transformers import AutoModelForImageTextToText, InternVLProcessor

from yopo.data.prompts import load_processor
from yopo.demo import INTERNVL_TINY
from yopo.demo.glyphs.font import GLYPHS
from yopo.demo.task import Turn
from yopo.demo.tickets.questions import KINDS
from yopo.demo.tickets.tickets import SYMBOL_COLS, SYMBOL_ROWS, TASK, TILE_SIZE, Ticket, pairs

SIDE = 4
TOKEN = 12


@pytest.fixture(scope="module")
def processor() -> InternVLProcessor:
    return build_processor()


def num_tiles(ticket: Ticket) -> int:
    rows, cols = ticket.look.shape
    return rows * cols + (rows * cols > 1)


def packer_for(processor: InternVLProcessor, ticket: Ticket) -> Packer:
    return Packer(processor, num_tiles(ticket) * SIDE**2)


def test_the_prompt_has_internvls_form(processor: InternVLProcessor) -> None:
    pair = next(pairs("train", 1))
    prompt = processor.apply_chat_template(
        [user(pair.image, pair.question)], add_generation_prompt=True
    )
    assert prompt == (
        f"<|im_start|>user\n<IMG_CONTEXT>\n{pair.question}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_every_word_is_known_and_survives_the_tokenizer(processor: InternVLProcessor) -> None:
    tokenizer, longest = processor.tokenizer, 0
    for pair in TASK.pairs("train", 300, kinds=KINDS):
        for text in (pair.question, pair.answer):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        longest = max(longest, len(ids))
    assert 50 < longest < MAX_NEW_TOKENS


def test_training_rows_are_what_processor_and_model_make_of_the_chat(
    processor: InternVLProcessor,
) -> None:
    for ticket, asked in itertools.islice(TASK.turns("train"), 8):
        chat = []
        for index, turn in enumerate(asked):
            chat.append(user(*([ticket.render()] if not index else []), turn.question))
            chat.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        expected = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt"
        )
        batch = packer_for(processor, ticket).batch([asked] * 4)
        length = expected["input_ids"].shape[1]
        talk = batch["input_ids"][3]  # the fourth row is a plain conversation
        assert talk[:length].tolist() == expected["input_ids"][0].tolist()
        assert set(talk[length:].tolist()) <= {processor.tokenizer.pad_token_id}
        assert batch["position_ids"][3, :length].tolist() == list(range(length))
        assert torch.equal(pixel_values(processor, [ticket]), expected["pixel_values"])


def test_talks_fit_their_rows(processor: InternVLProcessor) -> None:
    packer = Packer(processor, SIDE**2)
    for _, asked in itertools.islice(TASK.turns("train"), 300):
        _, labels, _, _ = packer.row(asked, True)
        assert (labels == packer.form.end).sum() == len(asked)


def test_a_packed_turn_computes_what_it_computes_alone(processor: InternVLProcessor) -> None:
    model = build_model().eval()
    ticket, asked = next(TASK.turns("train"))
    packer = packer_for(processor, ticket)

    def logits_of_answers(rows: list[tuple[Turn, ...]]) -> torch.Tensor:
        batch = packer.batch(rows)
        labels = batch.pop("labels")
        with torch.inference_mode():
            output = model(pixel_values=pixel_values(processor, [ticket] * len(rows)), **batch)
        return output.logits[labels != IGNORED]

    packed = logits_of_answers([asked])
    alone = torch.cat([logits_of_answers([(turn,)]) for turn in asked])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_token_labels_name_the_symbol_under_the_token() -> None:
    for ticket in itertools.islice(TASK.split_pictures("train"), 30):
        labels = token_labels(ticket).unflatten(0, (-1, SIDE**2))  # (tile, token, label)
        (rows, cols), (top, left) = ticket.look.shape, ticket.look.corner
        assert labels.shape == (num_tiles(ticket), SIDE**2, len(LABELS))
        assert (labels >= 0).all() and (labels < torch.tensor(list(LABELS.values()))).all()
        is_thumbnail = labels[..., 3].bool()
        assert not is_thumbnail[: rows * cols].any() and is_thumbnail[rows * cols :].all()
        assert not labels[is_thumbnail][:, :3].any()
        found = {}
        for tile, token in itertools.product(range(rows * cols), range(SIDE**2)):
            y = (tile // cols * TILE_SIZE + token // SIDE * TOKEN + TOKEN // 2) // SYMBOL_ROWS
            x = (tile % cols * TILE_SIZE + token % SIDE * TOKEN + TOKEN // 2) // SYMBOL_COLS
            symbol, line, place, _ = labels[tile, token].tolist()
            if line:
                assert (line - 1 + top, place - 1 + left) == (y, x)
                found[line - 1, place - 1] = GLYPHS[symbol - 1] if symbol else ""
        for row, line in enumerate(ticket.lines):
            width = max(map(len, ticket.lines))
            assert [found[row, col] for col in range(width)] == [*line, *[""] * (width - len(line))]


def test_answers_are_read_off_the_places_that_hold_them() -> None:
    kinds = set()
    for ticket, asked in itertools.islice(TASK.turns("train"), 60):
        for turn in asked:
            words = turn.answer.replace(",", " ,").replace(".", " .").split()
            cells = places(ticket, turn)
            assert len(cells) == len(words)
            for word, cell in zip(words, cells, strict=True):
                if turn.kind == "lines":
                    assert cell == (len(ticket.lines) - 1, 0)
                elif word in GLYPHS:
                    assert ticket.lines[cell[0]][cell[1]] == word
                else:
                    assert cell is None
            kinds.add(turn.kind)
    assert kinds == set(KINDS)


def test_what_predicts_a_symbol_is_told_to_look_at_it(processor: InternVLProcessor) -> None:
    batch = next(decoder_batches(processor, 4, 0))
    ids, labels, looked_at = (batch[name] for name in ("input_ids", "labels", "looked_at"))
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    assert (ids[looked_at.any(1)] == image).all()  # only visual tokens are looked at
    symbols = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(GLYPHS)))
    asks = torch.isin(labels[:, 1:], symbols)  # (row, query): the next token is a symbol
    assert looked_at.any(-1)[:, :-1][asks].all()
    assert looked_at.sum(-1).max() <= 2  # a symbol's place has the centers of one or two tokens
    assert asks.sum() > 40


def test_looking_where_one_should_costs_nothing() -> None:
    looked_at = torch.zeros(1, 3, 4, dtype=torch.bool)
    looked_at[0, 1, 1:3] = True
    attention = torch.full((1, 2, 3, 4), 0.25)
    loss, seen = looking_loss(attention, looked_at)
    assert seen == pytest.approx(0.5) and loss == pytest.approx(0.6931, abs=1e-3)
    attention[0, :, 1] = torch.tensor([0, 0.5, 0.5, 0])
    loss, seen = looking_loss(attention, looked_at)
    assert seen == 1 and loss == pytest.approx(0, abs=1e-5)


def test_guided_training_hides_what_is_to_be_answered(
    processor: InternVLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build_model().eval(), next(decoder_batches(processor, 4, 0))
    guide = RECIPES["internvl-tiny"].guide
    with torch.inference_mode():
        plain, _ = answer_loss(model, batch)
        model.set_attn_implementation({"text_config": "eager"})
        guided, _ = answer_loss(model, batch, guide)
        assert guided > plain + 0.1
        monkeypatch.setattr("demo_training.training._GUIDANCE", 0)
        guided, _ = answer_loss(model, batch, guide)
        torch.testing.assert_close(guided, plain, atol=1e-4, rtol=1e-4)
        unmasked = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
        assert abs(answer_loss(model, unmasked, guide)[0] - plain) > 1e-3  # the mask matters


def test_the_seed_fixes_the_untrained_weights() -> None:
    one, other, moved = (build_model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], moved[name]) for name in one)


def test_the_shipped_directory_is_whole_and_small() -> None:
    files = {path.name: path.stat().st_size for path in INTERNVL_TINY.iterdir()}
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
    processor: InternVLProcessor, tmp_path: Path
) -> None:
    save_processor(processor, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (INTERNVL_TINY / path.name).read_text(), path.name
    loaded = load_processor(str(INTERNVL_TINY))
    assert isinstance(loaded, InternVLProcessor)
    pair = next(pairs("heldout", 1))
    chat = [user(pair.image, pair.question)]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    one, other = (each.apply_chat_template(chat, **options) for each in (processor, loaded))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_images_have_no_more_tokens_than_four_tiles_and_a_thumbnail(
    processor: InternVLProcessor,
) -> None:
    for size in ((96, 96), (500, 300), (20, 60), (2000, 1000)):
        made = processor.image_processor(Image.new("RGB", size), return_tensors="pt")
        assert 1 <= len(made["pixel_values"]) <= 5


def test_the_shipped_model_answers_held_out_questions() -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(
        INTERNVL_TINY, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
    processor = load_processor(str(INTERNVL_TINY))
    asked = list(pairs("heldout", 200, seed=7))
    scores = score(asked, list(answer(model, processor, asked)))
    assert overall(scores) >= 0.95, table(scores)
    for kind in scores:
        assert kind.accuracy > kind.majority + 0.25, table(scores)
    asked = list(pairs("heldout", 32, seed=7, kinds=("all",)))
    (long,) = score(asked, list(answer(model, processor, asked)))
    assert long.token_accuracy >= 0.97 and long.mean_tokens > 20
