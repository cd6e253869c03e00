"""A whole axolotl file as a configuration of this trainer: what becomes of every key, and of its value."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ebft_mega.config.axolotl.axolotl_datasets import (
    build_command,
    dataset_name,
    download_words,
    is_local,
    literal_path,
    origin_of,
)
from ebft_mega.config.axolotl.axolotl_keys import Fate, foreign_key, nearest_foreign
from ebft_mega.config.fields import yaml_text
from ebft_mega.config.schema import SECTIONS
from ebft_mega.config.yaml_source import write_value
from ebft_mega.errors import Problem
from ebft_mega.shown_text import LONGEST_NOTE, shown

MAX_LISTED = 200  # of the keys that are not written: a file names so many at most by itself
_MOST = 1e15  # of any number, so that products are finite
_SHARDING = ("fsdp", "fsdp_config", "fsdp_version")
_ATTENTION = (
    *("flex_attention", "attn_implementation", "flash_attention", "sdp_attention"),
    *("xformers_attention", "sage_attention", "eager_attention"),
)
_SEED = 42  # axolotl's, where a file has none
_BETAS = (0.9, 0.999)
_NOT_STRIDED = ("concat", "completion_mean")  # ways of pooling that only axolotl's structured mode has
_SCHEDULE = "cosine"
_SCHEDULES = {"constant_with_warmup": "constant", **{name: name for name in ("constant", "linear", "cosine")}}


@dataclass(frozen=True)
class Written:
    """A key of this trainer with its value, and why it has that."""

    value: Any
    comment: str = ""


@dataclass
class Translation:
    """What becomes of a file."""

    values: dict[str, Written] = field(default_factory=dict)  # by dotted key of this trainer
    left_out: list[str] = field(default_factory=list)  # a line for every key that is refused or has no meaning
    to_supply: list[str] = field(default_factory=list)  # what a person has to do before a start
    problems: list[Problem] = field(default_factory=list)  # `where` is the foreign key's dotted name


def translate(tree: Mapping[str, Any], gpus: int, data_tokens: int | None = None) -> Translation:
    """Translate an axolotl file.

    Args:
        tree: the file's values.
        gpus: number of processes, which axolotl's batch is multiplied with.
        data_tokens: tokens of the training data, for `num_epochs` without `max_steps`.
    """
    found = Translation()
    given = dict(_leaves(tree))
    for name, value in given.items():
        key = foreign_key(name)
        if key is None:
            expected = "a key of axolotl that is known here (docs/axolotl.md)"
            found.problems.append(Problem(name, name, _shown(value), expected, nearest_foreign(name)))
        elif key.fate is Fate.REFUSED:
            found.left_out.append(f"{name}: {_shown(value)}: refused: {key.words}")
        elif key.fate is Fate.MEANINGLESS:
            found.left_out.append(f"{name}: {_shown(value)}: without meaning here: {key.words}")
    if tree.get("rl", "ebft") != "ebft":
        found.problems.append(Problem("rl", "rl", _shown(tree["rl"]), "ebft, the only method of this trainer"))
    values = _Reader(tree, found)
    _write_inputs(values, found)
    _write_objective(tree, found)
    _write_batch_and_length(values, found, gpus, data_tokens)
    _write_optimizer(values, found)
    _write_machine(values, found)
    return found


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all values, without numbers of list items; a key with nothing below it is one itself."""
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        inner = value if isinstance(value, list) else [value]
        mappings = [item for item in inner if isinstance(item, Mapping) and item]
        if mappings and len(mappings) == len(inner):
            for item in mappings:
                yield from _leaves(item, f"{dotted}.")
        else:
            yield dotted, value


