"""Paths of a configuration: absolute in memory, expanded once, written so that they are read back."""

from pathlib import Path
from typing import get_args

import pytest

from ebft_mega.config.input_keys import SourceConfig
from ebft_mega.config.load import load_config, resolved_yaml
from ebft_mega.config.schema import all_keys, path_keys
from ebft_mega.errors import ConfigError
from ebft_mega.io.expanded_paths import REPOSITORY

TEXT = """\
output_dir: {place}/out
model: {{init_from: "{place}/model"}}
data:
  sequence_length: 128
  tokenizer: {place}/tokenizer
  cache: {place}/cache
  sources:
    a: {{shards: "{place}/a"}}
    b: {{shards: "https://host/~x/$y"}}
evaluation: {{shards: "{place}/held-out"}}
ebft: {{feature_model: "{place}/features"}}
checkpoint: {{resume: "{place}/run"}}
train: {{max_steps: 5}}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a text from another working directory."""
    monkeypatch.chdir(tmp_path)

    def load_text(text, *overrides):
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return load_config("c.yaml", overrides)

    return load_text


def paths_of(config):
    data, sources = config.data, config.data.named_sources
    places = [config.output_dir, config.model.init_from, data.tokenizer, data.cache, sources["a"].shards]
    places += [config.evaluation.shards, config.ebft.feature_model, Path(config.checkpoint.resume)]
    assert sources["b"].shards == "https://host/~x/$y"
    return places


def has_path(annotation):
    return annotation is Path or any(has_path(part) for part in get_args(annotation))


def test_every_key_of_a_path_is_one():
    fields = all_keys() | {f"data.sources.*.{name}": field for name, field in SourceConfig.model_fields.items()}
    of_paths = [name for name, field in fields.items() if has_path(field.annotation)]
    assert sorted([*of_paths, "checkpoint.resume"]) == sorted(path_keys())


NAMES = ("out", "model", "tokenizer", "cache", "a", "held-out", "features", "run")


@pytest.mark.parametrize(
    ("place", "start"),
    [("here", REPOSITORY / "here"), ("~/x", "/home/me/x"), ("$DATA/x", "/d/x"), ("${DATA}", "/d"), ("/y", "/y")],
)
def test_paths_start_at_the_repository(load, monkeypatch, place, start):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/d")
    config = load(TEXT.format(place=place))
    assert paths_of(config) == [Path(start) / name for name in NAMES]
    again = load(resolved_yaml(config))
    assert paths_of(again) == paths_of(config)
    monkeypatch.delenv("DATA")  # what a run has written does not depend on it
    assert load(resolved_yaml(config)).model_dump() == config.model_dump()
    wanted = f"output_dir: {'here/out' if place == 'here' else f'{start}/out'}\n"
    assert wanted in resolved_yaml(config)


def test_overrides_are_expanded(load, monkeypatch):
    monkeypatch.setenv("DATA", "/d")
    config = load(TEXT.format(place="x"), "output_dir=$DATA/o", "data.sources.a.shards=$DATA/s", "data.cache=c")
    assert (config.output_dir, config.data.sources["a"].shards) == (Path("/d/o"), Path("/d/s"))
    assert config.data.cache == REPOSITORY / "c"


@pytest.mark.parametrize("name", ["$$DATA", "./~x", "./auto", "./never", "./a:b", "a b", "$$", "./~"])
def test_a_name_that_means_something_else_is_written_back(load, name):
    config = load(TEXT.format(place="x"), f"checkpoint.resume={name}", f"output_dir={name}", f"data.cache={name}")
    again = load(resolved_yaml(config))
    assert again.model_dump() == config.model_dump()
    assert config.output_dir == REPOSITORY / name.replace("$$", "$") == Path(config.checkpoint.resume)


def test_the_default_starts_at_the_repository_too(load):
    text = "output_dir: o\nmodel: {init_from: m}\ndata: {shards: s, sequence_length: 128}\ntrain: {max_steps: 5}\n"
    assert load(text).data.cache == REPOSITORY / "runs" / "cache"
    assert "  cache: runs/cache\n" in resolved_yaml(load(text)) and "  resume: auto\n" in resolved_yaml(load(text))


def test_what_is_not_set_is_named_with_its_line_and_the_nearest_variable(load, monkeypatch, tmp_path):
    monkeypatch.setenv("SCRATCH_PLACE", "/x")
    with pytest.raises(ConfigError) as refused:
        load(TEXT.format(place="$SCRACH_PLACE"), "evaluation.shards=${oops")
    lines = [str(problem) for problem in refused.value.problems]
    assert len(lines) == 8 and refused.value.exit_code == 2
    assert lines[0] == (
        f"{tmp_path}/c.yaml:1: output_dir: found '$SCRACH_PLACE/out', where SCRACH_PLACE is not set; expected a "
        "variable that is set ($$ stands for a dollar sign). Did you mean '$SCRATCH_PLACE'?"
    )
    assert f"{tmp_path}/c.yaml:8: data.sources.a.shards: found '$SCRACH_PLACE/a', where" in lines[4]
    assert lines[-1] == (
        "--set: evaluation.shards: found '${oops'; expected $NAME or ${NAME} for a variable ($$ stands for a dollar "
        "sign)"
    )


def test_a_variable_of_bytes_that_no_configuration_can_hold(load, monkeypatch):
    monkeypatch.setenv("DATA", "/d\udcff")
    with pytest.raises(ConfigError) as refused:
        load(TEXT.format(place="x"), "data.cache=$DATA")
    assert [str(problem) for problem in refused.value.problems] == [
        "--set: data.cache: found '$DATA', which is '/d\\udcff'; expected a path in UTF-8, as configurations are"
    ]
