"""The interface of a token reduction: one class with everything specific to its method.

A method chooses, from the projected tokens of one image and perhaps the question, the tokens that
the decoder gets; some also mix the features of others into them. A subclass is a frozen dataclass
whose fields are the method's parameters. No torch at run time: plans are read without it, so
methods import it where they compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    import torch

_ROUNDING = 1e-6

Sides = tuple[int, int]
"""Rows and columns of an image."""


@dataclass(frozen=True)
class Question:
    """The text that follows the last image, as far as the prompt goes, in embeddings.

    Attributes:
        embeds: (images, words, width), input embeddings of the language model.
        weights: (images, words) float32, 0 on padding.
        ids: (images, words) int64; None where the caller passed embeddings.
    """

    embeds: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor | None = None


@dataclass(frozen=True)
class Images:
    """Images of one size, of one prompt or several.

    Attributes:
        features: (images, tokens, width), projected tokens in row-major order.
        sides: Their rows and columns.
        question: For methods that read the prompt; None: there is no text.
        attention: (images, tokens) float32, the attention that the vision tower pays to each
            token, 1 in sum; None unless a method needs it.
        numbers: The place of each image among those of its prompt.
    """

    features: torch.Tensor
    sides: Sides
    question: Question | None = None
    attention: torch.Tensor | None = None
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Selection:
    """The choice of a method.

    Attributes:
        kept: (images, kept) int64, ascending: the tokens whose places remain.
        mixing: (images, kept, tokens) float32, by which the kept tokens' features are made of
            those of all tokens; None: they keep their own.
    """

    kept: torch.Tensor
    mixing: torch.Tensor | None = None


@dataclass(frozen=True)
class Method(ABC):
    """A method and its parameters.

    Attributes:
        keep: The share of every image's tokens that is kept, rounded down, but at least one.
        name: Its key in the registry, on command lines and in plans.
        label: Its name in tables.
        source: The paper that describes it, or an empty string.
        reads_prompt: Whether the choice depends on the question.
        needs_attention: Whether it needs the vision tower's attention.
        is_regular: Whether it treats tokens by their place in the grid.
    """

    keep: float

    name: ClassVar[str]
    label: ClassVar[str]
    source: ClassVar[str] = ""
    reads_prompt: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False
    is_regular: ClassVar[bool] = False

    @abstractmethod
    def select(self, images: Images) -> Selection:
        """Choose ``count`` tokens of every image.

        Only called where at least one token is dropped; images do not see each other.
        """

    @property
    def mixes(self) -> bool:
        """Whether features of kept tokens change."""
        return False

    @property
    def uses_prompt(self) -> bool:
        """Whether the choice depends on the question under these parameters."""
        return self.reads_prompt

    @property
    def needs_questions(self) -> bool:
        """Whether constants are missing that ``calibrated`` would find."""
        return False

    def calibrated(self, questions: Sequence[Collection[int]]) -> Self:
        """The method with its constants, as far as none are given.

        Args:
            questions: The token ids of each calibration pair's question.
        """
        return self

    def count(self, sides: Sides) -> int:
        """The number of tokens kept of an image."""
        return max(1, int(self.keep * sides[0] * sides[1] + _ROUNDING))

    def flops(self, sides: Sides, width: int, words: int) -> int:
        """FLOPs of the matrix products of one image's reduction.

        Args:
            sides: The image.
            width: The decoder's hidden width.
            words: Tokens of the question.
        """
        tokens, kept = sides[0] * sides[1], self.count(sides)
        if kept == tokens:
            return 0
        mixing = 2 * kept * tokens * width if self.mixes else 0
        return self.choosing_flops(sides, width, words) + mixing

    def choosing_flops(self, sides: Sides, width: int, words: int) -> int:
        """Those of choosing tokens, without mixing; arguments as for ``flops``."""
        return 0

    def problem(self) -> tuple[str, str] | None:
        """What is wrong with the parameters: (name, the rest of a sentence), or None."""
        if not 0 < self.keep <= 1:
            return "keep", f"must lie in (0, 1], found {self.keep}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters as plain values; parameters that are off or empty are left out."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value != ()
        }
        return {"method": self.name, **plain}

    def describe(self) -> str:
        """Label and share in a few words."""
        return f"{self.label} at {100 * self.keep:.3g} % of the tokens"


def pairs_flops(sides: Sides, width: int) -> int:
    """FLOPs of the similarity of all pairs of an image's tokens."""
    return 2 * (sides[0] * sides[1]) ** 2 * width
