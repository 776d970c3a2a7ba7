"""Reads a row of data, in any of the usual formats, as a pair.

Formats: plain columns (``image``, ``question``, ``answer``), LLaVA conversations, chat messages,
and the ``texts`` turns of The Cauldron. Of a conversation, the first question and answer are used.
Videos are given as paths. Rows with other media (audio, addresses of videos) are refused, since
their questions need it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from yopo.data.left_out import BadPair
from yopo.data.pairs import ImageRef, Pair
from yopo.data.videos import VideoRef
from yopo.support.documents import describe
from yopo.support.errors import printable

IMAGE_NAMES = ("images", "image", "image_path", "image_paths", "file_name", "file_names")
QUESTION_NAMES = ("question", "query", "prompt", "text")
ANSWER_NAMES = ("answers", "answer", "label", "multiple_choice_answer")
KIND_NAMES = ("kind", "question_type", "category", "type")
ID_NAMES = ("id", "question_id", "questionid", "sample_id")
_USER_ROLES = ("human", "user")
_ASSISTANT_ROLES = ("gpt", "assistant")
VIDEO_NAMES = ("videos", "video", "video_path", "video_paths")
OTHER_MEDIA = {
    "video": ("video_url",),
    "audio": ("audio", "audios", "audio_path", "audio_paths", "audio_url", "input_audio"),
}
"""Columns, and part types of chat messages, that hold neither images nor text."""

MAX_ANSWER_DEPTH = 4
"""Maximum nesting of lists of answers."""

MAX_LABEL = 80
"""Maximum characters of a kind or a column's name, which tables and messages show."""

MAX_NAMES = 20
"""Maximum number of columns listed in a message."""

MAX_QUESTION = 1 << 20
"""Maximum characters: more than any model's context holds, and tokenizing takes memory."""

