"""A file is replaced as a whole and durably, or stays what it was."""

import errno
import json
import os
from pathlib import Path

import pytest

from ebft_mega.io.durable import sync_directory, write_bytes, write_json


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_json(path, {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2}, shared=True)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_what_is_no_json_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "status.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shared", "temporary"), [(False, ".x.tmp"), (True, f".x.{os.getpid()}.tmp")], ids=["alone", "shared"]
)
def test_contents_are_synced_before_they_have_their_name_and_the_name_after(tmp_path, monkeypatch, shared, temporary):
    done = []
    sync, replace = os.fsync, os.replace

    def traced_sync(descriptor):
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        sync(descriptor)

    def traced_replace(old, new):
        done.append(f"rename to {Path(new).relative_to(tmp_path)}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(os, "replace", traced_replace)
    write_bytes(tmp_path / "x", b"abc", shared)
    assert done == [f"sync {temporary}", "rename to x", "sync ."]
    assert (tmp_path / "x").read_bytes() == b"abc"


@pytest.mark.parametrize(("number", "is_fatal"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_directories_is_no_failure(tmp_path, monkeypatch, number, is_fatal):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if is_fatal:
        with pytest.raises(OSError, match="Input/output"):
            sync_directory(tmp_path)
    else:
        sync_directory(tmp_path)
