"""What a run or an evaluation is made from, as plain values. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebft_mega.apps.experiment.runs.fingerprints import (
    data_fingerprint,
    evaluation_code,
    model_fingerprint,
    training_code,
    training_data,
)
from ebft_mega.apps.experiment.runs.stamps import SETTINGS, fingerprint
from ebft_mega.apps.experiment.runs.trial_runs import (
    ExperimentSetup,
    Split,
    evaluation_config,
    feature_model,
    model_of,
    split_place,
    start_trial,
    trial_config,
)
from ebft_mega.apps.experiment.trials import Choice, Trial
from ebft_mega.checkpoint.resume_rules import values_by_key
from ebft_mega.config.schema import RunConfig

# Inputs that are results of other runs, which are compared themselves.
FOLLOWING = ("start", "model", "feature network")
# Keys of a run configuration that say where a run lies and how it is watched, not what it is.
_OF_THE_PLACE = ("output_dir", "permissions")
_NOT_OF_EVALUATIONS = ("train.", "checkpoint.", "profile.", "evaluation.", "zero.", "parallel.", "learn.")


def training_inputs(setup: ExperimentSetup, trial: Trial, chosen: Mapping[str, Choice]) -> dict[str, Any]:
    """What a trial's run is made from, as plain JSON values; None is what is not there yet.

    Args:
        chosen: choices of the arms that it starts from.
    """
    config = trial_config(setup, trial, chosen)
    plan = setup.plans[trial.arm]
    start: str | None = "random weights"
    if plan.start in setup.plans:
        start = _model_inputs(setup, start_trial(setup, plan.start, trial.seed, chosen), chosen)
    elif config.model.init_from is not None:
        start = model_fingerprint(config.model.init_from)
    held_out = config.evaluation.shards
    return {
        SETTINGS: _settings(config),
        "processes": setup.num_ranks,
        "code": training_code(),
        "training data": training_data(config),
        "held-out data": "none" if held_out is None else _data(held_out),
        "start": start,
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    values = values_by_key(config.model_dump(mode="json"))
    return {key: value for key, value in values.items() if key not in _OF_THE_PLACE}


def _data(place: Path | str) -> str | None:
    return place if isinstance(place, str) else data_fingerprint(place)


def is_known(inputs: Mapping[str, Any]) -> bool:
    """Whether everything that something is made from is there."""
    nested = [value for key, value in inputs.items() if key != SETTINGS and isinstance(value, dict)]
    return None not in inputs.values() and not any(None in value.values() for value in nested)


def _model_inputs(setup: ExperimentSetup, trial: Trial, chosen: Mapping[str, Choice]) -> str | None:
    """Names the model of a trial by what it is made from; one that is not trained here, by its weights."""
    if setup.plans[trial.arm].model is not None:
        return model_fingerprint(model_of(setup, trial))
    inputs = training_inputs(setup, trial, chosen)
    return fingerprint(inputs) if is_known(inputs) else None


def evaluation_inputs(
    setup: ExperimentSetup, trial: Trial, split: Split, chosen: Mapping[str, Choice]
) -> dict[str, Any]:
    """What the evaluation of a trial is made from, as plain JSON values; None is what is not there yet."""
    features = feature_model(setup, trial, chosen)
    named = setup.spec.evaluation.feature_model or setup.spec.start
    of_features: str | None = "of the configuration"
    if named is not None and named in setup.plans:
        of_features = _model_inputs(setup, start_trial(setup, named, trial.seed, chosen), chosen)
    elif features is not None:
        of_features = model_fingerprint(features)
    settings = _settings(evaluation_config(setup))
    return {
        SETTINGS: {key: value for key, value in settings.items() if not key.startswith(_NOT_OF_EVALUATIONS)},
        "conditions": conditions(setup, split),
        "code": evaluation_code(),
        "data": data_fingerprint(split_place(setup, split)),
        "model": _model_inputs(setup, trial, chosen),
        "feature network": of_features,
    }


def conditions(setup: ExperimentSetup, split: Split) -> dict[str, Any]:
    """What is measured on a split: lengths and feature maps on the report split alone."""
    spec = setup.spec
    measured = spec.evaluation.model_dump(mode="json", exclude={"equal_temperature", "feature_model"})
    if split == "report":
        return measured
    return {"rows": spec.tuning.rows, **{key: measured[key] for key in ("samples", "temperatures")}}
