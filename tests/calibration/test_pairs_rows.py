"""A row of data may have several forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from yopo.data.pairs import Pair
from yopo.data.rows import pair_from_row, without_placeholders
from yopo.support.errors import DataError

FOLDER = Path("/data")


def read(row: Any, folder: Path | None = FOLDER) -> Pair:
    return pair_from_row(row, where="p:1", number=4, folder=folder)


@pytest.mark.parametrize("image", ["image", "images", "image_path", "file_name", "Image"])
@pytest.mark.parametrize("question", ["question", "query", "prompt", "text", "Question"])
@pytest.mark.parametrize("answer", ["answer", "answers", "label", "multiple_choice_answer"])
def test_common_column_names_are_accepted(image: str, question: str, answer: str) -> None:
    pair = read({image: "a.png", question: "Why?", answer: "So."})
    assert pair.images[0].source == FOLDER / "a.png"
    assert (pair.question, pair.answers, pair.id) == ("Why?", ("So.",), "4")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", ("yes",)),
        (3, ("3",)),
        (0, ("0",)),
        (None, ()),
        ("", ()),
        ([], ()),
        (["a", "b", "a"], ("a", "b", "a")),
        ([{"answer": "a", "answer_id": 1}, {"answer": "b"}], ("a", "b")),
        ({"answer": ["a", "b"]}, ("a", "b")),
    ],
)
def test_answers_are_read_from_all_their_forms(answer: Any, expected: tuple[str, ...]) -> None:
    assert read({"image": "a", "question": "q", "answers": answer}).answers == expected


def test_llava_conversations_become_pairs() -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "And this?"},
        {"from": "gpt", "value": "A dog."},
    ]
    pair = read({"id": "000", "image": "coco/a.jpg", "conversations": turns})
    assert (pair.question, pair.answers, pair.id) == ("What is this?", ("A cat.",), "000")
    assert read({"image": "a", "conversations": turns[:1]}).answers == ()
    swapped = [turns[1], turns[2]]
    assert read({"image": "a", "conversations": swapped}).answers == ()


def test_chat_messages_become_pairs() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    reply = {"role": "assistant", "content": [{"type": "text", "text": "That."}]}
    system = {"role": "system", "content": "Be brief."}
    messages = [system, {"role": "user", "content": parts}, reply]
    pair = read({"images": ["a.png", "b.png"], "messages": messages})
    assert (pair.question, pair.answers, len(pair.images)) == ("What?", ("That.",), 2)
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    assert read({"image": "a.png", "messages": plain}).answers == ("That.",)
    parts[0]["path"] = "inline.png"
    assert read({"messages": messages}).images[0].source == FOLDER / "inline.png"


def test_cauldron_texts_become_pairs() -> None:
    turn = {"user": "What?", "assistant": "That.", "source": "x"}
    pair = read({"images": ["a"], "texts": [turn]})
    assert (pair.question, pair.answers) == ("What?", ("That.",))


def test_images_may_have_several_forms() -> None:
    picture = Image.new("L", (2, 3))
    values = [picture, b"raw", {"bytes": b"raw", "path": "x/y.png"}, {"bytes": None, "path": "z"}]
    pair = read({"images": values, "question": "q"})
    assert [ref.source for ref in pair.images] == [picture, b"raw", b"raw", FOLDER / "z"]
    assert pair.images[2].label == "p:1: image y.png"
    assert "raw" not in repr(pair), "image bytes do not belong into messages"
    remote = read({"image": {"bytes": None, "path": "hf://datasets/a/b/c.png"}, "question": "q"})
    assert remote.images[0].source == "hf://datasets/a/b/c.png"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "p:1: a pair must be an object with an image and a question, found [1]."),
        ({}, "p:1: the pair has no question (columns found: none)."),
        ({"image": "a"}, "p:1: the pair has no question (columns found: image)."),
        ({"question": "q"}, "p:1: the pair has no image (columns found: question)."),
        ({"image": "a", "question": ["q"]}, "p:1: the question must be text, found ['q']."),
        (
            {"image": "a", "conversations": [{"role": "user", "value": "q"}]},
            "p:1: every turn of the conversation needs 'from' and 'value', "
            "found {'role': 'user', 'value': 'q'}.",
        ),
        ({"image": "a", "conversations": []}, "p:1: the pair has no question (columns found: "),
        ({"image": "a", "texts": ["q"]}, "p:1: the pair has no question (columns found: "),
        ({"image": {"path": None}, "question": "q"}, "p:1: the image must be a path or an image"),
    ],
)
def test_bad_rows_are_refused(row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row)
    assert caught.value.message.startswith(message)


def test_a_path_without_a_folder_is_refused() -> None:
    with pytest.raises(DataError, match="but the data has no folder"):
        read({"image": "a.png", "question": "q"}, folder=None)


def test_placeholders_are_removed_with_their_whitespace() -> None:
    assert without_placeholders("<image>\nWhat?") == "What?"
    assert without_placeholders("What?\n<image>") == "What?"
    assert without_placeholders("Is <image> like <image>?") == "Is like ?"
