"""Which changes since a checkpoint are refused, noted, or free."""

import dataclasses
from pathlib import Path

import pytest

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.checkpoint.commit import publish, temporary_folder
from ebft_mega.checkpoint.resume_rules import (
    BY_CONTENTS,
    FREE,
    LENGTH,
    NOTED,
    REFUSED,
    noted_changes,
    other_critic,
    refused_changes,
    rule_of,
)
from ebft_mega.checkpoint.saved_run import SavedRun, read_run
from ebft_mega.config.schema import RunConfig, all_keys
from ebft_mega.critic.critic_record import CriticRecord, critic_record
from ebft_mega.extension import options as declare
from ebft_mega.extension.advantage_estimator import AdvantageEstimator
from ebft_mega.extension.reward_term import RewardTerm
from ebft_mega.io.expanded_paths import REPOSITORY
from ebft_mega.registry.kinds import ADVANTAGE_ESTIMATORS, OPTIMIZERS, REWARD_TERMS
from tests.other_optimizers import Sgd
from tests.unit.checkpoint.folder_stand_ins import MODEL, fill, relist, run_config, run_state, write_checkpoint


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def root(output: Path) -> Path:
    return output / "checkpoints"


@pytest.fixture
def saved(root: Path) -> SavedRun:
    return read_run(write_checkpoint(root, 20))


def test_every_key_has_one_rule() -> None:
    for key in all_keys():
        rule_of(key)  # fails unless there is exactly one
    for key in (*REFUSED, *NOTED, *LENGTH, *BY_CONTENTS, *FREE):
        assert key in all_keys()


def test_nothing_has_changed(saved: SavedRun, output: Path) -> None:
    config = run_config(output)
    assert refused_changes(saved, config, Architecture.from_hf(MODEL, "here")) == []
    assert noted_changes(saved, config) == []


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"seed": 4}, "seed", "3", "4"),
        ({"data__document_masking": True}, "data.document_masking", "false", "true"),
        ({"data__train_on_first_token": False}, "data.train_on_first_token", "true", "false"),
        ({"ebft__stride": 4}, "ebft.stride", "8", "4"),
        ({"ebft__feature_layers": [0.5]}, "ebft.feature_layers", "[0.25, 0.5, 0.75]", "[0.5]"),
        ({"ebft__rl_coef": 0.0}, "ebft.rl_coef", "1.0", "0.0"),
        ({"ebft__whitening": "feature"}, "ebft.whitening", "sample", "feature"),
        ({"ebft__alignment": "inner_product"}, "ebft.alignment", "cosine", "inner_product"),
    ],
)
def test_another_run_is_refused_with_the_old_and_the_new_value(
    saved: SavedRun, output: Path, changes: dict, key: str, old: str, new: str
) -> None:
    config = run_config(output, **changes).with_places({key: "run.yaml:7"})
    (problem,) = refused_changes(saved, config, saved.architecture)
    assert (problem.where, problem.key, problem.found) == ("run.yaml:7", key, new)
    assert problem.expected.startswith(f"{old}, as in {saved.directory}; ")
    assert f"model.init_from: {saved.directory}" in problem.expected
    assert noted_changes(saved, config) == []


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"hidden_size": 32}, "hidden_size", "16", "32"),
        ({"num_hidden_layers": 5}, "num_hidden_layers", "4", "5"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", "false", "true"),
        ({"rope_theta": 5e5}, "rope_theta", "10000.0", "500000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type", "default", "linear"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_factor", "null", "2.0"),
    ],
)
def test_another_architecture_is_refused(
    saved: SavedRun, output: Path, changes: dict, key: str, old: str, new: str
) -> None:
    problems = refused_changes(saved, run_config(output), Architecture.from_hf(MODEL | changes, "here"))
    (problem,) = [problem for problem in problems if problem.key == f"model.config: {key}"]
    assert problem.found == new
    assert problem.expected.startswith(f"{old}, as in {saved.directory}; ")


def test_the_same_architecture_in_other_words_is_the_same(saved: SavedRun, output: Path) -> None:
    words = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
        "num_key_value_heads": 4,
        "dtype": "bfloat16",
        "transformers_version": "5.23.0",
        "architectures": ["LlamaForCausalLM"],
    }
    assert refused_changes(saved, run_config(output), Architecture.from_hf(MODEL | words, "here")) == []


