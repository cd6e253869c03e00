"""Models in stores are copied into the cache: the files of a model and no others, once, and never changed."""

import hashlib
import json
import pickle
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ebft_mega.checkpoint.describing_files import TOKENIZER_NAMES
from ebft_mega.config.load import load_config, resolved_yaml
from ebft_mega.config.paths import StoredModel
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.store import model_copies
from ebft_mega.data.store.model_copies import DESCRIBING_NAMES, with_local_models
from ebft_mega.errors import ConfigError, InputError
from ebft_mega.planning.absent_inputs import absent_inputs, models_to_download
from tests.unit.data.store.places.conftest import environment, files_below
from tests.unit.data.store.places.scripted_server import Answer, ScriptedServer, scripted

__all__ = ["environment"]

pytestmark = pytest.mark.timeout(60)

ADDRESS = "hf://somebody/tiny"
WEIGHTS = bytes(range(256)) * 4000
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
}
MODEL["model.safetensors.index.json"] = json.dumps(
    {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
).encode()
OTHERS = {"pytorch_model.bin": b"pickle", "modeling_tiny.py": b"code", "README.md": b"", "extra.safetensors": b"x"}
CONFIG = """\
output_dir: {folder}/out
model: {{init_from: {model}}}
data: {{shards: {folder}/data, sequence_length: 128, cache: {folder}/cache}}
train: {{max_steps: 1}}
"""


class Repository:
    def __init__(self) -> None:
        self.commit = 40 * "a"
        self.files = MODEL | OTHERS

    def answer(self, method: str, path: str, query: str, headers: dict[str, str]) -> Answer:
        if path.startswith("/api/models/somebody/tiny/revision/"):
            return 200, {}, json.dumps({"sha": self.commit}).encode()
        content = self.files.get(path.removeprefix(f"/somebody/tiny/resolve/{self.commit}/"))
        return (200, {}, content) if content is not None else (404, {}, b"")


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def server(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    with scripted(repository.answer) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def configured(tmp_path: Path) -> Callable[[str], RunConfig]:
    def configure(model: str = ADDRESS) -> RunConfig:
        (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path, model=model))
        return load_config(tmp_path / "c.yaml")

    return configure


def asked_for(server: ScriptedServer, ending: str) -> list[str]:
    return [path for method, path, _ in server.requests if method == "GET" and path.endswith(ending)]


def test_a_model_is_copied_once_and_what_is_none_of_it_never(
    server: ScriptedServer, configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = configured()
    local = with_local_models(config).model.init_from
    assert isinstance(local, StoredModel) and local.parent == tmp_path / "cache" / "models"
    assert files_below(local) == MODEL
    record = json.loads(local.with_name(f"{local.name}.json").read_text())
    assert record["address"] == f"{ADDRESS}@{40 * 'a'}"
    assert record["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in MODEL.items()}
    assert len(asked_for(server, ".safetensors")) == 2
    assert with_local_models(config).model.init_from == local
    assert len(asked_for(server, ".safetensors")) == 2
    assert not any(path.endswith((".bin", ".py", "extra.safetensors")) for _, path, _ in server.requests)


def test_processes_that_start_at_once_download_once(
    server: ScriptedServer, configured: Callable[..., RunConfig]
) -> None:
    config = configured()
    with ThreadPoolExecutor(4) as starts:
        places = {str(local.model.init_from) for local in starts.map(with_local_models, 4 * [config])}
    assert len(places) == 1 and len(asked_for(server, ".safetensors")) == 2


def test_what_is_pushed_later_is_another_copy(
    repository: Repository, server: ScriptedServer, configured: Callable[..., RunConfig]
) -> None:
    first = with_local_models(configured()).model.init_from
    repository.commit, repository.files = 40 * "b", MODEL | {"model.safetensors": WEIGHTS[::2]}
    del repository.files["model.safetensors.index.json"]
    second = with_local_models(configured()).model.init_from
    assert first is not None and second is not None and first != second
    assert files_below(first) == MODEL
    assert (second / "model.safetensors").read_bytes() == WEIGHTS[::2]


def test_a_plan_copies_the_small_files_and_says_what_a_start_downloads(
    server: ScriptedServer, configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = with_local_models(configured(), weights=False)
    planned = config.model.init_from
    assert planned is not None
    assert files_below(planned) == {name: MODEL[name] for name in MODEL if not name.endswith(".safetensors")}
    assert asked_for(server, ".safetensors") == []
    entry = models_to_download(config)["model.init_from"]
    assert entry.words.startswith(
        f"nothing: a start downloads 5 files, 0.00205 GB, of {ADDRESS}@{40 * 'a'} to {tmp_path}"
    )
    assert entry.stand_in == planned / "config.json"
    with_local_models(configured())
    assert models_to_download(with_local_models(configured(), weights=False)) == {}


def test_a_plan_without_data_asks_nobody(server: ScriptedServer, configured: Callable[..., RunConfig]) -> None:
    entry = absent_inputs(configured())["model.init_from"]
    assert entry.words == f"nothing: {ADDRESS} is not asked for its sizes; a start downloads it"
    assert server.requests == []


def refused(config: RunConfig) -> str:
    with pytest.raises(InputError) as caught:
        with_local_models(config)
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 1
    assert list((config.data.cache / "models").glob("*.incoming")) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("config.json", None, "config.json: found no such file; expected a Hugging Face model directory"),
        ("model-00002-of-00002.safetensors", None, "safetensors: found HTTP status 404 (Not Found)"),
        ("model.safetensors.index.json", b"{", "model.safetensors.index.json: found "),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "weight_map: found 0 files"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}', "found the file '../x.safe"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "x.bin"}}', "found the file 'x.bin'"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "found the file 1"),
    ],
)
def test_what_is_no_model_is_named_with_its_key(
    repository: Repository,
    server: ScriptedServer,
    configured: Callable[..., RunConfig],
    name: str,
    content: bytes | None,
    found: str,
) -> None:
    repository.files = {other: MODEL[other] for other in MODEL if other != name}
    repository.files |= {} if content is None else {name: content}
    message = refused(configured())
    assert f"c.yaml:2: model.init_from: {ADDRESS}@{40 * 'a'}/" in message and found in message


def test_a_file_that_changes_while_it_is_downloaded_is_refused(
    repository: Repository, server: ScriptedServer, configured: Callable[..., RunConfig]
) -> None:
    """A small one by its sha256; weights by their size."""
    answer = server.answer

    def changing(method: str, path: str, query: str, headers: dict[str, str]) -> Answer:
        if len(asked_for(server, name)) > times:
            return 200, {}, content
        return answer(method, path, query, headers)

    server.answer = changing
    name, times, content = "tokenizer.json", 1, MODEL["tokenizer.json"].replace(b"1.0", b"1.1")
    assert "tokenizer.json: found sha256" in refused(configured())
    name, times, content = "00002-of-00002.safetensors", 0, WEIGHTS[1:]
    assert "safetensors: found a file of 1023999 bytes; expected a file of 1024000 bytes" in refused(configured())


def test_a_disk_without_room_is_named_before_anything_is_downloaded(
    server: ScriptedServer, configured: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1_000_000))
    assert "found 0.00205 GB, and 0.001 GB free" in refused(configured())
    assert asked_for(server, ".safetensors") == []


