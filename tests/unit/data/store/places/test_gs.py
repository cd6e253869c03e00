"""Datasets in buckets of Google Cloud Storage: an emulator, and answers that the real server gives."""

import json
import pickle
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import google.auth
import google.auth.exceptions
import pytest
from google.oauth2.credentials import Credentials

from ebft_mega.data.store import clients
from ebft_mega.data.store.clients import store_client
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.places import gs
from ebft_mega.errors import DamagedDataError
from ebft_mega.registry.store_addresses import address_problem
from tests.unit.data.store.places.conftest import QUICK, files_below, read_all
from tests.unit.data.store.places.scripted_server import scripted

pytestmark = pytest.mark.timeout(60)

ADDRESS = "gs://data/code/train"
TOKEN = "planted-token"
CREDENTIALS = "credentials that may read it (GOOGLE_APPLICATION_CREDENTIALS"


@pytest.fixture(scope="module")
def emulator() -> Iterator[str]:
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    host, port = server._api._httpd.server_address[:2]
    yield f"http://{host}:{port}"
    server.stop()


def send(url: str, content: bytes, kind: str) -> None:
    request = urllib.request.Request(url, content, {"Content-Type": kind}, method="POST")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


def put(emulator: str, name: str, content: bytes) -> None:
    place = f"{emulator}/upload/storage/v1/b/data/o?uploadType=media&name={name}"
    send(place, content, "application/octet-stream")


@pytest.fixture(scope="module")
def bucket(emulator: str, dataset_directory: Path) -> str:
    """The server of a bucket `data` with a dataset in `code/train`."""
    send(f"{emulator}/storage/v1/b?project=p", json.dumps({"name": "data"}).encode(), "application/json")
    for name, content in files_below(dataset_directory).items():
        put(emulator, f"code/train/{name}", content)
    return emulator


def test_a_dataset_in_a_bucket_is_read_as_a_local_one(
    bucket: str, opened: Callable[..., Dataset], dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.removeprefix("http://"))
    assert read_all(opened(ADDRESS)) == read_all(dataset)
    remote = pickle.loads(pickle.dumps(opened(ADDRESS, 0)))
    assert read_all(remote) == read_all(dataset)
    assert remote.files.place(0) == f"{ADDRESS}/{dataset.manifest.shards[0].name}"


def test_what_is_missing(bucket: str, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket)
    assert "gs://data/nothing/dataset.json: dataset.json: found no such file" in refusal("gs://data/nothing")
    assert "gs://nobody/train/dataset.json: dataset.json: found " in refusal("gs://nobody/train")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://user:secret@here")
    assert "found no valid STORAGE_EMULATOR_HOST" in refusal(ADDRESS) and "secret" not in refusal(ADDRESS)


def test_contents_that_change_are_asked_for_by_their_generation(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket, "changing", b"0123456789")
    state = {"generation": "17"}

    def answer(method: str, path: str, query: str, headers: dict[str, str]):
        if "alt=media" not in query:
            return 200, {}, json.dumps({"size": "10", "generation": state["generation"]}).encode()
        asked = query.partition("ifGenerationMatch=")[2]
        return (200, {}, b"0123456789") if asked in ("", state["generation"]) else (412, {}, b"{}")

    with scripted(answer) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        client = store_client(ADDRESS, "dataset", QUICK, {})
        place = f"{ADDRESS}/changing"
        assert (client.size(place), client.version(place)) == (10, "17")
        assert b"".join(client.chunks(place, 2, 5, 10)) == b"234"
        state["generation"] = "18"
        with pytest.raises(DamagedDataError, match=f"^{place}: offset 2: expected the object as it was at the start"):
            b"".join(pickle.loads(pickle.dumps(client)).chunks(place, 2, 5, 10))


@pytest.mark.parametrize(
    ("status", "error", "found", "expected"),
    [
        (401, {"errors": [{"reason": "required"}]}, "HTTP status 401 (Unauthorized): required", CREDENTIALS),
        (403, {"errors": [{"reason": "forbidden"}]}, "HTTP status 403 (Forbidden): forbidden", CREDENTIALS),
        (404, {"message": "The specified bucket does not exist."}, "(Not Found): noSuchBucket", "a bucket"),
        (429, {"errors": [{"reason": "rateLimitExceeded"}]}, "HTTP status 429", "at most 99 bytes"),
    ],
)
def test_refusals_are_named_in_the_server_s_words(
    status: int, error: dict[str, object], found: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"message": "someone@example.com does not have access"} | error
    with scripted(lambda *asked: (status, {}, json.dumps({"error": more}).encode())) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        client = store_client(ADDRESS, "dataset", QUICK, {})
        with pytest.raises(DamagedDataError) as caught:
            client.small_file(f"{ADDRESS}/file", 99)
        assert found in caught.value.found and caught.value.expected.startswith(expected)
        assert "example.com" not in str(caught.value)
        if status == 403:
            assert client.small_file(f"{ADDRESS}/file", 99, absent_if_forbidden=True) is None
        with pytest.raises(DamagedDataError):
            client.size(f"{ADDRESS}/file")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"size": "x"}', b'{"size": "-1"}', b'{"size": "1", "generation": "x&y"}']
)
def test_an_answer_that_describes_no_object(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(lambda *asked: (200, {}, content)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        with pytest.raises(DamagedDataError, match="an answer that is no description of an object"):
            store_client(ADDRESS, "dataset", QUICK, {}).size(f"{ADDRESS}/file")


def test_without_credentials_or_the_extra(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = f"{ADDRESS}/dataset.json: dataset.json: found no credentials; expected {CREDENTIALS}"
    assert found in refusal(ADDRESS)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")
    assert found in refusal(ADDRESS)
    monkeypatch.setattr(clients, "_is_installed", lambda module: False)
    assert refusal(ADDRESS).endswith("which gs:// needs; expected pip install 'ebft-mega[gs]'")


def test_the_token_goes_to_google_s_server_and_into_no_message_or_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(google.auth, "default", lambda **arguments: (Credentials(TOKEN), None))
    client = gs.GsClient(QUICK, anonymous=False)
    asked = client._asked("GET", f"{ADDRESS}/c%d")
    assert asked.url == "https://storage.googleapis.com/storage/v1/b/data/o/code%2Ftrain%2Fc%25d?alt=media"
    assert asked.headers == {"authorization": f"Bearer {TOKEN}"}
    assert TOKEN.encode() not in pickle.dumps(client)
    assert gs.GsClient(QUICK, anonymous=True)._asked("GET", f"{ADDRESS}/c").headers == {}

    def refuse(**arguments: object) -> None:
        raise google.auth.exceptions.RefreshError(f"invalid_grant of {TOKEN}", {"refresh_token": TOKEN})

    monkeypatch.setattr(google.auth, "default", refuse)
    with pytest.raises(DamagedDataError) as caught:
        gs.GsClient(QUICK, anonymous=False).size(f"{ADDRESS}/file")
    assert "found credentials that give no token: RefreshError" in str(caught.value)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "address", ["gs:data", "gs://", "gs://user@data/x", "gs://data/x?generation=1", "gs://data/./x"]
)
def test_addresses_that_are_none(address: str, refusal: Callable[..., str]) -> None:
    assert address_problem(address) and refusal(address)
