"""Score a model's answers to demo pairs, per kind of question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, ProcessorMixin

from yopo.demo.task import DemoPair

_LONG_KINDS = ("description", "grid")


@dataclass(frozen=True)
class KindScore:
    """Scores of one kind; `majority` is what always giving the most common answer would score."""

    kind: str
    num_pairs: int
    accuracy: float
    token_accuracy: float
    majority: float
    mean_tokens: float


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Sequence[DemoPair],
    *,
    batch_size: int = 32,
) -> Iterator[str]:
    """Yield the model's greedy answer to each pair, one user turn per prompt."""
    for start in range(0, len(pairs), batch_size):
        chats = [_chat(pair) for pair in pairs[start : start + batch_size]]
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]  # (pair, new token): padding is on the left
        yield from (text.strip() for text in processor.batch_decode(new, skip_special_tokens=True))


def score(pairs: Sequence[DemoPair], answers: Sequence[str]) -> list[KindScore]:
    """Compare answers with the correct ones, kind by kind, in the order of first appearance."""
    scores = []
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        rows = [(p.answer, a) for p, a in zip(pairs, answers, strict=True) if p.kind == kind]
        tokens = [(_tokens(right), _tokens(given)) for right, given in rows]
        num_tokens = sum(len(right) for right, _ in tokens)
        matches = sum(r == g for right, given in tokens for r, g in zip(right, given, strict=False))
        commonest = Counter(right for right, _ in rows).most_common(1)[0][1]
        scores.append(
            KindScore(
                kind=kind,
                num_pairs=len(rows),
                accuracy=sum(right == given for right, given in rows) / len(rows),
                token_accuracy=matches / num_tokens,
                majority=commonest / len(rows),
                mean_tokens=num_tokens / len(rows),
            )
        )
    return scores


def overall(scores: Sequence[KindScore]) -> float:
    """Return the share of correct answers over all pairs of the short kinds."""
    short = [s for s in scores if s.kind not in _LONG_KINDS]
    return sum(s.accuracy * s.num_pairs for s in short) / sum(s.num_pairs for s in short)


def table(scores: Sequence[KindScore]) -> str:
    """Format scores as a Markdown table; "all short answers" leaves long ones out."""
    lines = [
        "| kind | pairs | accuracy | majority guess | token accuracy | tokens per answer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for s in scores:
        lines.append(
            f"| {s.kind} | {s.num_pairs} | {s.accuracy:.1%} | {s.majority:.1%} "
            f"| {s.token_accuracy:.1%} | {s.mean_tokens:.1f} |"
        )
    num_short = sum(s.num_pairs for s in scores if s.kind not in _LONG_KINDS)
    lines.append(f"| **all short answers** | {num_short} | **{overall(scores):.1%}** | | | |")
    return "\n".join(lines)


def _chat(pair: DemoPair) -> list[dict]:
    content = [{"type": "image", "image": pair.image}, {"type": "text", "text": pair.question}]
    return [{"role": "user", "content": content}]


def _tokens(text: str) -> list[str]:
    """Split into words, commas and periods, as the demo models' tokenizers do."""
    return text.replace(",", " ,").replace(".", " .").split()
