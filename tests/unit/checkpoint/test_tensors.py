"""Tensors read out of the shards of any writers' layout, against naive slices of the whole."""

import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.partition import StageShape
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.checkpoint import tensors as tensors_module
from ebft_mega.checkpoint.manifest import FileRecord
from ebft_mega.checkpoint.snapshot import StateShard, Written, write_state_shards
from ebft_mega.checkpoint.tensor_index import TensorIndex, merge_indices
from ebft_mega.checkpoint.tensors import CheckpointTensors, CheckpointWeights, check_tensors, restore_engine
from ebft_mega.data.store.format import file_sha256
from ebft_mega.errors import BrokenCheckpointError, InputError
from ebft_mega.model.stage import Stage
from ebft_mega.parallel.optimizers.adamw import AdamW
from tests.conftest import tiny_config


def shards_of(name: str, whole: Tensor, boxes: list[tuple[slice, ...]], kind: str = "weights") -> list[StateShard]:
    """The shards of a tensor, in the order of the ranks that write them."""
    return [
        StateShard(kind, name, tuple(side.start for side in box), tuple(whole.shape), whole[box].clone())
        for box in boxes
    ]


def saved(folder: Path, by_rank: list[list[StateShard]]) -> CheckpointTensors:
    written = [write_state_shards(folder, rank, shards) for rank, shards in enumerate(by_rank)]
    return CheckpointTensors(folder, merge_indices(part.index for part in written))


@st.composite
def cuts(draw, size: int) -> list[slice]:
    """A size cut into shards of any lengths."""
    places = sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else []
    return [slice(start, stop) for start, stop in zip([0, *places], [*places, size], strict=True)]


@st.composite
def tilings(draw):
    """A whole tensor, boxes that tile it, and a box to read."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    boxes: list[tuple[slice, ...]] = [()]
    for size in shape:
        boxes = [(*box, side) for box in boxes for side in draw(cuts(size))]
    wanted = []
    for size in shape:
        start = draw(st.integers(0, size))
        wanted.append(slice(start, draw(st.integers(start, size))))
    return torch.randn(shape), draw(st.permutations(boxes)), tuple(wanted)


@settings(max_examples=60)
@given(tilings())
def test_any_part_of_any_tiling_is_the_slice_of_the_whole(tmp_path_factory, tiling):
    whole, boxes, wanted = tiling
    folder = tmp_path_factory.mktemp("tiling")
    tensors = saved(folder, [[shard] for shard in shards_of("x", whole, boxes)])
    opened = []
    real = tensors_module.safe_open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tensors_module, "safe_open", lambda path, kind: opened.append(Path(path).name) or real(path, kind)
        )
        found = tensors.part("weights", "x", wanted)
    assert found.dtype == torch.float32 and torch.equal(found, whole[wanted])
    overlapping = [
        f"rank-{rank:05d}.safetensors"
        for rank, box in enumerate(boxes)
        if all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(box, wanted, strict=True))
    ]
    assert sorted(opened) == overlapping  # each file that has something of it once, and no other
    weights = CheckpointWeights(tensors)
    assert torch.equal(weights.tensor("x"), whole) and torch.equal(weights.part("x", wanted), whole[wanted])


def test_only_the_bytes_of_the_overlap_are_read(tmp_path, monkeypatch):
    """Each file's slice is asked for the overlap, not for the shard."""
    whole = torch.randn(8, 6)
    boxes = [(slice(0, 4), slice(0, 6)), (slice(4, 8), slice(0, 3)), (slice(4, 8), slice(3, 6))]
    tensors = saved(tmp_path, [[shard] for shard in shards_of("x", whole, boxes)])
    read = Counter()
    real = tensors_module.safe_open

    class Counted:
        def __init__(self, path, kind):
            self.name, self.file = Path(path).name, real(path, kind)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *arguments):
            return self.file.__exit__(*arguments)

        def get_slice(self, name):
            stored, counted = self.file.get_slice(name), self

            class Slice:
                get_dtype, get_shape = stored.get_dtype, stored.get_shape

                def __getitem__(self, box):
                    part = stored[box]
                    read[counted.name] += part.nbytes
                    return part

            return Slice()

    monkeypatch.setattr(tensors_module, "safe_open", Counted)
    found = tensors.part("weights", "x", (slice(3, 6), slice(1, 4)))
    assert torch.equal(found, whole[3:6, 1:4])
    assert read == {"rank-00000.safetensors": 12, "rank-00001.safetensors": 16, "rank-00002.safetensors": 8}


