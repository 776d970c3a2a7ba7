"""Output files go only where allowed, with the right permissions, and replace only their kind."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from yopo.support.errors import OutputError
from yopo.support.files import PAGE, PAGE_MARK, PLAN, STATISTICS, Kind, check_writable, write_file

CONTENT = {
    "plan": b"# mine\nyopo_plan: 1\n",
    "statistics": save({"rho": torch.zeros(2)}, metadata={"yopo": '{"format": 1}'}),
    "page": f"<html>{PAGE_MARK}</html>".encode(),
    "model weights": save({"weight": torch.zeros(2)}, metadata={"format": "pt"}),
    "weights without metadata": save({"yopo": torch.zeros(2)}),
    "pairs": b'{"image": "a.png", "question": "yopo_plan: what?"}\n',
    "settings": b"budget: 0.25\n",
    "noise": bytes(range(256)),
}
KINDS = {"plan": PLAN, "statistics": STATISTICS, "page": PAGE}


def refusal(path: Path, kind: Kind = PLAN, *, force: bool = True) -> OutputError:
    with pytest.raises(OutputError) as caught:
        check_writable(path, kind, force=force)
    assert str(path) in caught.value.message
    return caught.value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", CONTENT)
def test_a_file_replaces_only_files_of_its_own_kind(
    tmp_path: Path, kind: str, content: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[content])
    assert "exists already" in refusal(path, KINDS[kind], force=False).message
    if kind == content:
        check_writable(path, KINDS[kind], force=True)
    else:
        message = refusal(path, KINDS[kind]).message
        assert f"is not {KINDS[kind].name}" in message and "even with --force" in message
    assert path.read_bytes() == CONTENT[content]


def test_an_empty_file_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file", PLAN, force=True)


@pytest.fixture
def bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        yield


def test_anything_but_a_file_is_refused_without_opening_it(tmp_path: Path, bound: None) -> None:
    """Opening a pipe that nobody writes to would block forever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero")):
        assert "is a device, a pipe or a socket" in refusal(path).message
        assert "is a device" in refusal(path, force=False).message
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)
    assert "is a directory" in refusal(tmp_path).message
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(tmp_path / "file" / "plan.yaml").message


@pytest.mark.parametrize("leads_to", ["a plan", "weights", "nothing"])
def test_a_link_is_not_written_through(tmp_path: Path, leads_to: str) -> None:
    if leads_to != "nothing":
        name = "plan" if leads_to == "a plan" else "model weights"
        (tmp_path / "real").write_bytes(CONTENT[name])
    (tmp_path / "link").symlink_to("real")
    error = refusal(tmp_path / "link")
    assert "is a link to real" in error.message and "Name the file itself" in error.remedy


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask_or_the_previous_file(tmp_path: Path, mask: int) -> None:
    former = os.umask(mask)
    try:
        write_file(tmp_path / "new", b"x")
        (tmp_path / "private").touch(0o600)
        write_file(tmp_path / "private", b"x")
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_a_file_is_synced_renamed_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, replace = os.fsync, os.replace

    def record_sync(file: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def record_replace(old: Path, new: Path) -> None:
        steps.append((str(old), str(new)))
        replace(old, new)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc: what is synced cannot be named")
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_file(tmp_path / "file", b"x")
    new = steps[0]
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/\.file\.yopo-\w{{8}}/new", new)
    assert steps == [new, (new, str(tmp_path / "file")), str(tmp_path)]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
