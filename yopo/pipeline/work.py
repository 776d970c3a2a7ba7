"""What a calibration keeps in ``--work-dir``: whose work it is, and plans that were judged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, ProcessorMixin

from yopo.calibration.measure import identify
from yopo.calibration.statistics import Statistics
from yopo.calibration.statistics_file import from_parts
from yopo.data.pairs import ImageRef, Pair, Pairs, ResizedRef
from yopo.data.split import image_digest
from yopo.data.videos import VideoRef
from yopo.evaluation.fidelity import Fidelity, PairFidelity
from yopo.models.fingerprint import digest, is_plain, sample
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.request import LatencyRequest, PlanRequest
from yopo.plans.schema import PruningPlan
from yopo.support.ranks import is_together
from yopo.support.shared_work import SharedWork
from yopo.support.version import __version__
from yopo.support.work_dir import NoWork, Stage, Work, WorkDir, open_work

STATISTICS = "statistics"


def open_for_calibration(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Iterable[Pair],
    options: RunOptions,
    fit_options: FitOptions,
    requests: Sequence[PlanRequest],
) -> Work:
    """Open the directory that the options name, for this work only.

    Args:
        model: The dense model.
        processor: Its processor.
        pairs: All calibration pairs; read once.
        options: The data and how to run it.
        fit_options: How plans are measured and fitted, and ``work_dir``.
        requests: The plans that are asked for.

    Raises:
        OutputError: The directory holds other work, or cannot be used.
    """
    if fit_options.work_dir is None:
        return NoWork()
    path = Path(fit_options.work_dir)

    def opened() -> WorkDir:
        key = _key(model, processor, pairs, options, fit_options, requests)
        return open_work(path, key)

    return SharedWork(path, opened) if is_together() else opened()


def _key(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Iterable[Pair],
    options: RunOptions,
    fit_options: FitOptions,
    requests: Sequence[PlanRequest],
) -> dict[str, Any]:
    """What the bytes of the results depend on; the number of processes is not among it."""
    values = {**vars(options), **vars(fit_options)}
    for name in ("data", "strict", "trust_remote_code"):  # the pairs count
        del values[name]
    for name in ("work_dir", "shares", "offload"):  # of no effect on one plan
        del values[name]
    if is_together():  # moments are added exactly
        values["processes"] = "any number under torchrun"
    return {
        "yopo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": _model_digest(model),
        "processor": hashlib.sha256(repr(processor).encode()).hexdigest(),
        "data": _data_digest(pairs),
        "request": [_request(each) for each in requests],
        **{name: str(value) for name, value in values.items()},
    }


def about(pairs: Pairs, options: RunOptions, fit_options: FitOptions) -> dict[str, object]:
    """What a plan's provenance says of the pairs that were measured, and how they were."""
    found: dict[str, object] = {"yopo": __version__, "pairs": pairs.name, "seed": options.seed}
    if set(fit_options.grids) != {1}:
        found["grids"] = list(fit_options.grids)
    if options.image_options:
        found["processor"] = options.image_options
    if pairs.digest:
        found["pairs_digest"] = pairs.digest
    return found


def _request(request: PlanRequest) -> str:
    if not isinstance(request, LatencyRequest):
        return repr(request)
    costs = hashlib.sha256(Path(request.costs).read_bytes()).hexdigest()
    return repr(replace(request, costs=costs))


def _model_digest(model: PreTrainedModel) -> str:
    """Digest of samples of every weight, and of the files that the model was loaded from."""
    samples = [
        (name, tuple(each.shape), sample(each.detach().reshape(len(each), -1)))
        for name, each in model.named_parameters()
        if each.dim() and is_plain(each) and not each.is_meta
    ]
    decoder = identify(model, "").fingerprint
    return hashlib.sha256(f"{digest(samples)} {decoder}".encode()).hexdigest()


def _data_digest(pairs: Iterable[Pair]) -> str:
    """Digest of all that is read of pairs."""
    state = hashlib.sha256()
    for pair in pairs:
        media: tuple[ImageRef | VideoRef, ...] = (*pair.images, *pair.videos)
        found = [(image_digest(each), _scale(each)) for each in media]
        state.update(repr((found, pair.question, pair.answers, pair.kind)).encode())
    return state.hexdigest()


def _scale(image: object) -> float:
    return image.scale if isinstance(image, ResizedRef) else 1.0


def load_kept_statistics(work: Work) -> Statistics | None:
    """The statistics of a former run, without a hint to the model; None if there are none."""
    kept = work.load(STATISTICS)
    return None if kept is None else from_parts(kept.tensors, kept.about, Path())


def keep_statistics(work: Work, found: Statistics) -> None:
    """Keep all but the hint to the model."""
    work.save(STATISTICS, Stage(*found.parts()))


class Judgements:
    """How close plans are to the dense model, as far as they have been judged.

    Args:
        work: Where judgements are kept.
    """

    def __init__(self, work: Work):
        self._work = work

    def get(self, plan: PruningPlan, pairs: str) -> Fidelity | None:
        """How close a plan is on ``pairs`` (``comparison`` or ``holdout``); None: not judged."""
        kept = self._work.load(_name(plan, pairs))
        if kept is None:
            return None
        kl, agreed, tokens = (kept.tensors[name].tolist() for name in ("kl", "agreed", "tokens"))
        return Fidelity(tuple(map(PairFidelity, kl, agreed, tokens)))

    def add(self, plan: PruningPlan, pairs: str, found: Fidelity) -> None:
        """Keep a judgement."""
        parts = found.by_pair
        tensors = {
            "kl": torch.tensor([each.kl for each in parts], dtype=torch.float64),
            "agreed": torch.tensor([each.agreed for each in parts]),
            "tokens": torch.tensor([each.tokens for each in parts]),
        }
        about: dict[str, Any] = {"kl": found.kl, "budget": plan.budget.reached}
        self._work.save(_name(plan, pairs), Stage(tensors, about))


def _name(plan: PruningPlan, pairs: str) -> str:
    marks = repr((plan.layers, plan.compensation, plan.bidirectional))
    return f"{pairs}-{hashlib.sha256(marks.encode()).hexdigest()[:32]}"
