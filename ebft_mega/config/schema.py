"""Every configuration key: its default, what it accepts and what it means. No torch, no file access.

One frozen model per section, in the order and with the names of the YAML file. `key(...)` keeps the words
that errors and `docs/configuration.md` use beside the field they belong to. Rules that concern several keys
are in `rules.py`, rules that need files or the number of processes in `validate.py`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from ebft_mega.block_plan import BlockPlan

UNKNOWN_PLACE = "configuration"


def key(default: Any = ..., *, allowed: str, meaning: str, **limits: Any) -> Any:
    """A field with its words for errors and documentation; no default means that the key is required."""
    return Field(default, description=meaning, json_schema_extra={"allowed": allowed}, **limits)


def _as_path(value: Any) -> Any:
    """Turn text into a path; what could be taken for a command or a download stays text and is refused."""
    if isinstance(value, str) and value and not re.match(r"\w+:", value):
        return Path(value)
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_whole_number(value: Any) -> Any:
    """Let `1e9` stand for a number of tokens."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


LocalPath = Annotated[Path, BeforeValidator(_as_path)]
PATH = "a local path (relative paths start at the repository root)"
_HTTPS = (
    r"https://[A-Za-z0-9.:\[\]-]+(/[^\s?#@]*)?"  # no user name or query: both may carry secrets, and places are logged
)
DatasetPlace = Annotated[Path | Annotated[str, Field(pattern=f"^{_HTTPS}$")], BeforeValidator(_as_path)]
DATASET_PLACE = "a local path (relative paths start at the repository root) or an https:// URL"
COUNT = "an integer >= 1"
COEFFICIENT = "a number >= 0"


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are refused, values never change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The policy to train: exactly one of the two keys."""

    init_from: LocalPath | None = key(
        None,
        allowed=PATH,
        meaning="Model to start from: a Hugging Face directory (`config.json`, `*.safetensors`, a tokenizer), or a "
        "checkpoint of another run, of which only the weights are taken.",
    )
    config: dict[str, Any] | None = key(
        None,
        allowed="a mapping of architecture fields in Hugging Face's names",
        meaning="Architecture of a model with random weights, as in a Hugging Face `config.json`.",
    )


class SourceConfig(Section):
    """One of several datasets that are mixed."""

    shards: DatasetPlace = key(allowed=DATASET_PLACE, meaning="As `data.shards`.")
    weight: float = key(
        1.0, allowed="a number > 0", meaning="Share of the rows, relative to the other sources' weights.", gt=0
    )
    max_epochs: float | None = key(
        None,
        allowed="a number > 0, epochs",
        meaning="How often the source may be read; afterwards the others go on without it. Not set: without end.",
        gt=0,
    )


SourceName = Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_-]*$")]


class DataConfig(Section):
    """The text to train on: exactly one of `shards` and `sources`."""

    shards: DatasetPlace | None = key(
        None,
        allowed=DATASET_PLACE,
        meaning="Dataset directory made by `tools/build_shards.py`, or a directory of text webdataset shards, which is "
        "tokenized once.",
    )
    sources: Annotated[dict[SourceName, SourceConfig], Field(min_length=1)] | None = key(
        None,
        allowed="a mapping of names (letters, digits, _ and -) to sections with shards, weight and max_epochs",
        meaning="Several datasets, mixed row by row in exact proportion to their weights.",
    )
    sequence_length: int = key(allowed="an integer >= 2, tokens", meaning="P: tokens in one packed row.", ge=2)
    document_masking: bool = key(
        False,
        allowed="true or false",
        meaning="Hide the other documents of a row from each token, restart positions at each document, and drop "
        "anchors whose context or target crosses a boundary.",
    )
    on_error: Literal["raise", "skip"] = key(
        "raise",
        allowed="raise or skip",
        meaning="What happens when data turns out to be damaged in mid-run: the run ends with exit code 4, or the row "
        "is left out and recorded in `data_errors.jsonl`.",
    )
    allow_changed: bool = key(
        False,
        allowed="true or false",
        meaning="(ours) Go on from a checkpoint although the data is not what it was saved with. Documents may then be "
        "seen twice or missed.",
    )
    max_skipped_rows: int = key(
        100,
        allowed="an integer >= 0, rows",
        meaning="(ours) With `on_error: skip`: rows that may be left out before the run ends with exit code 4.",
        ge=0,
    )
    max_skipped_share: float = key(
        0.001,
        allowed="a number >= 0 and <= 1",
        meaning="(ours) The same as a share of all rows of the run; the smaller of the two holds.",
        ge=0,
        le=1,
    )
    workers: int = key(
        1,
        allowed="an integer >= 0, processes",
        meaning="(ours) Processes per rank that read rows ahead; 0: a thread. The order of rows never depends on it.",
        ge=0,
    )
    tokenizer: LocalPath | None = key(
        None,
        allowed=PATH,
        meaning="(ours) Tokenizer directory for text shards; not set: that of `model.init_from`.",
    )
    cache: LocalPath = key(
        Path("runs/cache"),
        allowed=PATH,
        meaning="(ours) Where shards from https URLs and tokenized text shards are kept; runs may share it.",
    )
    cache_gigabytes: float = key(
        100.0,
        allowed="a number >= 0, 1e9 bytes",
        meaning="(ours) Most bytes of downloaded shards in the cache; the least recently used are deleted first. "
        "Too few for a few shards: single documents are fetched instead.",
        ge=0,
    )

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name; `shards` alone is one source."""
        if self.sources is not None:
            return self.sources
        return {"shards": SourceConfig(shards=self.shards)} if self.shards is not None else {}

    @property
    def mixture_key(self) -> str:
        """The dotted key of all sources together."""
        return "data.shards" if self.sources is None else "data.sources"

    def source_key(self, name: str) -> str:
        """The dotted key that names a source's place."""
        return "data.shards" if self.sources is None else f"data.sources.{name}.shards"


