"""Every configuration key: its default, what it accepts and what it means. No torch, no file access.

One frozen class per section, in the order and with the names of the YAML file; those of what a run reads stand in
`input_keys.py`, those of what happens around its steps in `step_keys.py`. `make docs-tables` writes the tables of
`docs/configuration.md` from all of them. Rules that concern several keys are in `rules.py`; rules that need files or
the number of processes are in `ebft_mega/planning/run_plan.py`.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr
from pydantic.fields import FieldInfo

from ebft_mega.block_plan import BlockPlan
from ebft_mega.config.fields import (
    DATASET_PLACE,
    PATH,
    LocalPath,
    ModelPlace,
    as_integer,
    as_tuple,
    one_of,
    path_kind,
)
from ebft_mega.config.input_keys import STEPS, DataConfig, EvaluationConfig, ModelConfig, SourceConfig
from ebft_mega.config.paths import PathKind
from ebft_mega.config.step_keys import CheckpointConfig, ProfileConfig
from ebft_mega.extension.options import Section, key
from ebft_mega.io.output_directory import Permissions
from ebft_mega.registry.kinds import ADVANTAGE_ESTIMATORS, FEATURE_MAPS, OPTIMIZERS, REWARD_TERMS, SCHEDULES
from ebft_mega.registry.plugins import Plugin
from ebft_mega.reward.terms.alignment import AlignmentKind


class EbftConfig(Section):
    """Energy-based fine-tuning in strided mode; the names are axolotl's, the keys marked (ours) are added."""

    mode: Literal["strided"] = key("strided", "The only mode of this trainer.")
    stride: int = key(8, "Tokens from one anchor to the next.", unit="tokens", ge=1)
    context_length: int = key(
        8,
        "c: tokens before the first anchor. Every block sees its whole prefix, not only c tokens.",
        unit="tokens",
        ge=1,
    )
    generate_max_len: int = key(
        8, "G: tokens generated per block; (P - G - c) must be divisible by the stride.", unit="tokens", ge=1
    )
    n_samples_per_prompt: int = key(
        4,
        "n: rollouts per anchor. 1: the advantage is the reward, without a diversity term; 2: the diversity term has "
        "no baseline.",
        ge=1,
    )
    temperature: float = key(0.6, "Sampling temperature.", gt=0)
    top_p: float = key(
        1.0, "Nucleus sampling: probability mass of the tokens that may be sampled; 1: all tokens.", gt=0, le=1
    )
    merge_equal_prefixes: bool = key(
        True, "(ours) Compute what rollouts of an anchor begin with alike once. It changes no number, only the cost."
    )
    feature_layers: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = key(
        (0.25, 0.5, 0.75),
        "Depths at which the frozen network is read, as fractions of its layers.",
        allowed="a list of numbers > 0 and <= 1",
    )
    embed_method: Annotated[str, *one_of(FEATURE_MAPS)] = key(
        "last_token", "How the G token features of a block become one vector."
    )
    layer_weights: Annotated[tuple[Annotated[float, Field(ge=0, le=1e6)], ...] | None, BeforeValidator(as_tuple)] = key(
        None,
        "(ours) How often the inner products of each layer that is read count, from the shallowest to the deepest; at "
        "least one above 0. Features are normalised as without. Not set: each counts once.",
        allowed="a list of numbers >= 0 and <= 1e6, one for each layer that the feature map reads",
    )
    feature_norm: Literal["joint", "per_layer"] = key(
        "joint", "(ours) Normalise the concatenation of the tapped layers, or each layer by itself."
    )
    use_whitening: bool = key(
        True,
        "Whiten the rollout features of each block. Different rollouts are orthogonal then, so that "
        "`diversity_coef` only weighs a penalty of equal ones.",
    )
    whitening: Literal["sample", "feature"] = key(
        "sample", "(ours) `sample`: as the EBFT authors' code; `feature`: as the paper and axolotl."
    )
    alignment: AlignmentKind = key(
        "cosine",
        "(ours) The alignment reward: `cosine`: 2 cos(x, y), as the EBFT authors' code; `inner_product`: 2 x . y, with "
        "which unwhitened rewards follow feature matching itself.",
    )
    alignment_coef: float = key(1.0, "Weight of the alignment reward.", ge=0)
    diversity_coef: float = key(
        1.0,
        "Weight of the diversity penalty. With `use_whitening`, `sample` and `feature` alike, the penalty of a rollout "
        "is 0 unless others of its block equal it: of m equal ones among n each has 2 (m - 1) / (m (n - 1)).",
        ge=0,
    )
    reward_terms: dict[Annotated[str, *one_of(REWARD_TERMS)], float] = key(
        {},
        "(ours) More terms of the reward with their coefficients, above 0 for a reward, below 0 for a penalty. Those "
        "of `alignment` and `diversity` have keys of their own.",
        allowed="a mapping of names of reward terms to numbers",
    )
    rl_coef: float = key(1.0, "Weight of the policy-gradient loss. 0 disables rollouts and the feature network.", ge=0)
    ce_coef: float = key(0.0, "Weight of the next-token cross-entropy on the row.", ge=0)
    entropy_coef: float = key(
        0.0,
        "(ours) Weight of an entropy bonus: this times the mean entropy of the next token at temperature 1, in nats, "
        "over the positions that the cross-entropy counts, is subtracted from the loss.",
        ge=0,
    )
    advantage_estimator: Annotated[str, *one_of(ADVANTAGE_ESTIMATORS)] = key(
        "rloo", "How rewards become advantages. `rloo`: leave-one-out baseline, unbiased for the diversity term."
    )
    feature_model: ModelPlace | None = key(
        None, "(ours) Frozen feature network, as `model.init_from`; not set: the initial model.", allowed=DATASET_PLACE
    )

    noise_interval: int | None = key(
        None,
        "(ours) Steps between two measurements of the gradient's noise: `ebft/gradient_signal_to_noise` and "
        "`ebft/critical_batch_rows`. Needs two micro-batches in a step. Not set: none.",
        unit=STEPS,
        ge=1,
    )

    @property
    def reward_whitening(self) -> Literal["none", "sample", "feature"]:
        """The whitening that rewards are computed with."""
        return self.whitening if self.use_whitening else "none"


