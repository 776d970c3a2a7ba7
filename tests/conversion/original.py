"""Tiny checkpoints as OpenGVLab writes them, and the computation of the original code.

The formulas are those of the original remote code (InternViT, pixel shuffle v2, mlp1, InternLM2
with its interleaved wqkv, Phi-3 with fused projections), in float64 and without
transformers' classes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import conv2d, gelu, layer_norm, linear, silu

CONTEXT, END = 90, 91
TILE, PATCH = 24, 4
SIDE = TILE // PATCH // 2
LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 2, 4, 2, 8, 40, 100
HIDDEN = HEADS * HEAD_DIM
TOWER = 16

Tensors = dict[str, torch.Tensor]

BOILERPLATE = {
    "add_cross_attention": False,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "do_sample": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "max_length": 20,
    "pruned_heads": {},
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "torchscript": False,
    "transformers_version": "4.37.2",
    "use_bfloat16": True,
    "use_cache": True,
}

LLM = {
    "attn_implementation": "flash_attention_2",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "max_position_embeddings": 256,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    **BOILERPLATE,
}

DECODERS: dict[str, dict[str, Any]] = {
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "pretraining_tp": 1,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    },
    "internlm2-bias": {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": True,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "original_max_position_embeddings": 64,
        "sliding_window": 262144,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.0, 2.0, 4.0, 9.0],
        },
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "sliding_window": 32768,
        "max_window_layers": 21,
        "use_sliding_window": False,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
    },
}

VISIONS: dict[str, dict[str, Any]] = {
    "vit-300m": {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},
    "vit-6b": {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False},
}

TEMPLATES = {"phi3": "phi3-chat", "qwen2": "Hermes-2", "llama": "internvl2_5"}


def raw_config(decoder: str, vision: str) -> dict[str, Any]:
    """Return config.json of an original checkpoint."""
    return {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "llm_config": {**LLM, **DECODERS[decoder]},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": TEMPLATES.get(decoder, "internlm2-chat"),
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": TOWER,
            "image_size": TILE,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": 24,
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_hidden_layers": 2,
            "output_attentions": False,
            "patch_size": PATCH,
            "return_dict": True,
            "use_flash_attn": True,
            **VISIONS[vision],
        },
    }


@dataclass
class Original:
    """A checkpoint with random weights."""

    config: dict[str, Any]
    tensors: Tensors

    @classmethod
    def make(cls, decoder: str = "internlm2", vision: str = "vit-300m") -> Original:
        config = raw_config(decoder, vision)
        generator = torch.Generator().manual_seed(5)
        shapes = _vision_shapes(config["vision_config"]) | _text_shapes(config["llm_config"])
        tensors = {}
        for name, shape in shapes.items():
            tensors[name] = 0.3 * torch.randn(shape, generator=generator)
            if "norm" in name and name.endswith("weight") or name.endswith(("ls1", "ls2")):
                tensors[name] += 1.0
        return cls(config, tensors)

    def save(
        self, path: Path, *, sharded: bool = False, dtype: torch.dtype = torch.float32
    ) -> Path:
        """Write it in the layout of a hub repository."""
        path.mkdir()
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        (path / "config.json").write_text(json.dumps(self.config))
        (path / "added_tokens.json").write_text(
            json.dumps({"<IMG_CONTEXT>": CONTEXT, "<|im_end|>": END, "<|end|>": END + 1})
        )
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "InternLM2Tokenizer"}')
        (path / "tokenizer.model").write_bytes(b"pieces")
        (path / "modeling_internvl_chat.py").write_text("raise ImportError")
        (path / "README.md").write_text("---\nlicense: mit\n---\n")
        if not sharded:
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
            return path
        names, weight_map = list(tensors), {}
        for number in range(3):
            file = f"model-0000{number + 1}-of-00003.safetensors"
            save_file({name: tensors[name] for name in names[number::3]}, path / file)
            weight_map |= {name: file for name in names[number::3]}
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path

    def logits(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Compute (batch, sequence, vocabulary) logits in float64."""
        tensors = {name: tensor.double() for name, tensor in self.tensors.items()}
        features = _features(self.config, tensors, pixels.double())
        return _decode(self.config["llm_config"], tensors, ids, features)