class EvaluationConfig(Section):
    """Evaluation on held-out rows at step 0, at every interval and at the end; none without `shards`."""

    shards: DatasetPlace | None = key(None, allowed=DATASET_PLACE, meaning="Held-out dataset directory.")
    interval: int | None = key(
        None,
        allowed=COUNT + ", optimizer steps",
        meaning="Optimizer steps between evaluations; not set: only at step 0 and at the end.",
        ge=1,
    )
    rows: int = key(64, allowed=COUNT, meaning="Held-out rows that every evaluation looks at.", ge=1)


class EbftConfig(Section):
    """Energy-based fine-tuning in strided mode; the names are axolotl's, the keys marked (ours) are added."""

    mode: Literal["strided"] = key("strided", allowed="strided", meaning="The only mode of this trainer.")
    stride: int = key(8, allowed=COUNT + ", tokens", meaning="Tokens from one anchor to the next.", ge=1)
    context_length: int = key(
        8,
        allowed=COUNT + ", tokens",
        meaning="c: tokens before the first anchor (every block sees its whole prefix, not only c tokens).",
        ge=1,
    )
    generate_max_len: int = key(
        8,
        allowed=COUNT + ", tokens",
        meaning="G: tokens generated per block; (P - G - c) must be divisible by the stride.",
        ge=1,
    )
    n_samples_per_prompt: int = key(
        4,
        allowed=COUNT,
        meaning="n: rollouts per anchor. 1: the advantage is the reward, without a diversity term; "
        "2: the diversity term has no baseline.",
        ge=1,
    )
    temperature: float = key(0.6, allowed="a number > 0", meaning="Sampling temperature.", gt=0)
    top_p: float = key(
        1.0,
        allowed="a number > 0 and <= 1",
        meaning="Nucleus sampling: share of probability that is kept. 1 keeps everything.",
        gt=0,
        le=1,
    )
    feature_layers: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(_as_tuple), Field(min_length=1)
    ] = key(
        (0.25, 0.5, 0.75),
        allowed="a list of numbers > 0 and <= 1",
        meaning="Depths at which the frozen network is read, as fractions of its layers.",
    )
    embed_method: Literal["last_token", "mean_pooling"] = key(
        "last_token",
        allowed="last_token or mean_pooling",
        meaning="How the G token features of a block become one vector.",
    )
    feature_norm: Literal["joint", "per_layer"] = key(
        "joint",
        allowed="joint or per_layer",
        meaning="(ours) Normalise the concatenation of the tapped layers, or each layer by itself.",
    )
    use_whitening: bool = key(True, allowed="true or false", meaning="Whiten the rollout features of each block.")
    whitening: Literal["sample", "feature"] = key(
        "sample",
        allowed="sample or feature",
        meaning="(ours) `sample`: as the EBFT authors' code; `feature`: as the paper and axolotl.",
    )
    alignment_coef: float = key(1.0, allowed=COEFFICIENT, meaning="Weight of the alignment reward.", ge=0)
    diversity_coef: float = key(1.0, allowed=COEFFICIENT, meaning="Weight of the diversity penalty.", ge=0)
    rl_coef: float = key(
        1.0,
        allowed=COEFFICIENT,
        meaning="Weight of the policy-gradient loss. 0 pays for no rollouts and no feature network.",
        ge=0,
    )
    ce_coef: float = key(0.0, allowed=COEFFICIENT, meaning="Weight of the next-token cross-entropy on the row.", ge=0)
    advantage_estimator: Literal["rloo", "group_norm", "reinforce"] = key(
        "rloo",
        allowed="rloo, group_norm or reinforce",
        meaning="How rewards become advantages. `rloo`: leave-one-out baseline, unbiased for the diversity.",
    )
    feature_model: LocalPath | None = key(
        None,
        allowed=PATH,
        meaning="(ours) The frozen feature network, as `model.init_from`; not set: the initial model.",
    )

    @property
    def reward_whitening(self) -> Literal["none", "sample", "feature"]:
        """The whitening that rewards are computed with."""
        return self.whitening if self.use_whitening else "none"


