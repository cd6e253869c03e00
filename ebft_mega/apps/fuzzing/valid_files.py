"""Small valid files of every kind that the program reads: what mutations begin with. They are the same everywhere."""

import functools
import gzip
import hashlib
import io
import json
import struct
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ebft_mega.apps.fuzzing.hostile_bytes import protobuf_field, varint
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import EMBEDDING_NAME, hf_shapes
from ebft_mega.checkpoint.tensor_index import IndexedTensor, TensorIndex, TensorShard

# Files of a directory by their paths in it.
Files = Mapping[str, bytes]

END = "<|endoftext|>"
TEXTS = ("def add(first, second):\n    return first + second\n", "x = 1\n", "for name in names:\n    print(name)\n")
_MODEL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "eos_token_id": [1, 2],
    "torch_dtype": "float32",
}
CONFIGURATION = """\
output_dir: out
seed: 3
model:
  init_from: model
data:
  sequence_length: 32
  sources:
    code:
      shards: data
      weight: 0.75
    text:
      shards: other
      weight: 0.25
  on_error: skip
evaluation:
  shards: held
  interval: 2
ebft:
  stride: 4
  context_length: 4
  generate_max_len: 4
  feature_layers: [0.25, 0.5, 0.75]
  temperature: 0.6
train:
  global_batch_size: 8
  max_steps: 4
  lr: 1e-3
  betas: [0.9, 0.95]
parallel:
  tensor_parallel_size: 2
zero:
  stage: 3
"""


def plain_json(value: object) -> bytes:
    """A value as JSON text."""
    return json.dumps(value).encode()


