"""Warnings of the library's own are shown by the commands, those of others only with -v."""

from __future__ import annotations

import warnings

import pytest

from yopo.cli.verbosity import Verbosity, applied
from yopo.support.errors import YopoWarning


@pytest.mark.parametrize("quiet", [False, True])
def test_own_warnings_are_shown_like_the_commands(
    quiet: bool, capsys: pytest.CaptureFixture
) -> None:
    usual = warnings.showwarning
    with applied(Verbosity(quiet=quiet)):
        warnings.warn("a prompt beyond", YopoWarning, stacklevel=1)
        warnings.warn("of a library", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: a prompt beyond\n"
    assert warnings.showwarning is usual


def test_other_warnings_go_where_they_usually_go(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: seen.append(str(message)))
    with applied(Verbosity(verbose=1)):
        warnings.simplefilter("always")
        warnings.warn("of a library", UserWarning, stacklevel=1)
    assert seen == ["of a library"]
