"""The untrained demo model and its processor: LLaVA-1.5's architecture at a thousandth of its size.

CLIP vision tower, two-layer projector, Llama decoder: the same classes, prompt and path of visual
tokens as `llava-hf/llava-1.5-7b-hf`, so what works here has run on the real transformers code.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from yopo.demo.scenes import IMAGE_SIZE
from yopo.demo.vocabulary import COLORS, COLUMNS, NUMBERS, PLURALS, ROWS, SHAPES

PATCH_SIZE = 8  # 64 / 8: a grid of 8 x 8 visual tokens
HIDDEN_SIZE = 128
NUM_LAYERS = 8
NUM_HEADS = 8
MAX_NEW_TOKENS = 48  # the longest description has 40 tokens

_SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
_IMAGE_TOKEN = "<image>"
_WORDS = (
    "USER: ASSISTANT: what color shape is are there the a at how many where of left right above "
    "below object objects yes no describe scene and ? , ."
).split()

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for item in message['content'] if item['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{%- for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{%- endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer, which knows exactly the words of the scenes."""
    words = [*_SPECIAL.values(), _IMAGE_TOKEN, *_WORDS, *COLORS, *SHAPES, *PLURALS.values()]
    words += [*NUMBERS, *ROWS, *COLUMNS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"USER:|ASSISTANT:|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # spaces, but none before "," and "."
    bos = _SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_SPECIAL,
        extra_special_tokens={"image_token": _IMAGE_TOKEN},
        padding_side="left",
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """Build the processor; its image half needs only Pillow, not torchvision."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the CLS token, which "default" drops again
        chat_template=CHAT_TEMPLATE,
        image_token=_IMAGE_TOKEN,
    )


def build_model(*, seed: int = 0) -> LlavaForConditionalGeneration:
    """Build the model with random weights in float32; `seed` fixes them."""
    tokenizer = build_tokenizer()
    special_ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=HIDDEN_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=352,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=1024,
        **special_ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,  # all four layers are ours to train; LLaVA's -2 would waste one
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special_ids,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **special_ids
    )
    return model
