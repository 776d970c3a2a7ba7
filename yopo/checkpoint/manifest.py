"""A list of the files that yopo wrote to a directory, so that ``--force`` spares the user's own.

``yopo_files.json`` lists every file with its size, and its sha256 unless it is large (only weights
are). A directory without it is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from yopo.support.version import __version__

MANIFEST_FILE = "yopo_files.json"

_LARGE = 64 * 2**20
"""Size in bytes from which a file is only identified by its name and size."""

_MAX_BYTES = 16 * 2**20


def write_manifest(folder: Path) -> None:
    """Write the manifest of a finished directory."""
    files = {name: _describe(folder / name) for name in _files(folder) if name != MANIFEST_FILE}
    document = {"yopo": __version__, "files": files}
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def find_strangers(folder: Path) -> list[str] | None:
    """Files of a directory that were added or changed since yopo wrote it.

    Returns:
        Their paths inside the directory; None if yopo did not write the directory.
    """
    known = _read(folder / MANIFEST_FILE)
    if known is None:
        return None
    found = [name for name in _files(folder) if name != MANIFEST_FILE]
    return [
        name
        for name in found
        if name not in known or not _is_as_described(folder / name, known[name])
    ]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or "yopo" not in document:
        return None
    files = document.get("files")
    return files if isinstance(files, dict) else None


def _files(folder: Path) -> list[str]:
    """Paths of all files below a directory, and of its empty directories."""
    found = []
    for path, folders, files in os.walk(folder):
        links = [name for name in folders if Path(path, name).is_symlink()]
        for name in (*files, *links, *([] if files or folders else [""])):
            found.append(os.path.relpath(Path(path, name), folder))
    return sorted(found)


def _describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size >= _LARGE:
        return {"size": size}
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _is_as_described(path: Path, description: Any) -> bool:
    if path.is_symlink() or not path.is_file() or not isinstance(description, dict):
        return False
    if path.stat().st_size != description.get("size"):
        return False
    return path.stat().st_size >= _LARGE or _describe(path) == description