def test_all_refused_changes_come_at_once(saved: SavedRun, output: Path) -> None:
    config = run_config(output, seed=9, ebft__n_samples_per_prompt=8, ebft__top_p=0.9)
    problems = refused_changes(saved, config, Architecture.from_hf(MODEL | {"vocab_size": 101}, "here"))
    keys = [problem.key for problem in problems]
    assert keys == ["seed", "ebft.n_samples_per_prompt", "ebft.top_p", "model.config: vocab_size"]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"train__lr": 2e-6}, "train.lr was 1e-06 and is 2e-06 now"),
        ({"ebft__diversity_coef": 0.9}, "ebft.diversity_coef was 1.0 and is 0.9 now"),
        ({"ebft__alignment_coef": 0.9}, "ebft.alignment_coef was 1.0 and is 0.9 now"),
        ({"ebft__advantage_estimator": "group_norm"}, "ebft.advantage_estimator was rloo and is group_norm now"),
        ({"train__betas": [0.8, 0.95]}, "train.betas was [0.9, 0.95] and is [0.8, 0.95] now"),
        ({"train__dtype": "float32"}, "train.dtype was bfloat16 and is float32 now"),
        ({"train__global_batch_size": 16}, "train.global_batch_size was 8 and is 16 now"),
        ({"evaluation__shards": "x"}, "evaluation.shards was null and is x now"),
        ({"evaluation__interval": 5}, "evaluation.interval was null and is 5 now"),
    ],
)
def test_what_makes_other_numbers_is_noted(saved: SavedRun, output: Path, changes: dict, note: str) -> None:
    config = run_config(output, **changes)
    (found,) = noted_changes(saved, config)
    assert found.startswith(note + ": ")
    assert refused_changes(saved, config, saved.architecture) == []


def test_another_optimizer_is_refused_and_both_are_named(saved: SavedRun, output: Path, monkeypatch) -> None:
    monkeypatch.setitem(OPTIMIZERS.added, "sgd", Sgd)
    config = run_config(output, train__optimizer="sgd").with_places({"train.optimizer": "run.yaml:7"})
    assert saved.config["train"]["optimizer"] == "adamw"
    older = dataclasses.replace(saved, config=saved.config | {"train": dict(saved.config["train"])})
    del older.config["train"]["optimizer"]  # of a version that had no other one
    for each in (saved, older):
        (problem,) = refused_changes(each, config, saved.architecture)
        assert (problem.where, problem.key, problem.found) == ("run.yaml:7", "train.optimizer", "sgd")
        assert problem.expected.startswith(f"adamw, as in {saved.directory}; ")
    assert refused_changes(older, run_config(output), saved.architecture) == []


def test_another_length_is_noted_where_the_learning_rate_depends_on_it(root: Path, output: Path) -> None:
    saved = read_run(write_checkpoint(root, 20))
    assert noted_changes(saved, run_config(output, train__max_steps=20)) == []
    temporary = temporary_folder(root, 30)
    fill(temporary, 30, run_config(output, train__lr_scheduler="cosine"), run_state(30))
    saved = read_run(publish(temporary, root))
    (note,) = noted_changes(saved, run_config(output, train__lr_scheduler="cosine", train__max_steps=20))
    assert note.startswith("the run had 10 steps and has 20 now (train.max_steps or train.max_tokens): ")
    shared = {"train__warmup_share": 0.2}
    assert any(
        "the run had 10 steps" in note
        for note in noted_changes(saved, run_config(output, **shared, train__max_steps=20))
    )
    same = {"train__lr_scheduler": "cosine", "train__max_steps": None}
    assert noted_changes(saved, run_config(output, **same, train__max_tokens=10 * 8 * 32 + 5)) == []


def test_how_and_where_a_run_is_done_is_free(saved: SavedRun, tmp_path: Path) -> None:
    config = run_config(
        tmp_path / "elsewhere",
        data__shards="moved/train",
        data__workers=0,
        data__on_error="skip",
        parallel__tensor_parallel_size=2,
        zero__stage=1,
        learn__reuse_rollout="off",
        checkpoint__interval=5,
        profile__start=3,
        train__micro_batch_size=2,
        train__attention="dense",
        train__activation_checkpointing="full",
    )
    assert refused_changes(saved, config, saved.architecture) == []
    assert noted_changes(saved, config) == []


