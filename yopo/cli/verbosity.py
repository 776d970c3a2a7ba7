"""Verbosity: ``-v`` shows library messages, ``-vv`` shows tracebacks, ``-q`` hides notes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from yopo.support import console
from yopo.support.errors import YopoWarning

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


def _showing(usual: Callable[..., None]) -> Callable[..., None]:
    """Show warnings of yopo's own as the commands' are, and others as usual."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, YopoWarning):
            console.warn(str(message))
        else:
            usual(message, category, *where, **more)

    return show


@contextmanager
def applied(verbosity: Verbosity) -> Iterator[None]:
    """Set the verbosity of yopo and the libraries within a block."""
    console.set_quiet(verbosity.quiet)
    console.set_verbose(verbosity.verbose > 0)
    former = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _showing(warnings.showwarning)
            if not verbosity.verbose:
                for name, value in _SILENCE.items():
                    os.environ.setdefault(name, value)
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
            warnings.simplefilter("always", YopoWarning)
            yield
    finally:
        logging.disable(former)
        console.set_quiet(False)
        console.set_verbose(False)
