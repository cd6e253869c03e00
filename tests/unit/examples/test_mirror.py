"""The example of a store on a folder with known files."""

import pytest

from ebft_mega.errors import DamagedDataError
from ebft_mega.extension.store import DEFAULT_TRANSFER


@pytest.fixture
def store(entry_of_example, tmp_path, monkeypatch):
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "a.tar").write_bytes(bytes(range(100)))
    monkeypatch.setenv("MIRROR_FOLDER", str(tmp_path))
    return entry_of_example("mirror")()


def test_files_and_ranges(store):
    client, url = store.client(DEFAULT_TRANSFER), "mirror://team/a.tar"
    assert client.size(url) == 100
    assert b"".join(client.chunks(url, 10, 90, 100)) == bytes(range(10, 90))
    assert client.small_file(url, 100) == bytes(range(100))
    assert client.small_file("mirror://team/b.tar", 100) is None


def test_what_is_not_as_expected(store):
    client, url = store.client(DEFAULT_TRANSFER), "mirror://team/a.tar"
    with pytest.raises(DamagedDataError, match="expected 99 bytes, found 100 bytes"):
        list(client.chunks(url, 0, 99, 99))
    with pytest.raises(DamagedDataError, match="expected at most 50 bytes"):
        client.small_file(url, 50)
    with pytest.raises(DamagedDataError, match="mirror://team/b.tar: expected a file, found no such file"):
        client.size("mirror://team/b.tar")


@pytest.mark.parametrize(
    "address", ["mirror://team/../secret", "mirror://user@team", "mirror:///etc", "mirror://a?b=c"]
)
def test_addresses_that_lead_elsewhere(store, address):
    assert store.address_problem("mirror://team/python-3.11/") is None
    assert store.address_problem(address)
