"""Every parser of the program with a valid input, mutations of it, and the test that tells syntax from contents.

The first stage of a parser is its syntax: the file is JSON, YAML, a tar file with a right checksum, and so on.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ebft_mega.apps.fuzzing import readings, valid_files
from ebft_mega.apps.fuzzing.hostile_bytes import (
    Random,
    either,
    json_file,
    json_lines,
    mutated_bytes,
    numpy_header,
    protobuf_fields,
    safetensors_header,
    tar_members,
)
from ebft_mega.apps.fuzzing.hostile_values import mutated_yaml
from ebft_mega.apps.fuzzing.syntax import has_npy_header, has_safetensors_header, has_tar_header, is_json, is_protobuf
from ebft_mega.apps.fuzzing.valid_files import Files
from ebft_mega.data.store.format import fingerprint

Change = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class FuzzedParser:
    """A parser, what it reads, and how that is changed."""

    name: str
    files: Callable[[], Files]  # a valid input
    changes: Mapping[str, Change]  # of the files of which one is changed
    stage: Callable[[bytes], bool]  # whether the changed file passes the first stage
    read: Callable[[Path], object]  # the parser, on the directory that holds the files
    repair: Callable[[dict[str, bytes]], Mapping[str, bytes]] = lambda files: {}  # checksums of the changed file

    def mutate(self, random: Random, valid: dict[str, bytes]) -> dict[str, bytes]:
        """Change one file, and what other files say of it unless a check is to fail."""
        name = random.choice(list(self.changes))
        changed = {name: self.changes[name](random, valid[name])}
        if random.random() < 0.9:
            changed |= self.repair(valid | changed)
        return changed

    def passes_first_stage(self, changed: Mapping[str, bytes]) -> bool:
        """Whether the changed file has the syntax of its kind."""
        name = next(name for name in changed if name in self.changes)
        return self.stage(changed[name])


def _yaml_file(random: Random, content: bytes) -> bytes:
    return mutated_yaml(random, content.decode())


def _is_yaml(content: bytes) -> bool:
    try:  # by its events: the composer in C goes deeper than its stack
        return sum(1 for _ in yaml.parse(content, Loader=yaml.CSafeLoader)) > len(("stream", "end of it"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def _some_line_is_json(content: bytes) -> bool:
    return any(map(is_json, content.splitlines()))


def _is_compressed(content: bytes) -> bool:
    return content.startswith((b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"))


def _with_index(files: dict[str, bytes]) -> Mapping[str, bytes]:
    """The manifest of a dataset with the index as it is."""
    manifest = json.loads(files["dataset.json"])
    manifest["index"] |= {"bytes": len(files["index.npy"]), "sha256": valid_files.sha256(files["index.npy"])}
    return {"dataset.json": _signed(manifest)}


def _with_shard(files: dict[str, bytes]) -> Mapping[str, bytes]:
    """The manifest of a dataset with its first shard as it is."""
    manifest = json.loads(files["dataset.json"])
    manifest["shards"][0] |= {"bytes": len(files["shard-000000.tar"])}
    return {"dataset.json": _signed(manifest)}


def _with_fingerprint(files: dict[str, bytes]) -> Mapping[str, bytes]:
    try:
        manifest = json.loads(files["dataset.json"])
        return {"dataset.json": _signed(manifest)} if isinstance(manifest, dict) else {}
    except (ValueError, RecursionError):
        return {}


def _signed(manifest: dict[str, object]) -> bytes:
    return valid_files.plain_json(manifest | {"fingerprint": fingerprint(manifest)})


def _with_checkpoint_manifest(files: dict[str, bytes]) -> Mapping[str, bytes]:
    return {"manifest.json": valid_files.checkpoint_manifest(files)}


def _of(name: str, files: Callable[[], Files]) -> Callable[[], Files]:
    """One file of several."""
    return lambda: {name: files()[name]}


_WEIGHTS = "model-00001-of-00001.safetensors"
_JSON = either(json_file)

PARSERS = tuple(
    FuzzedParser(*fields)
    for fields in (
        (
            "configuration",
            lambda: {"run.yaml": valid_files.CONFIGURATION.encode()},
            {"run.yaml": either(_yaml_file, bytes_share=0.1)},
            _is_yaml,
            readings.configuration,
        ),
        ("model-config", valid_files.model_files, {"config.json": _JSON}, is_json, readings.model),
        (
            "describing-files",
            valid_files.model_files,
            {"generation_config.json": _JSON, "model.safetensors.index.json": _JSON},
            is_json,
            readings.model,
        ),
        (
            "safetensors",
            valid_files.model_files,
            {_WEIGHTS: either(safetensors_header)},
            has_safetensors_header,
            readings.model,
        ),
        ("manifest", valid_files.dataset, {"dataset.json": _JSON}, is_json, readings.dataset, _with_fingerprint),
        (
            "index",
            valid_files.dataset,
            {"index.npy": either(numpy_header)},
            has_npy_header,
            readings.dataset,
            _with_index,
        ),
        (
            "shards",
            valid_files.dataset,
            {"shard-000000.tar": either(tar_members, bytes_share=0.3)},
            has_tar_header,
            readings.dataset,
            _with_shard,
        ),
        (
            "tar",
            lambda: {"texts.tar": valid_files.text_archive()},
            {"texts.tar": either(tar_members)},
            has_tar_header,
            readings.archive,
        ),
        (
            "json-lines",
            lambda: {"texts.jsonl": valid_files.text_lines()},
            {"texts.jsonl": either(json_lines)},
            _some_line_is_json,
            readings.lines,
        ),
        (
            "compressed-lines",
            lambda: {"texts.jsonl.gz": valid_files.compressed_lines()},
            {"texts.jsonl.gz": mutated_bytes},
            _is_compressed,
            readings.lines,
        ),
        ("tokenizer-json", valid_files.hugging_face_tokenizer, {"tokenizer.json": _JSON}, is_json, readings.tokenizer),
        (
            "tokenizer-config",
            valid_files.hugging_face_tokenizer,
            {"tokenizer_config.json": _JSON},
            is_json,
            readings.tokenizer,
        ),
        (
            "tokenizer-model",
            valid_files.sentencepiece_tokenizer,
            {"tokenizer.model": either(protobuf_fields)},
            is_protobuf,
            readings.tokenizer,
        ),
        (
            "state",
            _of("state.json", valid_files.checkpoint_files),
            {"state.json": _JSON},
            is_json,
            readings.state,
        ),
        (
            "checkpoint",
            valid_files.checkpoint_files,
            {"state.json": _JSON, "config.json": _JSON, "tensors.json": _JSON},
            is_json,
            readings.checkpoint,
            _with_checkpoint_manifest,
        ),
        ("checkpoint-manifest", valid_files.checkpoint_files, {"manifest.json": _JSON}, is_json, readings.checkpoint),
        ("run-record", valid_files.run_files, {"run.json": _JSON}, is_json, readings.run_directory),
        (
            "status-and-lock",
            valid_files.run_files,
            {"status.json": _JSON, "run.lock": _JSON},
            is_json,
            readings.run_directory,
        ),
        (
            "metrics",
            valid_files.run_files,
            {"metrics.jsonl": either(json_lines)},
            _some_line_is_json,
            readings.run_directory,
        ),
        (
            "evaluation",
            lambda: {name: valid_files.evaluation_file() for name in ("evaluation.json", "other.json")},
            {"evaluation.json": _JSON},
            is_json,
            readings.evaluations,
        ),
        (
            "experiment",
            lambda: {"experiment.yaml": valid_files.EXPERIMENT.encode()},
            {"experiment.yaml": either(_yaml_file, bytes_share=0.1)},
            _is_yaml,
            readings.experiment,
        ),
        ("stamp", lambda: {".run.json": valid_files.stamp()}, {".run.json": _JSON}, is_json, readings.stamp),
        (
            "split-ledger",
            lambda: {"split_uses.json": valid_files.split_ledger()},
            {"split_uses.json": _JSON},
            is_json,
            readings.ledger,
        ),
    )
)
