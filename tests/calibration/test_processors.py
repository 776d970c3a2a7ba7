"""Processors with a video half work without torchvision: built, saved, loaded and used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from yopo.calibration.measure import measure
from yopo.data.pairs import ImageRef, Pair
from yopo.data.prompts import encode, load_processor
from yopo.evaluation.fidelity import compare, record_dense
from yopo.models.processors import image_class, load_without_videos
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest
from yopo.plans.flops import visual_budget
from yopo.plans.grid import Grid
from yopo.plans.schema import PruningPlan
from yopo.runtime.install import pruned
from yopo.support.errors import ModelError

KINDS = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
PATCH, MERGE = 4, 2
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
WORDS = ["<pad>", "<unk>", "</s>", *SPECIAL, *"user assistant what is this that ? yes no".split()]
IDS = {word: index for index, word in enumerate(WORDS)}
TEMPLATE = (
    "{% for message in messages %}user {% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL,
    )


def make_model(kind: str) -> PreTrainedModel:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": len(WORDS),
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "intermediate_size": 32,
    }
    vision |= {
        "Qwen2VL": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        "Qwen2_5_VL": {"hidden_size": 32, "out_hidden_size": 32, "window_size": 16},
        "Qwen3VL": {"hidden_size": 32, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id = None  # random weights: never stop early
    return model


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a processor and a configuration, as transformers saves them."""
    home = tmp_path_factory.mktemp(kind)
    stock = getattr(transformers, f"{kind}Processor")
    images = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, min_pixels=64)
    image_class(stock)(images, make_tokenizer(), chat_template=TEMPLATE).save_pretrained(home)
    make_model(kind).config.save_pretrained(home)
    return home


def pair(question: str, *sizes: tuple[int, int]) -> Pair:
    """A pair with images of (width, height) pixels of noise."""
    generator = torch.Generator().manual_seed(len(question))
    refs = []
    for width, height in sizes:
        pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        refs.append(ImageRef(Image.fromarray(pixels.numpy()), "p:1: image"))
    return Pair(tuple(refs), question, (), None, "0", "p:1")


PAIRS = (
    pair("what is this ?", (40, 24)),
    pair("is this that ?", (24, 40), (16, 16)),
    pair("what is that ?", (48, 16)),
)
GRIDS = ((Grid(3, 5),), (Grid(5, 3), Grid(2, 2)), (Grid(2, 6),))


def test_a_processor_is_the_stock_class_without_its_video_half(folder: Path, kind: str) -> None:
    processor = load_processor(str(folder))
    stock = getattr(transformers, f"{kind}Processor")
    assert isinstance(processor, stock) and type(processor).__name__ == stock.__name__
    assert processor.chat_template == TEMPLATE and not hasattr(processor, "video_processor")
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved["processor_class"] == stock.__name__


def test_hub_directories_are_loaded(folder: Path, kind: str, tmp_path: Path) -> None:
    """Hub repositories have a file per part, and one for videos that cannot be used here."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    parts = json.loads((folder / "processor_config.json").read_text())
    images = parts["image_processor"] | {"processor_class": f"{kind}Processor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    videos = images | {"video_processor_type": "Qwen2VLVideoProcessor"}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(videos))
    found, usual = (load_processor(str(each)) for each in (tmp_path, folder))
    picture = PAIRS[0].images[0].load()
    made = [each(text="<|image_pad|>", images=[picture]) for each in (found, usual)]
    assert made[0]["input_ids"] == made[1]["input_ids"]
    assert found.image_processor.patch_size == PATCH


def test_a_batch_may_hold_images_of_different_sizes(folder: Path) -> None:
    batch = encode(
        load_processor(str(folder)),
        PAIRS,
        image_token_id=IDS["<|image_pad|>"],
        device="cpu",
        dtype=torch.float32,
        answers=["yes", "no no", ""],
    )
    ids, types = batch.inputs["input_ids"], batch.inputs["mm_token_type_ids"]
    assert ids.shape == types.shape == batch.inputs["attention_mask"].shape
    assert torch.equal(types == 1, ids == IDS["<|image_pad|>"])
    sizes = (batch.inputs["image_grid_thw"][:, 1:] // MERGE).tolist()
    assert [Grid(*size) for size in sizes] == [grid for row in GRIDS for grid in row]
    assert batch.answer_mask.sum(dim=1).tolist() == [1, 2, 0]


def test_pairs_are_measured_planned_and_compared(folder: Path, kind: str) -> None:
    """All of ``yopo calibrate`` after loading."""
    model, processor = make_model(kind), load_processor(str(folder))
    statistics = measure(model, processor, PAIRS, name="tiny", batch_size=2)
    assert statistics.visual_tokens == sum(grid.tokens for row in GRIDS for grid in row)
    assert statistics.rho.shape == (3, 3, 4) and statistics.workload.grids in GRIDS
    records = record_dense(model, processor, PAIRS, batch_size=2, max_new_tokens=3)

    def judge(plan: PruningPlan) -> float:
        with pruned(model, plan):
            return compare(model, records).kl

    plan, candidates = make_plan(statistics, BudgetRequest(0.5), judge)
    assert visual_budget(plan) <= 0.5
    assert all(each.kl > 0 for each in candidates) and len(candidates) > 3


@pytest.mark.parametrize("often", range(len(PAIRS)))
def test_the_usual_pair_has_the_most_common_grids(folder: Path, kind: str, often: int) -> None:
    """This holds across batches, in any order and for grids of any size."""
    model, processor = make_model(kind), load_processor(str(folder))
    pairs = [*PAIRS[:often], PAIRS[often], *PAIRS[often:]]
    statistics = measure(model, processor, pairs, name="tiny", batch_size=3)
    assert statistics.workload.grids == GRIDS[often]


def test_other_missing_files_are_still_errors(folder: Path, tmp_path: Path) -> None:
    for name in ("processor_config.json", "config.json"):  # no tokenizer
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert load_without_videos(str(tmp_path)) is None
    with pytest.raises(ModelError, match="the processor cannot be loaded"):
        load_processor(str(tmp_path))


def test_processors_without_a_video_half_are_not_touched(tmp_path: Path) -> None:
    transformers.LlavaConfig().save_pretrained(tmp_path)
    assert load_without_videos(str(tmp_path)) is None
