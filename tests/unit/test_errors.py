"""Problems as lines: each different one, and many equal ones as one."""

from ebft_mega.errors import MAX_SHOWN_PROBLEMS, ConfigError, InputError, Problem


def problem(place: str, found: str = "nothing") -> Problem:
    return Problem(place, "text", found, "a text")


def test_many_problems_that_differ_in_their_places_are_one_line() -> None:
    many = [problem(f"a.jsonl:{number}") for number in range(1, 2001)]
    mixed = [many[0], problem("b.jsonl:7", "a number"), *many[1:]]
    assert str(InputError(mixed)).splitlines() == [
        "a.jsonl:1: text: found nothing; expected a text (2000 times; also at a.jsonl:2, a.jsonl:3, ...)",
        "b.jsonl:7: text: found a number; expected a text",
    ]
    assert InputError(mixed).problems == tuple(mixed)


def test_few_equal_problems_and_all_different_ones_stay_lines_of_their_own() -> None:
    three = [problem(f"a.yaml:{number}") for number in range(3)]
    assert str(ConfigError(three)).splitlines() == [str(each) for each in three]
    different = [problem("a", f"{number} things") for number in range(MAX_SHOWN_PROBLEMS + 2)]
    lines = str(InputError(different)).splitlines()
    assert len(lines) == MAX_SHOWN_PROBLEMS + 1 and lines[-1] == "and 2 more problems"


def test_an_example_is_shown_as_a_harmless_line() -> None:
    many = [problem(f"a\x1b[31m\n{number}") for number in range(5)]
    assert len(str(InputError(many)).splitlines()) == 1 and "\x1b" not in str(InputError(many))