def _shown(value: Any) -> str:
    text = yaml_text(value) if value is None or isinstance(value, bool | int | float | str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Reader:
    """Typed values of the file's top level; what has another type is a problem."""

    def __init__(self, tree: Mapping[str, Any], found: Translation):
        self._tree, self._found = tree, found

    def get(self, name: str) -> Any:
        """The value as it stands; None where there is none."""
        return self._tree.get(name)

    def origin(self, name: str) -> str:
        """A comment for a value that the file does not give."""
        return "axolotl's default" if self._tree.get(name) is None else ""

    def number(self, name: str, default: float | None = None) -> float | None:
        """A number, which may be written as text."""
        value = self._tree.get(name)
        if value is None:
            return default
        try:
            if not isinstance(value, bool) and abs(number := float(value)) <= _MOST:
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        self._found.problems.append(Problem(name, name, _shown(value), "a number"))
        return default

    def count(self, name: str, default: int | None = None) -> int | None:
        """A whole number."""
        value = self.number(name, default)
        if value is None or value == int(value):
            return None if value is None else int(value)
        self._found.problems.append(Problem(name, name, _shown(value), "a whole number"))
        return default

    def switch(self, name: str) -> bool | None:
        """True or false, also as the words that YAML 1.1 takes for them; None where it is neither."""
        value = self._tree.get(name)
        words = {"yes": True, "on": True, "no": False, "off": False}
        return words.get(value, None) if isinstance(value, str) else value if isinstance(value, bool) else None


def _write_inputs(values: _Reader, found: Translation) -> None:
    """Output, seed, model and data; names of the hub become folders that a person fills."""
    output = str(values.get("output_dir") or "runs/from-axolotl").removeprefix("./")
    found.values["output_dir"] = Written(literal_path(output))
    found.values["seed"] = Written(values.count("seed", _SEED), values.origin("seed"))
    model = str(values.get("base_model") or "")
    if is_local(model):
        place = model
        found.values["model.init_from"] = Written(literal_path(place), "a Hugging Face directory with its tokenizer")
    elif model:
        place = f"models/{model.rstrip('/').rpartition('/')[2]}"
        found.values["model.init_from"] = Written(literal_path(place), f"to be supplied: {model}, with its tokenizer")
        found.to_supply.append(f"model.init_from: download {model} to {place}, or name its directory there")
    else:
        found.problems.append(Problem("base_model", "base_model", "nothing", "the model to start from"))
        place = "MODEL"
    _write_data(values, found, place)
    length = values.count("sequence_len", 512)
    found.values["data.sequence_length"] = Written(length, values.origin("sequence_len"))
    if values.get("sample_packing") is not None:
        found.values["data.document_masking"] = Written(True, "documents of a row do not see each other, as there")
    workers = values.count("dataloader_num_workers")
    if workers is not None:
        found.values["data.workers"] = Written(workers)


def _write_data(values: _Reader, found: Translation, model: str) -> None:
    """The text to train on and what is held out of it; `model` is the place of the tokenizer."""
    listed = _datasets(values, "datasets", found) or _datasets(values, "pretraining_dataset", found)
    if not listed and not found.problems:
        found.problems.append(Problem("datasets", "datasets", "nothing", "the text to train on"))
    share = values.number("val_set_size", 0.0) or 0.0
    if not 0 <= share < 1:
        expected = "a share of the data, at least 0 and below 1"
        found.problems.append(Problem("val_set_size", "val_set_size", f"{share:g}", expected))
    for number, item in enumerate(listed):
        _write_dataset(item, number, len(listed), share, model, found)
    tests = _datasets(values, "test_datasets", found)
    if tests:
        name, origin = dataset_name(tests[0]), origin_of(tests[0])
        found.values["evaluation.shards"] = Written(f"data/{name}", f"to be supplied: {origin}")
        build = build_command(tests[0], model, "", name)
        found.to_supply.append(f"evaluation.shards: {download_words(tests[0])}{build}")
    found.left_out += [
        f"test_datasets: {origin_of(item)}: refused: there is one held-out dataset, the first" for item in tests[1:]
    ]


def _datasets(values: _Reader, key: str, found: Translation) -> list[Mapping[str, Any]]:
    """The datasets that a key lists, each as a mapping with a path; what is none is a problem."""
    given = values.get(key)
    several = given if isinstance(given, list) else [] if given is None else [given]
    listed = [item if isinstance(item, Mapping) else {"path": item} for item in several]
    wrong = [item for item in listed if not (isinstance(item.get("path"), str) and item["path"].strip())]
    found.problems += [Problem(key, key, _shown(dict(item)), "datasets, each with its path") for item in wrong]
    return [item for item in listed if item not in wrong]


def _write_dataset(
    item: Mapping[str, Any], number: int, total: int, share: float, model: str, found: Translation
) -> None:
    name = dataset_name(item)
    place = f"data/{name}" + ("/train" if share else "")
    key = "data.shards" if total == 1 else f"data.sources.{name}.shards"
    if key in found.values:
        key = f"data.sources.{name}-{number + 1}.shards"
    found.values[key] = Written(place, f"to be supplied: {origin_of(item)}")
    options = f" --held-out {share * 100:g}% --split-by document" if share else ""
    found.to_supply.append(f"{key}: {download_words(item)}{build_command(item, model, options, name)}")
    if share and number == 0:
        comment = f"val_set_size {share:g}: what --held-out sets aside"
        found.values["evaluation.shards"] = Written(f"data/{name}/held-out", comment)


def _write_objective(tree: Mapping[str, Any], found: Translation) -> None:
    """axolotl's block as it stands, and what is different there where nothing is said."""
    block = tree.get("ebft")
    if not isinstance(block, Mapping):
        found.problems.append(
            Problem("ebft", "ebft", _shown(block), "axolotl's section of this method, with mode: strided")
        )
        return
    for name, value in block.items():
        key = foreign_key(f"ebft.{name}")
        if key is not None and key.fate is Fate.TAKEN:
            found.values[f"ebft.{name}"] = Written(value)
    if (method := block.get("embed_method")) in _NOT_STRIDED:
        comment = f"what axolotl's strided mode computes where {method} is asked for"
        found.values["ebft.embed_method"] = Written("last_token", comment)
    if "mode" not in block:
        found.problems.append(Problem("ebft", "ebft.mode", "nothing", "strided: axolotl's default is structured"))
    if "use_whitening" not in block:
        found.values["ebft.use_whitening"] = Written(False, "axolotl's default")
    for name, value in (("feature_norm", "per_layer"), ("whitening", "feature")):
        found.values.setdefault(f"ebft.{name}", Written(value, "as axolotl does"))


def _write_batch_and_length(values: _Reader, found: Translation, gpus: int, data_tokens: int | None) -> None:
    micro, accumulated = values.count("micro_batch_size", 1) or 1, values.count("gradient_accumulation_steps", 1) or 1
    replicas = max(1, gpus // (values.count("tensor_parallel_size", 1) or 1))
    rows = micro * accumulated * replicas
    comment = f"micro_batch_size {micro} x gradient_accumulation_steps {accumulated} x {replicas} replicas"
    total = values.count("batch_size")
    if total is not None:
        rows, comment = total * replicas, f"batch_size {total} x {replicas} replicas"
    found.values["train.global_batch_size"] = Written(rows, comment)
    found.values["train.micro_batch_size"] = Written(micro)
    steps = values.count("max_steps")
    if steps is not None:
        epochs_words = "num_epochs counts for nothing beside it, as there"
        found.values["train.max_steps"] = Written(steps, epochs_words * (values.get("num_epochs") is not None))
    else:
        epochs = values.number("num_epochs", 1.0) or 1.0
        if data_tokens is None:
            expected = "max_steps, or --data-tokens N: how many tokens the data has"
            found.problems.append(Problem("num_epochs", "num_epochs", f"{epochs:g} without max_steps", expected))
            return
        length = found.values["data.sequence_length"].value or 1
        steps = max(1, int(epochs * data_tokens / (rows * length)))
        found.values["train.max_steps"] = Written(steps, f"{epochs:g} epochs of {data_tokens:,} tokens")
    _write_intervals(values, found, steps)


def _write_intervals(values: _Reader, found: Translation, steps: int) -> None:
    """What is said in steps, or below 1 as a share of them."""
    for name, ours in (("save_steps", "checkpoint.interval"), ("eval_steps", "evaluation.interval")):
        number = values.number(name)
        if number is not None:
            found.values[ours] = Written(max(1, round(number * steps if number < 1 else number)))
    kept = values.count("save_total_limit")
    if kept is not None:
        found.values["checkpoint.keep_last"] = Written(kept)
    if "evaluation.shards" in found.values and "evaluation.interval" not in found.values:
        interval = found.values.get("checkpoint.interval", Written(max(1, steps // 10)))
        found.values["evaluation.interval"] = Written(interval.value, "at every checkpoint, as nothing else is said")
    ratio, warmup = values.number("warmup_ratio"), values.count("warmup_steps")
    if ratio is not None:
        found.values["train.warmup_steps"] = Written(math.ceil(ratio * steps), f"warmup_ratio {ratio:g} x {steps}")
    elif warmup is not None:
        found.values["train.warmup_steps"] = Written(warmup)


def _write_optimizer(values: _Reader, found: Translation) -> None:
    rate = values.number("learning_rate")
    if rate is None:
        found.problems.append(Problem("learning_rate", "learning_rate", "nothing", "a number"))
    else:
        found.values["train.lr"] = Written(rate)
    schedule = str(values.get("lr_scheduler") or _SCHEDULE)
    if schedule not in _SCHEDULES:
        choices = "constant, constant_with_warmup, linear or cosine"
        found.problems.append(Problem("lr_scheduler", "lr_scheduler", schedule, choices))
    found.values["train.lr_scheduler"] = Written(_SCHEDULES.get(schedule, schedule), values.origin("lr_scheduler"))
    _write_lowest_rate(values, found, schedule, rate)
    betas = [values.number(name, default) for name, default in zip(("adam_beta1", "adam_beta2"), _BETAS, strict=True)]
    found.values["train.betas"] = Written(betas, "axolotl's defaults are 0.9 and 0.999")
    found.values["train.weight_decay"] = Written(values.number("weight_decay", 0.0))
    found.values["train.grad_clip"] = Written(values.number("max_grad_norm", 1.0))
    optimizer = str(values.get("optimizer") or "adamw")
    if optimizer.startswith("adamw"):
        found.values["train.optimizer"] = Written("adamw", "with float32 states")
    else:
        found.left_out.append(
            f"optimizer: {_shown(optimizer)}: refused: of axolotl's optimizers only AdamW, with float32 states"
        )


def _write_lowest_rate(values: _Reader, found: Translation, schedule: str, rate: float | None) -> None:
    name = "cosine_min_lr_ratio"
    ratio = values.number(name)
    if ratio is None or rate is None:
        return
    if schedule == "cosine":
        found.values["train.min_lr"] = Written(float(f"{ratio * rate:.15g}"), f"{name} {ratio:g} x {rate:g}")
    else:
        found.left_out.append(f"{name}: {ratio:g}: without meaning here: the schedule is {_shown(schedule)}")


def _write_machine(values: _Reader, found: Translation) -> None:
    is_float32 = values.switch("float32") is True or False in (values.switch("bf16"), values.switch("bfloat16"))
    found.values["train.dtype"] = Written("float32" if is_float32 else "bfloat16")
    if values.get("gradient_checkpointing") is not None:
        is_off = values.switch("gradient_checkpointing") is False  # a word says how
        found.values["train.activation_checkpointing"] = Written("none" if is_off else "full")
    tensor = values.count("tensor_parallel_size")
    if tensor is not None:
        found.values["parallel.tensor_parallel_size"] = Written(tensor)
    stage = re.search(r"zero-?_?([0-3])", str(values.get("deepspeed") or ""))
    if stage:
        found.values["zero.stage"] = Written(int(stage[1]), f"{values.get('deepspeed')}, which is not read")
    elif values.get("deepspeed"):
        name = _shown(values.get("deepspeed"))
        found.left_out.append(f"deepspeed: {name}: refused: its name says no stage: write zero.stage")
    if any(values.get(name) for name in _SHARDING):
        found.values.setdefault("zero.stage", Written(3, "fsdp divides the same things"))
    if any(values.get(name) is not None for name in _ATTENTION):
        found.values["train.attention"] = Written("auto", "flex attention on CUDA")
    resume = values.get("resume_from_checkpoint")
    if resume:
        found.values["checkpoint.resume"] = Written(str(resume), "a checkpoint of this trainer")
    elif values.switch("auto_resume_from_checkpoints") is False:
        found.values["checkpoint.resume"] = Written("never")
    start, count = values.count("profiler_steps_start"), values.count("profiler_steps")
    if count is not None:
        found.values["profile.start"] = Written(start or 0)
        found.values["profile.steps"] = Written(count)


def translated_text(translation: Translation, source: str) -> str:
    """Write the configuration, with a comment for everything that is not a key of this trainer.

    Args:
        source: name of the file that it comes from.
    """
    lines = [f"# From {_comment(source)}, an axolotl file. docs/axolotl.md says what becomes of every key."]
    if translation.to_supply:
        lines += ["#", "# To be supplied before a start:", *(f"#   {_comment(line)}" for line in translation.to_supply)]
    if translation.left_out:
        lines += ["#", "# Keys that are not here:"]
        lines += [f"#   {_comment(line)}" for line in translation.left_out[:MAX_LISTED]]
    top = {key: written for key, written in translation.values.items() if "." not in key}
    lines += ["", *(_line(key, written) for key, written in top.items())]
    for section in SECTIONS:
        inner = {key: written for key, written in translation.values.items() if key.startswith(f"{section}.")}
        if inner:
            lines += ["", f"{section}:", *_section_lines(section, inner)]
    return "\n".join(lines) + "\n"


def _section_lines(section: str, inner: Mapping[str, Written]) -> Iterator[str]:
    named = ""
    for key, written in inner.items():
        parts = key.removeprefix(f"{section}.").split(".")
        if len(parts) == 1:
            yield f"  {_line(parts[0], written)}"
            continue
        if named != parts[0]:
            named = parts[0]
            yield f"  {named}:"
        yield f"    {parts[1]}:"
        yield f"      {_line(parts[2], written)}"


def _line(name: str, written: Written) -> str:
    """One key with its value, and its comment if it has one."""
    text = f"{name}: {write_value(written.value)}"
    return f"{text}  # {_comment(written.comment)}" if written.comment else text


def _comment(words: str) -> str:
    """Words that end with their line: a YAML comment ends at any kind of line break."""
    return shown(words, LONGEST_NOTE)