def _vision_shapes(vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    wide, shuffled = vision["intermediate_size"], 4 * TOWER
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, TOWER),
        "vision_model.embeddings.patch_embedding.weight": (TOWER, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (TOWER,),
        "vision_model.embeddings.position_embedding": (1, (TILE // PATCH) ** 2 + 1, TOWER),
        "mlp1.0.weight": (shuffled,),
        "mlp1.0.bias": (shuffled,),
        "mlp1.1.weight": (HIDDEN, shuffled),
        "mlp1.1.bias": (HIDDEN,),
        "mlp1.3.weight": (HIDDEN, HIDDEN),
        "mlp1.3.bias": (HIDDEN,),
    }
    layer = {
        "attn.qkv.weight": (3 * TOWER, TOWER),
        "attn.proj.weight": (TOWER, TOWER),
        "attn.proj.bias": (TOWER,),
        "norm1.weight": (TOWER,),
        "norm2.weight": (TOWER,),
        "ls1": (TOWER,),
        "ls2": (TOWER,),
        "mlp.fc1.weight": (wide, TOWER),
        "mlp.fc1.bias": (wide,),
        "mlp.fc2.weight": (TOWER, wide),
        "mlp.fc2.bias": (TOWER,),
    }
    if vision["qkv_bias"]:
        layer["attn.qkv.bias"] = (3 * TOWER,)
    if vision["qk_normalization"]:
        layer |= {"attn.q_norm.weight": (TOWER,), "attn.k_norm.weight": (TOWER,)}
    if vision["norm_type"] == "layer_norm":
        layer |= {"norm1.bias": (TOWER,), "norm2.bias": (TOWER,)}
    for number in range(vision["num_hidden_layers"]):
        prefix = f"vision_model.encoder.layers.{number}."
        shapes |= {prefix + name: shape for name, shape in layer.items()}
    return shapes


def _text_shapes(llm: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    kind, kv = llm["model_type"], KV_HEADS * HEAD_DIM
    if kind == "internlm2":
        top = {"model.tok_embeddings.weight", "output.weight"}
        layer = {
            "attention.wqkv.weight": (HIDDEN + 2 * kv, HIDDEN),
            "attention.wo.weight": (HIDDEN, HIDDEN),
            "feed_forward.w1.weight": (FFN, HIDDEN),
            "feed_forward.w3.weight": (FFN, HIDDEN),
            "feed_forward.w2.weight": (HIDDEN, FFN),
            "attention_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
        }
        if llm["bias"]:
            layer |= {"attention.wqkv.bias": (HIDDEN + 2 * kv,), "attention.wo.bias": (HIDDEN,)}
    else:
        top = {"model.embed_tokens.weight", "lm_head.weight"}
        layer = {
            "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, FFN),
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
        }
        if kind == "phi3":
            layer["self_attn.qkv_proj.weight"] = (HIDDEN + 2 * kv, HIDDEN)
            layer["mlp.gate_up_proj.weight"] = (2 * FFN, HIDDEN)
        else:
            layer |= {f"mlp.{part}_proj.weight": (FFN, HIDDEN) for part in ("gate", "up")}
            for part, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
                layer[f"self_attn.{part}_proj.weight"] = (rows, HIDDEN)
                if kind == "qwen2":
                    layer[f"self_attn.{part}_proj.bias"] = (rows,)
    shapes = dict.fromkeys(sorted(top), (VOCABULARY, HIDDEN)) | {"model.norm.weight": (HIDDEN,)}
    for number in range(LAYERS):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {f"language_model.{name}": shape for name, shape in shapes.items()}


def _rms(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)


def _features(config: dict[str, Any], tensors: Tensors, pixels: torch.Tensor) -> torch.Tensor:
    """Run the tower, the pixel shuffle and mlp1: (tiles, tokens, hidden)."""
    vision, take = config["vision_config"], tensors.__getitem__
    name = "vision_model.embeddings."
    patches = conv2d(
        pixels,
        take(name + "patch_embedding.weight"),
        take(name + "patch_embedding.bias"),
        stride=PATCH,
    )
    patches = patches.flatten(2).transpose(1, 2)
    classes = take(name + "class_embedding").expand(len(pixels), 1, -1)
    states = torch.cat([classes, patches], dim=1) + take(name + "position_embedding")
    for number in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{number}."
        own = {key.removeprefix(layer): value for key, value in tensors.items() if layer in key}
        states = states + own["ls1"] * _tower_attention(
            vision, own, _tower_norm(vision, own, 1, states)
        )
        inner = _tower_norm(vision, own, 2, states)
        inner = gelu(linear(inner, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        states = states + own["ls2"] * linear(inner, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    side = TILE // PATCH
    grid = states[:, 1:].reshape(len(pixels), side, side, TOWER)
    grid = grid.view(len(pixels), side, side // 2, 2 * TOWER).permute(0, 2, 1, 3).contiguous()
    grid = grid.view(len(pixels), side // 2, side // 2, 4 * TOWER).permute(0, 2, 1, 3)
    flat = grid.reshape(len(pixels), -1, 4 * TOWER)
    flat = layer_norm(flat, flat.shape[-1:], take("mlp1.0.weight"), take("mlp1.0.bias"), 1e-5)
    flat = gelu(linear(flat, take("mlp1.1.weight"), take("mlp1.1.bias")))
    return linear(flat, take("mlp1.3.weight"), take("mlp1.3.bias"))


def _tower_norm(
    vision: dict[str, Any], own: Tensors, number: int, states: torch.Tensor
) -> torch.Tensor:
    weight, epsilon = own[f"norm{number}.weight"], vision["layer_norm_eps"]
    if vision["norm_type"] == "rms_norm":
        return _rms(states, weight, epsilon)
    return layer_norm(states, weight.shape, weight, own[f"norm{number}.bias"], epsilon)


def _tower_attention(vision: dict[str, Any], own: Tensors, states: torch.Tensor) -> torch.Tensor:
    heads = vision["num_attention_heads"]
    fused = linear(states, own["attn.qkv.weight"], own.get("attn.qkv.bias"))
    batch, length, _ = states.shape
    parts = fused.reshape(batch, length, 3, heads, TOWER // heads).permute(2, 0, 3, 1, 4)
    queries, keys, values = parts.unbind(0)
    if vision["qk_normalization"]:
        queries, keys = (
            _rms(each.transpose(1, 2).flatten(-2), own[f"attn.{part}_norm.weight"], 1e-6)
            .view(batch, length, heads, -1)
            .transpose(1, 2)
            for part, each in (("q", queries), ("k", keys))
        )
    weights = (queries * (TOWER // heads) ** -0.5 @ keys.transpose(-2, -1)).softmax(dim=-1)
    mixed = (weights @ values).transpose(1, 2).reshape(batch, length, TOWER)
    return linear(mixed, own["attn.proj.weight"], own["attn.proj.bias"])


def _decode(
    llm: dict[str, Any], tensors: Tensors, ids: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    is_internlm = llm["model_type"] == "internlm2"
    first, last = ("tok_embeddings", "output") if is_internlm else ("embed_tokens", "lm_head")
    embeddings = tensors[f"language_model.model.{first}.weight"]
    states = embeddings[ids]
    states[ids == CONTEXT] = features.reshape(-1, HIDDEN)
    norms = ("attention_norm", "ffn_norm")
    norms = norms if is_internlm else ("input_layernorm", "post_attention_layernorm")
    rotary, epsilon = _rotary(llm, ids.shape[1]), llm["rms_norm_eps"]
    for number in range(LAYERS):
        layer = f"language_model.model.layers.{number}."
        own = {key.removeprefix(layer): value for key, value in tensors.items() if layer in key}
        normed = _rms(states, own[f"{norms[0]}.weight"], epsilon)
        states = states + _attention(llm, own, normed, rotary)
        states = states + _ffn(llm, own, _rms(states, own[f"{norms[1]}.weight"], epsilon))
    states = _rms(states, tensors["language_model.model.norm.weight"], epsilon)
    head = embeddings if llm["tie_word_embeddings"] else tensors[f"language_model.{last}.weight"]
    return linear(states, head)


def _rotary(llm: dict[str, Any], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (length, head_dim) cosines and sines; angles are float32, as in the original code."""
    base, scaling, factor = llm["rope_theta"], llm["rope_scaling"] or {}, 1.0
    scale, most = torch.ones(HEAD_DIM // 2), llm["max_position_embeddings"]
    if scaling.get("type") == "dynamic" and length > most:
        stretch = scaling["factor"] * length / most - (scaling["factor"] - 1)
        base = base * stretch ** (HEAD_DIM / (HEAD_DIM - 2))
    elif scaling.get("type") == "su":
        short = llm["original_max_position_embeddings"]
        scale = torch.tensor(scaling["long_factor" if length > short else "short_factor"])
        factor = math.sqrt(1 + math.log(most / short) / math.log(short))
    inverse = 1.0 / (scale * base ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))
    step = scaling["factor"] if scaling.get("type") == "linear" else 1.0
    angles = torch.outer(torch.arange(length).float() / step, inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * factor).double(), (angles.sin() * factor).double()


def _rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    left, right = states.chunk(2, dim=-1)
    return states * rotary[0] + torch.cat([-right, left], dim=-1) * rotary[1]


def _attention(
    llm: dict[str, Any],
    own: Tensors,
    states: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    batch, length, _ = states.shape
    group = HEADS // KV_HEADS
    if llm["model_type"] == "internlm2":
        fused = linear(states, own["attention.wqkv.weight"], own.get("attention.wqkv.bias"))
        fused = fused.view(batch, length, KV_HEADS, group + 2, HEAD_DIM)
        queries = fused[..., :group, :].reshape(batch, length, HEADS, HEAD_DIM)
        keys, values = fused[..., -2, :], fused[..., -1, :]
        output = own["attention.wo.weight"], own.get("attention.wo.bias")
    elif llm["model_type"] == "phi3":
        fused = linear(states, own["self_attn.qkv_proj.weight"]).unflatten(-1, (-1, HEAD_DIM))
        queries, keys, values = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        output = own["self_attn.o_proj.weight"], None
    else:
        queries, keys, values = (
            linear(
                states, own[f"self_attn.{part}_proj.weight"], own.get(f"self_attn.{part}_proj.bias")
            ).unflatten(-1, (-1, HEAD_DIM))
            for part in "qkv"
        )
        output = own["self_attn.o_proj.weight"], None
    queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))
    queries, keys = _rotate(queries, rotary), _rotate(keys, rotary)
    keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(HEAD_DIM)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
    return linear((weights @ values).transpose(1, 2).flatten(2), *output)


def _ffn(llm: dict[str, Any], own: Tensors, states: torch.Tensor) -> torch.Tensor:
    if llm["model_type"] == "internlm2":
        names = [f"feed_forward.w{number}.weight" for number in (1, 3, 2)]
        gate, up = (linear(states, own[name]) for name in names[:2])
        return linear(silu(gate) * up, own[names[2]])
    if llm["model_type"] == "phi3":
        gate, up = linear(states, own["mlp.gate_up_proj.weight"]).chunk(2, dim=-1)
    else:
        gate, up = (linear(states, own[f"mlp.{part}_proj.weight"]) for part in ("gate", "up"))
    return linear(silu(gate) * up, own["mlp.down_proj.weight"])
