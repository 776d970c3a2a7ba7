"""The output appears complete or not at all, and nobody's folder is deleted."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from yopo.checkpoint.writer import OutputDirectory, format_bytes
from yopo.errors import OutputError


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def open_output(target: Path, source: Path, *, force: bool = False) -> OutputDirectory:
    return OutputDirectory(target, source=source, num_bytes=1000, force=force)


def old_checkpoint(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("old")
    (path / "extra.txt").write_text("old")
    return path


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


def test_appears_by_one_rename(source, tmp_path, monkeypatch) -> None:
    renames = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *pair: (renames.append(pair), rename(*pair)))
    target = tmp_path / "out"
    with open_output(target, source) as folder:
        (folder / "file").write_text("x")
        assert folder.parent == tmp_path and folder.name.startswith(".out.")
        assert not target.exists()
    assert renames == [(folder, target)]
    assert names(target) == ["file"] and names(tmp_path) == ["out", "source"]
    assert target.stat().st_mode & 0o777 == source.stat().st_mode & 0o777


def test_an_empty_directory_may_be_the_target(source, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with open_output(tmp_path / "out", source) as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path / "out") == ["file"]


def test_force_replaces_a_checkpoint(source, tmp_path) -> None:
    target = old_checkpoint(tmp_path / "out")
    with open_output(target, source, force=True) as folder:
        (folder / "config.json").write_text("new")
    assert names(target) == ["config.json"]
    assert (target / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out", "source"]


def test_a_link_keeps_leading_to_the_result(source, tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(old_checkpoint(tmp_path / "disk" / "real"))
    with open_output(tmp_path / "out", source, force=True) as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "config.json").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / "config.json").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
        (ValueError("a bug"), ValueError, "a bug"),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "disk full"),
        (OSError(errno.EACCES, "Permission denied"), OutputError, "cannot be written: Permission"),
    ],
)
@pytest.mark.parametrize("force", [True, False])
def test_failure_leaves_everything_as_it_was(
    source, tmp_path, error, expected, message, force
) -> None:
    target = tmp_path / "out"
    if force:
        old_checkpoint(target)
    with pytest.raises(expected, match=message), open_output(target, source, force=force) as folder:
        (folder / "config.json").write_text("half")
        raise error
    assert names(tmp_path) == (["out", "source"] if force else ["source"])
    if force:
        assert (target / "config.json").read_text() == "old" and len(names(target)) == 2


def test_failed_swap_restores_the_old_checkpoint(source, tmp_path, monkeypatch) -> None:
    target = old_checkpoint(tmp_path / "out")
    rename = os.rename

    def fail_on_publish(before, after):
        if ".new-" in str(before):
            raise OSError(errno.EIO, "Input/output error")
        rename(before, after)

    monkeypatch.setattr(os, "rename", fail_on_publish)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        open_output(target, source, force=True) as folder,
    ):
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out", "source"]


def test_target_that_appears_meanwhile_is_not_replaced(source, tmp_path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"), open_output(target, source) as folder:
        (folder / "config.json").write_text("new")
        old_checkpoint(target)
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out", "source"]


def refusal(target: Path, source: Path, *, force: bool = False) -> OutputError:
    with pytest.raises(OutputError) as caught:
        open_output(target, source, force=force).check()
    return caught.value


def test_existing_needs_force(source, tmp_path) -> None:
    error = refusal(old_checkpoint(tmp_path / "out"), source)
    assert "exists already and is not empty" in error.message and "--force" in error.remedy


def test_a_strangers_folder_is_never_replaced(source, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("x")
    assert "not a checkpoint (no config.json)" in refusal(folder, source, force=True).message
    assert names(folder) == ["holiday.jpg"]


def test_a_file_is_never_replaced(source, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file", source, force=True).message


def test_overlap_with_the_source(source, tmp_path) -> None:
    assert "is the source checkpoint itself" in refusal(source, source, force=True).message
    link = tmp_path / "link"
    link.symlink_to(source)
    assert "is the source checkpoint itself" in refusal(link, source, force=True).message
    assert "is inside the source" in refusal(source / "out", source).message
    assert "is a parent of the source" in refusal(tmp_path, source, force=True).message


def test_no_parent(source, tmp_path) -> None:
    assert "its folder does not exist" in refusal(tmp_path / "a" / "b", source).message


def test_too_little_space(source, tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1100, 900))
    assert "needs 1.0 kB, but its file system has 900 B left" in (
        refusal(tmp_path / "out", source).message
    )


def test_format_bytes() -> None:
    assert [format_bytes(size) for size in (0, 999, 13_476_839_424)] == ["0 B", "999 B", "13.5 GB"]
