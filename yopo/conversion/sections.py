"""Translates a section of a configuration key by key, refusing unknown keys.

A silently dropped key may change what the model computes. So each one is either carried over under
its new name, or must have the value that changes nothing, or is known not to affect the numbers at
all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from yopo.support.errors import CheckpointError

BOILERPLATE = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache use_flash_attn
    """.split()
)
"""Keys in every configuration of transformers 4: training, generation, bookkeeping."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "pruned_heads": ({}, [], None),
    "moe_config": (None,),
    "use_moe": (False,),
}
"""Keys of any section, and the values that change nothing."""

MOE = frozenset(
    """
    capacity_factor eval_capacity_factor laux_allreduce moe_coeff_ratio moe_intermediate_size
    moe_output_scale noisy_gate_policy num_experts num_routed_experts num_shared_experts
    shared_expert_intermediate_size use_residual use_rts use_weighted_residual
    """.split()
)
"""Keys that the original code only reads under ``use_moe``."""


@dataclass(frozen=True)
class Section:
    """The known keys of a section.

    Attributes:
        name: Its path in config.json, for messages.
        required: Old key -> new key, without a default: a checkpoint must set these.
        optional: Old key -> new key, carried over if present.
        fixed: Key -> the values for which the result computes the same.
        ignored: Further keys that do not affect the numbers.
        handled: Keys that the caller translates.
    """

    name: str
    required: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    handled: frozenset[str] = frozenset()

    def translate(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The new keys and values of a section.

        Raises:
            CheckpointError: A required key is missing, a value is not supported, or a key is
                unknown.
        """
        for key in self.required:
            if raw.get(key) is None:
                raise CheckpointError(f"config.json: {self.name} lacks '{key}'.")
        names = {**self.required, **self.optional}
        fixed = {**NEUTRAL, **self.fixed}
        known = {*names, *fixed, *self.ignored, *self.handled, *BOILERPLATE, *MOE}
        for key, value in raw.items():
            if key in fixed and value not in fixed[key]:
                raise CheckpointError(
                    f"config.json: {self.name}.{key} is {value!r}, which cannot be converted "
                    f"(only {' or '.join(map(repr, fixed[key]))})."
                )
            if key not in known:
                raise CheckpointError(
                    f"config.json: {self.name}.{key} is unknown, and it might change what the "
                    "model computes.",
                    remedy="Remove the key if you are sure that it does not.",
                )
        return {new: raw[old] for old, new in names.items() if old in raw}


def same(*names: str) -> dict[str, str]:
    """Keys that keep their names."""
    return {name: name for name in names}
