"""Checkpoint folders put together by hand, without a trainer: cut into shards, listed and hashed."""

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint.commit import folder_name, point_latest
from ebft_mega.checkpoint.manifest import FileRecord, Manifest, write_manifest
from ebft_mega.checkpoint.tensor_index import IndexedTensor, TensorIndex, TensorShard
from ebft_mega.model.weights.weight_sources import RandomWeights, WeightSource


class VariedWeights(RandomWeights):
    """Random weights whose norms and biases are random, too, so that no two tensors can be taken for each other."""

    def tensor(self, name):
        """Draw one tensor."""
        drawn = super().tensor(name)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return drawn + 0.3 * torch.randn(drawn.shape, generator=generator) if drawn.ndim == 1 else drawn


def write_checkpoint(
    root: Path, architecture: Architecture, source: WeightSource, step: int = 3, small_files: Path | None = None
) -> Path:
    """A checkpoint as two ranks would write it: matrices in two halves of rows, vectors by turns.

    Args:
        root: the run's `checkpoints`.
        small_files: directory whose files (tokenizer, generation config) go beside the weights.
    """
    folder = root / folder_name(step)
    folder.mkdir(parents=True)
    for path in small_files.iterdir() if small_files else ():
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(architecture.exported_config("float32")))
    kinds = {}
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        files = [{}, {}]
        kinds[kind] = {}
        for number, (name, shape) in enumerate(hf_shapes(architecture).items()):
            tensor = source.tensor(name).float() if kind == "weights" else source.tensor(name).float() * 0
            cuts = [0, shape[0] // 2, shape[0]] if len(shape) == 2 and shape[0] > 1 else [0, shape[0]]
            shards = []
            for shard, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
                rank = (number + shard) % 2
                files[rank][name] = tensor[start:stop].contiguous()
                offsets, sizes = (start, *(0 for _ in shape[1:])), (stop - start, *shape[1:])
                shards.append(TensorShard(file=f"{kind}/rank-{rank:05d}.safetensors", offsets=offsets, sizes=sizes))
            kinds[kind][name] = IndexedTensor(shape=shape, shards=tuple(shards))
        (folder / kind).mkdir()
        for rank, tensors in enumerate(files):
            save_file(tensors, folder / kind / f"rank-{rank:05d}.safetensors", metadata={"format": "pt"})
    (folder / "tensors.json").write_text(TensorIndex(version=1, kinds=kinds).to_json())
    list_files(folder, step)
    point_latest(root, folder.name)
    return folder


def list_files(folder: Path, step: int = 3) -> None:
    """Write the manifest of what is there."""
    files = {
        path.relative_to(folder).as_posix(): FileRecord(
            bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    write_manifest(folder, Manifest(version=1, step=step, files=files))
