"""What a start does where results are: every line of the table in docs/running.md, with and without checkpoints."""

import json
import re
import shutil
from pathlib import Path

import pytest

from ebft_mega.errors import ConfigError, InputError
from ebft_mega.lifecycle.findings import is_settled
from ebft_mega.lifecycle.setting_aside import Fresh, planned_standing
from ebft_mega.lifecycle.standing import Action, conclude_early, early_standing
from tests.unit.lifecycle.run_directories import Site

PAGE = Path(__file__).parents[3] / "docs" / "running.md"
# First words of the table's lines, and the tests that show them.
LINES = {
    "finished, same run, same steps": "test_finished_same_run_same_steps",
    "finished, same run, more steps": "test_finished_same_run_more_steps",
    "finished, fewer steps, other seed, data or model": "test_finished_other_run",
    "not finished, checkpoints, same run": "test_not_finished_checkpoints_same_run",
    "not finished, no checkpoint, same run": "test_not_finished_no_checkpoint_same_run",
    "not finished, another run": "test_not_finished_another_run",
    "anything, with `--fresh`": "test_anything_with_fresh",
}
MORE, FEWER = "train.max_steps=12", "train.max_steps=8"
both = pytest.mark.parametrize("checkpoint", [True, False], ids=["with-checkpoint", "without"])
versions = pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "earlier-version"])


@pytest.fixture
def site(inputs) -> Site:
    return Site(inputs)


def refusal(site, *overrides) -> str:
    """The message of a start that is refused; the dry run gives the same, and nothing changes."""
    before = site.contents()
    with pytest.raises(ConfigError) as caught:
        site.standing(*overrides)
    with pytest.raises(ConfigError) as of_dry_run:
        planned_standing(*site.planned(*overrides), Fresh())
    assert str(of_dry_run.value) == str(caught.value) and site.contents() == before
    message = str(caught.value)
    assert f"output_dir: found {site.output} with " in message
    assert "expected another output_dir, or --fresh, which sets everything there aside in " in message
    return message


def test_every_line_of_the_table_has_a_test():
    section = PAGE.read_text().split("## Starting where results are")[1]
    lines = re.findall(r"^\| ([^|]+?) \|", section.split("\n\n## ")[0], re.MULTILINE)
    assert [line for line in lines if line.strip("-") and line != "in `output_dir`"] == list(LINES)
    assert all(name in globals() for name in LINES.values())


@pytest.mark.parametrize("left", ["", "logs/rank-0000.log", "run.lock", "status.json", "STOP", "notes.txt"])
def test_directory_without_results_is_begun(site, left):
    if left:
        (site.output / left).parent.mkdir(parents=True)
        (site.output / left).touch()
    standing = site.standing()
    assert (standing.action, standing.words) == (Action.BEGIN, "The run begins at its first step.")


@both
@versions
def test_finished_same_run_same_steps(site, checkpoint, is_recorded):
    site.finish(checkpoint=checkpoint, is_recorded=is_recorded)
    before = site.contents()
    # How and where a run is done is free.
    for overrides in ((), ("checkpoint.keep_last=3", "zero.stage=1", "train.micro_batch_size=4")):
        standing = site.standing(*overrides)
        assert (standing.action, standing.words) == (Action.NOTHING, "done at step 10, nothing to do")
    assert conclude_early(*site.planned(), write_report=None) == 0
    assert site.contents() == before
    if not checkpoint:
        assert site.standing("checkpoint.final=false").action is Action.NOTHING


@both
@pytest.mark.parametrize("lost", ["report.html", "status.json", "failed"])
def test_what_a_finished_run_lacks_is_written_and_no_other_file_changes(site, checkpoint, lost):
    site.finish(checkpoint=checkpoint)
    before = site.contents()
    name = "status.json" if lost == "failed" else lost
    if lost == "failed":  # its last checkpoint could not be written, say
        (site.output / name).write_text('{"state": "failed", "exit_code": 1, "checkpoint": null, "step": 10}')
    else:
        (site.output / name).unlink()

    def write_report(output):
        (output / "report.html").write_text("a page")
        return output / "report.html"

    assert conclude_early(*site.planned(), write_report) == 0
    after = site.contents()
    assert {key: content for key, (content, _) in after.items()} == {key: text for key, (text, _) in before.items()}
    assert [key for key in before if before[key] != after[key]] == [name]


