"""How the commands run models over pairs, and on what plans are measured and fitted."""

from __future__ import annotations

from dataclasses import dataclass

from yopo.data.pairs import Data


@dataclass(frozen=True)
class RunOptions:
    """How a model is run over pairs.

    Attributes:
        data: Pairs: whatever ``--data`` takes (a file, a directory, ``org/name:split``,
            ``demo:SET``), or rows in memory, ``{"image": ..., "question": ..., "answer": ...}``
            each; None: the package's own, as ``yopo.demo`` has them for the model: its calibration
            set to calibrate, its held-out set to evaluate.
        samples: How many; None: all.
        seed: Decides which pairs are drawn.
        batch_size: Pairs per forward.
        device: Where a model that is loaded runs (``cpu``, ``cuda``, ``cuda:1``, ``mps``); one in
            memory stays where it is.
        dtype: Of a model that is loaded: ``auto`` (the checkpoint's), ``float32``, ``bfloat16``,
            ``float16``; one in memory stays as it is.
        max_new_tokens: Longest answer generated.
        trust_remote_code: Whether a processor or tokenizer that is the model's own code may run.
    """

    data: Data | None = None
    samples: int | None = None
    seed: int = 0
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    max_new_tokens: int = 32
    trust_remote_code: bool = False


@dataclass(frozen=True)
class FitOptions:
    """On what plans are measured and fitted.

    Attributes:
        queries: Which queries head activity sums over: ``text``, ``all`` or ``last``.
        measure_pairs: Calibration pairs that are held out to compare candidate plans on, at most;
            never more than a quarter (see ``split_pairs``).
        fit_pairs: Of the others, those on which visual weights are fitted, at most.
    """

    queries: str = "text"
    measure_pairs: int = 64
    fit_pairs: int = 256
