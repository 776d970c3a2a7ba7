"""The untrained glyph reader and its processor: Qwen2-VL at a thousandth of its size.

Vision tower with rotary positions, 2 x 2 patch merger, decoder with grouped KV heads and M-RoPE:
the same classes, prompt and path of visual tokens as `Qwen/Qwen2-VL-2B-Instruct`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from yopo.demo.glyphs.font import GLYPHS
from yopo.demo.glyphs.grids import IMAGE_SIZE
from yopo.demo.glyphs.questions import COLORS, EMPTY, NUMBERS
from yopo.models.processors import image_class

PATCH_SIZE = 6
MERGE_SIZE = 2
GRID_TOKENS = IMAGE_SIZE // (PATCH_SIZE * MERGE_SIZE)  # 8 rows and 8 columns of visual tokens
HIDDEN_SIZE = 128
NUM_LAYERS = 6
NUM_HEADS, NUM_KV_HEADS = 8, 2
MAX_NEW_TOKENS = 60  # a whole grid is 54 tokens and the end token

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
IMAGE_START, IMAGE_END = "<|vision_start|>", "<|vision_end|>"
_SPECIAL = (PAD, START, END, IMAGE, VIDEO, IMAGE_START, IMAGE_END, "<unk>")
_WORDS = (
    "system user assistant what is at row column color where the there a how many are in read grid "
    "yes no ? . ,"
).split()

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: Qwen2-VL's special tokens and every word of the task."""
    words = [*_SPECIAL, *_WORDS, EMPTY, *GLYPHS, *COLORS, *NUMBERS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # spaces, but none before "," and "."
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": IMAGE,
            "video_token": VIDEO,
            "vision_start_token": IMAGE_START,
            "vision_end_token": IMAGE_END,
            "turn_start_token": START,
        },
        padding_side="left",
        model_max_length=1024,
    )


def build_processor() -> Qwen2VLProcessor:
    """Build the processor without its video half; it needs only Pillow, not torchvision."""
    return image_class(Qwen2VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=PATCH_SIZE,
            merge_size=MERGE_SIZE,
            # pixels: no image has more visual tokens than a grid
            size={"shortest_edge": (IMAGE_SIZE // 2) ** 2, "longest_edge": IMAGE_SIZE**2},
        ),
        tokenizer=build_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(processor: Qwen2VLProcessor, directory: Path) -> None:
    """Save a processor from `build_processor`, with settings for the video half that it lacks.

    Where torchvision is installed, transformers loads Qwen2-VL processors with both halves.
    """
    processor.save_pretrained(directory)
    settings = json.loads((directory / "processor_config.json").read_text())["image_processor"]
    del settings["image_processor_type"]
    settings["video_processor_type"] = "Qwen2VLVideoProcessor"
    path = directory / "video_preprocessor_config.json"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_model(*, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Build the model with random weights in float32; `seed` fixes them."""
    tokenizer = build_tokenizer()
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Qwen2VLConfig(
        vision_config={
            "depth": 3,
            "embed_dim": 96,
            "hidden_size": HIDDEN_SIZE,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 304,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": NUM_HEADS,
            "num_key_value_heads": NUM_KV_HEADS,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],  # pairs of a head's 16 dimensions: time, row, column
            },
            **ids,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_id=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(IMAGE_START),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(IMAGE_END),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **ids
    )
    return model
