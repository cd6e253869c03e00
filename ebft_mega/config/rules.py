"""Checks between several keys, and of keys or values that this trainer does not support.

A rule yields problems without a place (`where` is empty); the loader adds file and line. Every rule names the keys that
it reads: it is skipped when one of them has already been refused.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.axolotl.axolotl_keys import LORA, STRUCTURED
from ebft_mega.config.critic_rules import CRITIC, critic_keeps_its_mean
from ebft_mega.config.entries import idle_options
from ebft_mega.config.entry_rules import (
    FEATURES,
    RATES,
    feature_map_keeps_its_contract,
    optimizer_keeps_its_contract,
    schedule_keeps_its_contract,
    terms_have_names_of_their_own,
)
from ebft_mega.config.fields import is_possible_path, yaml_text
from ebft_mega.config.schema import RunConfig
from ebft_mega.errors import InputError, Problem

MAX_TRIED = 1_000_000
# Keys of other trainers that a user may expect here, by the last part of the key, and why there is none.
REFUSED_NAMES: tuple[tuple[str, str], ...] = (
    (r"min_completion_prefix|adaptive_max_tokens|gt_length_multiplier", STRUCTURED),
    (
        r"context_parallel\w*|cp_size|ulysses\w*|ring_attn\w*",
        "context parallelism is not part of this trainer: a row and its rollouts stay in one replica",
    ),
    (
        r"num_(local_)?experts\w*|n_routed_experts|\w*experts_per_tok|expert_parallel\w*|moe\w*|\w+_moe",
        "mixture of experts is not part of this trainer: only dense Llama, Mistral, Qwen2 and Qwen3 models are built",
    ),
    (r"q?lora\w*|peft\w*|adapter\w*", LORA),
    (
        r"(qa|question|answer|prompt|completion)_?mask\w*|mask_(question|answer|prompt)\w*|train_on_inputs",
        "question/answer masks are not part of this trainer: every token of the raw text counts",
    ),
)


def refusal_reason(name: str) -> str:
    """Say why a key of this name (the last part of a dotted key) does not exist on purpose; empty if it is unknown."""
    for pattern, reason in REFUSED_NAMES:
        if re.fullmatch(pattern, name):
            return reason
    return ""


def _optimizer_stays_on_the_accelerator(config: RunConfig) -> Iterator[Problem]:
    offload = config.zero.offload_optimizer
    if offload != "none":
        yield Problem("", "zero.offload_optimizer", f"{offload}, which is not yet supported", "none")


def _one_model(config: RunConfig) -> Iterator[Problem]:
    given = [name for name in ("init_from", "config") if getattr(config.model, name) is not None]
    if len(given) != 1:
        found = "both model.init_from and model.config" if given else "neither model.init_from nor model.config"
        yield Problem("", "model.config" if given else "model", found, "exactly one of the two")


def _architecture(config: RunConfig) -> Iterator[Problem]:
    fields = config.model.config
    if fields is None:
        return
    refused = {name for name in fields if refusal_reason(name)}
    for name in fields:
        if name in refused:
            expected = f"no such key: {refusal_reason(name)}"
            yield Problem("", f"model.config.{name}", yaml_text(fields[name]), expected)
    try:
        Architecture.from_hf(fields, "")
    except InputError as error:
        for problem in error.problems:
            if problem.key not in refused:
                yield replace(problem, key=f"model.config.{problem.key}")


def _one_kind_of_data(config: RunConfig) -> Iterator[Problem]:
    given = [name for name in ("shards", "sources") if getattr(config.data, name) is not None]
    if len(given) != 1:
        found = "both data.shards and data.sources" if given else "neither data.shards nor data.sources"
        yield Problem("", "data.sources" if given else "data", found, "exactly one of the two")


def _one_length(config: RunConfig) -> Iterator[Problem]:
    given = [name for name in ("max_steps", "max_tokens") if getattr(config.train, name) is not None]
    if len(given) != 1:
        found = "both train.max_steps and train.max_tokens" if given else "neither max_steps nor max_tokens"
        yield Problem("", "train.max_tokens" if given else "train", found, "exactly one of the two")


def _at_least_one_step(config: RunConfig) -> Iterator[Problem]:
    tokens = config.train.max_tokens
    if tokens is not None and tokens < config.tokens_per_step:
        expected = f"at least the {config.tokens_per_step} tokens of one optimizer step (rows x sequence length)"
        yield Problem("", "train.max_tokens", str(tokens), expected)


def _blocks_fit(config: RunConfig) -> Iterator[Problem]:
    length, ebft = config.data.sequence_length, config.ebft
    needed = ebft.context_length + ebft.generate_max_len
    room = length - needed
    terms = f"ebft.context_length {ebft.context_length} + ebft.generate_max_len {ebft.generate_max_len}"
    if room < 0:
        yield Problem("", "data.sequence_length", str(length), f"at least {needed} ({terms})")
    elif room % ebft.stride:
        below, above = length - room % ebft.stride, length - room % ebft.stride + ebft.stride
        found = f"{length}: {length} - ({terms}) = {room} is not divisible by ebft.stride {ebft.stride}"
        expected = f"a sequence length such as {below} or {above}, or a stride such as {_strides(room, ebft.stride)}"
        yield Problem("", "data.sequence_length", found, expected)


def _strides(room: int, wanted: int) -> str:
    """The divisors of `room` next to `wanted`, which is none itself; at most a million numbers are tried."""
    below = next((s for s in range(min(wanted, room), max(0, wanted - MAX_TRIED), -1) if room % s == 0), 1)
    above = next((s for s in range(wanted, min(wanted + MAX_TRIED, room + 1)) if room % s == 0), room)
    return " or ".join(map(str, sorted({below, above})))


def _skipped_rows_are_in_order(config: RunConfig) -> Iterator[Problem]:
    pairs = config.data.skip_rows
    for number, (first, last) in enumerate(pairs):
        before = pairs[number - 1] if number else None
        if first > last:
            yield Problem("", "data.skip_rows", f"[{first}, {last}]", f"[first, last], such as [{last}, {first}]")
        elif before is not None and first <= before[1]:
            found = f"[{first}, {last}] behind {list(before)}"
            yield Problem("", "data.skip_rows", found, "ranges in ascending order without a common row")


def _micro_batches_fill_the_batch(config: RunConfig) -> Iterator[Problem]:
    rows, micro = config.train.global_batch_size, config.train.micro_batch_size
    if rows % micro:
        yield Problem("", "train.global_batch_size", str(rows), f"a multiple of train.micro_batch_size {micro}")


def _noise_is_the_difference_of_micro_batches(config: RunConfig) -> Iterator[Problem]:
    interval, rows, micro = config.ebft.noise_interval, config.train.global_batch_size, config.train.micro_batch_size
    if interval is not None and rows < 2 * micro:
        found = f"{interval}, with one micro-batch of {micro} rows in a step"
        expected = "at least two micro-batches: train.micro_batch_size at most half of train.global_batch_size"
        yield Problem("", "ebft.noise_interval", found, expected)


def _sequence_parallel_needs_ranks(config: RunConfig) -> Iterator[Problem]:
    if config.parallel.sequence_parallel and config.parallel.tensor_parallel_size == 1:
        found = "true, with parallel.tensor_parallel_size 1"
        yield Problem("", "parallel.sequence_parallel", found, "false, or a tensor-parallel size above 1")


def _something_to_learn(config: RunConfig) -> Iterator[Problem]:
    ebft = config.ebft
    if ebft.rl_coef == 0 and ebft.ce_coef == 0:
        yield Problem("", "ebft.rl_coef", "0, and ebft.ce_coef is 0 too", "at least one of the two above 0")
    elif ebft.rl_coef > 0 and not (ebft.alignment_coef or ebft.diversity_coef or any(ebft.reward_terms.values())):
        others = " and so is all of ebft.reward_terms" if ebft.reward_terms else ""
        found = f"0, and ebft.diversity_coef is 0 too{others}"
        yield Problem("", "ebft.alignment_coef", found, "at least one above 0, or a term in ebft.reward_terms")


def _profile_lies_within_the_run(config: RunConfig) -> Iterator[Problem]:
    profile = config.profile
    if (profile.start is None) != (profile.steps is None):
        missing, given = ("start", "steps") if profile.start is None else ("steps", "start")
        yield Problem("", f"profile.{missing}", f"not set, with profile.{given} given", "both or neither")
    # Without a length there is a problem of its own.
    elif profile.traced_steps and 0 < config.total_steps < profile.traced_steps.stop:
        found = f"{profile.start} + profile.steps {profile.steps}"
        yield Problem("", "profile.start", found, f"together at most the {config.total_steps} steps of the run")


def activations_can_be_saved(config: RunConfig) -> bool:
    """Whether parameters stay whole from the rollout to the gradient: a saved forward pass refers to their storage."""
    return config.zero.stage < 3 or config.zero.hold_parameters == "step"


def _saved_activations_need_whole_parameters(config: RunConfig) -> Iterator[Problem]:
    if config.learn.reuse_rollout != "activations" or not config.uses_rollouts:
        return
    if not activations_can_be_saved(config):
        found = f"activations, with zero.stage 3 and zero.hold_parameters {config.zero.hold_parameters}"
        expected = "checkpoints, or parameters that stay whole: zero.hold_parameters step, or zero.stage 0, 1 or 2"
        yield Problem("", "learn.reuse_rollout", found, expected)
    if config.train.activation_checkpointing == "full":
        found = "activations, with train.activation_checkpointing full, which keeps none"
        yield Problem("", "learn.reuse_rollout", found, "checkpoints, or train.activation_checkpointing none")


# Beyond these the system's own types, or the machine, end: nobody means them.
_HIGHEST = {
    **{"data.workers": 1024, "data.cache_gigabytes": 1e9, "train.step_timeout_minutes": 525_600},
    "train.lr": 1e6,  # AdamW's float32 raises at 1e39, and finite gradients would lead to infinite weights before that
}


def _not_beyond_all_bounds(config: RunConfig) -> Iterator[Problem]:
    for key, highest in _HIGHEST.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value > highest:
            yield Problem("", key, yaml_text(value), f"at most {highest:g}")


def _weights_do_not_grow_by_decay(config: RunConfig) -> Iterator[Problem]:
    rate, decay = config.train.lr, config.train.weight_decay
    if rate * decay > 1:
        found, expected = f"{yaml_text(decay)}, with train.lr {yaml_text(rate)}", "at most 1 / train.lr"
        yield Problem("", "train.weight_decay", found, f"{expected}: each step takes their product off every weight")


def _one_warm_up(config: RunConfig) -> Iterator[Problem]:
    steps, share = config.train.warmup_steps, config.train.warmup_share
    if steps and share:
        found = f"{yaml_text(share)}, with train.warmup_steps {steps}"
        yield Problem("", "train.warmup_share", found, "at most one of the two above 0")


def _lowest_rate_is_below_the_highest(config: RunConfig) -> Iterator[Problem]:
    lowest, highest = config.train.min_lr, config.train.lr
    if lowest > highest:
        yield Problem("", "train.min_lr", yaml_text(lowest), f"at most train.lr {yaml_text(highest)}")


def _kernels_repeat_their_bits(config: RunConfig) -> Iterator[Problem]:
    if config.deterministic and config.train.attention == "flex":
        found = "flex, with deterministic true: torch does not promise the same bits of its compiled kernel"
        yield Problem("", "train.attention", found, "auto, two_part or dense, or deterministic false")


def _resume_is_a_path(config: RunConfig) -> Iterator[Problem]:
    if not is_possible_path(config.checkpoint.resume):
        found = f"{config.checkpoint.resume[:40]!r}..., which no file can be called"
        yield Problem("", "checkpoint.resume", found, "auto, never or the path of a checkpoint")


@dataclass(frozen=True)
class Rule:
    """A check and the keys (or sections) that it reads."""

    keys: tuple[str, ...]
    check: Callable[[RunConfig], Iterable[Problem]]


_GEOMETRY = ("data.sequence_length", "ebft.stride", "ebft.context_length", "ebft.generate_max_len")
_LENGTH = ("train.max_steps", "train.max_tokens", "train.global_batch_size", "data.sequence_length")
_COEFFICIENTS = tuple(
    f"ebft.{name}" for name in ("rl_coef", "ce_coef", "alignment_coef", "diversity_coef", "reward_terms")
)
_SAVED_ACTIVATIONS = (
    *("learn.reuse_rollout", "zero.stage", "zero.hold_parameters", "train.activation_checkpointing"),
    "ebft.rl_coef",
)
RULES = (
    Rule(("zero.offload_optimizer",), _optimizer_stays_on_the_accelerator),
    Rule(("model.init_from", "model.config"), _one_model),
    Rule(("model.config",), _architecture),
    Rule(("data.shards", "data.sources"), _one_kind_of_data),
    Rule(("train.max_steps", "train.max_tokens"), _one_length),
    Rule(("train.max_tokens", "train.global_batch_size", "data.sequence_length"), _at_least_one_step),
    Rule(_GEOMETRY, _blocks_fit),
    Rule(("data.skip_rows",), _skipped_rows_are_in_order),
    Rule(("train.global_batch_size", "train.micro_batch_size"), _micro_batches_fill_the_batch),
    Rule(
        ("ebft.noise_interval", "train.global_batch_size", "train.micro_batch_size"),
        _noise_is_the_difference_of_micro_batches,
    ),
    Rule(("parallel.sequence_parallel", "parallel.tensor_parallel_size"), _sequence_parallel_needs_ranks),
    Rule(_COEFFICIENTS, _something_to_learn),
    Rule(("ebft.reward_terms", "ebft.alignment_coef", "ebft.diversity_coef"), terms_have_names_of_their_own),
    Rule(_SAVED_ACTIVATIONS, _saved_activations_need_whole_parameters),
    Rule(tuple(_HIGHEST), _not_beyond_all_bounds),
    Rule(("train.warmup_steps", "train.warmup_share"), _one_warm_up),
    Rule(("train.min_lr", "train.lr"), _lowest_rate_is_below_the_highest),
    Rule((*RATES, *_LENGTH), schedule_keeps_its_contract),
    Rule(FEATURES, feature_map_keeps_its_contract),
    Rule(("train.optimizer",), optimizer_keeps_its_contract),
    Rule(CRITIC, critic_keeps_its_mean),
    Rule(("train.lr", "train.weight_decay"), _weights_do_not_grow_by_decay),
    Rule(("deterministic", "train.attention"), _kernels_repeat_their_bits),
    Rule(("checkpoint.resume",), _resume_is_a_path),
    Rule(("profile.start", "profile.steps", *_LENGTH), _profile_lies_within_the_run),
)


def broken_rules(config: RunConfig, refused: frozenset[str] = frozenset()) -> list[Problem]:
    """Check all rules, except those that read a key in `refused`; `where` of the problems is empty.

    Args:
        config: the configuration; keys in `refused` (and their sections) may be missing from it.
        refused: dotted keys that have a problem of their own.
    """
    return [
        problem
        for rule in RULES
        if not refused.intersection(rule.keys) and not refused.intersection(k.split(".")[0] for k in rule.keys)
        for problem in rule.check(config)
        if problem.key not in refused
    ]


def notes(config: RunConfig) -> list[str]:
    """List settings that work but may surprise, one sentence each."""
    found = []
    ebft = config.ebft
    if config.uses_rollouts and ebft.n_samples_per_prompt == 1:
        found.append("ebft.n_samples_per_prompt is 1: the advantage is the reward itself and the diversity is 0.")
    if config.uses_rollouts and ebft.n_samples_per_prompt == 2:
        found.append("ebft.n_samples_per_prompt is 2: the diversity term has no baseline.")
    data = config.data
    # Compared with the defaults: the file that a run writes has every key.
    limits = ("max_skipped_rows", "max_skipped_share")
    changed = [f"data.{name}" for name in limits if getattr(data, name) != type(data).model_fields[name].default]
    if data.on_error == "raise" and changed:
        verb = "changes" if len(changed) == 1 else "change"
        found.append(f"{' and '.join(changed)} {verb} nothing: data.on_error is raise.")
    if config.train.warmup_of(config.total_steps) >= config.total_steps:
        key = "train.warmup_steps" if config.train.warmup_steps else "train.warmup_share"
        found.append(
            f"{key} {yaml_text(getattr(config.train, key.removeprefix('train.')))} reaches to the end of the run "
            f"({config.total_steps} steps): the learning rate never gets to train.lr."
        )
    if config.checkpoint.keep_every is not None and config.checkpoint.keep_last is None:
        found.append("checkpoint.keep_every changes nothing: without checkpoint.keep_last all checkpoints are kept.")
    zero = config.zero
    if zero.stage < 3 and zero.hold_parameters != "rollout":
        found.append(
            f"zero.hold_parameters {zero.hold_parameters} changes nothing: parameters are only divided at "
            f"zero.stage 3, not at {zero.stage}."
        )
    if zero.feature_network == "sharded" and not config.uses_rollouts:
        found.append("zero.feature_network sharded changes nothing: ebft.rl_coef is 0, so there is no feature network.")
    if config.learn.reuse_rollout in ("checkpoints", "activations") and not config.uses_rollouts:
        found.append(
            f"learn.reuse_rollout {config.learn.reuse_rollout} changes nothing: ebft.rl_coef is 0, so there are no "
            "rollouts."
        )
    return [*found, *idle_options(config)]
