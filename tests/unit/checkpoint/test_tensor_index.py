"""The shards that an index lists make up every tensor exactly once, or the index is refused."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.checkpoint.tensor_index import (
    IndexedTensor,
    TensorIndex,
    TensorShard,
    coverage_problems,
    merge_indices,
)
from ebft_mega.errors import BrokenCheckpointError, InputError

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def index_of(shape: tuple[int, ...], boxes: list[Box], kind: str = "weights") -> TensorIndex:
    """An index with one tensor, each shard in a file of its own."""
    shards = tuple(
        TensorShard(file=f"{kind}/rank-{number:05d}.safetensors", offsets=offsets, sizes=sizes)
        for number, (offsets, sizes) in enumerate(boxes)
    )
    return TensorIndex(version=1, kinds={kind: {"w": IndexedTensor(shape=shape, shards=shards)}})


@st.composite
def tilings(draw) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and boxes that make it up: it is cut in two, and the halves again."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[dim]))
        for start, length in ((0, cut), (cut, sizes[dim] - cut)):
            if length:
                place = [*offsets], [*sizes]
                place[0][dim] += start
                place[1][dim] = length
                boxes.append((tuple(place[0]), tuple(place[1])))
    return shape, boxes


@st.composite
def damaged_tilings(draw) -> tuple[tuple[int, ...], list[Box]]:
    """A tiling with one number or one box changed, which may or may not matter."""
    shape, boxes = draw(tilings())
    number = draw(st.integers(0, len(boxes) - 1))
    offsets, sizes = boxes[number]
    match draw(st.sampled_from(["move", "resize", "drop", "double", "swap", "empty"])):
        case "drop":
            boxes.pop(number)
        case "double":
            boxes.append(boxes[number])
        case "empty" if shape:
            boxes.append((offsets, (0,) * len(shape)))
        case "swap":
            boxes[number] = (sizes, offsets)
        case kind if shape:
            dim = draw(st.integers(0, len(shape) - 1))
            changed = [*(offsets if kind == "move" else sizes)]
            changed[dim] = max(0, changed[dim] + draw(st.integers(-2, 2)))
            boxes[number] = (tuple(changed), sizes) if kind == "move" else (offsets, tuple(changed))
    return shape, boxes


def fills_once(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """Count how often every element is filled, one by one."""
    count = np.zeros(shape, dtype=int)
    for offsets, sizes in boxes:
        if 0 in sizes:
            return False
        ranges = (range(start, start + length) for start, length in zip(offsets, sizes, strict=True))
        for place in itertools.product(*ranges):
            if any(at >= end for at, end in zip(place, shape, strict=True)):
                return False
            count[place] += 1
    return bool((count == 1).all())


@given(tilings() | damaged_tilings(), st.randoms(use_true_random=False))
def test_shards_are_right_if_and_only_if_they_fill_the_tensor_once(tiling, random) -> None:
    shape, boxes = tiling
    random.shuffle(boxes)
    assert (coverage_problems(index_of(shape, boxes)) == []) == fills_once(shape, boxes)


@given(tilings(), st.randoms(use_true_random=False))
def test_indices_of_ranks_become_one_in_any_order(tiling, random) -> None:
    shape, boxes = tiling
    whole = index_of(shape, boxes)
    parts = [
        TensorIndex(version=1, kinds={"weights": {"w": IndexedTensor(shape=shape, shards=(shard,))}})
        for shard in whole.kinds["weights"]["w"].shards
    ]
    random.shuffle(parts)
    merged = merge_indices(parts)
    assert coverage_problems(merged) == []
    assert merged.to_json() == merge_indices([whole]).to_json()
    assert TensorIndex.from_json(merged.to_json()) == merged


def test_indices_that_disagree_on_a_shape_are_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"weights: w is \(2,\) to one rank and \(3,\) to another"):
        merge_indices([index_of((2,), []), index_of((3,), [])])


def test_kinds_and_tensors_are_in_order_and_kinds_stay_apart() -> None:
    parts = [index_of((2,), [((0,), (2,))], kind) for kind in ("weights", "exp_avg_sq", "exp_avg")]
    merged = merge_indices(parts)
    assert list(merged.kinds) == ["exp_avg", "exp_avg_sq", "weights"]
    assert coverage_problems(merged) == []
    assert merge_indices([]) == TensorIndex(version=1, kinds={})


@pytest.mark.parametrize(
    ("index", "found"),
    [
        (index_of((2, 3), [((0, 0), (2, 2))]), "4 of 6 elements"),
        (index_of((2, 3), []), "0 of 6 elements"),
        (
            index_of((2, 3), [((0, 0), (2, 2)), ((1, 1), (1, 2))]),
            "the shards in weights/rank-00000.safetensors and weights/rank-00001.safetensors, which overlap",
        ),
        (index_of((2, 3), [((0, 0), (2, 4))]), "a shard at (0, 0) of (2, 4) in weights/rank-00000.safetensors"),
        (index_of((2, 3), [((0,), (6,))]), "a shard at (0,) of (6,) in weights/rank-00000.safetensors"),
        (index_of((2**62,), [((2**62,), (2**62,))]), f"a shard at ({2**62},) of ({2**62},) in weights/rank-00000"),
    ],
)
def test_what_is_wrong_is_said(index: TensorIndex, found: str) -> None:
    (problem,) = coverage_problems(index, "step-00000020/tensors.json")
    assert (problem.where, problem.key) == ("step-00000020/tensors.json", "weights: w")
    assert problem.found.startswith(found)


def test_two_shards_in_a_file_are_wrong_and_so_is_the_file_of_another_kind() -> None:
    def index(file: str) -> TensorIndex:
        shards = tuple(TensorShard(file=file, offsets=(row,), sizes=(1,)) for row in (0, 1))
        return TensorIndex(version=1, kinds={"weights": {"w": IndexedTensor(shape=(2,), shards=shards)}})

    assert [problem.found for problem in coverage_problems(index("weights/a"))] == ["more than one shard in weights/a"]
    assert "a shard in exp_avg/a" in [problem.found for problem in coverage_problems(index("exp_avg/a"))]


def test_every_kind_has_the_same_tensors() -> None:
    weights, moments = index_of((2,), [((0,), (2,))]), index_of((2,), [((0,), (2,))], "exp_avg")
    moments.kinds["exp_avg"]["v"] = moments.kinds["exp_avg"]["w"]
    (problem,) = coverage_problems(merge_indices([weights, moments]))
    assert (problem.key, problem.found) == ("weights: v", "no such tensor")


@pytest.mark.parametrize(
    "text",
    [
        '{"version":1,"kinds":{"weights":{"w":{"shape":[-1],"pieces":[]}}}}',
        '{"version":1,"kinds":{"weights":{"w":{"shape":[1],"pieces":[{"file":"../x","offsets":[0],"sizes":[1]}]}}}}',
        '{"version":1,"kinds":{"weights":{"w":{"shape":[99999999999999999999],"pieces":[]}}}}',
        '{"version":1,"kinds":{"weights":{"w":{"shape":[0],"shards":[]}}}}',  # the key is `pieces`
        '{"version":1,"kinds":{"weights":{},"weights":{}}}',
        '{"version":1}',
    ],
)
def test_an_index_that_is_none_is_a_broken_checkpoint(text: str) -> None:
    with pytest.raises(BrokenCheckpointError):
        TensorIndex.from_json(text)


def test_an_index_of_a_newer_version_is_named_as_such() -> None:
    with pytest.raises(InputError, match="newer version"):
        TensorIndex.from_json('{"version":2,"tensors":{}}')


def test_an_index_of_many_problems_names_a_few() -> None:
    tensors = {f"w{number}": IndexedTensor(shape=(2,), shards=()) for number in range(1000)}
    assert len(coverage_problems(TensorIndex(version=1, kinds={"weights": tensors}))) == 20
