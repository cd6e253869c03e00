"""Keys of the learning rate and the optimizer, and schedules and optimizers that do not keep their contract."""

import math

import pytest

from ebft_mega.config.entries import learning_rates
from ebft_mega.errors import ConfigError
from ebft_mega.extension.learning_rate_schedule import LearningRateSchedule
from ebft_mega.extension.update_rule import Optimizer
from ebft_mega.registry.kinds import OPTIMIZERS, SCHEDULES

BASE = """\
output_dir: runs/a
model: {init_from: runs/init}
data: {shards: data/train, sequence_length: 128}
train: {max_steps: 100, lr: 0.5}
"""


@pytest.mark.parametrize(
    ("share", "steps", "warmup"), [(0.07, 100, 7), (0.071, 100, 8), (1e-9, 100, 1), (0, 100, 0), (1, 7, 7)]
)
def test_a_share_of_the_steps_is_rounded_up(load, share, steps, warmup):
    config = load(f"train.warmup_share={share}", f"train.max_steps={steps}")
    assert learning_rates(config).warmup_steps == warmup
    assert learning_rates(load("train.warmup_steps=9")).warmup_steps == 9


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("train.warmup_steps=3", "train.warmup_share=0.1"),
            "--set: train.warmup_share: found 0.1, with train.warmup_steps 3; expected at most one of the two above 0",
        ),
        (("train.min_lr=0.6",), "--set: train.min_lr: found 0.6; expected at most train.lr 0.5"),
        (("train.min_lr=-1",), "--set: train.min_lr: found -1; expected a number >= 0"),
        (("train.warmup_share=1.5",), "--set: train.warmup_share: found 1.5; expected a number >= 0 and <= 1"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(load, overrides, words):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert str(caught.value) == words


class Faulty(LearningRateSchedule):
    """Is no schedule at the end of its run."""

    name = "faulty"
    last = 1.5

    def factor(self, progress):
        """Divides by 0 or gives what the test asks for at the last step."""
        return 1.0 if progress < 0.99 else 1.0 / self.last if self.last == 0 else self.last


@pytest.mark.parametrize(
    ("last", "found", "expected"),
    [
        (1.5, "whose factor(0.99), of step 99, is 1.5 ({place})", "a finite number from 0 to 1"),
        (math.nan, "whose factor(0.99), of step 99, is nan ({place})", "a finite number from 0 to 1"),
        (0, "which raises ZeroDivisionError at step 99: ", "a number from 0 to 1 for every step"),
    ],
)
def test_a_schedule_that_breaks_at_the_last_step_is_refused_at_its_place(load, monkeypatch, last, found, expected):
    monkeypatch.setitem(SCHEDULES.added, "faulty", Faulty)
    monkeypatch.setattr(Faulty, "last", last)
    with pytest.raises(ConfigError) as caught:
        load("train.lr_scheduler=faulty")
    (problem,) = caught.value.problems
    line = next(n for n, text in enumerate(open(__file__), 1) if text.startswith("class Faulty"))
    place = f"{__file__}:{line}"
    assert (problem.where, problem.key) == ("--set", "train.lr_scheduler")
    assert problem.found.startswith(f"faulty, {found.format(place=place)}") and place in problem.found
    assert problem.expected == expected


def test_every_schedule_of_the_package_keeps_its_contract(load):
    for name in SCHEDULES.own_names():
        for steps in (1, 2, 100):
            load(
                f"train.lr_scheduler={name}", f"train.max_steps={steps}", "train.warmup_share=0.03", "train.min_lr=0.1"
            )


@pytest.mark.parametrize(
    ("moments", "temporaries", "found", "expected"),
    [
        (["a"], 2, "whose moments are ['a']", "a tuple of different names of lower-case letters, digits and _, none"),
        (("a", "a"), 2, "whose moments are ('a', 'a')", "a tuple of different names"),
        (("weights",), 2, "whose moments are ('weights',)", "none of them weights or step"),
        (("../a",), 2, "whose moments are ('../a',)", "lower-case letters"),
        ((7,), 2, "whose moments are (7,)", "lower-case letters"),
        (("a",), -1, "whose temporaries are -1", "an integer >= 0"),
    ],
)
def test_an_optimizer_whose_moments_can_be_no_folders_is_refused(
    load, monkeypatch, moments, temporaries, found, expected
):
    kind = type("Odd", (Optimizer,), {"moments": moments, "temporaries": temporaries, "name": "odd"})
    monkeypatch.setitem(OPTIMIZERS.added, "odd", kind)
    monkeypatch.setattr("ebft_mega.config.entry_rules.place_of_entry", lambda entry: "odd.py:3")
    with pytest.raises(ConfigError) as caught:
        load("train.optimizer=odd")
    (problem,) = caught.value.problems
    assert (problem.where, problem.key) == ("--set", "train.optimizer")
    assert problem.found == f"odd, {found} (odd.py:3)" and expected in problem.expected
