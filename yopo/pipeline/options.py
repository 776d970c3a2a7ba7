"""How the commands run models over pairs, and how plans are measured and fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from yopo.data.drawing import DEFAULT_SAMPLES
from yopo.data.pairs import Data
from yopo.reduction.method import Method


@dataclass(frozen=True)
class RunOptions:
    """How a model is run over pairs.

    Attributes:
        data: Pairs: anything that ``--data`` accepts (a file, a directory, ``org/name:split``,
            ``demo:SET``), several of these in a list, or rows in memory, each
            ``{"image": ..., "question": ..., "answer": ...}``; None: the demo pairs for the model
            (see ``yopo.demo``): its calibration set to calibrate, its held-out set to evaluate.
        samples: How many, drawn evenly over kinds of question; None: all.
        seed: Seed for sampling pairs.
        batch_size: Pairs per forward.
        device: Device of a model that is loaded (``cpu``, ``cuda``, ``cuda:1``, ``mps``); a model
            in memory is not moved.
        device_map: In place of ``device``, as accelerate takes it: ``auto``, or the device of each
            module by name, for a decoder spread over several devices; ``cpu`` and ``disk`` beside a
            GPU hold weights that are fetched when they are needed. None: all is on ``device``.
        offload: Whether decoder layers of a model that is loaded stay in its files and are read one
            at a time: ``auto`` (where the weights do not fit the device's free memory), ``never``
            or ``always``; not together with ``device_map``.
        dtype: Dtype of a model that is loaded: ``auto`` (the checkpoint's; in place of float16 on a
            CPU, where it is slow, bfloat16 or float32: see ``serving.precision``), ``float32``,
            ``bfloat16`` (``bf16``), ``float16`` (``fp16``); a model in memory is not converted.
        max_new_tokens: Longest answer generated.
        trust_remote_code: Whether the model's own processor or tokenizer code may run.
        max_pixels: Largest area of an image, where the model's processor has such a limit (Qwen-VL,
            and InternVL in whole tiles); None: the processor's.
        min_pixels: Smallest area, likewise.
        processor_options: Other settings of the processor or its image processor, by name.
        strict: Whether a row without an image, a corrupt image and the like is an error; otherwise
            such rows are counted and left out.
    """

    data: Data | None = None
    samples: int | None = DEFAULT_SAMPLES
    seed: int = 0
    batch_size: int = 8
    device: str = "cpu"
    device_map: str | Mapping[str, str | int] | None = None
    dtype: str = "auto"
    max_new_tokens: int = 32
    trust_remote_code: bool = False
    strict: bool = False
    max_pixels: int | None = None
    min_pixels: int | None = None
    processor_options: Mapping[str, Any] = field(default_factory=dict)
    offload: Literal["auto", "never", "always"] = "never"

    @property
    def image_options(self) -> dict[str, Any]:
        """All settings of the processor that are not its own."""
        pixels = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        given = {name: value for name, value in pixels.items() if value is not None}
        return given | dict(self.processor_options)


@dataclass(frozen=True)
class FitOptions:
    """How plans are measured and fitted.

    Attributes:
        queries: Which queries head activity sums over: ``text``, ``all`` or ``last``.
        measure_pairs: At most this many calibration pairs are held out to compare candidate plans;
            never more than a quarter (see ``split_pairs``).
        fit_pairs: Visual weights are fitted on at most this many of the others.
        grids: Factors by which the sides of images are resized, pairs in turn, for plans that hold
            on more than one size; (1,): images as they are.
        reduction: Drops visual tokens before the first layer, in what is measured and fitted and in
            the plan (see ``yopo.reduction.registry.parse_method``); None: all enter it.
        shares: Shares of the tokens to compare, 1 for no reduction: the reduction's method keeps
            the best of them by measured KL; empty: its own.
        work_dir: Directory that keeps finished stages, so that a killed calibration goes on where
            it was; None: nothing is kept.
    """

    queries: str = "text"
    measure_pairs: int = 64
    fit_pairs: int = 256
    grids: tuple[float, ...] = (1.0,)
    reduction: Method | None = None
    shares: tuple[float, ...] = ()
    work_dir: str | Path | None = None