class ParallelConfig(Section):
    """How one model replica is split over processes; the replicas are data-parallel."""

    tensor_parallel_size: int = key(1, "Processes that share every weight matrix.", ge=1)
    pipeline_parallel_size: int = key(1, "Pipeline stages: processes that share the layers.", ge=1)
    sequence_parallel: bool = key(False, "Also split the activations between tensor-parallel layers.")


class TrainConfig(Section):
    """The optimisation; exactly one of `max_steps` and `max_tokens`."""

    global_batch_size: int = key(16, "Rows per optimizer step.", unit="rows", ge=1)
    micro_batch_size: int = key(1, "Rows that one replica processes at a time.", unit="rows", ge=1)
    max_steps: int | None = key(None, "Optimizer steps of the whole run.", unit=STEPS, ge=1)
    max_tokens: Annotated[int, BeforeValidator(as_integer), Field(ge=1)] | None = key(
        None,
        "Tokens of raw text to read; the run ends with the last whole optimizer step within it.",
        allowed="an integer >= 1, tokens",
    )
    max_run_minutes: float | None = key(
        None,
        "Wall time after which the run saves a checkpoint and stops (exit code 75). Leave room for one step and one "
        "checkpoint before the time limit of the job.",
        unit="minutes",
        gt=0,
    )
    lr: float = key(1e-6, "Highest learning rate; at most 1e6.", gt=0)
    lr_scheduler: Annotated[str, *one_of(SCHEDULES)] = key(
        "constant", "How the learning rate goes from `lr` to `min_lr` after the warm-up."
    )
    min_lr: float = key(
        0.0,
        "(ours) Lowest learning rate, to which the schedule falls; the step after the last one would have it. At most "
        "`train.lr`.",
        ge=0,
    )
    warmup_steps: int = key(0, "Steps of linear warm-up from 0 to `lr`.", unit=STEPS, ge=0)
    warmup_share: float = key(
        0.0, "(ours) Instead of `warmup_steps`: share of all steps, rounded up to whole ones.", ge=0, le=1
    )
    optimizer: Annotated[str, *one_of(OPTIMIZERS)] = key(
        "adamw", "(ours) How weights are updated from their gradients. Its moments are float32."
    )
    weight_decay: float = key(
        0.0, "Decoupled weight decay of matrices; norms and biases have none. At most 1 / `train.lr`.", ge=0
    )
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(as_tuple)
    ] = key((0.9, 0.95), "Averaging factors of the optimizer's moments.", allowed="a list of two numbers >= 0 and < 1")
    grad_clip: float = key(1.0, "Largest global gradient norm; 0 disables clipping.", ge=0)
    dtype: Literal["bfloat16", "float32"] = key(
        "bfloat16", "Precision of weights and activations; gradients accumulate in float32 either way."
    )
    activation_checkpointing: Literal["none", "full"] = key(
        "none", "`full`: save only each layer's input and recompute the rest in the backward pass."
    )
    attention: Literal["auto", "two_part", "flex", "dense"] = key(
        "auto",
        "(ours) How attention is computed; values and gradients are the same. `two_part`: the document prefix and the "
        "rollout's own tokens by torch's kernels, merged; `flex`: one sparse kernel, on CUDA; `dense`: a full mask, "
        "slow; `auto`: `flex` on CUDA with Triton, else `two_part`.",
    )
    step_timeout_minutes: float = key(
        30.0,
        "(ours) When no optimizer step ends within this time, every rank dumps its stacks and the run ends with exit "
        "code 3.",
        unit="minutes",
        gt=0,
    )

    def warmup_of(self, total_steps: int) -> int:
        """Steps of warm-up of a run of so many steps."""
        # The share as it is written: 0.07 of 100 steps is 7, though the nearest binary number is above it.
        return self.warmup_steps or math.ceil(Fraction(repr(self.warmup_share)) * total_steps)


