"""Plans without data and weights: what is absent is listed, what is there is checked, nothing is invented."""

import json
import shutil

import pytest

from ebft_mega.config.load import load_config
from ebft_mega.data.store import opening
from ebft_mega.data.store.opening import remote_absence
from ebft_mega.errors import InputError
from ebft_mega.extension.store import Transfer
from ebft_mega.lifecycle.setting_aside import Fresh, planned_standing
from ebft_mega.planning import absent_inputs as absent
from ebft_mega.planning.dry_run import describe_run
from ebft_mega.planning.run_plan import check_run, plan_of_sizes
from tests.unit.conftest import MODEL_FIELDS, write_tokenizer
from tests.unit.data.store.https_server import Fault, make_certificate, trusted_server


@pytest.fixture(autouse=True)
def published(tmp_path, monkeypatch):
    """The place of configurations of published models, with one of them."""
    folder = tmp_path / "configs" / "published"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(MODEL_FIELDS | {"eos_token_id": 0}))
    monkeypatch.setattr(absent, "MODEL_CONFIGS", folder)
    return folder


def plan_of(inputs, world_size=1, **changes):
    config = load_config(inputs.write(**changes))
    return config, check_run(config, world_size, without_data=True)


def lacking(inputs, **changes):
    """What is to be supplied: the words by key, without the folder of the inputs."""
    _, plan = plan_of(inputs, **changes)
    return {entry.key: entry.words.replace(f"{inputs.root}/", "") for entry in plan.to_be_supplied}


def refused(inputs, world_size=1, **changes):
    config = load_config(inputs.write(**changes))
    with pytest.raises(InputError) as caught:
        check_run(config, world_size, without_data=True)
    return [str(problem).replace(f"{inputs.root}/", "") for problem in caught.value.problems]


def lines_of(config, plan):
    return [" ".join(line.split()) for line in describe_run(config, plan).splitlines()]


def test_with_everything_there_the_plan_is_the_same(inputs):
    config, plan = plan_of(inputs, 2)
    assert plan == check_run(config, 2) and plan.to_be_supplied == ()
    assert "To be supplied" not in describe_run(config, plan)


def test_nothing_is_there(inputs):
    for name in ("model", "train", "held_out"):
        shutil.rmtree(inputs.root / name)
    config, plan = plan_of(inputs, 2)
    model, *data = plan.to_be_supplied
    assert (model.key, model.found, model.place) == ("model.init_from", "no such directory", str(inputs.root / "model"))
    assert [(entry.key, entry.found) for entry in data] == [
        ("data.shards", "no such directory"),
        ("evaluation.shards", "no such directory"),
    ]
    assert plan.architecture.hidden_size == 16 and plan.data_parallel_size == 2 and plan.train_rows is None
    lines = lines_of(config, plan)
    unknown = "not known: data.shards is to be supplied"
    for name in ("documents", "tokens", "rows there are", "epochs of the run"):
        assert f"{name} {unknown}" in lines
    assert "rows of the run 80" in lines and "tokens of the run 2,560" in lines
    assert "held-out rows 4 of a number that is not known: evaluation.shards is absent" in lines
    assert any(line.startswith("model.init_from: sizes from ") and "published" in line for line in lines)
    listed = lines[lines.index("To be supplied before a start") + 2 :]
    assert [line.split()[0] for line in listed] == ["model.init_from", "data.shards", "evaluation.shards"]
    assert planned_standing(config, plan, Fresh()).words == "The run begins at its first step."
    with pytest.raises(InputError) as caught:
        check_run(config, 2)
    assert len(caught.value.problems) == 3


def test_the_plan_is_that_of_the_true_inputs(inputs):
    """Layout and memory do not depend on whether the data is there."""
    _, whole = plan_of(inputs, 2)
    shutil.rmtree(inputs.root / "train")
    (inputs.root / "model" / "model.safetensors").unlink()
    config, plan = plan_of(inputs, 2)
    assert plan.architecture == whole.architecture
    tables = [describe_run(config, each).partition("\nLayout\n")[2].partition("\nNotes\n")[0] for each in (whole, plan)]
    assert tables[0] == tables[1] != ""
    bare = plan_of_sizes(config, 2, whole.architecture)
    assert (bare.parallel, bare.num_micro_batches, bare.total_steps) == (whole.parallel, 2, 10)


