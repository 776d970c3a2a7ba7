"""Reductions of ``yopo.reduction`` as baselines: dense layers over fewer tokens.

The methods are those that the reduction's own page describes; here they run alone, before stock
layers. Kept tokens keep their positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from yopo.baselines.baseline import Baseline
from yopo.baselines.prefill import Prompt
from yopo.baselines.reduction import Reduction
from yopo.models.family import Family
from yopo.models.reduced import Chosen, choose
from yopo.models.tower_attention import attention_path
from yopo.plans.flops import flops_of_reduction
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, Workload
from yopo.reduction.method import Method
from yopo.reduction.registry import make_method
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class TokenReduction(Baseline):
    """A share of every image's tokens, chosen by a method.

    Attributes:
        share: The share kept of every image, at least one token.
        method: The method's name in the registry of reductions.
    """

    share: float = 1.0

    method: ClassVar[str]

    @property
    def made(self) -> Method:
        """The method."""
        return make_method(self.method, self.share)

    @classmethod
    def choices(cls, shape: ModelShape, workload: Workload) -> Iterable[Self]:
        """Every number of tokens of the largest image."""
        largest = max(grid.tokens for grid in workload.grids)
        return (cls(count / largest) for count in range(1, largest + 1))

    def tokens(self, shape: ModelShape, grids: Sequence[Grid]) -> tuple[int, ...]:
        """The kept tokens, in every layer."""
        made = self.made
        return (sum(made.count((each.rows, each.cols)) for each in grids),) * shape.layers

    def extra_flops(self, shape: ModelShape, workload: Workload) -> int:
        """Choosing and mixing tokens, for a question of all text after the last image."""
        return flops_of_reduction(self.made, shape, workload)

    def describe(self, shape: ModelShape, workload: Workload) -> str:
        """The share."""
        return f"R = {100 * self.share:.1f} %"

    def check_model(self, model: PreTrainedModel, family: Family) -> None:
        """Check that a regular grid meets no separators between rows.

        Raises:
            ModelError: The family puts newline tokens into its images.
        """
        if self.method == "grid" and family.ends_rows(model.config):
            raise ModelError(
                f"{family.name} ends image rows with newline tokens, which a coarser grid cannot "
                "place.",
                remedy="Compare with methods that choose single tokens, such as divprune.",
            )

    def tower_attention(self, family: Family, config: PreTrainedConfig) -> str | None:
        """That of the class token, if the method ranks tokens by it."""
        return attention_path(self.made, family, config)

    def reduce(
        self, prompt: Prompt, embeds: torch.Tensor, positions: torch.Tensor
    ) -> Reduction | None:
        """Choose tokens; they keep their positions.

        Raises:
            ModelError: The rows of the batch would keep different numbers of tokens.
        """
        rows = choose(self.made, prompt.layout, embeds, prompt.ends, prompt.real)
        if rows is None:
            return None
        kept = [torch.cat([each.start + each.kept for each in row]) for row in rows]
        if len({len(each) for each in kept}) > 1:
            raise ModelError(
                f"{self.name} would keep {min(map(len, kept))} to {max(map(len, kept))} tokens "
                "per row, and a baseline needs the same number in all rows.",
                remedy="Use batches of one prompt.",
            )
        return Reduction(torch.stack(kept), _Mix(rows) if self.made.mixes else None)


@dataclass(frozen=True)
class _Mix:
    """Computes the features of kept tokens from those of all."""

    rows: list[list[Chosen]]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, visual, width) to (batch, kept, width)."""
        return torch.stack(
            [
                torch.cat([each.features(values) for each in row])
                for row, values in zip(self.rows, features, strict=True)
            ]
        )


class ParTokens(TokenReduction):
    """Tokens that match the prompt and do not repeat each other."""

    name = method = "par"
    label = "PAR (re-implemented)"
    source = "arXiv 2410.07278"


class DivPruneTokens(TokenReduction):
    """Tokens far from each other."""

    name = method = "divprune"
    label = "DivPrune"
    source = "arXiv 2503.02175"


class CDPrunerTokens(TokenReduction):
    """Tokens of the largest determinant, relevance to the prompt included."""

    name = method = "cdpruner"
    label = "CDPruner"
    source = "arXiv 2506.10967"


class ScopeTokens(TokenReduction):
    """Tokens that cover the others and that the tower attends to."""

    name = method = "scope"
    label = "SCOPE"
    source = "arXiv 2510.24214"


class PruMergeTokens(TokenReduction):
    """The tower's most attended tokens, which take in their neighbors."""

    name = method = "prumerge"
    label = "PruMerge"
    source = "arXiv 2403.15388"


class PruMergePlusTokens(TokenReduction):
    """The same, half of them spread evenly over the image."""

    name = method = "prumerge+"
    label = "PruMerge+"
    source = "arXiv 2403.15388"


class FolderTokens(TokenReduction):
    """Merged tokens."""

    name = method = "folder"
    label = "FOLDER"
    source = "arXiv 2501.02430"


class GridTokens(TokenReduction):
    """A coarser grid at the original positions."""

    name = method = "grid"
    label = "regular grid"
    source = "arXiv 2510.07143"