class ZeroConfig(Section):
    """How ZeRO partitions parameters, gradients and optimizer state over the data-parallel processes."""

    stage: Literal[0, 1, 2, 3] = key(3, "DeepSpeed's ZeRO stage.")
    hold_parameters: Literal["rollout", "step", "none"] = key(
        "rollout",
        "How long all parameters stay gathered at stage 3: during the rollout phase, during the whole step, or never.",
    )
    feature_network: Literal["auto", "resident", "sharded"] = key(
        "auto",
        "(ours) The frozen network: whole on every data-parallel process, or partitioned over them and gathered once "
        "for the features phase; `auto`: resident if it fits.",
    )
    offload_optimizer: Literal["none", "cpu"] = key(
        "none", "Where the optimizer state lives (`none`: on the accelerator). `cpu` is not yet supported."
    )


Reuse = Literal["checkpoints", "activations", "off"]  # what the gradient pass takes over from the rollout


class LearnConfig(Section):
    """The pass that computes gradients."""

    reuse_rollout: Literal["auto", "checkpoints", "activations", "off"] = key(
        "auto",
        "What the gradient pass takes over from the rollout phase, so that the policy is not run again: each layer's "
        "input (`checkpoints`; the rest is recomputed) or everything (`activations`); `auto`: the most that fits.",
    )


