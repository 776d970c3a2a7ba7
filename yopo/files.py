"""Single output files: checked before the work, written aside and renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from yopo.errors import OutputError


def check_writable(paths: Iterable[Path], *, force: bool) -> None:
    """Refuse files that would be overwritten, or whose folder cannot be written to.

    Raises:
        OutputError: The first such file.
    """
    for path in paths:
        folder = path.absolute().parent
        if path.is_dir():
            raise OutputError(f"{path}: is a directory, expected a file name.")
        if path.exists() and not force:
            raise OutputError(f"{path}: exists already.", remedy="Use --force to replace it.")
        if not folder.is_dir():
            raise OutputError(f"{path}: its folder does not exist.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: its folder is not writable.")


def write_file(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all; its folder is made if it is missing.

    Raises:
        OutputError: It cannot be written (disk full, say); nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".yopo-", delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(data)
                file.flush()
                os.chmod(temporary, 0o644)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from error
