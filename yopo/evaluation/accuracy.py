"""Whether an answer is right: normalised exact match against any accepted answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (the usual VQA normalisation)."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words)


def is_correct(answer: str, accepted: Sequence[str]) -> bool:
    """Whether ``answer`` equals one of the accepted answers after normalisation."""
    return normalise(answer) in {normalise(each) for each in accepted}
