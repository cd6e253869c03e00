"""What an experiment's file may say. Docs: docs/experiments.md. No torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ebft_mega.config.fields import as_tuple
from ebft_mega.extension.options import Section, key

# Metrics that a comparison may name.
MetricName = Literal[
    "feature_matching_loss", "ce_loss", "alignment", "raw_cosine", "duplicate_share", "brier", "calibration_error"
]
# best_temperature: each arm at the one of `evaluation.temperatures` at which its metric is best on the tuning split.
# equal_temperature: all arms at `evaluation.equal_temperature`.
At = Literal["best_temperature", "equal_temperature"]


class Splits(Section):
    """The datasets of an experiment, all made before the first run."""

    train: str = key(..., "Dataset to train on.", allowed="a dataset directory")
    tuning: str = key(
        ..., "Held-out dataset on which settings and temperatures are chosen.", allowed="a dataset directory"
    )
    report: str = key(
        ..., "Held-out dataset that figures are reported on; nothing else may use it.", allowed="a dataset directory"
    )


class Preparation(Section):
    """A command that makes inputs, run once and in order."""

    makes: str = key(..., "What it makes; made again when the command or the code that it runs has changed.")
    run: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = key(
        ...,
        "A tool of this repository and its arguments, such as [tools/build_shards.py, --input, ...].",
        allowed="a list of texts",
    )


class Arm(Section):
    """A way to train (or, with `model`, to leave a model as it is)."""

    like: str | None = key(None, "Another arm: its keys, its start and the values chosen for it hold here, too.")
    config: str | None = key(None, "Run configuration (default: that of the experiment).")
    set: dict[str, Any] = key(
        {}, "Dotted keys of the run configuration, and their values.", allowed="a mapping of dotted keys to values"
    )
    start: str | None = key(
        None,
        "Arm (its run of the same seed) or model directory that it starts from (default: that of the experiment).",
    )
    model: str | None = key(None, "A model directory that is evaluated as it is; nothing is trained.")
    tune: dict[str, tuple[Any, ...]] = key(
        {},
        "Dotted keys, each with the values to choose from on the tuning split.",
        allowed="a mapping of dotted keys to lists of values",
    )
    seeds: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] | None = key(
        None, "Seeds of its runs (default: those of the experiment).", allowed="a list of integers"
    )
    directory: str | None = key(
        None, "Run directory of its only run, within `output_dir` (default: one below `output_dir`/runs)."
    )
    about: str = key("", "What a reader of the report should know of it.")
    reported: bool = key(True, "Whether it is evaluated; an arm may be there only for others to start from.")


class Tuning(Section):
    """How settings are chosen."""

    seeds: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = key(
        (1000,), "Seeds of the runs that are compared.", allowed="a list of integers"
    )
    metric: MetricName = key("feature_matching_loss", "Taken on the tuning split, each run at its best temperature.")
    rows: int = key(128, "Rows of the tuning split.", ge=2)


class FeatureMapChoice(Section):
    """A feature map to evaluate with beside the trained one; what is not given is as in the run configuration."""

    embed_method: str | None = key(None, "`ebft.embed_method`.")
    feature_layers: tuple[float, ...] | None = key(None, "`ebft.feature_layers`.", allowed="a list of numbers")
    feature_norm: Literal["joint", "per_layer"] | None = key(None, "`ebft.feature_norm`.", allowed="joint or per_layer")
    feature_model: str | None = key(None, "Another frozen network.")


class EvaluationSection(Section):
    """What every trained model is measured on."""

    rows: int = key(256, "Rows of the report split.", ge=2)
    samples: int | None = key(None, "Rollouts of an anchor (default: those of the run configuration).", ge=2)
    temperatures: Annotated[tuple[float, ...], BeforeValidator(as_tuple)] = key(
        (0.4, 0.6, 0.8, 1.0, 1.2), "Sampling temperatures.", allowed="a list of numbers > 0"
    )
    equal_temperature: float = key(1.0, "The one of them at which arms are compared at equal temperature.", gt=0)
    completion_lengths: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = key(
        (), "Tokens of completions beside the configuration's.", allowed="a list of integers >= 1"
    )
    feature_maps: dict[str, FeatureMapChoice] = key(
        {}, "Feature maps beside the trained one, by name.", allowed="a mapping of names to sections"
    )
    feature_model: str | None = key(None, "Frozen network (default: the model that the arms start from).")


class Comparison(Section):
    """A difference, `arm` minus `against`."""

    arm: str = key(..., "An arm.")
    against: str = key(..., "Another arm.")
    metric: MetricName = key("feature_matching_loss", "What is compared.")
    at: At = key("best_temperature", "At which temperature each arm is sampled; cross-entropy is at 1 either way.")


class ExperimentSpec(Section):
    """An experiment: what is asked, what is run, what is compared. Paths start in the repository, as a run's."""

    question: str = key(..., "What it is to find out, a sentence.")
    output_dir: str = key(..., "Directory of all runs, evaluations and the report.")
    config: str = key(..., "Run configuration that the arms have in common.")
    splits: Splits
    prepare: tuple[Preparation, ...] = key((), "Commands that make inputs.", allowed="a list of sections")
    start: str | None = key(None, "Model directory, or arm, that arms start from (default: the run configuration's).")
    arms: dict[str, Arm] = key(..., "What is compared, by name.", allowed="a mapping of names to sections")
    seeds: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = key(
        (0, 1, 2), "Seeds of every arm's runs.", allowed="a list of integers"
    )
    tuning: Tuning = Tuning()
    evaluation: EvaluationSection = EvaluationSection()
    primary: tuple[Comparison, ...] = key(
        (),
        "Comparisons named beforehand; their intervals and p are corrected (Holm).",
        allowed="a list of sections",
    )
    secondary: tuple[Comparison, ...] = key(
        (), "Others to show, each with an interval of its own.", allowed="a list of sections, as `primary`"
    )
    fronts: dict[str, tuple[str, ...]] = key(
        {},
        "Groups of arms, by name, whose cross-entropy and feature matching are drawn as one line.",
        allowed="a mapping of names to lists of arms",
    )
    limits: tuple[str, ...] = key((), "What the report says the experiment does not show.", allowed="a list of texts")
