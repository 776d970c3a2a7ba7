"""The untrained ticket reader and its processor: InternVL's form, a thousandth of its size.

Tiles and a thumbnail, vision tower with absolute positions, pixel shuffle, projector, Qwen2 decoder
with grouped KV heads: the same classes, prompt and path of visual tokens as
`OpenGVLab/InternVL3-1B-hf`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from yopo.demo.glyphs.font import GLYPHS
from yopo.demo.tickets.questions import ORDINALS
from yopo.demo.tickets.tickets import TILE_SIZE
from yopo.models.processors import image_class

PATCH_SIZE = 6
DOWNSAMPLE = 0.5  # the pixel shuffle makes one visual token of 2 x 2 patches
TILE_SIDE = int(TILE_SIZE // PATCH_SIZE * DOWNSAMPLE)  # rows and columns of a tile's tokens
MAX_TILES = 4
HIDDEN_SIZE = 128
NUM_LAYERS = 6
NUM_HEADS, NUM_KV_HEADS = 8, 4
MAX_NEW_TOKENS = 68  # six lines of eight symbols are 66 tokens and the end

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE, VIDEO = "<IMG_CONTEXT>", "<video>"
IMAGE_START, IMAGE_END = "<img>", "</img>"
_SPECIAL = (PAD, START, END, IMAGE, VIDEO, IMAGE_START, IMAGE_END, "<unk>")
# "comes after" is of a question that the shipped weights did not learn, and is asked no more.
_WORDS = (
    "system user assistant what is first last in line comes after how many lines are there read "
    "the ticket ? . ,"
).split()

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{%- elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: InternVL's special tokens, and every word of the task."""
    words = [*_SPECIAL, *_WORDS, *GLYPHS, *ORDINALS]
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
            "context_image_token": IMAGE,
            "video_token": VIDEO,
            "start_image_token": IMAGE_START,
            "end_image_token": IMAGE_END,
            "turn_start_token": START,
        },
        padding_side="left",
        model_max_length=1024,
    )


def build_processor() -> InternVLProcessor:
    """Build the processor without its video half: it needs Pillow only, no torchvision."""
    return image_class(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": TILE_SIZE, "width": TILE_SIZE},
            crop_to_patches=True,
            min_patches=1,
            max_patches=MAX_TILES,
        ),
        tokenizer=build_tokenizer(),
        image_seq_length=TILE_SIDE**2,
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(processor: InternVLProcessor, directory: Path) -> None:
    """Save a processor of `build_processor`, and settings for the video half that it lacks.

    Where torchvision is installed, transformers loads InternVL processors with both halves.
    """
    processor.save_pretrained(directory)
    settings = json.loads((directory / "processor_config.json").read_text())["image_processor"]
    for name in ("image_processor_type", "crop_to_patches", "min_patches", "max_patches"):
        del settings[name]  # frames are not cut into tiles
    settings["video_processor_type"] = "InternVLVideoProcessor"
    path = directory / "video_preprocessor_config.json"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_model(*, seed: int = 0) -> InternVLForConditionalGeneration:
    """Build the model with random weights in float32; `seed` fixes them."""
    tokenizer = build_tokenizer()
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = InternVLVisionConfig(
        image_size=TILE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        layer_scale_init_value=1.0,  # three layers need no damping
        attention_bias=True,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=304,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=False,
        **ids,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=TILE_SIDE**2,
        downsample_ratio=DOWNSAMPLE,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **ids
    )
    return model
