"""What of the configuration decides how a dataset is opened."""

import pytest

from ebft_mega.config.schema import DataConfig, EvaluationConfig, ModelConfig, RunConfig, TrainConfig
from ebft_mega.extension.store import Transfer
from ebft_mega.planning import datasets


@pytest.mark.parametrize("hosts", [(), ("cdn.example:8443", "*.cdn.example")])
def test_redirects_lead_to_the_hosts_that_the_configuration_names(
    hosts: tuple[str, ...], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[object, Transfer]] = []
    monkeypatch.setattr(
        datasets, "open_dataset", lambda place, cache, *, on_error, transfer, options: opened.append((place, transfer))
    )
    url = "https://data.example/train"
    data = DataConfig(shards=url, sequence_length=128, redirect_hosts=hosts, cache=str(tmp_path))
    config = RunConfig(
        output_dir="runs/a",
        model=ModelConfig(init_from="runs/init"),
        data=data,
        evaluation=EvaluationConfig(shards=url),
        train=TrainConfig(max_steps=1),
    )
    for key in ("data.shards", "evaluation.shards"):
        datasets.open_place(config, key, url)
    assert opened == [(url, Transfer(redirect_hosts=hosts))] * 2
