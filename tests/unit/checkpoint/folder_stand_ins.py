"""Small checkpoint folders with everything but tensors, and the configuration of the run that wrote them."""

import json
from pathlib import Path

from ebft_mega.checkpoint.commit import publish, temporary_folder
from ebft_mega.checkpoint.manifest import Manifest, read_manifest, write_file, write_manifest
from ebft_mega.checkpoint.run_state import EvaluationRecord, Layout, RunState, StartedFrom
from ebft_mega.config.schema import RunConfig
from ebft_mega.config.yaml_source import write_yaml
from ebft_mega.data.rows.stream_state import SourceState, StreamState

MODEL = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
DATA = StreamState(
    seed=3,
    next_row=80,
    sequence_length=32,
    sources=(
        SourceState(
            name="shards", fingerprint="a" * 64, tokenizer_sha256="b" * 64, weight="1", max_epochs=None, rows=80
        ),
    ),
)
LAYOUT = Layout(
    data_parallel=2, tensor_parallel=1, pipeline_parallel=1, sequence_parallel=False, zero_stage=3, world_size=2
)


def run_config(output_dir: Path, **changes: object) -> RunConfig:
    """A valid configuration; changes name dotted keys with `__` for the dot."""
    tree: dict = {
        "output_dir": str(output_dir),
        "seed": 3,
        "model": {"config": dict(MODEL)},
        "data": {"shards": "datasets/train", "sequence_length": 32},
        "train": {"global_batch_size": 8, "max_steps": 10},
    }
    for name, value in changes.items():
        *sections, leaf = name.split("__")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = value
    return RunConfig.model_validate(tree)


def run_state(step: int, **changes: object) -> RunState:
    """Where the run stands after so many steps."""
    state = RunState(
        step=step,
        optimizer_updates=step,
        skipped_steps=0,
        skipped_in_a_row=0,
        tokens=step * 256,
        seed=3,
        data=DATA,
        feature_network="c" * 64,
        feature_source="random weights of seed 3",
        layout=LAYOUT,
        evaluations=(EvaluationRecord(step=0, metrics={"eval/ce_loss": 4.5}),),
        pending_metrics=None,
        started_from=None,
    )
    return state.model_copy(update=changes)


def fill(directory: Path, step: int, config: RunConfig, state: RunState, weights: bytes = b"weights") -> Manifest:
    """Write all files of a checkpoint into a folder."""
    contents = {
        "state.json": state.to_json().encode(),
        "config.resolved.yaml": write_yaml(config.model_dump(mode="json")).encode(),
        "config.json": json.dumps(MODEL).encode(),
        "weights/rank-00000.safetensors": weights,
    }
    files = {name: write_file(directory, name, content) for name, content in contents.items()}
    manifest = Manifest(version=1, step=step, files=files)
    write_manifest(directory, manifest)
    return manifest


def write_checkpoint(
    root: Path, step: int, started_from: StartedFrom | None = None, weights: bytes = b"weights"
) -> Path:
    """A complete checkpoint; `latest` stays as it is."""
    temporary = temporary_folder(root, step)
    fill(temporary, step, run_config(root.parent), run_state(step, started_from=started_from), weights)
    return publish(temporary, root)


def relist(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and the manifest with it."""
    manifest = read_manifest(folder)
    files = manifest.files | {name: write_file(folder, name, content)}
    write_manifest(folder, manifest.model_copy(update={"files": files}))
