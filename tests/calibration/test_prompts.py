"""Pairs as model batches, with a real (tiny) LLaVA processor and model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from yopo.data import prompts
from yopo.data.pairs import ImageRef, Pair
from yopo.data.prompts import answer_ids, batches, encode, load_processor, prompt_text
from yopo.models.hub import Probe
from yopo.support.errors import DataError, ModelError

SIZE, PATCH = 12, 4
VISUAL = (SIZE // PATCH) ** 2
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
WORDS = SPECIAL + "what is this and that a cat dog yes no ?".split()
TEMPLATE = (
    "{% for message in messages %}USER: {% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"USER:|ASSISTANT:|\w+|[^\w\s]"), behavior="removed", invert=True
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right",  # encode must not depend on it
    )


def make_processor(template: str | None = TEMPLATE) -> LlavaProcessor:
    size = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size),
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        image_token="<image>",
    )


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> LlavaProcessor:
    home = tmp_path_factory.mktemp("processor")
    make_processor().save_pretrained(home)
    return load_processor(str(home))


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, image_seq_length=VISUAL
    )
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(config).eval()
    made.generation_config.eos_token_id = None  # random weights: never stop early
    return made


def pair(question: str, *, images: int = 1, color: str = "red", mode: str = "RGB") -> Pair:
    picture = Image.new("RGB", (20, 15), color).convert(mode)
    refs = tuple(ImageRef(picture, f"p:1: image {index}") for index in range(images))
    return Pair(refs, question, (), None, "0", "p:1")


def run(processor: LlavaProcessor, pairs: list[Pair], **options: object) -> prompts.Batch:
    options = {"image_token_id": 4, "device": "cpu", "dtype": torch.float32, **options}
    return encode(processor, pairs, **options)


def words_of(processor: LlavaProcessor, ids: torch.Tensor) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids.tolist())


def test_prompts_come_from_a_template_or_llavas_form() -> None:
    one = pair("<image>\nwhat is this?")
    assert prompt_text(make_processor(), one) == "USER: <image>\nwhat is this? ASSISTANT:"
    assert prompt_text(make_processor(None), one) == "USER: <image>\nwhat is this? ASSISTANT:"
    two = pair("what is <image> and <image>?", images=2)
    expected = "USER: <image>\n<image>\nwhat is and ? ASSISTANT:"
    for template in (TEMPLATE, None):
        assert prompt_text(make_processor(template), two) == expected
    answered = prompt_text(make_processor(), one, answer="a cat")
    assert answered == "USER: <image>\nwhat is this? ASSISTANT: a cat"
    newline = make_processor(TEMPLATE.replace("ASSISTANT:", "ASSISTANT:\n"))
    assert prompt_text(newline, one, answer="a cat").endswith("ASSISTANT:\na cat")


def test_batches_are_left_padded(processor: LlavaProcessor) -> None:
    pairs = [pair("what?"), pair("what is this and that?", images=2, color="blue")]
    batch = run(processor, pairs, dtype=torch.bfloat16)
    assert len(batch) == 2 and batch.pairs == tuple(pairs) and batch.answer_mask is None
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    lengths = [1 + 1 + VISUAL + 2 + 1, 1 + 1 + 2 * VISUAL + 6 + 1]  # bos, USER:, ..., ASSISTANT:
    assert mask.tolist() == [
        [0] * (lengths[1] - lengths[0]) + [1] * lengths[0],
        [1] * lengths[1],
    ]
    assert (ids[mask == 0] == processor.tokenizer.pad_token_id).all()
    assert (ids == 4).sum(dim=1).tolist() == [VISUAL, 2 * VISUAL]
    assert words_of(processor, ids[0, -3:]) == ["what", "?", "ASSISTANT:"]
    assert (ids == processor.tokenizer.bos_token_id).sum(dim=1).tolist() == [1, 1]
    assert batch.inputs["pixel_values"].shape == (3, 3, SIZE, SIZE)
    assert batch.inputs["pixel_values"].dtype == torch.bfloat16
    assert ids.dtype == torch.int64


def test_a_bos_token_in_the_template_is_not_doubled() -> None:
    batch = run(make_processor("{{ bos_token }}" + TEMPLATE), [pair("what?")])
    ids = batch.inputs["input_ids"][0]
    assert (ids == 1).sum() == 1 and ids[0] == 1


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA"])
def test_image_modes_reach_the_model_as_three_channels(
    processor: LlavaProcessor, mode: str
) -> None:
    pixels = run(processor, [pair("what?", mode=mode)]).inputs["pixel_values"]
    assert pixels.shape == (1, 3, SIZE, SIZE)


def test_padding_does_not_change_the_logits(
    processor: LlavaProcessor, model: LlavaForConditionalGeneration
) -> None:
    pairs = [pair("what?"), pair("what is this and that?", images=2, color="blue")]
    together = model(**run(processor, pairs).inputs).logits[:, -1]
    for row, single in enumerate(pairs):
        alone = model(**run(processor, [single]).inputs).logits[0, -1]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_answers_follow_their_prompts(processor: LlavaProcessor) -> None:
    pairs = [pair("what?"), pair("what is this and that?"), pair("this?")]
    prompts_only = run(processor, pairs)
    batch = run(processor, pairs, answers=["a cat", [15, 14, 15, 2], ""])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    assert batch.answer_mask.dtype == torch.bool and batch.answer_mask.shape == ids.shape
    assert [ids[row][batch.answer_mask[row]].tolist() for row in range(3)] == [
        processor.tokenizer.convert_tokens_to_ids(["a", "cat"]),
        [15, 14, 15, 2],
        [],
    ]
    for row in range(3):
        before = prompts_only.inputs["input_ids"][row]
        before = before[prompts_only.inputs["attention_mask"][row].bool()]
        real = ids[row][mask[row]]
        assert real[: len(before)].tolist() == before.tolist(), "prompt ids must stay as they are"
        assert len(real) == len(before) + batch.answer_mask[row].sum()
        assert mask[row].tolist() == sorted(mask[row].tolist()), "padding belongs to the left"
    assert (ids[~mask] == 0).all() and mask.all(dim=1).any()
    same = prompts_only.inputs["pixel_values"]
    assert torch.equal(batch.inputs["pixel_values"], same)


def test_one_pass_reproduces_the_greedy_continuation(
    processor: LlavaProcessor, model: LlavaForConditionalGeneration
) -> None:
    """Each answer token is the argmax one position earlier, so no answer is shifted."""
    pairs = [pair("what?"), pair("what is this and that?", color="blue")]
    inputs = run(processor, pairs).inputs
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    tokens = made[:, inputs["input_ids"].shape[1] :].tolist()
    batch = run(processor, pairs, answers=[tokens[0], tokens[1][:2]])
    predicted = model(**batch.inputs).logits.argmax(dim=-1)
    for row, expected in enumerate([tokens[0], tokens[1][:2]]):
        before = batch.answer_mask[row].roll(-1)
        assert predicted[row][before].tolist() == expected


def test_other_prompt_inputs_grow_with_the_answer() -> None:
    inputs = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "token_type_ids": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "image_sizes": torch.tensor([[3, 4], [5, 6]]),
    }
    grown, mask = prompts._append(inputs, [[1, 2, 3], [4]], 0)
    assert grown["input_ids"].tolist() == [[5, 6, 1, 2, 3], [0, 7, 8, 9, 4]]
    assert grown["attention_mask"].tolist() == [[1] * 5, [0, 1, 1, 1, 1]]
    assert grown["token_type_ids"].tolist() == [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]
    assert mask.tolist() == [[False] * 2 + [True] * 3, [False] * 4 + [True]]
    assert torch.equal(grown["image_sizes"], inputs["image_sizes"])


def test_answer_ids_depend_on_what_precedes_the_answer() -> None:
    """A sentencepiece-like vocabulary has "▁yes" after a word and "yes" after a newline."""
    words = ["<unk>", "▁USER:", "▁ASSISTANT:", "▁yes", "yes", "\n"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    space = pre_tokenizers.Metaspace(prepend_scheme="always")
    line = pre_tokenizers.Split("\n", "isolated")

    def ids(prompt: str, answer: str, *steps: pre_tokenizers.PreTokenizer) -> list[int]:
        inner.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
        return answer_ids(SimpleNamespace(tokenizer=tokenizer), prompt, answer)

    assert ids("USER: ASSISTANT:", "yes", space, line) == [3]
    assert ids("USER: ASSISTANT:\n", "yes", space, line) == [4]
    assert ids("USER: ASSISTANT:", "", space, line) == []
    assert ids("USER:\n", "yes", space) == [3], "merged: the answer by itself"


def test_a_prompt_without_visual_tokens_is_refused(processor: LlavaProcessor) -> None:
    with pytest.raises(DataError, match="p:1: the processor made a prompt without visual tokens"):
        run(processor, [pair("what?")], image_token_id=99)
    blind = make_processor(TEMPLATE.replace("<image>\n", ""))
    rejected = "rejects the batch: The total number"
    said = rejected if tiny.processors_count_images() else "made a prompt without visual tokens"
    with pytest.raises(DataError, match=f"p:1: the processor {said}"):
        run(blind, [pair("what?")])


def test_a_corrupt_image_is_reported_when_encoded(
    processor: LlavaProcessor, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_text("no image")
    bad = Pair((ImageRef(tmp_path / "a.png", "p:7: image a.png"),), "what?", (), None, "0", "p:7")
    with pytest.raises(DataError, match="p:7: image a.png: cannot be decoded"):
        run(processor, [pair("what?"), bad])


def test_batches_keep_order() -> None:
    pairs = [pair(str(number)) for number in range(5)]
    groups = list(batches(iter(pairs), 2))
    assert [len(group) for group in groups] == [2, 2, 1]
    assert [each for group in groups for each in group] == pairs
    assert list(batches([], 2)) == []


def expect_error(location: Path | str, message: str, remedy: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_processor(str(location))
    assert message in caught.value.message and "\n" not in caught.value.message
    assert remedy in str(caught.value.remedy)


def test_a_tokenizer_is_not_accepted_as_a_processor(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    expect_error(tmp_path, "not a processor for images and text", "processor_config.json")


def test_an_unknown_processor_class_is_refused(tmp_path: Path) -> None:
    make_processor().save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer_config.json"):
        path = tmp_path / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": "Nothing"}))
    expect_error(tmp_path, "not a processor for images and text", "processor class")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    expect_error(tmp_path, f"{tmp_path}: the processor cannot be loaded: ", "files next to")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*_: object, **__: object) -> None:
        raise ImportError(
            "\nXVideoProcessor requires the Torchvision library but it was not found."
        )

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    expect_error(tmp_path, "package that is missing: XVideoProcessor requires", "same build")


def test_an_unreachable_hub_and_a_missing_repository_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    expect_error(
        "some-org/some-model",
        "the hub is unreachable (HF_HUB_OFFLINE is set)",
        "give its directory",
    )
    monkeypatch.setattr(
        prompts, "probe", lambda *_, **__: Probe(True, None, "there is no such model")
    )
    expect_error("some-org/some-model", "there is no such model", "hf auth login")


def test_a_missing_pad_token_is_set(tmp_path: Path) -> None:
    made = make_processor()
    made.tokenizer.pad_token = None
    made.save_pretrained(tmp_path)
    loaded = load_processor(str(tmp_path))
    assert loaded.tokenizer.pad_token == "</s>"
    assert len(run(loaded, [pair("what?"), pair("what is this?")])) == 2


def test_demo_pairs_can_be_encoded() -> None:
    build = pytest.importorskip("demo_training.build")
    from yopo.data.sources import open_pairs

    processor = build.build_processor()
    pairs = list(open_pairs(None, samples=4, seed=0))
    batch = run(
        processor,
        pairs,
        image_token_id=processor.image_token_id,
        answers=[each.answers[0] for each in pairs],
    )
    unknown = processor.tokenizer.unk_token_id
    assert (batch.inputs["input_ids"] != unknown).all()
    assert batch.answer_mask.any(dim=1).all()