@versions
def test_missing_model_is_written_from_the_checkpoint_of_the_last_step(site, is_recorded):
    site.finish(model=False, is_recorded=is_recorded)
    standing = site.standing()
    assert standing.action is Action.COMPLETE
    assert standing.words == (
        "The 10 steps of the run are done and its model is missing: it is written from "
        f"{site.output / 'checkpoints' / 'step-00000010'}."
    )
    # One that lacks a file is none.
    site.export()
    (site.output / "hf" / "model.safetensors").write_bytes(b"")
    assert site.standing().action is Action.COMPLETE


@both
@versions
def test_finished_same_run_more_steps(site, checkpoint, is_recorded):
    site.finish(checkpoint=checkpoint, is_recorded=is_recorded)
    if checkpoint:
        standing = site.standing(MORE)
        assert standing.action is Action.RESUME and standing.notes_on_going_back(10) == ()
        assert standing.words == f"The run resumes from {site.output / 'checkpoints' / 'step-00000010'}."
        assert "the run starts after step 4" in standing.notes_on_going_back(4)[0]
    else:
        message = refusal(site, MORE)
        assert "train.max_steps: found 12 optimizer steps; expected those of " in message
        assert "or a checkpoint to resume from, and there is none" in message


@both
def test_run_that_was_extended_and_killed_is_not_taken_for_finished(site, checkpoint):
    """The old model stays until the new one replaces it, and it is known of which step it is."""
    site.finish()
    site.begin(MORE, logged=11)
    site.save(11, MORE) if checkpoint else None
    standing = site.standing(MORE)
    assert standing.action is Action.RESUME and standing.model_step == 10
    assert f"step-000000{11 if checkpoint else 10}" in standing.words
    if checkpoint:
        assert "expected at least the 11 steps that are done" in refusal(site)
    else:
        assert site.standing().words == "done at step 10, nothing to do"
    site.save(12, MORE)
    assert site.standing(MORE).action is Action.COMPLETE


def test_model_of_an_earlier_version_in_a_run_that_was_extended_since(site):
    site.finish(is_recorded=False)
    config, plan = site.planned(MORE)
    site.begin(MORE, logged=12)
    record = site.output / "run.json"
    record.write_text(record.read_text().replace('"model_step": null', '"model_step": 10'))
    assert site.standing(MORE).action is Action.RESUME and site.standing(MORE).model_step == 10


@both
@versions
@pytest.mark.parametrize("what", ["fewer steps", "seed", "data", "model", "feature model", "settings", "length"])
def test_finished_other_run(site, checkpoint, is_recorded, what):
    site.finish(checkpoint=checkpoint, is_recorded=is_recorded)
    if what == "data":
        # Without a record and a checkpoint only the path tells.
        expected = "data.shards (fingerprint): found" if is_recorded or checkpoint else "data.shards: found"
        assert expected in refusal(site, site.add_other_data())
        assert refusal(site, f"data.shards={site.inputs.root / 'other'}", MORE)
        return
    if what == "model":
        if is_recorded:
            site.change_model()
            assert "model.init_from: found a model of fingerprint " in refusal(site)
            assert refusal(site, MORE)
        shutil.copytree(site.inputs.root / "model", site.inputs.root / "moved")
        if not is_recorded:
            assert "model.init_from: found " in refusal(site, f"model.init_from={site.inputs.root / 'moved'}")
        return
    overrides, words = {
        "fewer steps": ((FEWER,), "train.max_steps: found 8 optimizer steps; expected at least the 10 steps that are"),
        "seed": (("seed=3",), f"seed: found 3; expected 0, as in {site.output}"),
        "feature model": (("ebft.feature_model=" + str(site.inputs.root / "model"),), "ebft.feature_model: found"),
        "settings": (("train.lr=0.5",), "train.lr: found 0.5; expected "),
        "length": (("data.sequence_length=40",), "sequence_length: found 40; expected 32, as "),
    }[what]
    assert words in refusal(site, *overrides)
    assert "data.shards: seed" not in refusal(site, *overrides), "the seed is named once, by its own key"


