"""Groups are held out whole, by their names alone, and the share is met as closely as the groups allow."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebft_mega.data.selection.held_out_split import (
    GROUP_DTYPE,
    SplitOptions,
    divide,
    divide_among,
    group_number,
    read_share,
    read_shares,
    repository_folder,
    usual_groups,
)


@pytest.mark.parametrize(
    ("text", "share"), [("1%", Fraction(1, 100)), ("0.01", Fraction(1, 100)), (" 2.5 % ", Fraction(1, 40))]
)
def test_a_share_is_a_percentage_or_a_fraction(text: str, share: Fraction) -> None:
    assert read_share(text) == share


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "1",
        "100%",
        "2",
        "-1%",
        "abc",
        "",
        "%",
        "nan",
        "inf",
        "1e999",
        "0%%",
        "0." + "0" * 50,
        "1e-300",
        "1e-999999999",
    ],
)
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError):
        read_share(text)


def test_shares_of_several_datasets_have_names() -> None:
    assert read_shares("1%") == {"held-out": Fraction(1, 100)}
    assert list(read_shares("tuning=5%, report = 0.1").items()) == [
        ("tuning", Fraction(1, 20)),
        ("report", Fraction(1, 10)),
    ]


@pytest.mark.parametrize("text", ["a=", "=1%", "a=1%,", "a=1%,2%", "a=1%,a=1%", "train=1%", "a/b=1%", "a=60%,b=0.4"])
def test_what_is_no_share_with_a_name(text: str) -> None:
    with pytest.raises(ValueError):
        read_shares(text)


def documents_of(names: list[str], sizes: list[int], seed: int = 0) -> np.ndarray:
    return np.array([(group_number(name, seed), size) for name, size in zip(names, sizes, strict=True)], GROUP_DTYPE)


GROUPS = st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(1, 1000)), min_size=2, max_size=60)


@given(GROUPS, st.integers(1, 99), st.randoms())
def test_no_group_is_divided_and_the_order_of_the_documents_does_not_matter(documents, percent, random) -> None:
    names, sizes = (list(values) for values in zip(*documents, strict=True))
    keep = np.array([random.random() < 0.8 for _ in names])
    share = Fraction(percent, 100)
    division = divide(documents_of(names, sizes), keep, share)
    held_out = {name for name, held in zip(names, division.held_out, strict=True) if held}
    train = {name for name, held in zip(names, division.held_out, strict=True) if not held}
    assert not held_out & train
    staying = {name for name, stays in zip(names, keep, strict=True) if stays}
    assert (division.groups, division.held_out_groups) == (len(staying), len(held_out & staying))
    if len(staying) > 1:
        assert held_out & staying and train & staying
    size_of = {name: sum(s for n, s, k in zip(names, sizes, keep, strict=True) if n == name and k) for name in staying}
    assert division.bytes == sum(size_of.values())
    assert division.held_out_bytes == sum(size_of[name] for name in held_out & staying)
    order = list(range(len(names)))
    random.shuffle(order)
    again = divide(documents_of([names[i] for i in order], [sizes[i] for i in order]), keep[order], share)
    assert (again.held_out == division.held_out[order]).all()


def test_several_datasets_meet_their_shares_of_all_documents_and_the_first_is_that_of_one_share() -> None:
    random = np.random.default_rng(4)
    names = [f"group{number % 400}" for number in range(4000)]
    documents = documents_of(names, random.integers(1, 10_000, len(names)).tolist())
    keep = random.random(len(names)) < 0.9
    shares = (Fraction(1, 10), Fraction(1, 4), Fraction(1, 2))
    divisions = divide_among(documents, keep, shares)
    assert all(abs(each.share - share) < 0.003 for each, share in zip(divisions, shares, strict=True))
    assert sum(each.held_out.astype(int) for each in divisions).max() == 1
    for division in divisions:
        assert division.held_out_bytes == documents["bytes"][keep & division.held_out].sum()
        groups = set(documents["group"][division.held_out])
        assert not groups & set(documents["group"][~division.held_out])
    assert (divisions[0].held_out == divide(documents, keep, shares[0]).held_out).all()


def test_a_share_of_many_groups_is_met_and_the_seed_chooses_others() -> None:
    random = np.random.default_rng(3)
    names = [f"group{number % 500}" for number in range(5000)]
    sizes = random.integers(1, 10_000, len(names)).tolist()
    keep = np.ones(len(names), bool)
    chosen = [divide(documents_of(names, sizes, seed), keep, Fraction(1, 100)) for seed in (0, 0, 1)]
    assert all(abs(division.share - 0.01) < 0.001 for division in chosen)
    assert (chosen[0].held_out == chosen[1].held_out).all() and (chosen[0].held_out != chosen[2].held_out).any()


def test_what_is_added_later_moves_few_groups() -> None:
    """Groups keep their place in the order, so that what was held out is mostly held out again."""
    names = [f"group{number}" for number in range(1000)]
    before = divide(documents_of(names, [100] * 1000), np.ones(1000, bool), Fraction(1, 10))
    more = [*names, *(f"new{number}" for number in range(100))]
    after = divide(documents_of(more, [100] * 1100), np.ones(1100, bool), Fraction(1, 10))
    assert (before.held_out & after.held_out[:1000]).sum() > 90


def test_a_group_larger_than_the_share_is_passed_over_and_the_smallest_is_taken_where_all_are() -> None:
    names, keep = ["a", "b", "c"], np.ones(3, bool)
    division = divide(documents_of(names, [900, 60, 40]), keep, Fraction(1, 100))
    assert division.held_out.tolist() == [False, False, True] and division.share == 0.04
    assert (division.largest_group, division.largest_bytes) == (group_number("a", 0), 900)
    assert not divide(documents_of(names, [900, 60, 40]), keep, Fraction(1, 10)).held_out[0]
    alone = divide(documents_of(["a", "a"], [1, 2]), np.ones(2, bool), Fraction(1, 100))
    assert alone.groups == alone.held_out_groups == 1


def test_the_nearest_folder_with_git_is_the_repository(tmp_path) -> None:
    for folder in ("one/.git", "one/inner/deep", "two/x", "one/sub"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "one" / "sub" / ".git").write_text("gitdir: ../.git/modules/sub")
    known: dict[str, str | None] = {}
    found = [repository_folder(tmp_path, path, known) for path in ("one/inner/deep/a", "one/sub/b", "two/x/c", "d")]
    assert found == ["one", "one/sub", None, None]
    (tmp_path / ".git").mkdir()
    assert repository_folder(tmp_path, "two/x/c", {}) == "."


def test_the_usual_groups() -> None:
    assert usual_groups([("a/x", True), ("b/y", True)]) == "top-folder"
    assert usual_groups([("a/x", True), ("a/y", True), ("z", True)]) == "document"
    assert usual_groups([("a/x.jsonl", False), ("b/y.jsonl", False)]) == "document"
    assert SplitOptions("1%", "repo").keys[0] == "repo" and SplitOptions("1%", "k").keys == ("k",)
