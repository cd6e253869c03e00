"""Feature matching at matched cross-entropy: cases by hand, what pseudo-values say, coverage, what is outside."""

import numpy as np
import pytest

from ebft_mega.apps.experiment import fronts
from ebft_mega.apps.experiment.arm_values import CROSS_ENTROPY
from ebft_mega.apps.experiment.fronts import front_point, matched_difference

ROWS = 20


class Arm:
    """An arm of which only cross-entropy and feature matching are known, [S, R] each."""

    def __init__(self, name, ce, fm, seeds=(0, 1), groups=None):
        self.arm, self.seeds, self.groups = name, seeds, groups
        self.found = {CROSS_ENTROPY: np.asarray(ce, dtype=float), fronts.FEATURE_MATCHING: np.asarray(fm, dtype=float)}

    def values(self, measure, seeds):
        found = self.found[measure.metric]
        return found[[self.seeds.index(seed) for seed in seeds]] if self.seeds else found.repeat(len(seeds) or 1, 0)


def constant(name, ce, fm, num_seeds=2, **keys):
    return Arm(name, np.full((num_seeds, ROWS), ce), np.full((num_seeds, ROWS), fm), **keys)


TEMPERATURES = dict.fromkeys("abcx", 1.0)
LINE = [constant("a", 2.0, 0.30), constant("c", 2.4, 0.10), constant("b", 2.2, 0.20)]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(fronts, "STATISTIC_RESAMPLES", 100)
    monkeypatch.setattr(fronts, "OTHER_RESAMPLES", 100)


@pytest.mark.parametrize(("ce", "on_line"), [(2.0, 0.30), (2.1, 0.25), (2.2, 0.20), (2.35, 0.125), (2.4, 0.10)])
def test_the_line_is_straight_between_its_arms_in_the_order_of_cross_entropy(ce, on_line):
    found = matched_difference("line", LINE, constant("x", ce, 0.22), TEMPERATURES)
    assert found.on_line == pytest.approx(on_line) and found.ends == pytest.approx((2.0, 2.4))
    assert found.evidence.interval.mean == pytest.approx(0.22 - on_line)
    assert found.evidence.bootstrap.mean == pytest.approx(0.22 - on_line)


@pytest.mark.parametrize("ce", [1.999, 2.401])
def test_beyond_the_ends_nothing_is_said(ce):
    found = matched_difference("line", LINE, constant("x", ce, 0.22), TEMPERATURES)
    assert found.is_outside and found.evidence is None and found.ce == pytest.approx(ce)


def test_arms_above_each_other_and_lines_of_one_arm():
    twice = [constant("a", 2.0, 0.3), constant("b", 2.0, 0.2)]
    assert matched_difference("line", twice, constant("x", 2.0, 0.3), TEMPERATURES).on_line == pytest.approx(0.25)
    assert matched_difference("line", LINE[:1], constant("x", 2.0, 0.3), TEMPERATURES) is None
    assert matched_difference("line", LINE, constant("x", 2.1, 0.3, seeds=(8, 9)), TEMPERATURES) is None


def test_a_model_without_seeds_is_the_same_for_all():
    found = matched_difference("line", LINE, constant("x", 2.1, 0.24, 1, seeds=()), TEMPERATURES)
    assert found.evidence.interval.seed_means == pytest.approx((-0.01, -0.01)) and found.evidence.seeds == (0, 1)


def noisy(name, ce, fm, generator, common, num_seeds=3):
    """Rows that are hard are so for both losses; the seed moves an arm along its own line of both."""
    noise = generator.normal(0, 0.02, size=(2, num_seeds, ROWS)) + generator.normal(0, 0.02, size=(2, num_seeds, 1))
    return Arm(name, ce + common + noise[0], fm + 0.1 * common + noise[1], seeds=(0, 1, 2))


def test_the_interval_covers_the_difference_of_the_means(monkeypatch):
    """An arm exactly on the line of the arms' true means: nine in ten intervals, at least, hold zero."""
    generator, covered, trials = np.random.default_rng(4), 0, 100
    monkeypatch.setattr(fronts, "STATISTIC_RESAMPLES", 2)
    monkeypatch.setattr(fronts, "OTHER_RESAMPLES", 2)
    for _ in range(trials):
        common = 0.3 * generator.normal(size=ROWS)
        line = [noisy("a", 2.0, 0.3, generator, common), noisy("b", 2.4, 0.1, generator, common)]
        found = matched_difference("line", line, noisy("x", 2.1, 0.25, generator, common), TEMPERATURES)
        covered += found.evidence.interval.combined.low <= 0 <= found.evidence.interval.combined.high
    assert 0.9 <= covered / trials <= 1.0, covered / trials


def test_uncertain_cross_entropy_counts_by_the_lines_slope():
    """The arm's own seeds differ in cross-entropy alone; on a flat line that is no matter, on a steep one it is."""
    ces = np.full((2, ROWS), 2.1) + np.array([[-0.01], [0.01]])
    arm = Arm("x", ces, np.full((2, ROWS), 0.25))
    flat = [constant("a", 2.0, 0.25), constant("b", 2.4, 0.25)]
    steep = [constant("a", 2.0, 0.30), constant("b", 2.4, 0.10)]
    assert matched_difference("line", flat, arm, TEMPERATURES).evidence.interval.standard_error == pytest.approx(0)
    found = matched_difference("line", steep, arm, TEMPERATURES).evidence
    assert found.interval.standard_error == pytest.approx(0.5 * 0.01), "slope -.5, standard error of the mean .01"
    assert found.bootstrap.high - found.bootstrap.low == pytest.approx(0.01), "from both draws of the one seed"


def test_a_point_of_a_line():
    point = front_point(LINE[0], 0.8)
    assert (point.arm, point.temperature, point.ce.mean, point.fm.mean) == ("a", 0.8, 2.0, pytest.approx(0.3))