def test_other_settings_beside_the_feature_model_s_weights_make_another_run(site):
    features = site.inputs.root / "features"
    shutil.copytree(site.inputs.root / "model", features)
    named = f"ebft.feature_model={features}"
    site.finish(named)
    assert site.standing(named).action is Action.NOTHING
    (features / "config.json").write_text(json.dumps(site.inputs.model_fields | {"rope_theta": 77.0}))
    assert "ebft.feature_model: found a model of fingerprint " in refusal(site, named)


@both
@versions
def test_rows_left_out_are_part_of_what_results_are_of(site, checkpoint, is_recorded):
    left_out, others = "data.skip_rows=[[0,7]]", "data.skip_rows=[[0,8]]"
    site.finish(left_out, checkpoint=checkpoint, is_recorded=is_recorded)
    assert site.standing(left_out).action is Action.NOTHING
    assert "data.skip_rows: found [[0, 8]]; expected [[0, 7]], as in " in refusal(site, others)
    assert "data.skip_rows: found []; expected [[0, 7]], as in " in refusal(site)
    if checkpoint:
        assert site.standing(others, MORE).action is Action.RESUME
    for override in ("deterministic=true", "permissions=group", "data.workers=2", "data.on_error=skip"):
        assert site.standing(left_out, override).action is Action.NOTHING


def test_model_that_has_moved_is_the_same_model(site):
    site.finish()
    shutil.copytree(site.inputs.root / "model", site.inputs.root / "moved")
    assert site.standing(f"model.init_from={site.inputs.root / 'moved'}").action is Action.NOTHING


@both
@pytest.mark.parametrize("model", [True, False])
def test_never_is_refused_on_finished_results(site, checkpoint, model):
    if checkpoint or model:
        site.finish(checkpoint=checkpoint, model=model)
        assert "checkpoint.resume: found never; expected auto" in refusal(site, "checkpoint.resume=never")
        assert refusal(site, "checkpoint.resume=never", MORE)
    site.output.mkdir(exist_ok=True)
    shutil.rmtree(site.output)
    site.begin(logged=6)
    site.save(4)
    assert site.standing("checkpoint.resume=never").action is Action.BEGIN


@versions
def test_not_finished_checkpoints_same_run(site, is_recorded):
    site.begin(logged=6, is_recorded=is_recorded)
    site.save(2)
    site.save(4)
    standing = site.standing()
    assert standing.action is Action.RESUME
    assert standing.words == (
        f"The run resumes from {site.output / 'checkpoints' / 'step-00000004'}, or from an older one if that is not "
        "whole."
    )
    (note,) = standing.notes_on_going_back(4)
    assert "show 6 steps and the run starts after step 4: steps 5 to 6 are taken again" in note
    assert standing.notes_on_going_back(6) == ()
    assert site.standing(MORE).action is Action.RESUME and site.standing("train.lr=0.5").action is Action.RESUME


CRITIC = ("ebft.advantage_estimator=token_critic", "ebft.use_whitening=false", "ebft.alignment=inner_product")
RANK = "options.token_critic.rank="


@pytest.mark.parametrize("is_named", [False, True], ids=["own", "named"])
def test_a_critic_of_another_rank_is_refused_before_the_start(site, is_named):
    """By the dry run, too. The hidden size of 16 bounds the rank."""
    site.begin(*CRITIC, f"{RANK}9", logged=6)
    site.save(4, *CRITIC, f"{RANK}9")
    saved = site.output / "checkpoints" / "step-00000004"
    where = (f"output_dir={site.inputs.root / 'next'}", f"checkpoint.resume={saved}") if is_named else ()
    for rank, found in ((8, 8), (64, 16)):
        with pytest.raises(ConfigError) as caught:
            planned_standing(*site.planned(*CRITIC, f"{RANK}{rank}", *where), Fresh())
        expected = f"9, as the token critic in {saved / 'state.json'} has it"
        assert f"options.token_critic.rank: found {found}; expected {expected}" in str(caught.value)
    for settings in ((), ("options.token_critic.decay=0.5", "ebft.diversity_coef=0.5")):
        assert site.standing(*CRITIC, f"{RANK}9", *where, *settings).action is Action.RESUME
    # Another estimator has no use for it, and what is not whole is passed over by the start.
    assert site.standing(*CRITIC[1:], *where).action is Action.RESUME
    (saved / "state.json").write_text("{}")
    assert site.standing(*CRITIC, f"{RANK}8", *where).action is Action.RESUME


