"""Datasets in buckets of S3: a server of moto, and answers that real servers give."""

import logging
import pickle
import shutil
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from ebft_mega.data.store import clients
from ebft_mega.data.store.clients import store_client
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.opening import remote_absence
from ebft_mega.data.store.shard_cache import ShardCache
from ebft_mega.errors import DamagedDataError, InputError
from ebft_mega.registry.store_addresses import address_problem
from tests.unit.data.store.places.conftest import QUICK, files_below, read_all
from tests.unit.data.store.places.scripted_server import Answer, scripted

pytestmark = pytest.mark.timeout(120)

KEY_ID, SECRET, TOKEN = "AKIAPLANTEDKEYID", "planted/secret+key", "planted//session==token"
ADDRESS = "s3://data/code/train"
CREDENTIALS = "credentials that may read it (AWS_PROFILE"


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def objects(moto: str, dataset_directory: Path) -> Any:
    """A client of a bucket `data`."""
    import boto3

    names = {"aws_access_key_id": "x", "aws_secret_access_key": "y", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=moto, **names)
    client.create_bucket(Bucket="data")
    return client


@pytest.fixture
def bucket(objects: Any, moto: str, credentials: None, dataset_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client, with a dataset in `code/train`, and the bucket's server as the one to ask."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    for name, content in files_below(dataset_directory).items():
        objects.put_object(Bucket="data", Key=f"code/train/{name}", Body=content)
    return objects


@pytest.mark.parametrize("limit_bytes", [1 << 30, 0])
def test_a_dataset_in_a_bucket_is_read_as_a_local_one(
    bucket: Any, opened: Callable[..., Dataset], dataset: Dataset, limit_bytes: int
) -> None:
    remote = opened(ADDRESS, limit_bytes)
    assert read_all(remote) == read_all(dataset)
    assert remote.files.place(0) == f"{ADDRESS}/{dataset.manifest.shards[0].name}"


def test_a_forked_process_reads_it_too(bucket: Any, opened: Callable[..., Dataset], dataset: Dataset) -> None:
    """As workers of the loader do: with what the parent has used, which is the parent's alone."""
    remote = opened(ADDRESS, 0)
    remote.tokens(0)
    here, there = get_context("fork").Pipe(duplex=False)
    get_context("fork").Process(target=lambda: there.send(read_all(remote)), daemon=True).start()
    assert here.poll(60) and here.recv() == read_all(dataset)
    assert read_all(remote) == read_all(dataset)


def test_an_object_that_changes_under_a_run_is_named(
    bucket: Any, opened: Callable[..., Dataset], dataset: Dataset
) -> None:
    """Of the same size, so that only the ETag tells."""
    remote = opened(ADDRESS, 0)
    name = dataset.manifest.shards[0].name
    content = bucket.get_object(Bucket="data", Key=f"code/train/{name}")["Body"].read()
    bucket.put_object(Bucket="data", Key=f"code/train/{name}", Body=content[::-1])
    for copy in (remote, pickle.loads(pickle.dumps(remote))):
        with pytest.raises(DamagedDataError) as caught:
            copy.tokens(0)
        assert str(caught.value).startswith(f"{ADDRESS}/{name}: offset ")
        assert "expected the object as it was at the start, found HTTP status 412" in str(caught.value)


def test_a_bucket_or_a_dataset_that_is_missing(bucket: Any, refusal: Callable[..., str]) -> None:
    message = refusal("s3://nobody-has-this/train")
    assert message.startswith("s3://nobody-has-this/train/dataset.json: dataset.json: found HTTP status 404")
    assert message.endswith("NoSuchBucket; expected a bucket")
    assert "found no such file; expected the manifest" in refusal("s3://data/code/tran")


def test_a_missing_object_is_named(bucket: Any, refusal: Callable[..., str], dataset: Dataset) -> None:
    name = dataset.manifest.shards[1].name
    bucket.delete_object(Bucket="data", Key=f"code/train/{name}")
    assert f"{ADDRESS}/{name}: {name}: found HTTP status 404 (Not Found)" in refusal(ADDRESS)


def test_without_credentials(
    bucket: Any, refusal: Callable[..., str], opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    assert f"{ADDRESS}/dataset.json: dataset.json: found no credentials; expected {CREDENTIALS}" in refusal(ADDRESS)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "found no such profile as AWS_PROFILE names" in refusal(ADDRESS)
    monkeypatch.delenv("AWS_PROFILE")
    assert "found HTTP status 403" in refusal(ADDRESS, s3={"anonymous": True})
    for page in bucket.list_objects_v2(Bucket="data")["Contents"]:
        bucket.put_object_acl(Bucket="data", Key=page["Key"], ACL="public-read")
    assert opened(ADDRESS, s3={"anonymous": True}).manifest.documents


def test_without_the_extra_one_line_says_what_to_install(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_is_installed", lambda module: False)
    found = f"{ADDRESS}: address: found no s3fs, which s3:// needs"
    assert refusal(ADDRESS) == f"{found}; expected pip install 'ebft-mega[s3]'"
    assert "no s3fs" in str(remote_absence(ADDRESS, QUICK))


def error_answer(status: int, code: str, more: str = "", headers: dict[str, str] | None = None) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>for {KEY_ID}</Message>{more}</Error>"
    return status, headers or {}, body.encode()


REFUSALS = [
    (error_answer(403, "AccessDenied"), "HTTP status 403 (Forbidden): AccessDenied", CREDENTIALS),
    (error_answer(403, "SignatureDoesNotMatch"), "HTTP status 403 (Forbidden): SignatureDoesNotMatch", CREDENTIALS),
    (error_answer(400, "ExpiredToken"), "HTTP status 400 (Bad Request): ExpiredToken", CREDENTIALS),
    (
        error_answer(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-3"}),
        "PermanentRedirect: a bucket of eu-west-3",
        "AWS_REGION=eu-west-3",
    ),
    (
        error_answer(400, "AuthorizationQueryParametersError", "<Region>eu-west-3</Region>"),
        "AuthorizationQueryParametersError: a bucket of eu-west-3",
        "AWS_REGION=eu-west-3",
    ),
    (error_answer(301, "PermanentRedirect"), "a bucket of another region", "AWS_REGION with the region of the bucket"),
    (error_answer(503, "SlowDown"), "HTTP status 503 (Service Unavailable) (attempt 2 of 2)", "at most 99 bytes"),
]


def test_refusals_are_named_in_the_server_s_words(credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run as in mid-run, and a forbidden file is missing only where the server denies access to it alone."""
    place = f"{ADDRESS}/file"
    with scripted(lambda *asked: answers[0]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        client = store_client(ADDRESS, "dataset", QUICK, {})
        for answer, found, expected in REFUSALS:
            answers = [answer]
            with pytest.raises(DamagedDataError) as caught:
                client.small_file(place, 99)
            assert found in caught.value.found and caught.value.expected.startswith(expected)
            assert str(caught.value).startswith(f"{place}: ") and KEY_ID not in str(caught.value)
            with pytest.raises(DamagedDataError):
                b"".join(client.chunks(place, 5, 9, 9))
            if "AccessDenied" in found:
                assert client.small_file(place, 99, absent_if_forbidden=True) is None
            else:
                with pytest.raises(DamagedDataError):
                    client.small_file(place, 99, absent_if_forbidden=True)


def test_where_listing_is_refused_a_forbidden_file_is_a_missing_one(
    credentials: None,
    opened: Callable[..., Dataset],
    dataset_directory: Path,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As buckets answer for what is not there, to those who may read objects and not list them."""
    served = files_below(dataset_directory)

    def answer(method: str, path: str, query: str, headers: dict[str, str]):
        content = served.get(path.removeprefix("/data/code/train/"))
        return (200, {}, content) if content is not None else error_answer(403, "AccessDenied")

    with scripted(answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert read_all(opened(ADDRESS)) == read_all(dataset)
        assert any("/tokenizer/" in path and asked == "GET" for asked, path, _ in server.requests)


def test_an_endpoint_that_is_none(
    credentials: None, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "what:ever@here")
    message = refusal(ADDRESS)
    assert "no valid AWS_ENDPOINT_URL" in message and "ever" not in message


@pytest.mark.parametrize(
    "address",
    [
        "s3:data",
        "s3://",
        "s3:///x",
        "s3://key:secret@data/x",
        "s3://key@data/x",
        "s3://data/x?versionId=secret",
        "s3://data/x#secret",
        "s3://data/a b",
        "s3://data/../x",
        "s3://data//x",
        "s3://x",
    ],
)
def test_addresses_that_are_none(address: str, refusal: Callable[..., str]) -> None:
    assert address_problem(address)
    assert "secret" not in refusal(address).replace("a user", "")


def test_secrets_are_in_no_message_log_pickle_or_file(
    bucket: Any,
    opened: Callable[..., Dataset],
    cache: ShardCache,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the credentials nor signed addresses, with all logs of all libraries shown."""
    caplog.set_level(logging.DEBUG)
    written = []
    remote = opened(ADDRESS)
    read_all(remote)
    written.append(pickle.dumps(remote).decode("latin-1"))
    bucket.delete_object(Bucket="data", Key=f"code/train/{remote.manifest.shards[0].name}")
    shutil.rmtree(cache.directory / "shards")
    attempts: list[Callable[[], object]] = [
        lambda: opened(ADDRESS),
        lambda: opened("s3://nobody-has-this/train"),
        lambda: read_all(pickle.loads(pickle.dumps(opened(ADDRESS, 0)))),
        lambda: store_client(ADDRESS, "x", QUICK, {}).size(f"{ADDRESS}/nothing"),
    ]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for attempt in attempts:
        with pytest.raises((InputError, DamagedDataError)) as caught:
            attempt()
        written += ["".join(traceback.format_exception(caught.value)), pickle.dumps(caught.value).decode("latin-1")]
    written += [
        caplog.text,
        *capfd.readouterr(),
        *(data.decode("latin-1") for data in files_below(cache.directory).values()),
    ]
    for secret in (KEY_ID, SECRET, TOKEN, "X-Amz", "Signature", "Authorization"):
        assert not any(secret.lower() in text.lower() for text in written)
