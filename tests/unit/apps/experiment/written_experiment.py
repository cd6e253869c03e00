"""Evaluations of arms that never ran, with the values that a test needs, and the results that hold them."""

import json
from dataclasses import dataclass, field

import numpy as np

from ebft_mega.apps.experiment.spec import ExperimentSpec
from ebft_mega.apps.experiment.trials import ExperimentResults, Trial, TrialCost, TrialResult
from ebft_mega.evaluation.conditions import CONFIDENCE_BINS, POSITION_BINS, TRAINED_FEATURES

TEMPERATURES = (0.6, 0.8, 1.0)
ROLLOUT_METRICS = ("feature_matching_loss", "cfm_loss", "alignment", "raw_cosine", "duplicate_share")
OWN_LENGTH = 4
ROWS = 24
GROUPS = [f"d{row // 2}" for row in range(ROWS)]


@dataclass(frozen=True)
class Truth:
    """What an arm is: means of its metrics, before noise."""

    ce: float = 2.0
    fm: float = 0.2  # at its best temperature
    best: float = 0.8
    seeds: tuple = (0, 1, 2)  # () for a model as it is
    spread: float = 0.0005  # standard deviation between seeds
    noise: float = 0.001  # of a seed's row
    overconfidence: float = 0.1
    cost: TrialCost | None = field(default=TrialCost(100, 51200, 3e12, 25.0, 30.0))


def spec_of(**keys):
    """A valid experiment, but for what a test says."""
    base = {
        "question": "Is <b> lower than a?",
        "output_dir": "runs/x",
        "config": "configs/tiny.yaml",
        "splits": {"train": "data/train", "tuning": "data/tuning", "report": "data/report"},
        "arms": {"a": {}, "b": {}},
        "evaluation": {"temperatures": TEMPERATURES},
    }
    return ExperimentSpec.model_validate(_with_tuples({**base, **keys}))


def _with_tuples(value):
    """Lists as tuples, which the sections ask for."""
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


def rng_of(*parts):
    return np.random.default_rng([sum(map(ord, str(part))) * 7919 + len(str(part)) for part in parts])


def write_evaluation(directory, truth, seed, name="a", split="report", maps=(), lengths=(), **fields):
    """The file of one run on a split; rows and documents have effects that all arms share."""
    directory.mkdir(parents=True, exist_ok=True)
    rows, own = rng_of(split), rng_of(name, seed, split)
    common = 0.05 * rows.normal(size=ROWS // 2).repeat(2) + 0.02 * rows.normal(size=ROWS)
    of_seed = truth.spread * rng_of(name, seed).normal()

    def values(mean, scale=1.0):
        noise = truth.noise * own.normal(size=ROWS)
        return mean + scale * (common + noise + of_seed)

    conditions = []
    for temperature in TEMPERATURES:
        for length in (OWN_LENGTH, *lengths):
            for features in (TRAINED_FEATURES, *maps):
                fm = truth.fm + 0.05 * (temperature - truth.best) ** 2 + 0.001 * (length - OWN_LENGTH)
                per_row = {f"eval/{key}": values(fm if "loss" in key else 1 - temperature) for key in ROLLOUT_METRICS}
                conditions.append(
                    {
                        "temperature": temperature,
                        "completion_length": length,
                        "features": features,
                        "means": {key: float(found.mean()) for key, found in per_row.items()},
                        "per_row": {key: found.tolist() for key, found in per_row.items()},
                        "per_position": {
                            key: np.repeat(found[:, None], POSITION_BINS, 1).tolist() for key, found in per_row.items()
                        },
                    }
                )
    ce = values(truth.ce, 2.0)
    content = {
        "model": str(directory),
        "feature_model": "models/start",
        "data": f"data/{split}",
        "sequence_length": 32,
        "rows": ROWS,
        "temperature": 0.6,
        "completion_length": OWN_LENGTH,
        "eval/ce_loss": float(ce.mean()),
        "per_row": {"eval/ce_loss": ce.tolist()},
        "row_groups": GROUPS,
        "conditions": conditions,
        "feature_maps": {each: f"the map {each}" for each in (TRAINED_FEATURES, *maps)},
        "calibration": [calibration(temperature, truth, values, own) for temperature in TEMPERATURES],
        "ce_per_position": (ce[:, None] + np.linspace(0.1, -0.1, POSITION_BINS)).tolist(),
    }
    (directory / "evaluation.json").write_text(json.dumps(content | fields))
    return directory


def calibration(temperature, truth, values, own):
    """Tokens in three bins; the arm is as much too sure as its truth says, and more at low temperature."""
    tokens = np.zeros((ROWS, CONFIDENCE_BINS))
    tokens[:, [3, 7, 12]] = (10, 12, 9)
    confidence = tokens * (np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS
    correct = np.clip(confidence - tokens * (truth.overconfidence + 0.2 * (1 - temperature)), 0, None)
    correct = np.round(correct + own.uniform(-0.5, 0.5, size=correct.shape) * (tokens > 0))
    brier = values(0.5 + truth.overconfidence + 0.1 * (temperature - 1) ** 2)
    per_row = {"brier": brier, "bin_tokens": tokens, "bin_confidence": confidence, "bin_correct": correct}
    error = abs(confidence.sum(0) - correct.sum(0)).sum() / tokens.sum()
    return {
        "temperature": temperature,
        "means": {"eval/brier": float(brier.mean()), "eval/calibration_error": float(error)},
        "per_row": {f"eval/{key}": found.tolist() for key, found in per_row.items()},
    }


def write_results(folder, truths, chosen=None, tried=None, **evaluation):
    """Evaluations of main runs on both splits, and of the runs among which values were chosen.

    Args:
        truths: by arm.
        tried: by arm, a truth for each choice, evaluated with the seeds 1000 and 1001.
    """
    trials = []
    for arm, truth in truths.items():
        for seed in truth.seeds or (None,):
            places = [
                write_evaluation(folder / f"{arm}-{seed}-{split}", truth, seed, arm, split, **evaluation)
                for split in ("tuning", "report")
            ]
            trial = Trial(arm, (chosen or {}).get(arm, ()), seed, "main")
            trials.append(TrialResult(trial, folder / f"{arm}-{seed}", *places, truth.cost if truth.seeds else None))
    for arm, choices in (tried or {}).items():
        for number, (choice, truth) in enumerate(choices):
            for seed in truth.seeds:
                place = write_evaluation(folder / f"{arm}-{number}-{seed}-tried", truth, seed, arm, "tuning")
                trials.append(TrialResult(Trial(arm, choice, seed, "tuning"), None, place, None, None))
    return ExperimentResults(chosen or {}, tuple(trials), {"code": "1234abc", "machine": "2 cores"})
