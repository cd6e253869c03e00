"""A local https server for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.data.store.https_server import FileServer, make_certificate, trusted_server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server(tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with trusted_server(tmp_path / "served", certificate, monkeypatch) as server:
        yield server
