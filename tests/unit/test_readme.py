"""The README's tree shows the rooms in their order, and every path that it names exists."""

import re
from pathlib import Path

import pytest

from tests.unit.test_layering import ROOMS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"```\nebft_mega/\n(.*?)```", README, re.DOTALL)[1].splitlines()


def rooms_and_files(lines):
    """The rooms of a tree by their names in ROOMS, and the files that it names within them."""
    rooms, files = [], []
    for line in lines:
        path = re.match(r" {2}(?: {2})?(\S+) {2,}\S", line)
        if path is None:
            continue
        if line.startswith("    "):
            files.append(f"ebft_mega/{rooms[-1].replace('.', '/')}/{path[1]}")
        else:
            rooms.append(path[1].removesuffix("/").removesuffix(".py").replace("/", "."))
    return rooms, files


def test_the_tree_lists_the_rooms_in_their_order():
    assert rooms_and_files(TREE)[0] == list(ROOMS)


def test_the_check_of_the_tree_can_fail():
    swapped = [*TREE[1:3], TREE[0], *TREE[3:]]
    assert rooms_and_files(swapped)[0] != list(ROOMS) != rooms_and_files(TREE[:-9])[0]


def test_every_room_says_what_it_is_for():
    assert all(len(line.split("  ")[-1]) > 10 for line in TREE)


def test_files_of_the_tree_exist():
    files = rooms_and_files(TREE)[1]
    assert len(files) > 10 and [file for file in files if not (ROOT / file).exists()] == []


# One file of the tree answers each question that a newcomer asks first.
@pytest.mark.parametrize(
    ("question", "file"),
    [
        ("the diversity term", "ebft_mega/reward/terms/diversity.py"),
        ("who decides that a checkpoint is whole", "ebft_mega/checkpoint/manifest.py"),
        ("where a token of a rollout gets its noise", "ebft_mega/rollout/noise.py"),
        ("what crosses ranks for the reward", "ebft_mega/features/gram.py"),
        ("DeepSpeed's private names", "ebft_mega/parallel/deepspeed_adapter/"),
        ("where a new metric is added", "ebft_mega/train/step_metrics.py"),
        ("how a row is found again after a restart", "ebft_mega/data/rows/stream_state.py"),
        ("a key's default", "ebft_mega/config/schema.py"),
        ("what turns a signal into a checkpoint", "ebft_mega/train/step_boundary.py"),
    ],
)
def test_first_questions_are_answered_by_the_tree(question, file):
    assert file in rooms_and_files(TREE)[1], question


def test_named_paths_exist():
    named = set(re.findall(r"\b(?:tools|launcher|configs|docs|tests)/[\w./-]*\w", README))
    assert len(named) > 10 and [path for path in sorted(named) if not (ROOT / path).exists()] == []