@pytest.mark.parametrize("remains", [(), ("config.json",), ("config.json", "tokenizer.json"), ("tokenizer.json",)])
def test_a_model_directory_without_weights(inputs, published, remains):
    for path in (inputs.root / "model").iterdir():
        if path.name not in remains:
            path.unlink()
    config, plan = plan_of(inputs)
    (entry,) = plan.to_be_supplied
    assert (entry.key, entry.found) == ("model.init_from", "no weights" if remains else "an empty directory")
    own = inputs.root / "model" if "config.json" in remains else published / "model"
    assert entry.stand_in == own / "config.json"
    write_tokenizer(inputs.root / "model", '{"model": {"another": 1}}')
    assert any("expected the tokenizer of" in line for line in refused(inputs))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "model" / "model.safetensors").write_bytes(b"123"), "model.safetensors"),
        (lambda root: (root / "model" / "config.json").unlink(), "config.json"),
        (lambda root: (root / "train" / "index.npy").unlink(), "index.npy"),
        (lambda root: (root / "train" / "dataset.json").write_text("{"), "dataset.json"),
        (lambda root: (root / "held_out" / "index.npy").write_bytes(b""), "index.npy"),
    ],
)
def test_what_is_there_is_checked(inputs, damage, words):
    shutil.rmtree(inputs.root / "held_out" if words != "index.npy" else inputs.root / "nothing", ignore_errors=True)
    damage(inputs.root)
    assert any(words in line for line in refused(inputs))


def test_files_in_the_place_of_directories(inputs):
    shutil.rmtree(inputs.root / "train")
    (inputs.root / "train").write_text("text")
    assert refused(inputs)
    (inputs.root / "train").unlink()
    assert lacking(inputs)["data.shards"].startswith("train: no such directory; expected a dataset directory")
    assert refused(inputs, data__shards=str(inputs.root / "run.yaml" / "below"))


def test_all_problems_of_the_rest_are_found_at_once(inputs):
    shutil.rmtree(inputs.root / "train")
    found = refused(
        inputs,
        3,
        model__init_from=str(inputs.root / "other"),
        output_dir=str(inputs.root / "held_out"),
        evaluation__rows=400,
        data__skip_rows=[[0, 99]],
    )
    assert [line.split(": ")[1] for line in found] == [
        "model.init_from",
        "train.global_batch_size",
        "output_dir",
        "data.skip_rows",
        "evaluation.shards",
    ]
    assert "to plan without it, its config.json in that directory or as " in found[0]


def test_a_stand_in_that_cannot_be_used(inputs, published):
    shutil.rmtree(inputs.root / "model")
    (published / "model" / "config.json").write_text(json.dumps(MODEL_FIELDS | {"model_type": "gpt2"}))
    (line,) = refused(inputs)
    assert "run.yaml:3: model.init_from: " in line and "published/model/config.json: model_type" in line


def test_a_feature_model(inputs, published):
    (published / "judge").mkdir()
    fields = MODEL_FIELDS | {"hidden_size": 32}
    (published / "judge" / "config.json").write_text(json.dumps(fields))
    _, plan = plan_of(inputs, ebft__feature_model=str(inputs.root / "judge"))
    assert plan.feature_architecture.hidden_size == 32 and plan.architecture.hidden_size == 16
    assert [entry.key for entry in plan.to_be_supplied] == ["ebft.feature_model"]
    (published / "judge" / "config.json").write_text(json.dumps(fields | {"vocab_size": 90}))
    (line,) = refused(inputs, ebft__feature_model=str(inputs.root / "judge"))
    assert "a vocabulary of 90 tokens" in line


def test_some_sources_of_a_mixture(inputs):
    places = {name: {"shards": str(inputs.root / name)} for name in ("train", "other")}
    config, plan = plan_of(inputs, data__shards=None, data__sources=places)
    assert [entry.key for entry in plan.to_be_supplied] == ["data.sources.other.shards"]
    lines = lines_of(config, plan)
    assert "documents and tokens of train 4 and 660" in lines
    assert "tokens not known: data.sources.other.shards is to be supplied" in lines
    (inputs.root / "train" / "index.npy").unlink()
    assert any("data.sources.train.shards" in line for line in refused(inputs, data__shards=None, data__sources=places))