def test_records_and_headers_are_those_of_the_files(tmp_path):
    whole = torch.arange(12.0).view(4, 3)
    boxes = [(slice(0, 4), slice(0, 3))]
    shards = shards_of("x", whole, boxes) + shards_of("x", -whole, boxes, "exp_avg")
    told = []
    written = write_state_shards(tmp_path, 7, shards, told.append)
    assert told == [48, 48]
    assert set(written.files) == {"weights/rank-00007.safetensors", "exp_avg/rank-00007.safetensors"}
    for file, record in written.files.items():
        assert record == FileRecord(bytes=(tmp_path / file).stat().st_size, sha256=file_sha256(tmp_path / file))
    with tensors_module.safe_open(tmp_path / "weights/rank-00007.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": '{"x": {"saved_offsets": [0, 0]}}',
        }
        assert torch.equal(file.get_tensor("x"), whole)
    tensors = CheckpointTensors(tmp_path, written.index)
    assert tensors.shape("weights", "x") == (4, 3)
    assert torch.equal(tensors.part("exp_avg", "x", (slice(1, 2), slice(0, 3))), -whole[1:2])


def test_a_rank_without_shards_writes_nothing(tmp_path):
    assert write_state_shards(tmp_path / "folder", 3, []) == Written({}, TensorIndex(version=1, kinds={}))
    assert not (tmp_path / "folder").exists()


def test_two_shards_of_a_tensor_have_no_place_in_a_file(tmp_path):
    halves = [(slice(0, 2),), (slice(2, 4),)]
    with pytest.raises(AssertionError, match="two shards"):
        write_state_shards(tmp_path, 0, shards_of("x", torch.zeros(4), halves))


def test_a_full_disk_is_reported(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "weights").mkdir()
    os.symlink("/dev/full", tmp_path / "weights/rank-00000.safetensors")
    with pytest.raises(OSError, match="No space left"):
        write_state_shards(tmp_path, 0, shards_of("x", torch.zeros(1 << 20), [(slice(0, 1 << 20),)]))


def a_checkpoint(folder: Path) -> tuple[CheckpointTensors, Tensor]:
    whole = torch.randn(6, 2)
    boxes = [(slice(0, 3), slice(0, 2)), (slice(3, 6), slice(0, 2))]
    return saved(folder, [[shard] for shard in shards_of("x", whole, boxes)]), whole


EVERYTHING = (slice(0, 6), slice(0, 2))


def missing_file(folder: Path) -> None:
    (folder / "weights/rank-00001.safetensors").unlink()


def no_tensor_file(folder: Path) -> None:
    (folder / "weights/rank-00001.safetensors").write_bytes(b"\xff" * 100)


def cut_short(folder: Path) -> None:
    path = folder / "weights/rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def another_tensor(folder: Path) -> None:
    write_state_shards(folder, 1, shards_of("y", torch.zeros(3, 2), [(slice(0, 3), slice(0, 2))]))


def another_shape(folder: Path) -> None:
    write_state_shards(folder, 1, shards_of("x", torch.zeros(6, 2), [(slice(2, 6), slice(0, 2))]))


def a_pickle(folder: Path) -> None:
    torch.save({"x": torch.zeros(3, 2)}, folder / "weights/rank-00001.safetensors")


@pytest.mark.parametrize(
    "damage",
    [missing_file, no_tensor_file, cut_short, another_tensor, another_shape, a_pickle],
    ids=lambda f: f.__name__,
)
def test_what_changed_behind_the_index_is_a_broken_checkpoint(tmp_path, damage):
    tensors, whole = a_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(BrokenCheckpointError) as raised:
        tensors.part("weights", "x", EVERYTHING)
    (problem,) = raised.value.problems
    assert problem.where.endswith("weights/rank-00001.safetensors") and problem.key == "x"
    assert problem.expected == "F32 (3, 2)" and problem.found != problem.expected
    assert torch.equal(tensors.part("weights", "x", (slice(0, 3), slice(0, 2))), whole[:3])  # not needed there


