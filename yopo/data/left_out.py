"""Pairs that cannot be used: counted and left out, or refused where everything has to be right.

Real data holds rows without an image, and images that no decoder reads. One of them need not end a
run, but how many there are, and which comes first, has to be said.
"""

from __future__ import annotations

from pathlib import Path

from yopo.support.console import warn
from yopo.support.errors import DataError


class BadPair(DataError):
    """A row that is no usable pair.

    Args:
        message: As for any error: where, expected, found.
        reason: What such rows have in common, as the rest of "3 rows ...": "without an image".
        remedy: What the user can do.
    """

    def __init__(self, message: str, *, reason: str, remedy: str | None = None):
        super().__init__(message, remedy=remedy)
        self.reason = reason


def refuse_missing(path: Path, label: str, what: str, remedy: str) -> None:
    """Refuse a path without a file, without opening anything.

    Args:
        path: The path.
        label: Name in messages.
        what: What the file should be: ``image``, ``video``.
        remedy: What the user can do.

    Raises:
        BadPair: There is no such file.
    """
    try:
        is_missing = not path.is_file()
    except (OSError, ValueError):  # too long, or contains a zero byte
        is_missing = True
    if is_missing:
        reason = f"whose {what} does not exist"
        raise BadPair(f"{label}: there is no file {path}.", reason=reason, remedy=remedy)


UNREADABLE = "with an image that cannot be read"
"""Reason of an error that states none: it comes from opening a file."""


class LeftOut:
    """Counts the rows of one source that are left out.

    Args:
        where: The source's name in messages.
        strict: Whether the first of them is an error.
    """

    def __init__(self, where: str, *, strict: bool = False):
        self._where, self._strict = where, strict
        self._first: dict[str, DataError] = {}
        self._counts: dict[str, int] = {}

    @property
    def count(self) -> int:
        """Rows left out."""
        return sum(self._counts.values())

    def add(self, error: DataError) -> None:
        """Leave a row out.

        Raises:
            DataError: The same, under ``strict``.
        """
        if self._strict:
            raise error
        reason = getattr(error, "reason", UNREADABLE)
        self._first.setdefault(reason, error)
        self._counts[reason] = self._counts.get(reason, 0) + 1

    def refuse_if_nothing_is_left(self, kept: int) -> None:
        """Raise if no row is usable.

        Raises:
            DataError: The first problem of all, or that the source is empty.
        """
        if kept:
            return
        if not self._first:
            raise DataError(f"{self._where}: holds no pairs.")
        error = next(iter(self._first.values()))
        if self.count == 1:
            raise error
        raise DataError(
            f"{self._where}: none of its {self.count} rows can be used; the first problem: "
            f"{error.message}",
            remedy=error.remedy,
        )

    def report(self, total: int) -> None:
        """Warn of what was left out, if anything: how many rows, why, and the first of each.

        Args:
            total: Rows that were looked at.
        """
        if not self.count:
            return
        parts = [
            f"{count} {reason} (first: {self._first[reason].message.rstrip('.')})"
            for reason, count in self._counts.items()
        ]  # at most a dozen reasons
        warn(
            f"{self._where}: left out {self.count} of {total} rows: {'; '.join(parts)}. "
            "Use --strict to refuse them."
        )
