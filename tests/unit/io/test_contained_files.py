"""Files of a directory are read only where they lie in it: every way out of one, every kind of file, and races."""

import os
import socket
from pathlib import Path

import pytest

from ebft_mega.errors import InputError
from ebft_mega.io import contained_files
from ebft_mega.io.contained_files import LeavesDirectoryError, leaves, read_contained, read_contained_bytes

MOST = 1000
SECRET = b"root:x:0:0\n"


@pytest.fixture
def directory(tmp_path):
    """A directory beside a secret."""
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(SECRET)
    directory = tmp_path / "model"
    (directory / "inner").mkdir(parents=True)
    (directory / "plain").write_bytes(b"own")
    (directory / "inner" / "plain").write_bytes(b"inner")
    return directory


def link(directory, name, target):
    (directory / name).symlink_to(target)
    return name


@pytest.mark.parametrize(
    "target",
    [
        *("../secret", "/etc/passwd", "/proc/self/environ", "/dev/zero", "../outside/secret", "../gone"),
        *("inner/../../secret", "../model-beside/x"),
    ],
)
def test_a_link_that_leaves_is_refused(directory, target):
    name = link(directory, "merges.txt", target)
    assert leaves(directory, directory / name) == Path(os.path.realpath(directory / target))
    with pytest.raises(LeavesDirectoryError, match="outside"):
        read_contained_bytes(directory, name, MOST)


def test_a_link_of_links_that_leaves_at_last_is_refused(directory):
    link(directory, "second", "../secret")
    assert leaves(directory, directory / link(directory, "first", "second"))


def test_a_folder_on_the_way_is_not_left_through_either(directory):
    link(directory, "additional_chat_templates", "../outside")
    assert leaves(directory, directory / "additional_chat_templates" / "secret")
    with pytest.raises(LeavesDirectoryError):
        read_contained_bytes(directory, "additional_chat_templates/secret", MOST)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "inner/../../secret", "", ".", "inner/.."])
def test_names_that_are_not_below_the_directory_are_refused(directory, name):
    with pytest.raises(LeavesDirectoryError):
        read_contained_bytes(directory, name, MOST)


def test_what_stays_inside_is_read(directory, tmp_path):
    link(directory, "relative", "inner/plain")
    link(directory, "absolute", directory / "plain")
    link(directory, "folder", "inner")
    (tmp_path / "way").symlink_to(directory)
    for base in (directory, tmp_path / "way"):
        assert read_contained_bytes(base, "plain", MOST) == b"own"
        assert read_contained_bytes(base, "relative", MOST) == b"inner"
        assert read_contained_bytes(base, "absolute", MOST) == b"own"
        assert read_contained_bytes(base, "folder/plain", MOST) == b"inner"
        assert leaves(base, base / "absolute") is None


def hub(tmp_path, blob="a" * 64):
    """A snapshot of the hub's cache with one link to a blob."""
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / blob).write_bytes(b"blob")
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / "deep").mkdir(parents=True)
    (snapshot / "config.json").symlink_to(f"../../blobs/{blob}")
    (snapshot / "deep" / "inner.json").symlink_to(f"../../../blobs/{blob}")
    return snapshot


@pytest.mark.parametrize("length", [40, 64])
def test_blobs_of_the_same_hub_repository_are_read(tmp_path, length):
    snapshot = hub(tmp_path, "b" * length)
    assert read_contained_bytes(snapshot, "config.json", MOST) == b"blob"
    assert read_contained_bytes(snapshot, "deep/inner.json", MOST) == b"blob"
    assert leaves(snapshot, snapshot / "config.json") is None


def test_other_files_of_the_hubs_cache_are_outside(tmp_path):
    snapshot = hub(tmp_path)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / ("a" * 64)).write_bytes(SECRET)
    for number, target in enumerate([other / ("a" * 64), "../../refs", "../../blobs/..", "../../blobs/name"]):
        assert leaves(snapshot, snapshot / link(snapshot, str(number), target))
    blob = snapshot.parents[1] / "blobs" / ("c" * 64)
    blob.symlink_to("/etc/passwd")
    assert leaves(snapshot, snapshot / link(snapshot, "through", f"../../blobs/{blob.name}")) == Path("/etc/passwd")