def test_unknown_tensors_and_gaps_are_named(tmp_path):
    tensors, _ = a_checkpoint(tmp_path)
    with pytest.raises(BrokenCheckpointError, match="exp_avg: x: found no such tensor"):
        tensors.part("exp_avg", "x", EVERYTHING)
    with pytest.raises(BrokenCheckpointError, match="weights: y: found no such tensor"):
        tensors.shape("weights", "y")
    first = tensors.index.kinds["weights"]["x"]
    half = first.model_copy(update={"shards": first.shards[:1]})
    gap = CheckpointTensors(tmp_path, TensorIndex(version=1, kinds={"weights": {"x": half}}))
    with pytest.raises(BrokenCheckpointError, match="6 elements of it are in no shard"):
        gap.part("weights", "x", EVERYTHING)


KINDS = ("weights", *AdamW.moments)


class Restored:
    """Stands for an engine: asks for the whole state of a model."""

    def __init__(self, names):
        self.names = names

    def restore(self, read, applied_updates, count):
        for kind in KINDS:
            for name in self.names:
                read(kind, name)
                count(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_not_finite_is_named_with_its_files(groups, tmp_path, kind):
    architecture = Architecture.from_hf(tiny_config("llama"), "test")
    shards = [
        StateShard(each, name, (0,) * len(shape), shape, torch.zeros(shape))
        for each in KINDS
        for name, shape in hf_shapes(architecture).items()
    ]
    wrong = next(shard for shard in shards if (shard.kind, shard.name) == (kind, "model.norm.weight"))
    wrong.tensor[3] = torch.nan
    tensors = saved(tmp_path, [shards])
    stage = Stage(architecture, StageShape.whole(architecture), groups, torch.float32)
    engine = Restored([name for name, _ in stage.named_parameters()])
    with pytest.raises(InputError, match=f"{kind}: model.norm.weight: found values that are infinite") as caught:
        restore_engine(engine, stage, tensors, 3)
    (problem,) = caught.value.problems
    assert problem.where.startswith(str(tmp_path)) and problem.where.endswith("rank-00000.safetensors")


def test_all_tensors_that_a_model_lacks_are_named_at_once(tmp_path):
    architecture = Architecture.from_hf(tiny_config("qwen3", tied=False), "test")
    shards = [
        StateShard(kind, name, (0,) * len(shape), shape, torch.zeros(shape))
        for kind in KINDS
        for name, shape in hf_shapes(architecture).items()
    ]
    check_tensors(saved(tmp_path / "whole", [shards]), architecture, KINDS)
    lacking = [shard for shard in shards if (shard.kind, shard.name) != ("exp_avg", "lm_head.weight")]
    lacking = [shard for shard in lacking if shard.name != "model.norm.weight"]
    lacking += shards_of("model.norm.weight", torch.zeros(31), [(slice(0, 31),)])
    tensors = saved(tmp_path / "lacking", [lacking])
    with pytest.raises(BrokenCheckpointError) as raised:
        check_tensors(tensors, architecture, KINDS)
    assert {(problem.key, problem.found) for problem in raised.value.problems} == {
        ("weights: model.norm.weight", "shape (31,)"),
        ("exp_avg: model.norm.weight", "no such tensor"),
        ("exp_avg_sq: model.norm.weight", "no such tensor"),
        ("exp_avg: lm_head.weight", "no such tensor"),
    }
    with pytest.raises(BrokenCheckpointError) as raised:
        check_tensors(tensors, architecture, kinds=("weights",))
    assert len(raised.value.problems) == 1


class Planted:
    """Leaves a mark when somebody unpickles it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_planted_pickle_is_never_opened(tmp_path):
    tensors, whole = a_checkpoint(tmp_path)
    mark = tmp_path / "mark"
    for place in (tmp_path, tmp_path / "weights"):
        for name in (".metadata", "pytorch_model.bin", "rank-00000.pt", "__0_0.distcp"):
            (place / name).write_bytes(pickle.dumps(Planted(mark)))
    assert torch.equal(tensors.part("weights", "x", EVERYTHING), whole)
    assert not mark.exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert mark.exists()  # so the check can fail
