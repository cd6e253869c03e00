"""The runs that an experiment asks for, by hand-written expectations."""

import pytest

from ebft_mega.apps.experiment.runs.arm_plans import (
    arm_plans,
    choice_of,
    closure,
    combinations,
    levels,
    main_trials,
    start_seed,
    tuning_trials,
)
from ebft_mega.apps.experiment.spec import Arm, ExperimentSpec, Splits, Tuning
from ebft_mega.apps.experiment.trials import Trial


def spec(arms, **values):
    splits = Splits(train="a", tuning="b", report="c")
    named = {name: Arm.model_validate(keys) for name, keys in arms.items()}
    return ExperimentSpec(question="?", output_dir="o", config="c.yaml", splits=splits, arms=named, **values)


ARMS = {
    "warm": {"config": "w.yaml", "seeds": (7,)},
    "plain": {"set": {"ebft.rl_coef": 0.0, "train.lr": 1.0}},
    "ce": {"like": "plain", "tune": {"train.lr": (0.1, 0.2), "train.min_lr": (0, 1)}},
    "ebft": {"like": "ce", "set": {"ebft.rl_coef": 1.0}, "seeds": (0,)},
    "fixed": {"like": "ebft", "set": {"train.lr": 0.5}},
}


@pytest.fixture
def tuned():
    return spec(ARMS, start="warm", tuning=Tuning(seeds=(100, 101)))


CHOSEN = {"ce": (("train.lr", 0.2), ("train.min_lr", 1))}


def test_what_arms_take_over(tuned):
    plans = arm_plans(tuned)
    assert plans["ebft"].settings == {"ebft.rl_coef": 1.0}  # the tried key takes the place of the set one
    assert plans["fixed"].settings == {"ebft.rl_coef": 1.0, "train.lr": 0.5}
    assert plans["warm"].start is None and plans["fixed"].start == "warm"
    assert (plans["warm"].config, plans["ce"].config) == ("w.yaml", "c.yaml")
    assert plans["fixed"].seeds == (0, 1, 2)  # those of the experiment, not of the arm that it is like


def test_every_combination_is_tried_with_every_tuning_seed(tuned):
    plans = arm_plans(tuned)
    trials = tuning_trials(plans["ce"], tuned, {})
    assert len(trials) == 8 and len(set(trials)) == 8
    assert {trial.seed for trial in trials} == {100, 101}
    assert trials[0].choice == (("train.lr", 0.1), ("train.min_lr", 0))
    assert tuning_trials(plans["ebft"], tuned, CHOSEN) == []


def test_choices_hold_for_arms_that_are_alike_unless_they_set_the_key(tuned):
    plans = arm_plans(tuned)
    assert main_trials(plans["ebft"], tuned, CHOSEN) == [Trial("ebft", CHOSEN["ce"], 0, "main")]
    assert choice_of(plans["fixed"], tuned, CHOSEN) == (("train.min_lr", 1),)
    assert [trial.seed for trial in main_trials(plans["ce"], tuned, CHOSEN)] == [0, 1, 2]
    with pytest.raises(KeyError):
        main_trials(plans["ebft"], tuned, {})


def test_an_arm_tunes_more_on_top_of_what_was_chosen_for_another():
    found = spec({"a": {"tune": {"x.y": (1, 2)}}, "b": {"like": "a", "tune": {"x.z": (3, 4)}}})
    plans = arm_plans(found)
    trials = tuning_trials(plans["b"], found, {"a": (("x.y", 2),)})
    assert [trial.choice for trial in trials] == [(("x.y", 2), ("x.z", 3)), (("x.y", 2), ("x.z", 4))]
    chosen = {"a": (("x.y", 2),), "b": trials[1].choice}
    assert choice_of(plans["b"], found, chosen) == (("x.y", 2), ("x.z", 4))
    assert levels(plans) == [["a"], ["b"]]


def test_arms_come_after_what_they_start_from(tuned):
    assert levels(arm_plans(tuned)) == [["warm"], ["plain", "ce", "ebft", "fixed"]]
    chain = spec({"c": {"start": "b"}, "b": {"start": "a"}, "a": {}, "d": {}})
    assert levels(arm_plans(chain)) == [["a"], ["b"], ["c", "d"]]


def test_an_arm_that_others_start_from_is_chosen_for_before():
    found = spec({"tuned": {"tune": {"x.y": (1, 2)}}, "base": {"like": "tuned"}, "later": {"start": "base"}})
    assert levels(arm_plans(found)) == [["tuned", "base"], ["later"]]


def test_what_arms_need(tuned):
    plans = arm_plans(tuned)
    assert closure(["fixed"], plans) == {"fixed", "ce", "warm"}
    assert closure(["warm"], plans) == {"warm"}


def test_the_run_to_start_from_has_the_same_seed_or_is_the_first(tuned):
    plans = arm_plans(tuned)
    assert start_seed(plans["warm"], 2) == 7
    assert start_seed(plans["ce"], 2) == 2
    assert start_seed(plans["ce"], 100) == 0


def test_a_model_is_one_trial_without_a_seed():
    found = spec({"as it is": {"model": "m"}}, start="elsewhere")
    plan = arm_plans(found)["as it is"]
    assert main_trials(plan, found, {}) == [Trial("as it is", (), None, "main")]
    assert plan.start is None


def test_combinations_change_the_last_key_fastest():
    assert combinations({"a": (1, 2), "b": (3, 4)})[:2] == [(("a", 1), ("b", 3)), (("a", 1), ("b", 4))]
    assert combinations({}) == [()]
