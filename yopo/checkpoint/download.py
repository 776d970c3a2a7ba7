"""Downloads files of a hub repository to the local cache, with readable errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yopo.models.registry import ModelSource
from yopo.support import console
from yopo.support.errors import ModelError

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
"""Download options, by their names in transformers and huggingface_hub."""

_SKIPPED = ("consolidated*", "original/*", "onnx/*")
"""The same weights in other formats."""


def download(source: ModelSource, files: Sequence[str], **options: Any) -> Path:
    """Download a repository's files to the local cache.

    Args:
        source: A hub repository.
        files: Path patterns.
        **options: ``HUB_OPTIONS``.

    Returns:
        The directory of the revision in the cache.

    Raises:
        ModelError: The repository or revision is unknown or gated, or the hub is unreachable.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = source.location + (f"@{source.revision}" if source.revision else "")
    try:
        known = try_to_load_from_cache(
            source.location,
            str(Path(files[0]).with_name("config.json")),
            cache_dir=options.get("cache_dir"),
            revision=source.revision,
        )
        if not isinstance(known, str):
            console.note(f"{name}: looking on the Hugging Face hub (-v shows download progress).")
        folder = snapshot_download(
            source.location,
            revision=source.revision,
            allow_patterns=list(files),
            ignore_patterns=list(_SKIPPED),
            **options,
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name}: is gated on the Hugging Face hub.",
            remedy="Accept its conditions on its hub page, then log in with `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        what = "revision" if isinstance(error, RevisionNotFoundError) else "model"
        raise ModelError(
            f"{name}: no such {what} on the Hugging Face hub.",
            remedy="Check the spelling; a private model needs `hf auth login`.",
        ) from error
    except (HTTPError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # a local problem, such as a full disk
            raise ModelError(f"{name}: cannot be downloaded: {error}.") from error
        raise ModelError(
            f"{name}: is not (completely) in the local cache, and the Hugging Face hub cannot be "
            "reached.",
            remedy="Check the network (and HF_HUB_OFFLINE), or give a local model directory.",
        ) from error
    return Path(folder)