class ParallelConfig(Section):
    """How one model replica is split over processes; the rest of the world is data-parallel."""

    tensor_parallel_size: int = key(1, allowed=COUNT, meaning="Processes that share every weight matrix.", ge=1)
    pipeline_parallel_size: int = key(1, allowed=COUNT, meaning="Processes that share the layers, in stages.", ge=1)
    sequence_parallel: bool = key(
        False, allowed="true or false", meaning="Also split the activations between tensor-parallel layers."
    )


class TrainConfig(Section):
    """The optimisation; exactly one of `max_steps` and `max_tokens`."""

    global_batch_size: int = key(16, allowed=COUNT + ", rows", meaning="Rows per optimizer step.", ge=1)
    micro_batch_size: int = key(1, allowed=COUNT + ", rows", meaning="Rows that one replica processes at a time.", ge=1)
    max_steps: int | None = key(
        None, allowed=COUNT + ", optimizer steps", meaning="Optimizer steps of the whole run.", ge=1
    )
    max_tokens: Annotated[int, BeforeValidator(_as_whole_number), Field(ge=1)] | None = key(
        None,
        allowed=COUNT + ", tokens",
        meaning="Tokens of raw text to read; the run ends with the last whole optimizer step within it.",
    )
    max_run_minutes: float | None = key(
        None,
        allowed="a number > 0, minutes",
        meaning="Wall time after which the run saves a checkpoint and stops (exit code 75). Leave the job's time limit "
        "room for one step and one checkpoint.",
        gt=0,
    )
    lr: float = key(1e-6, allowed="a number > 0", meaning="Highest learning rate.", gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = key(
        "constant",
        allowed="constant, linear or cosine",
        meaning="Learning rate after the warm-up; `linear` and `cosine` end at 0.",
    )
    warmup_steps: int = key(0, allowed="an integer >= 0, optimizer steps", meaning="Steps of linear warm-up.", ge=0)
    weight_decay: float = key(0.0, allowed=COEFFICIENT, meaning="AdamW's decoupled weight decay.", ge=0)
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        BeforeValidator(_as_tuple),
    ] = key((0.9, 0.95), allowed="a list of two numbers >= 0 and < 1", meaning="AdamW's averaging factors.")
    grad_clip: float = key(
        1.0, allowed=COEFFICIENT, meaning="Largest global gradient norm; 0 turns clipping off.", ge=0
    )
    dtype: Literal["bfloat16", "float32"] = key(
        "bfloat16",
        allowed="bfloat16 or float32",
        meaning="Precision of weights and activations; gradients accumulate in float32 either way.",
    )
    activation_checkpointing: Literal["none", "full"] = key(
        "none", allowed="none or full", meaning="`full`: keep only each layer's input and recompute the rest."
    )
    attention: Literal["auto", "two_part", "flex", "dense"] = key(
        "auto",
        allowed="auto, two_part, flex or dense",
        meaning="(ours) How attention is computed; values and gradients are the same. `two_part`: the document prefix "
        "and the rollout's own tokens by torch's kernels, merged; `flex`: one sparse kernel, on CUDA; `dense`: a full "
        "mask, slow; `auto`: `flex` on CUDA with Triton, else `two_part`.",
    )
    step_timeout_minutes: float = key(
        30.0,
        allowed="a number > 0, minutes",
        meaning="(ours) When no optimizer step ends for so long, every rank dumps its stacks and the run ends "
        "with exit code 3.",
        gt=0,
    )


