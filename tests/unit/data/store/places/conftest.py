"""What the tests of all stores need: a clean environment, a cache, impatient limits."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.opening import open_dataset
from ebft_mega.data.store.shard_cache import ShardCache
from ebft_mega.errors import InputError
from ebft_mega.extension.store import Transfer
from tests.unit.data.store.conftest import certificate

__all__ = ["certificate"]

QUICK = Transfer(timeout_seconds=10, attempts=2, first_wait_seconds=0.001)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of whoever runs the tests, no servers of the machine's cloud, no proxies."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "HF_", "HUGGING", "CLOUDSDK_", "STORAGE_")) or "_proxy" in name.lower():
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_GCE_CHECK": "true",
        "CLOUDSDK_CONFIG": str(home / "gcloud"),
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1 << 30)


@pytest.fixture
def opened(cache: ShardCache) -> Callable[..., Dataset]:
    """Open a remote dataset with short limits."""

    def open_it(address: str, limit_bytes: int = 1 << 30, transfer: Transfer = QUICK, **options: object) -> Dataset:
        own = ShardCache(cache.directory, limit_bytes)
        return open_dataset(address, own, transfer=transfer, options=options)

    return open_it


@pytest.fixture
def refusal(opened: Callable[..., Dataset]) -> Callable[..., str]:
    """The one line that says why a remote dataset cannot be opened."""

    def refuse(address: str, **arguments: object) -> str:
        with pytest.raises(InputError) as caught:
            opened(address, **arguments)
        assert caught.value.exit_code == 2
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        return message

    return refuse


def read_all(dataset: Dataset) -> list[list[int]]:
    """The tokens of all documents."""
    return [dataset.tokens(number).tolist() for number in range(dataset.manifest.documents)]


def files_below(directory: Path) -> dict[str, bytes]:
    """The contents of all files of a folder, by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