_MEDIA_MARK = re.compile(r"<(video|audio)>", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\s*<(image|video)>\s*")


def without_placeholders(question: str) -> str:
    """Return a question without ``<image>`` and ``<video>``, which the prompt's template adds."""
    return _PLACEHOLDER.sub(" ", question).strip()


def pair_from_row(row: Any, *, where: str, number: int, folder: Path | None) -> Pair:
    """Read one pair; unknown columns are ignored.

    Args:
        row: A mapping from column names (any case) to values.
        where: The row's location in messages, ``pairs.jsonl:3``.
        number: The row's number from 0, used as its id if it has none.
        folder: Base of relative image paths; None if there is no such folder.

    Raises:
        BadPair: The row is not a mapping, or has no image, no question, or one of a wrong type.
    """
    if not isinstance(row, Mapping):
        raise BadPair(
            f"{where}: a pair must be an object with an image and a question, "
            f"found {describe(row)}.",
            reason="that are no objects",
        )
    columns = {str(name).lower(): value for name, value in row.items()}
    _refuse_other_media(columns, where)
    question, answer, inline = _question_and_answer(columns, where)
    values = _as_list(_first(columns, IMAGE_NAMES)) or inline
    videos = tuple(_video(value, where, folder) for value in _videos(columns))
    if not values and not videos:
        raise BadPair(
            f"{where}: the pair has no image (columns found: {_names(row)}).",
            reason="without an image",
            remedy=f"Name the image in one of the columns {', '.join(IMAGE_NAMES)}.",
        )
    kind, own_id = _first(columns, KIND_NAMES), _first(columns, ID_NAMES)
    return Pair(
        images=tuple(_image(value, where, folder) for value in values),
        question=question,
        answers=tuple(_answers(answer, where)),
        kind=printable(kind[:MAX_LABEL]) if isinstance(kind, str) else None,
        id=printable(str(own_id)) if isinstance(own_id, str | int) else str(number),
        where=where,
        videos=videos,
    )


def _videos(columns: Mapping[str, Any]) -> list[Any]:
    return _as_list(_first(columns, VIDEO_NAMES))


def _refuse_other_media(columns: dict[str, Any], where: str) -> None:
    for kind, names in OTHER_MEDIA.items():
        if _first(columns, names) is not None:
            raise other_media(kind, where)


def other_media(kind: str, where: str) -> BadPair:
    """The error for a pair that a model cannot be asked about."""
    return BadPair(
        f"{where}: the question is also about {'a video' if kind == 'video' else 'audio'}, but "
        "only images are supported here.",
        reason="about a video or audio",
        remedy="Remove the pair from the data, or give the video's frames as images.",
    )


def _all_turns(columns: dict[str, Any], where: str) -> tuple[list[Any], bool]:
    """(role, content) of a row's conversation, and whether it came from plain columns."""
    if isinstance(columns.get("conversations"), list):
        return _turns(columns["conversations"], "from", "value", where), False
    if isinstance(columns.get("messages"), list):
        return _turns(columns["messages"], "role", "content", where), False
    if isinstance(columns.get("texts"), list):
        first = columns["texts"][0] if columns["texts"] else {}
        first = first if isinstance(first, Mapping) else {}
        return [(role, first.get(role)) for role in ("user", "assistant")], False
    question, answer = _first(columns, QUESTION_NAMES), _first(columns, ANSWER_NAMES)
    return [("user", question), ("assistant", answer)], True


def _question_and_answer(columns: dict[str, Any], where: str) -> tuple[str, Any, list[Any]]:
    """Return (question, raw answer or None, images inside the question's message)."""
    inline: list[Any] = []
    turns, is_flat = _all_turns(columns, where)
    question, answer = _first_exchange(turns)
    if isinstance(question, list) and not is_flat:
        inline = list(_inline_images(question, where, has_videos=bool(_videos(columns))))
        question = _joined_text(question)
    if question is None:
        question = ""
    if not isinstance(question, str):
        raise BadPair(
            f"{where}: the question must be text, found {describe(question)}.",
            reason="without a question in text",
        )
    mark = _MEDIA_MARK.search(question)
    if mark is not None and not (mark[1].lower() == "video" and _videos(columns)):
        raise other_media(mark[1].lower(), where)
    if len(question) > MAX_QUESTION:
        raise BadPair(
            f"{where}: the question has {len(question):,} characters, more than the limit of "
            f"{MAX_QUESTION:,}.",
            reason="with a question that is too long",
        )
    text = without_placeholders(question)
    if not text:
        raise BadPair(
            f"{where}: the pair has no question (columns found: {_names(columns)}).",
            reason="without a question",
            remedy=f"Put it in one of the columns {', '.join(QUESTION_NAMES)}, "
            "conversations or messages.",
        )
    if isinstance(answer, list) and not is_flat:
        answer = _joined_text(answer)
    return text, answer, inline


def _turns(value: list[Any], role: str, content: str, where: str) -> list[tuple[Any, Any]]:
    """Read conversation turns as (role, content)."""
    for turn in value:
        if not isinstance(turn, Mapping) or role not in turn or content not in turn:
            raise BadPair(
                f"{where}: every turn of the conversation needs '{role}' and '{content}', "
                f"found {describe(turn)}.",
                reason="with a conversation that cannot be read",
            )
    return [(turn[role], turn[content]) for turn in value]


def _first_exchange(turns: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return the first user turn and the assistant turn right after it, None where missing."""
    for index, (role, content) in enumerate(turns):
        if role in _USER_ROLES:
            following = turns[index + 1 :][:1]
            answered = following and following[0][0] in _ASSISTANT_ROLES
            return content, following[0][1] if answered else None
    return None, None


def _joined_text(parts: list[Any]) -> str | None:
    """Return the text of a chat message's list of typed parts."""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return " ".join(text for text in texts if isinstance(text, str)) or None


def _inline_images(parts: list[Any], where: str, *, has_videos: bool) -> Iterator[Any]:
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        for kind, names in OTHER_MEDIA.items():
            also = VIDEO_NAMES if kind == "video" and not has_videos else ()
            if part.get("type") in (*names, *also):
                raise other_media(kind, where)
        if part.get("type") in ("image", "image_url"):
            value = _first(part, ("image", "path", "url", "image_url"))
            if isinstance(value, Mapping) and "url" in value:
                value = value["url"]
            if value is not None:
                yield value


def _image(value: Any, where: str, folder: Path | None) -> ImageRef:
    """Read an image column's value: path, bytes, ``{"bytes", "path"}`` or a decoded image."""
    from PIL import Image

    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        held, path = value.get("bytes"), value.get("path")
        if isinstance(held, bytes | bytearray | memoryview):
            name = Path(path).name if isinstance(path, str) else f"of {len(held)} bytes"
            return ImageRef(bytes(held), f"{where}: image {name}")
        if held is not None:
            raise BadPair(
                f"{where}: an image's bytes must be bytes, found {describe(held)}.",
                reason="with an image of a wrong type",
            )
        value = path
    if isinstance(value, bytes):
        return ImageRef(value, f"{where}: image of {len(value)} bytes")
    if isinstance(value, Image.Image):
        return ImageRef(value, f"{where}: image {getattr(value, 'filename', '') or 'in memory'}")
    if not isinstance(value, str) or not value:
        raise BadPair(
            f"{where}: the image must be a path or an image, found {describe(value)}.",
            reason="with an image of a wrong type",
        )
    return _image_at(value, where, folder)


def _video(value: Any, where: str, folder: Path | None) -> VideoRef:
    """Read a video column's value: the path of a file."""
    if isinstance(value, Mapping) and value.get("path"):
        value = value["path"]
    if not isinstance(value, str) or not value or "://" in value:
        raise BadPair(
            f"{where}: the video must be the path of a file, found {describe(value)}.",
            reason="with a video that is no file",
            remedy="Download the videos and give the paths of the files.",
        )
    remedy = "Use a JSONL file next to the videos."
    path = _in_folder(Path(value), value, where, folder, "video", remedy)
    return VideoRef(path, f"{where}: video {value}")


def _in_folder(
    path: Path, shown: str, where: str, folder: Path | None, what: str, remedy: str
) -> Path:
    """A path from the folder that it is relative to."""
    if path.is_absolute():
        return path
    if folder is None:
        raise BadPair(
            f"{where}: the {what} is a relative path ({shown}), but the data has no folder.",
            reason=f"whose {what} is a relative path",
            remedy=remedy,
        )
    return folder / path


def _image_at(address: str, where: str, folder: Path | None) -> ImageRef:
    label = f"{where}: image {address}"
    if any(part.startswith(("http:", "https:", "data:")) for part in address.split("::")):
        raise BadPair(
            f"{where}: the image is a URL ({describe(address)}), not a file.",
            reason="whose image is a URL",
            remedy="Download the images and give the paths of the files.",
        )
    if "://" in address:
        return ImageRef(address, label)
    try:
        path = Path(address).expanduser()
    except RuntimeError:  # ~name without such a user: a file name that starts with ~
        path = Path(address)
    remedy = "Use a dataset that contains its images, or a JSONL file next to them."
    return ImageRef(_in_folder(path, address, where, folder, "image", remedy), label)


def _answers(value: Any, where: str, depth: int = 0) -> Iterator[str]:
    """Yield the answers in a text, a number, a list of them, or VQA's ``[{"answer": ...}]``."""
    if isinstance(value, Mapping) and "answer" in value:
        value = value["answer"]
    if value is None or value == "":
        return
    if isinstance(value, str | int | float):
        yield str(value)
    elif isinstance(value, list | tuple) and depth < MAX_ANSWER_DEPTH:
        for each in value:
            yield from _answers(each, where, depth + 1)
    else:
        raise BadPair(
            f"{where}: an answer must be text or a list of texts, found {describe(value)}.",
            reason="with an answer of a wrong type",
        )


def _first(columns: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Return the first non-null, non-empty value of the named columns."""
    for name in names:
        value = columns.get(name)
        if value is not None and not (isinstance(value, str | list | tuple) and len(value) == 0):
            return value
    return None


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _names(columns: Mapping[str, Any]) -> str:
    names = [str(name)[:MAX_LABEL] for name in columns]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(names[:MAX_NAMES]) or "none") + more