class ZeroConfig(Section):
    """How parameters, gradients and optimizer state are divided over the data-parallel processes."""

    stage: Literal[0, 1, 2, 3] = key(3, allowed="0, 1, 2 or 3", meaning="DeepSpeed's ZeRO stage.")
    hold_parameters: Literal["rollout", "step", "none"] = key(
        "rollout",
        allowed="rollout, step or none",
        meaning="For how long all parameters stay gathered at stage 3: the rollout phase, the whole step, or never.",
    )
    feature_network: Literal["auto", "resident", "sharded"] = key(
        "auto",
        allowed="auto, resident or sharded",
        meaning="(ours) The frozen network: whole on every data-parallel process, or divided over them and "
        "gathered once for the features phase; `auto`: resident if it fits.",
    )
    offload_optimizer: Literal["none", "cpu"] = key(
        "none", allowed="none or cpu", meaning="Where the optimizer state lives (none: on the accelerator)."
    )


Reuse = Literal["checkpoints", "activations", "off"]  # what the gradient pass takes over from the rollout


class LearnConfig(Section):
    """The pass that computes gradients."""

    reuse_rollout: Literal["auto", "checkpoints", "activations", "off"] = key(
        "auto",
        allowed="auto, checkpoints, activations or off",
        meaning="What the gradient pass takes over from the rollout phase, so that the policy is not run again: each "
        "layer's input (`checkpoints`; the rest is recomputed) or everything (`activations`); `auto`: the most that "
        "fits.",
    )


class CheckpointConfig(Section):
    """Complete checkpoints during the run."""

    interval: int | None = key(
        None,
        allowed=COUNT + ", optimizer steps",
        meaning="Optimizer steps between checkpoints, and one after the last step; not set: only when the run is asked "
        "to save or to stop.",
        ge=1,
    )
    keep_last: int | None = key(
        None, allowed=COUNT, meaning="How many of the newest checkpoints are kept; not set: all.", ge=1
    )
    keep_every: int | None = key(
        None,
        allowed=COUNT + ", optimizer steps",
        meaning="With `keep_last`: checkpoints at multiples of this are kept for good.",
        ge=1,
    )
    resume: Annotated[str, Field(min_length=1)] = key(
        "auto",
        allowed="auto, never or the path of a checkpoint",
        meaning="`auto`: go on from the newest complete checkpoint in `output_dir`, if there is one. A path (of a "
        "checkpoint or of a run): go on from there, and after that from what the run itself has saved since.",
    )
    on_error: Literal["continue", "stop"] = key(
        "continue",
        allowed="continue or stop",
        meaning="(ours) Whether a run goes on when a checkpoint cannot be written.",
    )


class ProfileConfig(Section):
    """A profiler trace of some steps; both keys or neither."""

    start: int | None = key(
        None,
        allowed="an integer >= 0, optimizer steps",
        meaning="Optimizer steps of the run before the first traced one.",
        ge=0,
    )
    steps: int | None = key(None, allowed=COUNT + ", optimizer steps", meaning="How many steps to trace.", ge=1)

    @property
    def traced_steps(self) -> range:
        """The steps to trace, counted from 0; empty if none are."""
        if self.start is None or self.steps is None:
            return range(0)
        return range(self.start, self.start + self.steps)


class RunConfig(Section):
    """One run, complete: what `config.resolved.yaml` of a run directory holds."""

    output_dir: LocalPath = key(allowed=PATH, meaning="Run directory; it is made if it does not exist.")
    seed: int = key(
        0,
        allowed="an integer from 0 to 2**63 - 1",
        meaning="Seed of the data order, of random weights and of the sampling noise.",
        ge=0,
        lt=2**63,
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

    def place(self, dotted_key: str) -> str:
        """Where a key, or else the section around it, was written: `file:line` or `--set`."""
        parts = dotted_key.split(".")
        for length in range(len(parts), 0, -1):
            found = self._places.get(".".join(parts[:length]))
            if found:
                return found
        return self._places.get("", UNKNOWN_PLACE)

    def with_places(self, places: Mapping[str, str]) -> "RunConfig":
        """The same configuration, remembering where each key was written."""
        copy = self.model_copy()
        copy._places = dict(places)
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


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def all_keys() -> dict[str, Any]:
    """Every dotted key and its pydantic field, in the order of the file."""
    keys: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if name in SECTIONS:
            keys.update({f"{name}.{leaf}": inner for leaf, inner in SECTIONS[name].model_fields.items()})
        else:
            keys[name] = field
    return keys


def allowed_text(field: Any) -> str:
    """What a field accepts, in the words of its declaration."""
    return str(field.json_schema_extra["allowed"])