def sha256(content: bytes) -> str:
    """Checksum of a file, hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def model_files() -> Files:
    """A model directory of one file of weights, all zero, and an index."""
    architecture = Architecture.from_hf(_MODEL, "config.json")
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in hf_shapes(architecture).items():
        start, end = end, end + 4 * functools.reduce(int.__mul__, shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    header = plain_json(entries)
    name = "model-00001-of-00001.safetensors"
    weight_map = {tensor: name for tensor in entries if tensor != "__metadata__"}
    return {
        "config.json": plain_json(_MODEL),
        "generation_config.json": plain_json({"eos_token_id": [1], "temperature": 0.7}),
        "model.safetensors.index.json": plain_json({"metadata": {"total_size": end}, "weight_map": weight_map}),
        name: struct.pack("<Q", len(header)) + header + bytes(end),
    }


def hugging_face_tokenizer() -> Files:
    """A byte-level tokenizer of a few characters."""
    characters = sorted({*"abcdefghijklmnopqrstuvwxyz_(),:=+1", "\u0120", "\u010a"})
    vocabulary = {character: number for number, character in enumerate([*characters, "re", "na", "nam"])}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    model = {"type": "BPE", **dict.fromkeys(names), "vocab": vocabulary, "merges": ["r e", "n a", "na m"]}
    definition = {
        **{"version": "1.0", "truncation": None, "padding": None},
        "added_tokens": [{"id": len(vocabulary), "content": END, **flags}],
        **{"normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model},
    }
    config = {
        "eos_token": {"content": END},
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>"],
        "added_tokens_decoder": {str(len(vocabulary)): {"content": END, "special": True}},
    }
    return {"tokenizer.json": plain_json(definition), "tokenizer_config.json": plain_json(config)}


def sentencepiece_tokenizer() -> Files:
    """A unigram model of a few characters."""
    unknown, normal, control, user_defined = 2, 1, 3, 4
    kinds = {"<unk>": unknown, "<s>": control, "</s>": control, "<mark>": user_defined}
    kinds |= dict.fromkeys(("\u2581", *"abcdefghijklmnopqrstuvwxyz_(),:=+1"), normal)
    parts = []
    for number, (text, kind) in enumerate(kinds.items()):
        message = protobuf_field(1 << 3 | 2, text.encode()) + protobuf_field(2 << 3 | 5, struct.pack("<f", -number))
        parts.append(protobuf_field(1 << 3 | 2, message + varint(3 << 3) + varint(kind)))
    trainer = varint(3 << 3) + varint(1) + varint(4 << 3) + varint(len(kinds))
    normalizer = protobuf_field(1 << 3 | 2, b"identity")
    normalizer += b"".join(varint(field << 3) + varint(int(field == 5)) for field in (3, 4, 5))
    model = b"".join([*parts, protobuf_field(2 << 3 | 2, trainer), protobuf_field(3 << 3 | 2, normalizer)])
    return {"tokenizer.model": model, "tokenizer_config.json": plain_json({"eos_token": "</s>"})}


def dataset() -> Files:
    """A dataset of three documents in two shards."""
    # Brings webdataset, which only this one needs.
    from ebft_mega.data.builder.shard_writer import DatasetWriter
    from ebft_mega.data.tokenizers.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name, "tokenizer"), Path(name, "dataset")
        write_files(source, hugging_face_tokenizer())
        output.mkdir()
        writer = DatasetWriter(output, load_tokenizer(source), shard_bytes=1, max_documents=2)
        for number, length in enumerate((5, 0, 9)):
            writer.add(list(range(length)), {"path": f"file-{number}.py", "licence": "MIT"})
        writer.finish()
        return read_files(output)


def text_archive() -> bytes:
    """A webdataset shard of texts with their records, as GNU tar writes it."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, text in enumerate(TEXTS):
            for suffix, content in (("txt", text.encode()), ("json", plain_json({"licence": "MIT", "stars": number}))):
                member = tarfile.TarInfo(f"folder/{'long' * 40 * (number == 1)}{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


def text_lines() -> bytes:
    """JSON lines of texts."""
    records = [{"text": text, "licence": ["MIT"], "stars": number} for number, text in enumerate(TEXTS)]
    return b"".join(plain_json(record) + b"\n" for record in records)


def compressed_lines() -> bytes:
    """The same, compressed with gzip."""
    return gzip.compress(text_lines(), mtime=0)


def checkpoint_files() -> Files:
    """The small files of a checkpoint, whose manifest lists no others."""
    source = {"name": "code", "fingerprint": "a" * 64, "tokenizer_sha256": "b" * 64, "weight": "7/10", "rows": 16}
    data = {"version": 1, "seed": 3, "next_row": 16, "sequence_length": 32, "skipped_rows": 0}
    sizes = ("data_parallel", "tensor_parallel", "pipeline_parallel", "world_size")
    state = {
        **{"version": 1, "step": 2, "optimizer_updates": 2, "skipped_steps": 0, "skipped_in_a_row": 0, "tokens": 512},
        **{"seed": 3, "data": {**data, "sources": [{**source, "max_epochs": None}]}},
        **{"feature_network": "c" * 64, "feature_source": "the initial model"},
        "feature_architecture": {"hidden_size": 8, "rope_theta": 1e4, "rope_type": None},
        "critic": {
            **{"feature_map": "concat", "feature_norm": "joint", "layers": [1, 2], "layer_weights": [1.0, 0.5]},
            **{"vectors": 4, "hidden_size": 8, "generate_length": 4, "rank": 8, "vocabulary": 64, "batches": 2},
        },
        "layout": {**dict.fromkeys(sizes, 1), "sequence_parallel": False, "zero_stage": 3},
        "evaluations": [{"step": 0, "metrics": {"eval/ce_loss": 4.5, "eval/alignment": "nan"}}],
        **{"pending_metrics": {"loss/total": 1.5}, "started_from": {"path": "run", "manifest_sha256": "d" * 64}},
    }
    shards = (
        TensorShard(file="weights/rank-00000.safetensors", offsets=(0, 0), sizes=(4, 8)),
        TensorShard(file="weights/rank-00001.safetensors", offsets=(4, 0), sizes=(60, 8)),
    )
    table = TensorShard(file="critic/rank-00000.safetensors", offsets=(0, 0), sizes=(64, 8))
    kinds = {
        "weights": {EMBEDDING_NAME: IndexedTensor(shape=(64, 8), shards=shards)},
        "critic": {"table": IndexedTensor(shape=(64, 8), shards=(table,))},
    }
    files = {
        "state.json": plain_json(state),
        "config.resolved.yaml": CONFIGURATION.encode(),
        "config.json": plain_json(_MODEL),
        "tensors.json": TensorIndex(version=1, kinds=kinds).to_json().encode(),
    }
    return {**files, "manifest.json": checkpoint_manifest(files)}


def checkpoint_manifest(files: Files) -> bytes:
    """The manifest that lists files of a checkpoint as they are."""
    listed = {
        name: {"bytes": len(content), "sha256": sha256(content)}
        for name, content in files.items()
        if name != "manifest.json"
    }
    return plain_json({"version": 1, "step": 2, "files": listed})


def run_files() -> Files:
    """Small files of a run directory."""
    state = json.loads(checkpoint_files()["state.json"])
    record = {
        **{"version": 1, "step": None, "steps": 4, "settings": {"seed": 3, "train.lr": 1e-3}, "data": state["data"]},
        **{"architecture": {"hidden_size": 8}, "held_out": "none", "initial_model": "random", "feature_model": "same"},
    }
    holder = {
        **{"host": "machine", "pid": 4000, "started": "2024-01-01T00:00:00+00:00", "token": "a" * 32},
        **{"process_start": 7, "boot": "b", "pid_namespace": "n", "slurm_job_id": "12", "slurm_restart_count": 1},
    }
    metrics = [{"step": step, "loss/total": 2.0 / (step + 1), "eval/ce_loss": None} for step in range(4)]
    return {
        "run.json": plain_json(record),
        "status.json": plain_json({"state": "done", "exit_code": 0, "checkpoint": "step-00000002", "step": 2}),
        "run.lock": plain_json(holder),
        "metrics.jsonl": b"".join(plain_json(line) + b"\n" for line in metrics),
        "config.resolved.yaml": CONFIGURATION.encode(),
    }


def evaluation_file() -> bytes:
    """The file of an evaluation."""
    values = {"eval/ce_loss": [2.0, 2.5, 3.0], "eval/alignment": [0.5, None, 0.25]}
    content = {
        **{"model": "model", "data": "a" * 64, "rows": 3, "skipped_rows": 0, "temperature": 0.6},
        **{"document_masking": True, "feature_model": "f", "per_row": values, "row_groups": ["a", "a", "b"]},
        **{"eval/ce_loss": 2.5, "eval/alignment": 0.375},
    }
    return plain_json(content)


# Its paths are there, so that nothing is wrong with it.
EXPERIMENT = """\
question: Does it?
output_dir: out
config: pyproject.toml
splits: {train: made/train, tuning: made/tuning, report: made/report}
prepare:
- {makes: made, run: [tools/build_shards.py, --output, made]}
start: warm
arms:
  warm: {seeds: [0], config: pyproject.toml}
  ce: {tune: {train.lr: [0.001, 0.002]}, about: first}
  ebft: {like: ce, set: {ebft.rl_coef: 1.0, ebft.feature_layers: [0.5, 1.0]}}
  as it is: {model: tools}
seeds: [0, 1]
tuning: {seeds: [7], metric: alignment, rows: 8}
evaluation:
  temperatures: [0.6, 1.0]
  completion_lengths: [4, 8]
  feature_maps: {last: {embed_method: last_token}}
primary: [{arm: ebft, against: ce, metric: brier, at: equal_temperature}]
fronts: {mixtures: [ce, ebft]}
limits: [none]
"""


def stamp() -> bytes:
    """What a run was made from."""
    inputs = {"settings": {"train.lr": 0.1, "ebft.feature_layers": [0.5]}, "code": "a" * 64, "start": None}
    starts = [{"wall_seconds": 2.5, "cpu_seconds": 2.0, "exit_code": 0}]
    return plain_json({"version": 1, "inputs": inputs, "is_done": True, "starts": starts})


def split_ledger() -> bytes:
    """Uses of a split by two experiments."""
    use = {"fingerprint": "a" * 64, "role": "report", "experiment": "out", "spec": "c" * 64, "place": "data"}
    uses = [use | {"date": "2026-01-01T00:00:00+00:00"}, use | {"role": "tuning", "date": "2026-01-02T00:00:00+00:00"}]
    return plain_json({"version": 1, "uses": uses})


def write_files(directory: Path, files: Files) -> None:
    """Write files of a directory, and make it."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_files(directory: Path) -> Files:
    """All files of a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
