"""The user's settings of a processor change what the model sees, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import ProcessorMixin

from yopo.data.processor_options import parsed, with_options
from yopo.data.prompts import load_processor
from yopo.demo import INTERNVL_TINY, LLAVA_TINY, QWEN2_VL_TINY
from yopo.support.errors import ModelError

SIDE = 96


def image_tokens(processor: ProcessorMixin) -> int:
    """Visual tokens of one picture."""
    token = processor.image_token
    made = processor(text=[token], images=[[Image.new("RGB", (SIDE, SIDE))]], return_tensors="pt")
    return int((made["input_ids"] == processor.image_token_id).sum())


@pytest.mark.parametrize("place", [QWEN2_VL_TINY, INTERNVL_TINY], ids=["qwen", "internvl"])
def test_fewer_pixels_are_fewer_tokens(place: Path) -> None:
    processor = load_processor(str(place))
    before = image_tokens(processor)
    fewer = with_options(processor, {"min_pixels": 1, "max_pixels": SIDE**2 // 4}, "m")
    assert image_tokens(fewer) < before
    assert image_tokens(processor) == before, "the caller's processor is unchanged"
    assert with_options(processor, {}, "m") is processor


def test_other_settings_are_set_by_name() -> None:
    processor = load_processor(str(INTERNVL_TINY))
    one = with_options(processor, {"max_patches": 1}, "m")
    assert image_tokens(one) < image_tokens(processor)
    small = with_options(
        load_processor(str(QWEN2_VL_TINY)),
        dict([parsed('size={"shortest_edge": 144, "longest_edge": 2304}')]),
        "m",
    )
    assert image_tokens(small) == 2304 // 12**2


@pytest.mark.parametrize(
    ("place", "options", "sentence"),
    [
        (LLAVA_TINY, {"max_pixels": 100}, "m: its processor (CLIPImageProcessor"),
        (QWEN2_VL_TINY, {"max_pixels": 0}, "must be positive whole numbers"),
        (QWEN2_VL_TINY, {"max_pixels": 5}, "smallest size of an image (2304) is larger than"),
        (INTERNVL_TINY, {"max_patchs": 5}, "m: the processor has no option 'max_patchs'."),
        (INTERNVL_TINY, {"max_patches": "many"}, "max_patches must be like 4, found 'many'"),
        (INTERNVL_TINY, {"max_patches": True}, "max_patches must be like 4, found True"),
    ],
)
def test_settings_that_a_processor_does_not_have_are_refused(
    place: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ModelError) as caught:
        with_options(load_processor(str(place)), options, "m")
    assert sentence in caught.value.message and caught.value.remedy


def test_options_are_parsed_as_json_where_they_are_json() -> None:
    assert parsed("a=3") == ("a", 3)
    assert parsed("a=true") == ("a", True)
    assert parsed("a=x=y") == ("a", "x=y")
    with pytest.raises(ModelError, match="must look like max_patches=6, found 'a'"):
        parsed("a")
