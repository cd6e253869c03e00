"""The quickstart as an experiment: what its arms have in common, where its runs lie, what a small budget does."""

import re
import runpy
from pathlib import Path

import pytest

from ebft_mega.apps.experiment.declared.spec_file import read_spec
from ebft_mega.apps.experiment.declared.spec_rules import spec_problems
from ebft_mega.apps.experiment.running.preparing import DATA_CODE
from ebft_mega.apps.experiment.running.start_checks import configuration_problems
from ebft_mega.apps.experiment.runs.arm_plans import main_trials
from ebft_mega.apps.experiment.runs.command_lines import ToolCommands
from ebft_mega.apps.experiment.runs.jobs import evaluation_job
from ebft_mega.apps.experiment.runs.trial_runs import ExperimentSetup, run_directory, trial_config
from ebft_mega.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]
SPEC = ROOT / "configs" / "experiments" / "quickstart.yaml"
TRAINED = ("warm_start", "EBFT", "cross-entropy")


def setup(path=SPEC, **changes):
    return ExperimentSetup(read_spec(path, spec_problems), **changes)


def configuration(experiment, arm):
    (trial,) = main_trials(experiment.plans[arm], experiment.spec, {})
    return trial_config(experiment, trial, {})


def test_both_arms_differ_only_in_the_objective():
    """What is compared is the objective: model, data, geometry and evaluation are the same in both files."""
    ebft, cross_entropy = (configuration(setup(), arm).model_dump() for arm in TRAINED[1:])
    differing = {
        f"{section}.{key}"
        for section, values in ebft.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if cross_entropy[section][key] != value
    }
    assert differing == {"ebft.rl_coef", "ebft.ce_coef", "train.lr"}
    assert ebft["seed"] == cross_entropy["seed"], "the same rows in the same order"


def test_runs_lie_where_their_own_configurations_put_them():
    """The main job's file can be run by itself after `make quickstart`, and finds its warm start."""
    experiment = setup()
    for arm in TRAINED:
        (trial,) = main_trials(experiment.plans[arm], experiment.spec, {})
        own = ROOT / "runs" / "quickstart" / {"warm_start": "warmstart", "EBFT": "ebft", "cross-entropy": "ce"}[arm]
        assert run_directory(experiment, trial) == own == configuration(experiment, arm).output_dir
    text = (ROOT / "configs" / "quickstart.yaml").read_text()
    assert "init_from: runs/quickstart/warmstart/hf" in text and "output_dir: runs/quickstart/ebft" in text


def test_a_small_budget_takes_fewer_steps_and_keeps_the_schedule_valid():
    whole, half, least = setup(), setup(steps_share=0.5), setup(steps_share=0.0)
    for arm in TRAINED:
        steps = configuration(whole, arm).total_steps
        assert configuration(half, arm).total_steps == steps // 2
        assert configuration(least, arm).total_steps == 2 and configuration(least, arm).train.warmup_steps < 2


def test_one_process_evaluates_whatever_the_layout_of_the_runs():
    experiment = setup(overrides=("parallel.tensor_parallel_size=2", "train.lr=1e-4"), num_ranks=2)
    (trial,) = main_trials(experiment.plans["EBFT"], experiment.spec, {})
    assert configuration(experiment, "EBFT").parallel.tensor_parallel_size == 2
    command = evaluation_job(experiment, trial, "report", {}, ToolCommands()).command()
    assert "train.lr=1e-4" in command and not any("parallel" in word for word in command)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("directory: runs/quickstart/ebft", "directory: runs/quickstart/ce", "directory of its own within"),
        ("directory: runs/quickstart/ebft", "directory: runs/elsewhere/ebft", "directory of its own within"),
        ("seeds: \\[0\\]", "seeds: [0, 1]", "2 runs or none"),
    ],
)
def test_a_run_directory_is_that_of_one_run(tmp_path, old, new, found):
    path = tmp_path / "spec.yaml"
    path.write_text(re.sub(old, new, SPEC.read_text(), count=1))
    with pytest.raises(ConfigError, match=found):
        setup(path)


def test_datasets_are_made_anew_when_any_code_that_builds_them_changes():
    rooms = [ROOT / "ebft_mega" / "data" / room for room in ("text", "store", "builder")]
    sources = [path.read_text() for room in rooms for path in room.glob("*.py")]
    imported = {name for source in sources for name in re.findall(r"from ebft_mega\.(\w+)", source)}
    assert imported == {name.removesuffix(".py") for name in DATA_CODE}


@pytest.fixture(scope="module")
def quickstart():
    return runpy.run_path(str(ROOT / "tools" / "quickstart.py"), run_name="quickstart")


def test_the_default_budget_runs_the_configured_steps(quickstart):
    share = quickstart["share_of_steps"](quickstart["FULL_SECONDS"])
    assert share == 1
    assert quickstart["evaluation_rows"](share) == quickstart["FULL_ROWS"]


def test_budgets_scale_what_is_not_fixed(quickstart):
    full, fixed = quickstart["FULL_SECONDS"], quickstart["FIXED_SECONDS"]
    share, rows = quickstart["share_of_steps"], quickstart["evaluation_rows"]
    assert share((full + fixed) / 2) == 0.5 and rows(0.5) == quickstart["FULL_ROWS"] // 2
    assert share(0) == 0 and rows(0) == quickstart["LEAST_ROWS"]
    assert share(2 * full - fixed) == 2 and rows(2) == quickstart["FULL_ROWS"]


@pytest.mark.parametrize("name", ["stories", "code", "headers", "few_data", "quickstart"])
def test_declared_experiments_are_right_but_for_what_is_not_made_yet(name, tmp_path, monkeypatch):
    monkeypatch.setenv("EBFT_STORIES", str(tmp_path))
    path = SPEC.with_name(f"{name}.yaml")
    try:
        experiment = setup(path)
    except ConfigError as error:
        # The model of another experiment.
        found = [problem.key for problem in error.problems]
        assert name == "few_data" and found == ["start", "arms.warm_start.model"]
        return
    assert not configuration_problems(experiment)
