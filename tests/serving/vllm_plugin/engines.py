"""Engines under test, and what they are compared with: ``yopo.load`` in transformers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from PIL import Image
from torch import nn
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import yopo

TOKENS = 6
"""Tokens of every answer."""

Prompt = tuple[str, list[Image.Image]]
Answer = tuple[list[int], torch.Tensor]
"""Tokens, and (tokens, vocabulary) log-probabilities in float64."""


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    """An engine in this process, in float32."""
    usual = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_logprobs": -1,
        "max_num_seqs": 8,
        "block_size": 32,
        "disable_log_stats": True,
        "limit_mm_per_prompt": {"image": 3, "video": 0},
    }
    llm = LLM(str(folder), **(usual | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(llm: LLM, prompts: Sequence[Prompt], tokens: int = TOKENS) -> list[Answer]:
    """Greedy answers of an engine, all requests at once."""
    wanted = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, logprobs=-1)
    requests = [
        {"prompt": text} | ({"multi_modal_data": {"image": images}} if images else {})
        for text, images in prompts
    ]
    found = []
    for output in llm.generate(requests, wanted, use_tqdm=False):
        answer = output.outputs[0]
        rows = [[row[token].logprob for token in range(len(row))] for row in answer.logprobs]
        found.append((list(answer.token_ids), torch.tensor(rows, dtype=torch.float64)))
    return found


@dataclass(frozen=True)
class Reference:
    """What transformers computes for some prompts.

    Attributes:
        usual: In float32.
        oracle: In float64.
    """

    usual: list[Answer]
    oracle: list[Answer]

    @classmethod
    def of(
        cls,
        folder: Path,
        prompts: Sequence[Prompt],
        *,
        dense: bool = False,
        budget: float | None = None,
    ) -> Reference:
        """Run a checkpoint on prompts, one at a time."""
        found = []
        for dtype in (torch.float32, torch.float64):
            if dense:
                stock = transformers.AutoModelForImageTextToText
                model = stock.from_pretrained(folder, dtype=dtype)
            else:
                model = yopo.load(folder, dtype=dtype, budget=budget)
            found.append(generated(model, folder, prompts))
        return cls(*found)

    @property
    def rounding(self) -> float:
        """The error of ordinary float32 code."""
        return max(
            (one - exact).abs().max().item()
            for (_, one), (_, exact) in zip(self.usual, self.oracle, strict=True)
        )

    def check(self, found: Sequence[Answer], names: Sequence[int] | None = None) -> None:
        """Check an engine's answers, of these prompts by number.

        Tokens may part only where the oracle's best two are closer than rounding errors.
        """
        tolerance = tiny.ROUNDING_FACTOR * self.rounding
        for number, (tokens, scores) in zip(names or range(len(found)), found, strict=True):
            wanted, exact = self.oracle[number]
            for step, (token, right) in enumerate(zip(tokens, wanted, strict=True)):
                error = (scores[step] - exact[step]).abs().max().item()
                assert error <= tolerance, f"prompt {number}, step {step}: off by {error:.2e}"
                if token != right:
                    best = exact[step].topk(2).values
                    assert best[0] - best[1] <= 2 * tolerance, f"prompt {number}, step {step}"
                    break

    def distance(self, other: Reference) -> float:
        """How far the first log-probabilities of two models are apart, on the nearest prompt."""
        return min(
            (one[0] - two[0]).abs().max().item()
            for (_, one), (_, two) in zip(self.oracle, other.oracle, strict=True)
        )


def generated(model: Any, folder: Path, prompts: Sequence[Prompt]) -> list[Answer]:
    """Greedy answers of transformers, one prompt at a time."""
    if model.dtype is torch.float64:
        _round_nothing(model)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    found = []
    for text, images in prompts:
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        inputs = tiny.as_dtype(dict(inputs), model.dtype)
        run = model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = run.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        found.append((tokens, torch.cat(run.logits).double().log_softmax(-1)))
    return found


def _round_nothing(model: nn.Module) -> None:
    """Norms in float64 (transformers' compute in float32)."""
    for module in list(model.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
