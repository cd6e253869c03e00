"""A whole run whose model and data lie in stores: the same figures as from the disk, and no secret anywhere."""

import json
import logging

import pytest

from tests.integration.conftest import launch, settings
from tests.unit.data.store.places.scripted_server import scripted

CONFIG = ["--config", "configs/tiny_cpu.yaml"]
COMMIT = 40 * "c"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYID",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key",
    "HF_TOKEN": "hf_plantedToken",
}


def files_below(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def buckets(data, monkeypatch):
    """Buckets `train` and `held-out` of a server of moto."""
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3", region_name="us-east-1")
    for bucket, directory in (("train", data.train), ("held-out", data.held_out)):
        client.create_bucket(Bucket=bucket)
        for name, content in files_below(directory).items():
            client.put_object(Bucket=bucket, Key=f"data/{name}", Body=content)
    yield
    server.stop()


@pytest.mark.slow
def test_a_run_from_stores_is_one_from_the_disk_and_shows_no_secret(data, buckets, tmp_path, monkeypatch):
    first = tmp_path / "first"
    completed = launch([*CONFIG, *settings(data, first, "train.max_steps=1", "evaluation.shards=null")], ranks=None)
    assert completed.returncode == 0, completed.stdout
    model = files_below(first / "hf")

    def answer(method, path, query, headers):
        if headers.get("authorization") != f"Bearer {SECRETS['HF_TOKEN']}":
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if path.startswith("/api/models/me/tiny/revision/main"):
            return 200, {}, json.dumps({"sha": COMMIT}).encode()
        content = model.get(path.removeprefix(f"/me/tiny/resolve/{COMMIT}/"))
        return (200, {}, content) if content is not None else (404, {"X-Error-Code": "EntryNotFound"}, b"")

    steps = ("train.max_steps=2", "model.config=null")
    local, remote, cache = tmp_path / "local", tmp_path / "remote", tmp_path / "cache"
    completed = launch([*CONFIG, *settings(data, local, *steps, f"model.init_from={first / 'hf'}")], ranks=2)
    assert completed.returncode == 0, completed.stdout
    with scripted(answer) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        stores = ("model.init_from=hf://me/tiny", "data.shards=s3://train/data", "evaluation.shards=s3://held-out/data")
        arguments = [*CONFIG, *settings(data, remote, *steps, *stores, f"data.cache={cache}", "data.workers=1")]
        planned = launch([*arguments, "--dry-run"], ranks=None)
        assert planned.returncode == 0, planned.stdout
        assert f"of hf://me/tiny@{COMMIT} to" in planned.stdout
        assert not any(path.endswith(".safetensors") and method == "GET" for method, path, _ in hub.requests)
        completed = launch(arguments, ranks=2)
        assert completed.returncode == 0, completed.stdout
        weights = [path for method, path, _ in hub.requests if method == "GET" and path.endswith(".safetensors")]
        assert len(weights) == len(set(weights)) == len([name for name in model if name.endswith(".safetensors")])
        elsewhere = settings(data, tmp_path / "no", *steps, *stores, "data.shards=s3://nobody/data")
        refused = launch([*CONFIG, *elsewhere, "--dry-run"], ranks=None)
        assert refused.returncode == 2 and "s3://nobody/data/dataset.json" in refused.stdout
    keys = ("train/loss", "train/grad_norm", "eval/feature_matching_loss")
    for one, other in zip(*((run / "metrics.jsonl").read_text().splitlines() for run in (local, remote)), strict=True):
        assert [json.loads(one).get(key) for key in keys] == [json.loads(other).get(key) for key in keys]
    assert "init_from: hf://me/tiny\n" in (remote / "config.resolved.yaml").read_text()
    written = [planned.stdout, completed.stdout, refused.stdout]
    written += [content.decode("latin-1") for folder in (remote, cache) for content in files_below(folder).values()]
    for secret in (*SECRETS.values(), "X-Amz"):
        assert not any(secret in text for text in written)
