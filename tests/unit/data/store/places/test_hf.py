"""Datasets in repositories of the hub: a small server behind HF_ENDPOINT."""

import json
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ebft_mega.data.store.clients import store_client
from ebft_mega.data.store.dataset import Dataset
from ebft_mega.data.store.shard_cache import ShardCache
from ebft_mega.errors import DamagedDataError, InputError
from ebft_mega.registry.store_addresses import address_problem
from tests.unit.data.store.https_server import trusted_server
from tests.unit.data.store.places.conftest import QUICK, files_below, read_all
from tests.unit.data.store.places.scripted_server import Answer, ScriptedServer, scripted

pytestmark = pytest.mark.timeout(60)

COMMIT, LATER = 40 * "a", 40 * "b"
TOKEN = "hf_plantedToken"
ADDRESS = "hf://datasets/somebody/code/train"
FIXED = f"hf://datasets/somebody/code@{COMMIT}/train"


class Hub:
    """What a repository `somebody/code` holds, by commit, and whom it lets read."""

    def __init__(self, files: dict[str, bytes]):
        self.commits = {COMMIT: files}
        self.branches = {"main": COMMIT}
        self.is_private = False
        self.elsewhere: dict[str, str] = {}  # where files lie that are not on the server itself

    def answer(self, method: str, path: str, query: str, headers: dict[str, str]) -> Answer:
        if self.is_private and headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"X-Error-Code": "RepoNotFound"}, b"Invalid username or password."
        for prefix in ("/api/datasets/somebody/code/revision/", "/api/models/somebody/code/revision/"):
            if path.startswith(prefix):
                commit = self.branches.get(path.removeprefix(prefix))
                if commit is None:
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b""
                return 200, {}, json.dumps({"sha": commit}).encode()
        start, _, rest = path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        if start not in ("/datasets/somebody/code", "/somebody/code") or commit not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if name in self.elsewhere:
            return 302, {"Location": self.elsewhere[name]}, b""
        content = self.commits[commit].get(name)
        return (200, {}, content) if content is not None else (404, {"X-Error-Code": "EntryNotFound"}, b"")


@pytest.fixture
def hub(dataset_directory: Path) -> Hub:
    return Hub({f"train/{name}": content for name, content in files_below(dataset_directory).items()})


