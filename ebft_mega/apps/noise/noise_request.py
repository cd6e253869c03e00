"""What a measurement of noise is asked for, checked against its inputs before anything is computed. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ebft_mega.apps.noise.estimator_specs import EstimatorSpec
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.config.schema import CheckpointConfig, EvaluationConfig, ParallelConfig, RunConfig, ZeroConfig
from ebft_mega.errors import InputError, InputProblems, Problem
from ebft_mega.planning.model_files import check_model
from ebft_mega.planning.run_plan import RunPlan, check_run

WARMUP_BATCHES = 20


@dataclass(frozen=True)
class NoiseRequest:
    """Estimators of the gradient of one model, and what they are measured on."""

    model: Path  # the policy: a Hugging Face directory or a checkpoint folder
    data: Path  # dataset directory, read in the order of the configuration's seed
    specs: tuple[EstimatorSpec, ...]  # with the configurations of runs
    rows: int  # X, measured rows
    replicates: int  # R, samplings of each row
    directions: int  # D, of random signs
    warmup_batches: int = WARMUP_BATCHES  # global batches before the measured rows, which critics are fitted on
    by_token: bool = False  # measure the contribution of each token of the rollouts, too

    @property
    def first_row(self) -> int:
        """Number of the first measured row, counted through the run."""
        return self.warmup_batches * self.specs[0].config.train.global_batch_size

    @property
    def labels(self) -> tuple[str, ...]:
        """Of everything that is measured: the estimators, then each one's tokens."""
        tokens = [
            f"{spec.label}/token={t}"
            for spec in self.specs
            if self.by_token
            for t in range(spec.config.ebft.generate_max_len)
        ]
        return (*(spec.label for spec in self.specs), *tokens)

    def fitting(self, spec: EstimatorSpec) -> RunConfig:
        """The configuration of a run with an estimator, in this process: what its critic is fitted with."""
        return measured_config(spec.config, self.data)

    def of_one_row(self, spec: EstimatorSpec) -> RunConfig:
        """The same with steps of one row."""
        config = self.fitting(spec)
        train = config.train.model_copy(update={"global_batch_size": 1, "micro_batch_size": 1})
        return config.model_copy(update={"train": train})


@dataclass(frozen=True)
class NoisePlan:
    """The models of a measurement."""

    architecture: Architecture  # of the policy
    feature_architecture: Architecture
    notes: tuple[str, ...]


def measured_config(config: RunConfig, data: Path) -> RunConfig:
    """A run's configuration, in one process, in float32, for the policy gradient alone, on this data."""
    sections = {
        "data": config.data.model_copy(update={"shards": data, "sources": None, "workers": 0, "on_error": "raise"}),
        "evaluation": EvaluationConfig(),
        "parallel": ParallelConfig(),
        "ebft": config.ebft.model_copy(update={"ce_coef": 0.0, "entropy_coef": 0.0, "rl_coef": 1.0}),
        "train": config.train.model_copy(update={"dtype": "float32"}),
        "zero": ZeroConfig(stage=0),
        "checkpoint": CheckpointConfig(resume="never"),
    }
    return config.model_copy(update=sections)


def check_request(request: NoiseRequest) -> NoisePlan:
    """Check the models and the data, as those of a run that reads as many rows.

    Raises:
        InputError: everything that is wrong, at once.
    """
    problems: list[Problem] = []
    plans: list[RunPlan] = []
    for config in _different_inputs(request):
        try:
            plans.append(check_run(_long_enough(config, request), world_size=1))
        except InputProblems as error:
            problems += [problem for problem in error.problems if problem not in problems]
    architecture = None
    try:
        architecture = check_model(request.model).architecture
    except InputProblems as error:
        problems += [problem.within("--model") for problem in error.problems]
    for plan in plans:
        supply = plan.train_rows
        for source in () if supply is None else supply.sources:
            if source.epochs > 1:
                needed = f"{request.first_row} rows for the critics and {request.rows} to measure"
                found = f"{source.manifest.tokens} tokens, {source.epochs:.2f} passes over them"
                problems.append(Problem(str(request.data), "--data", found, f"{needed}, none of them twice"))
        if architecture is not None and hf_shapes(architecture) != hf_shapes(plan.architecture):
            found = f"another architecture than that of {request.specs[0].config.place('model.init_from')}"
            problems.append(Problem(str(request.model), "--model", found, "a policy that the run trains"))
    if problems or architecture is None:
        raise InputError(list(dict.fromkeys(problems)))
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    return NoisePlan(architecture, plans[0].feature_architecture, tuple(notes))


def _different_inputs(request: NoiseRequest) -> Sequence[RunConfig]:
    """One configuration for each combination of files that estimators name."""
    found: dict[object, RunConfig] = {}
    for spec in request.specs:
        ebft = spec.config.ebft
        found.setdefault((ebft.feature_model, ebft.feature_layers, ebft.embed_method), request.fitting(spec))
    return tuple(found.values())


def _long_enough(config: RunConfig, request: NoiseRequest) -> RunConfig:
    """A run that reads the rows of the warm-up and those that are measured."""
    steps = request.warmup_batches + -(-request.rows // config.train.global_batch_size)
    train = config.train.model_copy(update={"max_steps": steps, "max_tokens": None})
    return config.model_copy(update={"train": train})