def test_a_key_that_the_checkpoint_does_not_know_had_its_default(root: Path, output: Path) -> None:
    folder = write_checkpoint(root, 20)
    relist(folder, "config.resolved.yaml", b"seed: 3\noutput_dir: x\ntrain:\n  max_steps: 10\n  global_batch_size: 8\n")
    saved = read_run(folder)
    assert refused_changes(saved, run_config(output), saved.architecture) == []
    assert noted_changes(saved, run_config(output)) == []
    assert len(refused_changes(saved, run_config(output, ebft__stride=4), saved.architecture)) == 1


def test_a_path_as_an_earlier_version_wrote_it_has_not_changed(root: Path, output: Path) -> None:
    saved = read_run(write_checkpoint(root, 20))
    saved.config["evaluation"]["shards"] = f"{REPOSITORY}/data/held-out"
    assert noted_changes(saved, run_config(output, evaluation__shards="data/held-out")) == []
    assert noted_changes(saved, run_config(output, evaluation__shards="data/other"))


class _Options(declare.Section):
    """Of a plugin whose second version has one option more."""

    scale: float = declare.key(1.0, "Scale.")
    added: int = declare.key(3, "Not in the first version.")


class _Scaled(RewardTerm):
    """A term with options."""

    name = "scaled"
    Options = _Options


class _Judging(AdvantageEstimator):
    """An estimator with options."""

    name = "judging"
    Options = _Options


WITH_OPTIONS = {
    "ebft__reward_terms": {"scaled": 0.5},
    "ebft__advantage_estimator": "judging",
    "train__lr_scheduler": "warmup_stable_decay",
}


@pytest.mark.parametrize(
    ("options", "refused", "notes"),
    [
        ({}, [], []),
        ({"scaled": {"scale": 1.0, "added": 3}}, [], []),
        ({"scaled": {"scale": 2.0, "added": 3}}, ["options.scaled.scale: found 2.0; expected 1.0"], []),
        ({"scaled": {"scale": 1.0, "added": 4}}, ["options.scaled.added: found 4; expected 3"], []),
        ({"judging": {"scale": 2.0, "added": 3}}, [], ["options.judging.scale was 1.0 and is 2.0"]),
        ({"judging": {"scale": 1.0, "added": 4}}, [], ["options.judging.added was 3 and is 4"]),
        ({"warmup_stable_decay": {"decay_share": 0.5}}, [], ["options.warmup_stable_decay.decay_share was 0.2 and is"]),
        ({"linear": {"of": "nothing in use"}}, [], []),
    ],
)
def test_options_follow_the_kind_of_their_entry(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch, options: dict, refused: list, notes: list
) -> None:
    """What an entry did not have at the checkpoint was its default there."""
    monkeypatch.setitem(REWARD_TERMS.added, "scaled", _Scaled)
    monkeypatch.setitem(ADVANTAGE_ESTIMATORS.added, "judging", _Judging)
    before = {"scaled": {"scale": 1.0}, "judging": {"scale": 1.0}, "warmup_stable_decay": {"decay_share": 0.2}}
    temporary = temporary_folder(root, 20)
    fill(temporary, 20, run_config(output, **WITH_OPTIONS, options=before), run_state(20))
    saved = read_run(publish(temporary, root))
    config = run_config(output, **WITH_OPTIONS, options=options)
    problems = refused_changes(saved, config, saved.architecture)
    assert [str(each).split(", as in ")[0].removeprefix("configuration: ") for each in problems] == refused
    found = noted_changes(saved, config)
    assert len(found) == len(notes) and all(map(str.startswith, found, notes))


CRITIC = {
    "ebft__advantage_estimator": "token_critic",
    "ebft__alignment": "inner_product",
    "ebft__use_whitening": False,
    "options": {"token_critic": {"rank": 8}},
}
ARCHITECTURE = Architecture.from_hf(MODEL, "here")


CHANGED = (
    "ebft.diversity_coef",
    *(f"options.token_critic.{name}" for name in ("decay", "prefix_ridge", "warmup_batches")),
)


def record_of(config: RunConfig) -> CriticRecord | None:
    return critic_record(config, ARCHITECTURE, ARCHITECTURE, batches=20)


def saved_with(root: Path, config: RunConfig, critic: CriticRecord | None) -> SavedRun:
    """A checkpoint of a run that has learned a critic."""
    temporary = temporary_folder(root, 20)
    fill(temporary, 20, config, run_state(20, critic=critic))
    return read_run(publish(temporary, root))


