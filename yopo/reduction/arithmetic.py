"""Tensor functions that several methods share; float32 or better whatever the model's dtype."""

from __future__ import annotations

import torch

from yopo.reduction.method import Question, Selection


def precise(values: torch.Tensor) -> torch.Tensor:
    """Values in at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(values: torch.Tensor) -> torch.Tensor:
    """(..., width) vectors of length 1 in at least float32; those of length 0 remain."""
    values = precise(values)
    return values / values.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def similarity(features: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs of tokens: (images, tokens, width) to (images, tokens, tokens)."""
    units = unit(features)
    return units @ units.transpose(1, 2)


def scaled(values: torch.Tensor) -> torch.Tensor:
    """(images, tokens) values moved and scaled to [0, 1] per image; 1 where all are equal."""
    least, most = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    spread = most - least
    return torch.where(spread > 0, (values - least) / spread.clamp(min=1e-30), 1.0)


def relevance(units: torch.Tensor, question: Question) -> torch.Tensor:
    """Mean cosine of each token to the question: (images, tokens).

    Args:
        units: (images, tokens, width) of length 1.
        question: Its weights say how much each word counts.
    """
    cosines = unit(question.embeds).to(units) @ units.transpose(1, 2)
    weights = question.weights.to(units)
    total = (cosines * weights[..., None]).sum(dim=1)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)


def pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(images, tokens) values at one index per image: (images,)."""
    return values.gather(1, index[:, None])[:, 0]


def row(matrix: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(images, tokens, tokens) rows at one index per image: (images, tokens)."""
    return matrix[torch.arange(len(matrix), device=matrix.device), index]


def ascending(chosen: list[torch.Tensor]) -> torch.Tensor:
    """The order in which tokens were chosen, (images,) each, to (images, kept) ascending."""
    return torch.stack(chosen, dim=1).sort(dim=1).values


def best(values: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens of the largest values, (images, count) ascending; of equals, the first."""
    order = values.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def means(kept: torch.Tensor, into: torch.Tensor) -> Selection:
    """Kept tokens that become the mean of themselves and the tokens that join them.

    Args:
        kept: (images, kept) int64, ascending.
        into: (images, tokens) int64, for each token the place among ``kept`` of the one that it
            joins; -1: it is dropped.
    """
    place = torch.arange(kept.shape[1], device=kept.device)
    members = (into[:, None, :] == place[None, :, None]).float()
    return Selection(kept, members / members.sum(dim=2, keepdim=True))
