"""Streams the rows of a JSON or JSONL file, in the memory of a single row.

Byte ranges of the rows are remembered, so that sampled rows can be read again.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from yopo.support.errors import DataError
from yopo.support.reading import open_regular

MAX_ROW = 16 << 20
"""Maximum bytes of a row: rows name images, they do not contain them."""

CHUNK = 1 << 20
"""Bytes of a JSON list that are read at a time."""

_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_ITEM = tuple(",] \t\n\r")
_FORMS = "Write one object per line, or all of them in one list."


class JsonRows:
    """The rows of one file, found in one scan.

    Attributes:
        path: The file.
        digest: SHA-256 of its bytes, once ``scan`` is exhausted.
    """

    def __init__(self, path: Path):
        self.path = path
        self._hash = hashlib.sha256()
        self._lines, self._starts, self._stops = (array("Q") for _ in range(3))
        self._state: tuple[int, int] | None = None
        self._is_list = False

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def digest(self) -> str:
        """SHA-256 of what was scanned."""
        return self._hash.hexdigest()

    def where(self, number: int) -> str:
        """The location of a scanned row: its line, or its number if other rows share the line."""
        line = self._lines[number]
        shares = self._is_list and (line == 1 or (number > 0 and line == self._lines[number - 1]))
        return f"{self.path} row {number}" if shares else f"{self.path}:{line}"

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Yield (line, value) of every row, remembering its position.

        Raises:
            DataError: Not a regular file, not UTF-8, or not JSON; names the line.
        """
        file, _ = open_regular(self.path, error=DataError)
        with file:
            self._state = _state(file)
            for line, start, content, value in self._rows(file):
                self._lines.append(line)
                self._starts.append(start)
                self._stops.append(start + len(content))
                yield line, value

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, int, Any]]:
        """Read some rows again and yield their (number, line, value).

        Raises:
            DataError: The file changed since the scan.
        """
        file, _ = open_regular(self.path, error=DataError)
        with file:
            if _state(file) != self._state:
                raise DataError(f"{self.path}: changed while it was in use.")
            for number in numbers:
                line, start = self._lines[number], self._starts[number]
                file.seek(start)
                yield number, line, self._value(line, file.read(self._stops[number] - start))

    def _rows(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes, Any]]:
        """(line, start, bytes, value) of every row."""
        offset = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(0)
        self._hash.update(file.read(offset))
        first = b"\n"
        while first.isspace():
            first = file.read(1)
        file.seek(offset)
        self._is_list = first == b"["
        rows = self._list_rows if self._is_list else self._line_rows
        yield from rows(file, offset)

    def _line_rows(self, file: BinaryIO, offset: int) -> Iterator[tuple[int, int, bytes, Any]]:
        line = 0
        while content := file.readline(MAX_ROW + 1):
            line += 1
            self._hash.update(content)
            if len(content) > MAX_ROW:
                raise self._too_long(line)
            if content.strip():
                yield line, offset, content, self._value(line, content)
            offset += len(content)

    def _list_rows(self, file: BinaryIO, offset: int) -> Iterator[tuple[int, int, bytes, Any]]:
        """Rows of one list. JSON's own characters are ASCII, so bytes are scanned as Latin-1."""
        window = _Window(self, file, offset)
        window.skip("[")
        while window.peek() != "]":
            line, start, content, value = window.item()
            if not content.isascii():
                value = self._value(line, content.encode("latin-1"))
            yield line, start, content.encode("latin-1"), value
            if window.peek() != "]":
                window.skip(",")
                if window.peek() == "]":
                    raise window.error("Expecting value")
        window.skip("]")
        if window.peek():
            raise window.error("Extra data")

    def _value(self, line: int, content: bytes) -> Any:
        try:
            return json.loads(content.decode("utf-8").rstrip("\n"))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}:{line}: is not UTF-8 text.") from error
        except json.JSONDecodeError as error:
            raise self.not_json(line + error.lineno - 1, error.colno, error.msg) from error
        except (RecursionError, ValueError) as error:
            raise self.not_json(line, 1, _beyond(error)) from error

    def read_more(self, file: BinaryIO) -> str:
        """The next bytes of a list, as Latin-1."""
        content = file.read(CHUNK)
        self._hash.update(content)
        return content.decode("latin-1")

    def not_json(self, line: int, column: int, problem: str) -> DataError:
        """Build the error for a row that cannot be parsed."""
        return DataError(
            f"{self.path}:{line}: not JSON: {problem} (column {column}).", remedy=_FORMS
        )

    def _too_long(self, line: int) -> DataError:
        return DataError(
            f"{self.path}:{line}: the row is longer than the limit of {MAX_ROW:,} bytes.",
            remedy=_FORMS,
        )


class _Window:
    """A window that moves along a long JSON text."""

    def __init__(self, rows: JsonRows, file: BinaryIO, offset: int):
        self._rows, self._file = rows, file
        self._text, self._place = "", 0
        self._offset, self._line, self._column = offset, 1, 1  # of the text's first character
        self._counted, self._lines_before = 0, 0  # characters whose lines were counted
        self._is_last = False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._place)
            self._place = self._place if space is None else space.end()
            if self._place < len(self._text) or self._is_last:
                return self._text[self._place : self._place + 1]
            self._grow()

    def skip(self, expected: str) -> None:
        """Skip a character that has to come next."""
        if self.peek() != expected:
            raise self.error(f"Expecting '{expected}'")
        self._place += 1

    def item(self) -> tuple[int, int, str, Any]:
        """(line, start, text, value) of the next value."""
        self.peek()
        while True:
            start = self._place
            try:
                value, stop = self._decoder.raw_decode(self._text, start)
                if self._is_last or self._text[stop : stop + 1] in _AFTER_ITEM:
                    break  # otherwise a number may continue
                problem = ("Expecting ',' delimiter", stop)
            except json.JSONDecodeError as error:
                problem = (error.msg, error.pos)
            except (RecursionError, ValueError) as error:
                raise self.error(_beyond(error)) from error
            if self._is_last or len(self._text) - start > MAX_ROW:
                raise self.error(*problem)
            self._grow()
        if stop - start > MAX_ROW:
            raise self.error(f"an item longer than {MAX_ROW:,} bytes")
        self._lines_before += self._text.count("\n", self._counted, start)
        self._counted, self._place = start, stop
        return self._line + self._lines_before, self._offset + start, self._text[start:stop], value

    def error(self, problem: str, place: int | None = None) -> DataError:
        """Build an error for a problem here, or at ``place`` in the window."""
        before = self._text[: self._place if place is None else place]
        line_start = before.rfind("\n") + 1
        column = len(before) - line_start + (1 if line_start else self._column)
        return self._rows.not_json(self._line + before.count("\n"), column, problem)

    def _grow(self) -> None:
        """Read more, and drop the text before the current place."""
        before, self._text = self._text[: self._place], self._text[self._place :]
        newline = before.rfind("\n")
        self._column = len(before) - newline if newline >= 0 else self._column + len(before)
        self._line += before.count("\n")
        self._offset += len(before)
        self._place = self._counted = self._lines_before = 0
        more = self._rows.read_more(self._file)
        self._is_last = not more
        self._text += more


def _state(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _beyond(error: Exception) -> str:
    is_deep = isinstance(error, RecursionError)
    return "it nests too deeply" if is_deep else "a number has too many digits"