def test_a_critic_of_the_same_features_is_taken_over_with_other_settings(root: Path, output: Path) -> None:
    config = run_config(output, **CRITIC)
    saved = saved_with(root, config, record_of(config))
    assert saved.state.critic == record_of(config) and saved.state.critic.batches == 20
    options = {"token_critic": {"rank": 8, "decay": 0.5, "prefix_ridge": 1.0, "warmup_batches": 9}}
    for changes in ({}, {"options": options, "ebft__diversity_coef": 0.5}):
        config = run_config(output, **CRITIC | changes)
        assert refused_changes(saved, config, ARCHITECTURE, record_of(config)) == []
        assert all(note.split(" was ")[0] in CHANGED for note in noted_changes(saved, config, record_of(config)))


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"options": {"token_critic": {"rank": 7}}}, "options.token_critic.rank", "8", "7"),
        ({"options": {}}, "options.token_critic.rank", "8", "16"),  # 64, and the hidden size is 16
        ({"ebft__embed_method": "mean_pooling"}, "ebft.embed_method", "last_token", "mean_pooling"),
        ({"ebft__feature_norm": "per_layer"}, "ebft.feature_norm", "joint", "per_layer"),
        ({"ebft__generate_max_len": 4}, "ebft.generate_max_len", "8", "4"),
        ({"ebft__layer_weights": [1.0, 2.0, 1.0]}, "ebft.layer_weights", "null", "[1.0, 2.0, 1.0]"),
        (
            {"ebft__feature_layers": [0.5]},
            "ebft.feature_layers",
            "features of the layers [1, 2, 3]",
            "features of the layers [2]",
        ),
    ],
)
def test_a_critic_of_other_features_is_refused(
    root: Path, output: Path, changes: dict, key: str, old: str, new: str
) -> None:
    config = run_config(output, **CRITIC)
    saved = saved_with(root, config, record_of(config))
    config = run_config(output, **CRITIC | changes).with_places({key: "run.yaml:7"})
    (problem,) = other_critic(saved, config, record_of(config))
    assert (problem.where, problem.key, problem.found) == ("run.yaml:7", key, new)
    assert problem.expected.startswith(f"{old}, as the token critic in {saved.directory / 'state.json'} has it; ")
    # What the rules refuse already is not named twice.
    assert [each.key for each in refused_changes(saved, config, ARCHITECTURE, record_of(config))] == [key]


def test_a_critic_of_another_vocabulary_is_refused(root: Path, output: Path) -> None:
    config = run_config(output, **CRITIC)
    saved = saved_with(root, config, record_of(config))
    other = Architecture.from_hf(MODEL | {"vocab_size": 101}, "here")
    (problem,) = other_critic(saved, config, critic_record(config, other, other))
    assert (problem.key, problem.found) == ("model.config: vocab_size", "101")


class _Critical(AdvantageEstimator):
    """An estimator that chooses the rank by itself."""

    name = "critical"
    needs = frozenset({"critic"})


def test_a_plugin_without_an_option_for_the_rank_is_named(root: Path, output: Path, monkeypatch) -> None:
    monkeypatch.setitem(ADVANTAGE_ESTIMATORS.added, "critical", _Critical)
    config = run_config(output, **CRITIC)
    saved = saved_with(root, config, record_of(config))
    config = run_config(output, **CRITIC | {"ebft__advantage_estimator": "critical"})
    (problem,) = other_critic(saved, config, record_of(config))
    assert (problem.key, problem.found) == ("ebft.advantage_estimator", "rank 16")
    assert problem.expected.startswith("rank 8, as the token critic in ")


def test_a_critic_that_begins_anew_or_is_left_out_is_noted(root: Path, output: Path) -> None:
    with_critic, without = (
        run_config(output, **CRITIC),
        run_config(output, **CRITIC | {"ebft__advantage_estimator": "rloo"}),
    )
    assert record_of(without) is None
    saved = saved_with(root, without, None)
    *_, note = noted_changes(saved, with_critic, record_of(with_critic))
    assert note == f"{saved.directory} has no token critic: that of token_critic begins with nothing learned"
    assert refused_changes(saved, with_critic, ARCHITECTURE, record_of(with_critic)) == []
    assert noted_changes(saved, without) == []
    saved = saved_with(root, with_critic, record_of(with_critic))
    *_, note = noted_changes(saved, without)
    assert note.startswith(f"the token critic in {saved.directory}, which has learned from 20 batches, is left out: ")
    assert note.endswith("ebft.advantage_estimator is rloo")
    assert refused_changes(saved, without, ARCHITECTURE) == []
