"""The output appears complete or not at all, and no unrelated folder is deleted."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from yopo.checkpoint.manifest import MANIFEST_FILE, write_manifest
from yopo.checkpoint.writer import OutputDirectory, format_bytes
from yopo.support import durable, scratch
from yopo.support.errors import OutputError


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
    write_manifest(path)
    return path


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


def test_the_output_appears_by_one_rename(source, tmp_path, monkeypatch) -> None:
    renames = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *pair: (renames.append(pair), rename(*pair)))
    target = tmp_path / "out"
    with open_output(target, source) as folder:
        (folder / "file").write_text("x")
        assert folder.parent.parent == tmp_path and folder.parent.name.startswith(".out.yopo-")
        assert not target.exists()
    assert renames == [(folder, target)]
    assert names(target) == ["file", MANIFEST_FILE] and names(tmp_path) == ["out", "source"]
    assert target.stat().st_mode & 0o777 == source.stat().st_mode & 0o777


def test_an_empty_directory_may_be_the_target(source, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with open_output(tmp_path / "out", source) as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path / "out") == ["file", MANIFEST_FILE]


def test_force_replaces_a_checkpoint(source, tmp_path) -> None:
    target = old_checkpoint(tmp_path / "out")
    with open_output(target, source, force=True) as folder:
        (folder / "config.json").write_text("new")
    assert names(target) == ["config.json", MANIFEST_FILE]
    assert (target / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out", "source"]


def test_a_link_still_leads_to_the_result(source, tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(old_checkpoint(tmp_path / "disk" / "real"))
    with open_output(tmp_path / "out", source, force=True) as folder:
        assert folder.parent.parent == tmp_path / "disk"
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
def test_a_failure_leaves_everything_as_it_was(
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
        assert (target / "config.json").read_text() == "old" and len(names(target)) == 3


@pytest.fixture
def without_exchange(monkeypatch) -> None:
    """Act like a file system that cannot exchange two names."""
    monkeypatch.setattr(scratch, "exchange", lambda one, other: False)


def test_force_works_without_atomic_exchange(source, tmp_path, without_exchange) -> None:
    test_force_replaces_a_checkpoint(source, tmp_path)


def test_a_failed_swap_restores_the_old_checkpoint(
    source, tmp_path, monkeypatch, without_exchange
) -> None:
    target = old_checkpoint(tmp_path / "out")
    rename = os.rename

    def fail_on_publish(before, after):
        if str(before).endswith("/new"):
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


def test_a_target_that_appears_in_the_meantime_is_not_replaced(source, tmp_path) -> None:
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


def test_an_existing_checkpoint_needs_force(source, tmp_path) -> None:
    error = refusal(old_checkpoint(tmp_path / "out"), source)
    assert "exists already and is not empty" in error.message and "--force" in error.remedy


def test_an_unrelated_folder_is_never_replaced(source, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("x")
    assert "was not written by yopo" in refusal(folder, source, force=True).message
    assert names(folder) == ["holiday.jpg"]


def test_another_programs_model_is_never_replaced(source, tmp_path) -> None:
    """A former --force deleted any folder that had a config.json."""
    for name, text in (("plain", "{}"), ("looks-baked", '{"yopo": {"plan": "yopo_plan.yaml"}}')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").write_bytes(b"weights")
        assert "was not written by yopo" in refusal(folder, source, force=True).message


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 9000, '{"yopo": 1}', '{"yopo": 1, "files": []}', "\xff"]
)
def test_an_invalid_file_list_prevents_replacement(source, tmp_path, text) -> None:
    target = old_checkpoint(tmp_path / "out")
    (target / MANIFEST_FILE).write_bytes(text.encode("latin-1"))
    assert "was not written by yopo" in refusal(target, source, force=True).message


def test_links_and_changed_files_belong_to_the_user(source, tmp_path) -> None:
    target = old_checkpoint(tmp_path / "out")
    (target / "extra.txt").write_text("new")  # of the same size
    (target / "link").symlink_to(source)
    assert "changed since: extra.txt, link." in refusal(target, source, force=True).message


def test_a_file_is_never_replaced(source, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file", source, force=True).message


def test_a_target_inside_the_source_is_refused(source, tmp_path) -> None:
    assert "is the source checkpoint itself" in refusal(source, source, force=True).message
    link = tmp_path / "link"
    link.symlink_to(source)
    assert "is the source checkpoint itself" in refusal(link, source, force=True).message
    assert "is inside the source" in refusal(source / "out", source).message
    assert "is a parent of the source" in refusal(tmp_path, source, force=True).message


def test_a_missing_parent_folder_is_refused(source, tmp_path) -> None:
    assert "its folder does not exist" in refusal(tmp_path / "a" / "b", source).message


def test_too_little_disk_space_is_refused(source, tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1100, 900))
    assert "needs 1.0 kB, but its file system has 900 B left" in (
        refusal(tmp_path / "out", source).message
    )


def test_bytes_are_formatted_for_people() -> None:
    assert [format_bytes(size) for size in (0, 999, 13_476_839_424)] == ["0 B", "999 B", "13.5 GB"]


def recorded(monkeypatch) -> list[str]:
    """Record the calls that decide what survives a power cut, in order, as ``what name``."""
    steps: list[str] = []

    def record(owner, name, label):
        function = getattr(owner, name)

        def call(*arguments, **options):
            result = function(*arguments, **options)
            steps.append(label(*arguments))
            return result

        monkeypatch.setattr(owner, name, call)

    record(durable, "sync_file", lambda path: f"sync {path.name}")
    record(scratch, "sync_directory", lambda path: f"sync {scratch_name(path)}")
    record(durable, "sync_directory", lambda path: f"sync {scratch_name(path)}")
    record(os, "rename", lambda old, new: f"rename {old.name} {new.name}")
    record(scratch, "exchange", lambda old, new: f"exchange {old.name} {new.name}")
    record(shutil, "rmtree", lambda path, **_: f"delete {path.name}")
    return steps


def scratch_name(path: Path) -> str:
    return "scratch" if ".yopo-" in path.name else path.name


SYNCED = ["sync config.json", "sync inner.txt", f"sync {MANIFEST_FILE}"]


@pytest.mark.parametrize("replaces", [False, True])
def test_the_old_checkpoint_is_deleted_only_after_the_new_one_is_synced(
    source, tmp_path, monkeypatch, replaces
) -> None:
    target = tmp_path / "out"
    if replaces:
        old_checkpoint(target)
    steps = recorded(monkeypatch)
    with open_output(target, source, force=True) as folder:
        (folder / "config.json").write_text("new")
        (folder / "inner").mkdir()
        (folder / "inner" / "inner.txt").write_text("new")
    files = [step for step in steps[: steps.index("sync new")] if step != "sync inner"]
    assert sorted(files) == sorted(SYNCED)
    assert steps.index("sync inner") < steps.index("sync new")
    step = "exchange new out" if replaces else "rename new out"
    expected = ["sync new", step, "sync scratch", f"sync {tmp_path.name}"]
    expected += ["delete new"] if replaces else []
    assert steps[steps.index("sync new") :] == expected


def test_without_atomic_exchange_the_old_checkpoint_is_deleted_last(
    source, tmp_path, monkeypatch, without_exchange
) -> None:
    old_checkpoint(tmp_path / "out")
    steps = recorded(monkeypatch)
    with open_output(tmp_path / "out", source, force=True) as folder:
        (folder / "config.json").write_text("new")
    parent = f"sync {tmp_path.name}"
    assert steps[-5:] == ["rename out old", "rename new out", "sync scratch", parent, "delete old"]