def test_text_shards_and_their_tokenizer(inputs, tmp_path):
    shutil.rmtree(inputs.root / "train")
    (inputs.root / "train").mkdir()
    (inputs.root / "train" / "0.tar").write_bytes(b"")
    tokenizer = str(inputs.root / "tokenizer")
    found = lacking(inputs, data__tokenizer=tokenizer, data__cache=str(inputs.root / "cache"))
    assert found == {
        "data.shards": "train: text shards, whose tokens cannot be counted without their tokenizer; expected a "
        "tokenizer in tokenizer",
        "data.tokenizer": "tokenizer: no such directory; expected a tokenizer directory, for text shards",
    }
    assert not (inputs.root / "cache").exists()
    # Text that there is a tokenizer for is read; data that is not there may be text.
    assert refused(inputs, data__cache=str(inputs.root / "cache"))
    shutil.rmtree(inputs.root / "train")
    assert list(lacking(inputs, data__tokenizer=tokenizer)) == ["data.shards", "data.tokenizer"]
    assert list(lacking(inputs, data__tokenizer=str(inputs.root / "model"))) == ["data.shards"]


def test_a_tokenizer_that_nothing_needs_is_not_listed(inputs):
    assert lacking(inputs, data__tokenizer=str(inputs.root / "tokenizer")) == {}


def test_a_checkpoint_to_resume_from(inputs):
    place = str(inputs.root / "elsewhere" / "step-00000005")
    config, plan = plan_of(inputs, checkpoint__resume=place)
    assert [entry.key for entry in plan.to_be_supplied] == ["checkpoint.resume"]
    assert place in planned_standing(config, plan, Fresh()).words
    (inputs.root / "elsewhere" / "step-00000005").mkdir(parents=True)
    (inputs.root / "elsewhere" / "step-00000005" / "file").touch()
    assert any("checkpoint.resume" in line for line in refused(inputs, checkpoint__resume=place))


def test_an_earlier_run_in_output_dir_is_not_refused_for_what_is_not_known(inputs):
    """Weights, data and held-out data of a record cannot be compared with what is not there."""
    from ebft_mega.lifecycle.run_record import RunRecord, data_differences, noted_differences, refused_differences

    config, whole = plan_of(inputs)
    then = RunRecord.of(config, whole)
    for name in ("model", "train", "held_out"):
        shutil.rmtree(inputs.root / name)
    config, plan = plan_of(inputs)
    now = RunRecord.of(config, plan)
    assert (now.initial_model, now.data, now.held_out) == (None, None, None)
    for differences in (refused_differences, data_differences, noted_differences):
        assert differences(then, now, config, inputs.root) == []
    other, plan = plan_of(inputs, seed=5)
    assert refused_differences(then, RunRecord.of(other, plan), other, inputs.root)


@pytest.fixture
def server(inputs, tmp_path, monkeypatch):
    with trusted_server(inputs.root, make_certificate(tmp_path), monkeypatch) as server:
        yield server


def test_a_remote_dataset_that_is_there(inputs, server):
    url = f"{server.url}/train"
    cache = str(inputs.root / "cache")
    _, plan = plan_of(inputs, data__shards=url, data__cache=cache)
    assert plan.train_rows.sources[0].manifest.tokens == 660 and plan.to_be_supplied == ()
    next((inputs.root / "train").glob("*.tar")).unlink()
    assert any(".tar" in line for line in refused(inputs, data__shards=url, data__cache=cache))


def test_a_remote_dataset_that_is_not(inputs, server):
    found = lacking(inputs, data__shards=f"{server.url}/nothing", evaluation__shards="https://localhost:1/held-out")
    assert found["data.shards"].startswith(f"{server.url}/nothing: no dataset.json; expected a dataset")
    assert found["evaluation.shards"].startswith("https://localhost:1/held-out: Connection refused")
    assert not (inputs.root / "cache").exists()


def test_a_server_that_answers_wrongly_is_no_absence(inputs, server):
    server.faults["dataset.json"] = Fault("status", 418)
    assert remote_absence(f"{server.url}/train", Transfer()) is None


def test_a_server_that_does_not_answer_is_waited_for_once(inputs, server, monkeypatch):
    assert opening._SHORT_SECONDS == 3.0
    monkeypatch.setattr(opening, "_SHORT_SECONDS", 0.1)
    server.faults["dataset.json"] = Fault("hang")
    found = lacking(inputs, data__shards=f"{server.url}/train")
    assert list(found) == ["data.shards"]
    assert [path for _, path, _ in server.requests] == ["/train/dataset.json"]
    assert not (inputs.root / "cache").exists()