def test_behind_the_model_only_with_a_note(site):
    site.finish(checkpoint=False)
    site.save(4)
    (of_metrics, of_model) = site.standing(MORE).notes_on_going_back(4)
    assert "steps 5 to 10 are taken again" in of_metrics
    assert "hf/ is of step 10" in of_model and "stays until the new model replaces it" in of_model


@versions
@pytest.mark.parametrize("logged", [-1, 6, 10])
def test_not_finished_no_checkpoint_same_run(site, is_recorded, logged):
    site.begin(logged=logged, is_recorded=is_recorded)
    for overrides in ((), (MORE,), ("checkpoint.resume=never",)):
        standing = site.standing(*overrides)
        assert standing.action is Action.BEGIN and len(standing.notes) == (logged >= 0)


@both
@versions
def test_not_finished_another_run(site, checkpoint, is_recorded):
    site.begin(logged=6, is_recorded=is_recorded)
    if checkpoint:
        site.save(4)
    for overrides in (("seed=3",), ("ebft.stride=4",), (site.add_other_data(),), ("checkpoint.resume=never", "seed=1")):
        assert "an unfinished run of 10 steps (" in refusal(site, *overrides)


def test_changed_data_may_be_allowed_where_a_checkpoint_is_resumed_from(site):
    site.begin(logged=6)
    other = (site.add_other_data(), "data.allow_changed=true")
    refusal(site, *other)
    site.save(4)
    assert site.standing(*other).action is Action.RESUME


def test_results_of_which_nothing_is_known_are_refused(site):
    site.output.mkdir()
    site.export(is_recorded=False)
    assert "a finished run (hf/)" in refusal(site)


def test_named_checkpoint(site):
    """A path outside the directory: its own results are another run's, unless they began there."""
    site.begin(logged=4)
    site.save(4)
    elsewhere = site.inputs.root / "elsewhere"
    site.output.rename(elsewhere)
    resume = f"checkpoint.resume={elsewhere}"
    assert site.standing(resume).action is Action.RESUME
    site.finish()
    assert "checkpoint.resume: found " in refusal(site, resume)
    own = f"checkpoint.resume={site.output / 'checkpoints' / 'step-00000010'}"
    assert site.standing(own).action is Action.NOTHING
    site.save(4)
    assert refusal(site, own.replace("10", "04"))


@both
def test_anything_with_fresh(site, checkpoint):
    site.finish(checkpoint=checkpoint)
    before = site.contents()
    standing = planned_standing(*site.planned("seed=3"), Fresh.of(True, (), {}))
    assert standing.action is Action.BEGIN and "--fresh sets " in standing.notes[0] and "hf, " in standing.notes[0]
    restarted = Fresh.of(True, (), {"SLURM_RESTART_COUNT": "1"})
    standing = planned_standing(*site.planned(), restarted)
    assert standing.action is Action.NOTHING and "SLURM_RESTART_COUNT is set" in standing.notes[0]
    with pytest.raises(ConfigError):
        planned_standing(*site.planned("seed=3"), restarted)
    assert site.contents() == before


@pytest.mark.parametrize("left", ["run.lock", "previous/.unfinished", ".hf.0123abcd", "checkpoints/step-00000004.tmp"])
def test_ranks_do_not_decide_alone_where_something_is_under_way(site, left):
    site.finish()
    assert early_standing(*site.planned()).action is Action.NOTHING
    (site.output / left).mkdir(parents=True)
    assert early_standing(*site.planned()) is None


def test_several_ranks_decide_alone_only_where_nothing_has_changed_lately(site):
    site.finish()
    assert is_settled(site.output, is_alone=True) and not is_settled(site.output, is_alone=False)


def test_record_of_a_newer_version_is_not_ignored(site):
    site.finish()
    record = site.output / "run.json"
    record.write_text(record.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match="written by a newer version of ebft_mega"):
        site.standing()
