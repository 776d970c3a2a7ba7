"""Translates config.json of an original InternVL checkpoint to the native class's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from yopo.conversion.sections import Section, same
from yopo.support.errors import CheckpointError

ARCHITECTURE = "InternVLForConditionalGeneration"
NORM_EPSILON = 1e-6
"""Epsilon of transformers' norms of the tower's queries and keys, whatever the configuration."""

_OUTER = Section(
    "the outer part",
    required=same("downsample_ratio"),
    fixed={
        "model_type": ("internvl_chat",),
        "ps_version": ("v2",),  # under v1 the shuffled image is transposed
        "select_layer": (-1,),
        "pad2square": (False,),
        "use_backbone_lora": (0,),
        "use_llm_lora": (0,),
        "dynamic_image_size": (True,),
        "use_thumbnail": (True,),
    },
    ignored=frozenset({"template", "system_message", "hidden_size", "num_hidden_layers"}),
    handled=frozenset(
        "vision_config llm_config force_image_size min_dynamic_patch max_dynamic_patch "
        "tie_word_embeddings".split()
    ),
)
_EXPLICIT = ("ps_version", "dynamic_image_size", "use_thumbnail")
"""Required keys: their defaults in the original code differ from what its checkpoints use."""

_VISION = Section(
    "vision_config",
    required=same(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "layer_norm_eps",
        "hidden_act",
        "norm_type",
    )
    | {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"},
    optional=same("num_channels"),
    fixed={"model_type": ("intern_vit_6b",), "norm_type": ("layer_norm", "rms_norm")},
    ignored=frozenset(
        "attention_dropout drop_path_rate dropout initializer_factor initializer_range".split()
    ),
)

_SIZES = same(
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
)
_TOKENS = same("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
_HANDLED = frozenset({"rope_theta", "rope_scaling", "tie_word_embeddings"})

Rope = Callable[[Mapping[str, Any]], dict[str, Any]]
"""llm_config -> rope_parameters."""


@dataclass(frozen=True)
class TextDecoder:
    """The translation of one kind of text decoder.

    Attributes:
        model_type: ``model_type`` of the native configuration.
        section: The known keys of ``llm_config``.
        rope_types: Kinds of ``rope_scaling`` (besides none) -> their translation.
    """

    model_type: str
    section: Section
    rope_types: Mapping[str, Rope]


def _by_factor(kind: str) -> Rope:
    def translate(llm: Mapping[str, Any]) -> dict[str, Any]:
        scaling = _only(llm["rope_scaling"], {"type", "rope_type", "factor"})
        return {"rope_type": kind, "factor": float(scaling["factor"])}

    return translate


def _longrope(llm: Mapping[str, Any]) -> dict[str, Any]:
    scaling = _only(llm["rope_scaling"], {"type", "rope_type", "short_factor", "long_factor"})
    return {
        "rope_type": "longrope",
        "short_factor": scaling["short_factor"],
        "long_factor": scaling["long_factor"],
        "factor": llm["max_position_embeddings"] / llm["original_max_position_embeddings"],
        "original_max_position_embeddings": llm["original_max_position_embeddings"],
        "partial_rotary_factor": 1.0,
    }


def _only(scaling: Mapping[str, Any], known: set[str]) -> Mapping[str, Any]:
    needed = known - {"type", "rope_type"}
    if not needed <= scaling.keys() <= known:
        raise CheckpointError(
            f"config.json: llm_config.rope_scaling has the keys {', '.join(sorted(scaling))}, "
            f"expected {', '.join(sorted(needed))} and a type."
        )
    return scaling


_DYNAMIC = {"dynamic": _by_factor("dynamic")}
_FACTORS = {**_DYNAMIC, "linear": _by_factor("linear")}

DECODERS: dict[str, TextDecoder] = {
    "InternLM2ForCausalLM": TextDecoder(
        "llama",
        Section(
            "llm_config",
            required=_SIZES | {"bias": "attention_bias"},
            optional=_TOKENS,
            fixed={
                "model_type": ("internlm2",),
                "rope_pos_id_version": ("default", None),
                "rope_pos_id_stride": (None,),
            },
            handled=_HANDLED,
        ),
        _FACTORS,
    ),
    "LlamaForCausalLM": TextDecoder(
        "llama",
        Section(
            "llm_config",
            required=_SIZES,
            optional=_TOKENS | same("attention_bias", "mlp_bias", "head_dim"),
            fixed={"model_type": ("llama",)},
            ignored=frozenset({"attention_dropout"}),
            handled=_HANDLED,
        ),
        _FACTORS,
    ),
    "Qwen2ForCausalLM": TextDecoder(
        "qwen2",
        Section(
            "llm_config",
            required=_SIZES,
            optional=_TOKENS,
            fixed={"model_type": ("qwen2",), "use_sliding_window": (False,)},
            ignored=frozenset(
                {"attention_dropout", "sliding_window", "max_window_layers", "layer_types"}
            ),
            handled=_HANDLED,
        ),
        _DYNAMIC,
    ),
    "Phi3ForCausalLM": TextDecoder(
        "phi3",
        Section(
            "llm_config",
            required=_SIZES | same("original_max_position_embeddings"),
            optional=_TOKENS | same("sliding_window"),
            fixed={"model_type": ("phi3",), "attention_bias": (False,)},
            ignored=frozenset({"attention_dropout", "embd_pdrop", "resid_pdrop"}),
            handled=_HANDLED,
        ),
        {"su": _longrope, "longrope": _longrope},
    ),
}
"""Class of the original text decoder -> its translation."""


def decoder_of(raw: Mapping[str, Any]) -> TextDecoder:
    """The translation of a checkpoint's text decoder.

    Raises:
        CheckpointError: Its kind is unknown.
    """
    found = ((raw.get("llm_config") or {}).get("architectures") or ["nothing"])[0]
    if found not in DECODERS:
        raise CheckpointError(
            f"config.json: the text decoder {found} cannot be converted "
            f"(only {', '.join(sorted(DECODERS))})."
        )
    return DECODERS[found]


def translate(raw: Mapping[str, Any], image_token_id: int) -> dict[str, Any]:
    """The native configuration, as keyword arguments of ``InternVLConfig``.

    Args:
        raw: config.json of the original checkpoint.
        image_token_id: Id of the placeholder, from the tokenizer.

    Raises:
        CheckpointError: Something in it is unknown or cannot be expressed natively.
    """
    for key in _EXPLICIT:
        if key not in raw:
            raise CheckpointError(f"config.json: lacks '{key}'.")
    decoder = decoder_of(raw)
    outer = _OUTER.translate(raw)
    vision, text = _vision(raw), _text(raw["llm_config"], decoder)
    patches = vision["image_size"] // vision["patch_size"]
    side = patches * outer["downsample_ratio"]
    if side != int(side) or 1 / outer["downsample_ratio"] % 1:
        raise CheckpointError(
            f"config.json: {patches} x {patches} patches cannot be shuffled by downsample_ratio "
            f"{outer['downsample_ratio']}."
        )
    config = {
        "architectures": [ARCHITECTURE],
        "text_config": text,
        "vision_config": vision,
        "image_token_id": image_token_id,
        "image_seq_length": int(side) ** 2,
        "tie_word_embeddings": text["tie_word_embeddings"],
        **outer,
    }
    dtype = raw.get("torch_dtype") or raw.get("dtype")
    return config | ({"dtype": dtype} if dtype else {})


def _vision(raw: Mapping[str, Any]) -> dict[str, Any]:
    vision = _VISION.translate(raw.get("vision_config") or {})
    forced = raw.get("force_image_size")
    if forced not in (None, vision["image_size"]):
        raise CheckpointError(
            f"config.json: force_image_size is {forced}, but the tower has position embeddings "
            f"for {vision['image_size']} pixels."
        )
    if vision["use_qk_norm"] and vision["layer_norm_eps"] != NORM_EPSILON:
        raise CheckpointError(
            f"config.json: vision_config.layer_norm_eps is {vision['layer_norm_eps']}, but "
            f"transformers norms the tower's queries and keys with {NORM_EPSILON}."
        )
    return vision


def _text(llm: Mapping[str, Any], decoder: TextDecoder) -> dict[str, Any]:
    text = decoder.section.translate(llm)
    rope: dict[str, Any] = {"rope_type": "default"}
    scaling = llm.get("rope_scaling")
    if scaling:
        kinds = {scaling[key] for key in ("type", "rope_type") if key in scaling}
        if len(kinds) != 1 or not kinds <= decoder.rope_types.keys():
            raise CheckpointError(
                f"config.json: llm_config.rope_scaling is of type "
                f"{' and '.join(map(str, sorted(kinds, key=str))) or 'None'}, which cannot be "
                f"converted for this decoder (only {', '.join(decoder.rope_types)})."
            )
        rope = decoder.rope_types[kinds.pop()](llm)
    text["rope_parameters"] = rope | {"rope_theta": float(text.pop("rope_theta"))}
    text["model_type"] = decoder.model_type
    text["tie_word_embeddings"] = bool(llm.get("tie_word_embeddings", False))
    return text