class RunConfig(Section):
    """One run, complete: what `config.resolved.yaml` of a run directory holds."""

    output_dir: LocalPath = key(..., "Run directory; it is created if it does not exist.", allowed=PATH)
    permissions: Permissions = key(
        "private",
        "(ours) Who may use the directories and files that the run makes: `private`: their owner alone (0700); "
        "`group`: the group, too (0770), as a shared `data.cache` needs; `umask`: whoever the umask leaves. What is "
        "there keeps its mode.",
    )
    seed: int = key(
        0,
        "Seed of the data order, of random weights and of the sampling noise.",
        allowed="an integer from 0 to 2**63 - 1",
        ge=0,
        lt=2**63,
    )
    deterministic: bool = key(
        False,
        "Only kernels that give the same bits every time: two runs at one layout on one machine are equal bit for bit. "
        "An operation without such a kernel ends the run.",
    )
    plugins: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = key(
        (),
        "(ours) Modules with entries of your own: names of installed ones, or paths of Python files, of which relative "
        "ones start in the configuration's folder. Their code is run.",
        allowed="a list of module names and of paths that end in .py",
    )
    options: dict[str, dict[str, Any]] = key(
        {},
        "(ours) Options of the entries that other keys name, by the entry's name.",
        allowed="a mapping of names of entries to their options",
    )
    model: ModelConfig
    data: DataConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    ebft: EbftConfig = EbftConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    zero: ZeroConfig = ZeroConfig()
    learn: LearnConfig = LearnConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()

    _places: dict[str, str] = PrivateAttr(default_factory=dict)
    _plugins: tuple[Plugin, ...] = PrivateAttr(default=())

    @property
    def loaded_plugins(self) -> tuple[Plugin, ...]:
        """What `plugins` names, as this process has imported it; none unless `load_config` has made this."""
        return self._plugins

    def place(self, dotted_key: str) -> str:
        """Say where a key, or else the section around it, was written: `file:line` or `--set`."""
        parts = dotted_key.split(".")
        for length in range(len(parts), 0, -1):
            found = self._places.get(".".join(parts[:length]))
            if found:
                return found
        return self._places.get("", "configuration")

    def with_places(self, places: Mapping[str, str]) -> "RunConfig":
        """Copy the configuration, with the place where each key was written."""
        copy = self.model_copy()
        copy._places = dict(places)
        return copy

    def with_plugins(self, plugins: tuple[Plugin, ...]) -> "RunConfig":
        """Copy the configuration, with the plugins that were imported for it."""
        copy = self.model_copy()
        copy._plugins = plugins
        return copy

    @property
    def block_plan(self) -> BlockPlan:
        """Block geometry of one row.

        Raises:
            ValueError: the lengths do not fit (`load_config` has refused this already).
        """
        return BlockPlan(
            sequence_length=self.data.sequence_length,
            stride=self.ebft.stride,
            context_length=self.ebft.context_length,
            generate_length=self.ebft.generate_max_len,
            num_samples=self.ebft.n_samples_per_prompt,
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of raw text that one optimizer step reads."""
        return self.train.global_batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, from `train.max_steps` or `train.max_tokens`."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        return (self.train.max_tokens or 0) // self.tokens_per_step

    @property
    def uses_rollouts(self) -> bool:
        """Whether training samples and scores rollouts; plain continued pretraining does not."""
        return self.ebft.rl_coef > 0

    @property
    def uses_targets(self) -> bool:
        """Whether training scores the rows' own tokens, for their cross-entropy or for entropies."""
        return self.ebft.ce_coef > 0 or self.ebft.entropy_coef > 0


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def all_keys() -> dict[str, FieldInfo]:
    """List every dotted key and its pydantic field, in the order of the file."""
    keys: dict[str, FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        if name in SECTIONS:
            keys.update({f"{name}.{leaf}": inner for leaf, inner in SECTIONS[name].model_fields.items()})
        else:
            keys[name] = field
    return keys


def path_keys() -> dict[str, PathKind]:
    """List the keys that hold paths; `*` stands for the name of a source."""
    fields = all_keys() | {f"data.sources.*.{name}": field for name, field in SourceConfig.model_fields.items()}
    return {name: kind for name, field in fields.items() if (kind := path_kind(field)) is not None}
