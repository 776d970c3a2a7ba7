"""The files next to a converted checkpoint's weights: tokenizer, processor, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yopo.support.errors import CheckpointError

IMAGE_TOKEN = "<IMG_CONTEXT>"

_COPIED = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_ALSO_COPIED = ("LICENSE*", "NOTICE*", "README.md")

_ROLES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE_TOKEN,
    "video_token": "<video>",
}
"""Tokens that InternVLProcessor looks up in its tokenizer."""


@dataclass(frozen=True)
class Conversation:
    """The message format of an original conversation template.

    Attributes:
        before: Text before a message, with ``ROLE`` for the speaker.
        end: The token that ends a message, and an answer.
        after: White space after that token.
    """

    before: str
    end: str
    after: str = ""

    def chat_template(self) -> str:
        """The format as a jinja template: images first, each followed by a newline."""
        start = "'" + self.before.replace("ROLE", "' + {role} + '") + "\\n'"
        end = f"'{self.end}{self.after}'".replace("\n", "\\n")
        opening, answer = start.format(role="message['role']"), start.format(role="'assistant'")
        return (
            "{% for message in messages %}"
            f"{{{{ {opening} }}}}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            f"{{% if part['type'] == 'image' %}}{{{{ '{IMAGE_TOKEN}\\n' }}}}"
            "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endif %}"
            f"{{{{ {end} }}}}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
        )


_CHAT_ML = Conversation("<|im_start|>ROLE", "<|im_end|>")
CONVERSATIONS = {
    "internlm2-chat": _CHAT_ML,
    "Hermes-2": _CHAT_ML,
    "internvl2_5": Conversation("<|im_start|>ROLE", "<|im_end|>", "\n"),
    "phi3-chat": Conversation("<|ROLE|>", "<|end|>"),
}
"""Template named in config.json -> its format."""


def conversation_of(raw: Mapping[str, Any]) -> Conversation:
    """The conversation template that config.json names.

    Raises:
        CheckpointError: It is unknown: prompts and the end of answers would be guesses.
    """
    name = raw.get("template")
    if name not in CONVERSATIONS:
        raise CheckpointError(
            f"config.json: the conversation template {name!r} is unknown "
            f"(known: {', '.join(CONVERSATIONS)})."
        )
    return CONVERSATIONS[name]


def token_id(folder: Path, token: str) -> int:
    """Id of a special token, from all tokenizer files that contain it.

    Raises:
        CheckpointError: No file contains it, or two files differ.
    """
    found = set()
    added = _read(folder / "added_tokens.json")
    if token in added:
        found.add(int(added[token]))
    decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    found |= {int(key) for key, value in decoder.items() if value.get("content") == token}
    listed = _read(folder / "tokenizer.json").get("added_tokens") or []
    found |= {int(entry["id"]) for entry in listed if entry.get("content") == token}
    if len(found) != 1:
        said = f"give different ids {sorted(found)}" if found else "do not give an id"
        raise CheckpointError(
            f"{folder}: its tokenizer files {said} for {token}.",
            remedy="Download all files of the original repository.",
        )
    return found.pop()


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    return data if isinstance(data, dict) else {}


def files_to_copy(folder: Path) -> list[Path]:
    """Tokenizer files, license and model card of the source."""
    found = [folder / name for name in _COPIED]
    found += [path for pattern in _ALSO_COPIED for path in sorted(folder.glob(pattern))]
    return [path for path in found if path.is_file()]


def documents(folder: Path, raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """The small files that are rewritten: name -> text.

    Args:
        folder: The source.
        raw: Its config.json.
        config: The native configuration.
    """
    conversation = conversation_of(raw)
    tokenizer = _read(folder / "tokenizer_config.json")
    tokenizer["extra_special_tokens"] = _ROLES
    tokenizer.pop("chat_template", None)  # it does not support images
    generation = _read(folder / "generation_config.json")
    generation["eos_token_id"] = _ends(generation, token_id(folder, conversation.end))
    generation.pop("transformers_version", None)
    written: dict[str, Any] = {
        "tokenizer_config.json": tokenizer,
        "generation_config.json": generation,
        "processor_config.json": _processor(raw, config),
    }
    texts = {name: json.dumps(data, indent=2) + "\n" for name, data in written.items()}
    return texts | {"chat_template.jinja": conversation.chat_template()}


def _ends(generation: Mapping[str, Any], end: int) -> list[int]:
    known = generation.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    return list(dict.fromkeys([end, *known]))


def _processor(raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    side = config["vision_config"]["image_size"]
    pixels = {
        "size": {"height": side, "width": side},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    tiles = {
        "crop_to_patches": True,
        "min_patches": raw.get("min_dynamic_patch", 1),
        "max_patches": raw.get("max_dynamic_patch", 6),
    }
    return {
        "processor_class": "InternVLProcessor",
        "image_seq_length": config["image_seq_length"],
        "image_processor": {"image_processor_type": "GotOcr2ImageProcessor", **pixels, **tiles},
        "video_processor": {"video_processor_type": "InternVLVideoProcessor", **pixels},
    }