def test_a_folder_that_only_looks_like_the_cache_gives_no_blobs(tmp_path):
    (tmp_path / "snapshots" / "x").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("a" * 64)).write_bytes(SECRET)
    directory = tmp_path / "snapshots" / "x"
    assert leaves(directory, directory / link(directory, "file", "../../blobs/" + "a" * 64))


def test_whatever_is_no_plain_file_is_refused_without_waiting(directory):
    os.mkfifo(directory / "fifo")
    link(directory, "to-fifo", "fifo")
    link(directory, "circle", "circle")
    link(directory, "itself", ".")
    link(directory, "dangling", "gone")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(directory / "socket"))
        found = {
            name: str(pytest.raises(OSError, read_contained_bytes, directory, name, MOST).value)
            for name in ("fifo", "to-fifo", "circle", "itself", "dangling", "inner", "socket", "plain/x")
        }
    assert "a FIFO" in found["fifo"]
    assert "a FIFO" in found["to-fifo"]
    assert "circle" in found["circle"]
    assert "a directory" in found["itself"]
    assert "a directory" in found["inner"]
    assert "a socket" in found["socket"]
    assert "No such file" in found["dangling"]
    assert "Not a directory" in found["plain/x"]


def test_names_that_no_file_can_have_are_system_errors(directory):
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(OSError):
            read_contained_bytes(directory, name, MOST)


def test_the_size_is_bounded(directory):
    (directory / "long").write_bytes(bytes(MOST + 1))
    with pytest.raises(OSError, match="more than 1000"):
        read_contained_bytes(directory, "long", MOST)
    assert len(read_contained_bytes(directory, "long", MOST + 1)) == MOST + 1


def test_a_file_without_a_size_is_bounded_by_what_is_read():
    status = Path("/proc/self")
    assert (status / "status").stat().st_size == 0
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_contained_bytes(status, "status", 10)


@pytest.mark.parametrize("name", ["plain", "inner/plain"])
def test_a_link_that_takes_the_place_of_a_checked_file_is_not_followed(directory, monkeypatch, name):
    """Swap the file, or the folder in which it is, between the check and the opening."""
    checked = contained_files._read_beneath

    def swapped(*arguments):
        place = directory / name.split("/")[0]
        place.rename(directory / "away")
        place.symlink_to("../secret" if place.name == name else "../outside")
        (directory.parent / "outside" / "plain").write_bytes(SECRET)
        return checked(*arguments)

    monkeypatch.setattr(contained_files, "_read_beneath", swapped)
    with pytest.raises(OSError):
        read_contained_bytes(directory, name, MOST)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["a link", "a FIFO", "a longer file"])
def test_what_comes_between_the_look_and_the_opening_is_not_read(directory, monkeypatch, kind):
    look = os.stat

    def swapped(*arguments, **options):
        found = look(*arguments, **options)
        if options.get("dir_fd") is not None:
            (directory / "plain").unlink()
            if kind == "a link":
                (directory / "plain").symlink_to("../secret")
            elif kind == "a FIFO":
                os.mkfifo(directory / "plain")
            else:
                (directory / "plain").write_bytes(bytes(MOST + 1))
        return found

    monkeypatch.setattr(contained_files.os, "stat", swapped)
    with pytest.raises(OSError):
        read_contained_bytes(directory, "plain", MOST)


def test_no_descriptor_is_left_open(directory):
    before = len(os.listdir("/proc/self/fd"))
    for name in ("plain", "inner/plain", "inner", "gone", "inner/gone/x"):
        try:
            read_contained_bytes(directory, name, MOST)
        except OSError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_error_for_users_says_what_to_do(directory):
    link(directory, "config.json", "/etc/passwd")
    with pytest.raises(InputError) as caught:
        read_contained(directory, "config.json", MOST, "a model's config.json")
    (problem,) = caught.value.problems
    assert problem.where == str(directory / "config.json")
    assert "/etc/passwd" in problem.found
    assert "copy it there" in problem.expected
    with pytest.raises(InputError, match="no such file"):
        read_contained(directory, "gone", MOST, "a file")
    assert read_contained(directory, "plain", MOST, "a file") == b"own"
