"""Verbosity: ``-v`` shows library messages, ``-vv`` shows tracebacks, ``-q`` hides notes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from yopo.support import console

# Read by the libraries when they are imported, which is after this.
_SILENCE = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Verbosity:
    """Counts of ``-v`` and ``-q``, anywhere on the command line."""

    verbose: int = 0
    quiet: bool = False

    @property
    def shows_tracebacks(self) -> bool:
        """Whether failures come with a traceback."""
        return self.verbose >= 2


@contextmanager
def applied(verbosity: Verbosity) -> Iterator[None]:
    """Set the verbosity of yopo and the libraries within a block."""
    console.set_quiet(verbosity.quiet)
    former = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if not verbosity.verbose:
                for name, value in _SILENCE.items():
                    os.environ.setdefault(name, value)
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)
        console.set_quiet(False)