@pytest.fixture
def server(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    with scripted(hub.answer) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        yield server


@pytest.mark.parametrize("limit_bytes", [1 << 30, 0])
def test_a_dataset_in_a_repository_is_read_as_a_local_one(
    server: ScriptedServer, opened: Callable[..., Dataset], dataset: Dataset, limit_bytes: int
) -> None:
    remote = opened(ADDRESS, limit_bytes)
    assert read_all(pickle.loads(pickle.dumps(remote))) == read_all(dataset)
    assert remote.files.place(0) == f"{FIXED}/{dataset.manifest.shards[0].name}"
    assert "authorization" not in {name for _, _, headers in server.requests for name in headers}


def test_a_branch_is_resolved_once_and_what_is_pushed_later_changes_nothing(
    hub: Hub,
    server: ScriptedServer,
    opened: Callable[..., Dataset],
    dataset: Dataset,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    remote = opened(named := ADDRESS.replace("code/", "code@main/"), 0)
    assert f"{named} is {FIXED}" in caplog.text
    hub.commits[LATER], hub.branches["main"] = {}, LATER
    assert read_all(remote) == read_all(dataset)
    assert len([path for _, path, _ in server.requests if path.startswith("/api/")]) == 1
    assert read_all(opened(FIXED, 0)) == read_all(dataset)
    assert len([path for _, path, _ in server.requests if path.startswith("/api/")]) == 1


def test_what_is_missing(hub: Hub, server: ScriptedServer, refusal: Callable[..., str]) -> None:
    assert "train/dataset.json: dataset.json: found no such file" in refusal("hf://datasets/somebody/code/no/train")
    message = refusal("hf://datasets/somebody/code@nothing/train")
    assert (
        "hf://datasets/somebody/code@nothing/train: dataset: found HTTP status 404 (Not Found): RevisionNot" in message
    )
    message = refusal("hf://datasets/nobody/code")
    assert (
        "hf://datasets/nobody/code: dataset: found HTTP status 404 (Not Found): RepoNotFound; expected a repo"
        in message
    )
    hub.branches["main"] = "no commit"
    assert "found an answer without a commit" in refusal(ADDRESS)


def test_a_private_repository_takes_a_token(
    hub: Hub,
    server: ScriptedServer,
    refusal: Callable[..., str],
    opened: Callable[..., Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.is_private = True
    expected = "found HTTP status 401 (Unauthorized): RepoNotFound; expected a repository that HF_TOKEN"
    assert expected in refusal(ADDRESS)
    monkeypatch.setenv("HF_TOKEN", "hf_anotherToken")
    assert expected in refusal(ADDRESS)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert opened(ADDRESS).manifest.documents
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert opened(ADDRESS).manifest.documents


def test_the_token_is_not_sent_where_the_hub_redirects_to(
    hub: Hub,
    server: ScriptedServer,
    opened: Callable[..., Dataset],
    dataset: Dataset,
    tmp_path: Path,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.is_private = True
    (tmp_path / "elsewhere").mkdir()
    with trusted_server(tmp_path / "elsewhere", certificate, monkeypatch) as large_files:
        for shard in dataset.manifest.shards:
            content = hub.commits[COMMIT][f"train/{shard.name}"]
            (tmp_path / "elsewhere" / shard.name).write_bytes(content)
            hub.elsewhere[f"train/{shard.name}"] = f"{large_files.url}/{shard.name}"
        with pytest.raises(InputError) as refused:
            opened(ADDRESS)
        assert "which is neither this server nor one of data.redirect_hosts" in str(refused.value)
        transfer = replace(QUICK, redirect_hosts=(large_files.url.removeprefix("https://"),))
        assert read_all(opened(ADDRESS, 0, transfer)) == read_all(dataset)
        assert large_files.headers and not any("authorization" in headers for headers in large_files.headers)
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for _, _, headers in server.requests)


@pytest.mark.parametrize("endpoint", ["http://hub.example", "ftp://hub.example", "https://user:pass@hub", "hub"])
def test_an_endpoint_to_which_no_token_is_sent(
    endpoint: str, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    message = refusal(ADDRESS)
    assert "found no valid HF_ENDPOINT; expected an https address" in message
    assert "pass" not in message and TOKEN not in message


def test_secrets_are_in_no_message_log_pickle_or_file(
    hub: Hub,
    server: ScriptedServer,
    opened: Callable[..., Dataset],
    cache: ShardCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    remote = opened(ADDRESS)
    read_all(remote)
    written = [pickle.dumps(remote).decode("latin-1")]
    name = f"train/{remote.manifest.shards[0].name}"
    hub.elsewhere[name] = "https://elsewhere.example/file?X-Signature=planted"
    client = store_client(ADDRESS, "x", QUICK, {})
    attempts: list[Callable[[], object]] = [
        lambda: opened(ADDRESS),
        lambda: opened("hf://datasets/nobody/code"),
        lambda: client.size(f"{FIXED}/{name}"),
        lambda: b"".join(client.chunks(f"{FIXED.removesuffix('/train')}/{name}", 0, 9, 9)),
    ]
    for attempt in attempts:
        with pytest.raises((InputError, DamagedDataError)) as caught:
            attempt()
        written += ["".join(traceback.format_exception(caught.value)), pickle.dumps(caught.value).decode("latin-1")]
    written += [caplog.text, *capfd.readouterr()]
    written += [data.decode("latin-1") for data in files_below(cache.directory).values()]
    for secret in (TOKEN, "planted", "authorization"):
        assert not any(secret.lower() in text.lower() for text in written)


@pytest.mark.parametrize(
    "address",
    [
        *("hf:x", "hf://", "hf://name", "hf://datasets/name", "hf://spaces/a/b", "hf://datasets/a/b@/x"),
        *("hf://hf_secret@datasets/a/b", "hf://datasets/a/b/../c", "hf://datasets/a/b?token=secret", "hf://a/b@x y"),
    ],
)
def test_addresses_that_are_none(address: str, refusal: Callable[..., str]) -> None:
    assert address_problem(address)
    assert "secret" not in refusal(address)
