"""A file is replaced as a whole and durably, or stays what it was."""

import ast
import errno
import json
import os
from pathlib import Path

import pytest

import ebft_mega
from ebft_mega.io.durable import sync_directory, write_bytes, write_json

PACKAGE = Path(ebft_mega.__file__).parent


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


@pytest.mark.parametrize("name", ["status.json", ".status.json.tmp"])
@pytest.mark.parametrize("planted", ["link", "hard link", "pipe"])
def test_nothing_planted_is_written_through_or_waited_for(tmp_path, name, planted):
    (tmp_path / "out").mkdir()
    victim, path = tmp_path / "victim", tmp_path / "out" / "status.json"
    victim.write_text("keep")
    place = path.with_name(name)
    if planted == "pipe":
        os.mkfifo(place)
        reader = os.open(place, os.O_RDWR)  # so that nobody could wait for one
    elif planted == "link":
        place.symlink_to(victim)
    else:
        place.hardlink_to(victim)
    write_bytes(path, b"new")
    if planted == "pipe":
        os.close(reader)
    assert victim.read_text() == "keep" and path.read_bytes() == b"new" and not path.is_symlink()
    assert list(path.parent.iterdir()) == [path]


def test_files_of_a_run_directory_are_replaced_not_written_through():
    """Whoever copies a run directory from elsewhere copies its links, too."""
    found = []
    for room in ("lifecycle", "checkpoint", "runtime", "apps/report"):
        for file in sorted((PACKAGE / room).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    call = (node.func.attr, ast.unparse(node.args[0]) if node.args else "")
                    if call[0] in ("write_text", "write_bytes") or call == ("savefig", "path"):
                        found.append(f"{file.name}:{node.lineno}")
    assert found == []


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