def test_nothing_planted_in_the_cache_is_written_through(
    server: ScriptedServer, configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    local = with_local_models(configured()).model.init_from
    assert local is not None
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x" * len(MODEL["config.json"]))
    for victim, target in ((local / "config.json", tmp_path / "file"), (local, tmp_path / "folder")):
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        victim.symlink_to(target)
        assert with_local_models(configured()).model.init_from == local
        assert files_below(local) == MODEL and not victim.is_symlink()
    assert list((tmp_path / "folder").iterdir()) == []
    assert (tmp_path / "file").read_bytes() == b"x" * len(MODEL["config.json"])


def test_the_address_is_what_a_configuration_keeps(
    server: ScriptedServer, configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    for config in (configured(), with_local_models(configured())):
        assert f"init_from: {ADDRESS}\n" in resolved_yaml(config)
        copy = pickle.loads(pickle.dumps(config.model.init_from))
        assert copy == config.model.init_from and copy.address == ADDRESS
    assert configured(f"{ADDRESS}@main").model.init_from.name == "tiny"
    local = with_local_models(configured(str(tmp_path))).model.init_from
    assert local == tmp_path and not isinstance(local, StoredModel)
    for wrong in ("hf://tiny", "s3://key:secret@bucket/model", "ftp://host/model", "pipe:cat"):
        with pytest.raises(ConfigError) as caught:
            configured(f'"{wrong}"')
        assert "model.init_from: found" in str(caught.value) and "secret" not in str(caught.value)


def test_every_file_of_a_tokenizer_that_a_checkpoint_keeps_is_copied() -> None:
    assert set(TOKENIZER_NAMES) <= set(DESCRIBING_NAMES)
    assert {Path(name).suffix for name in DESCRIBING_NAMES} <= set(model_copies.LONGEST_BYTES)
