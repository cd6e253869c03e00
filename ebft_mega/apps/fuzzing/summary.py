"""What a search has found: a table of figures, what falls short, and the files of cases that failed."""

from collections.abc import Sequence
from pathlib import Path

from ebft_mega.apps.fuzzing.campaign import LEAST_SHARE, Tally
from ebft_mega.apps.fuzzing.valid_files import write_files
from ebft_mega.shown_text import escaped

_ENOUGH_CASES = 100  # of which a share can be told


TITLES = (
    f"{'parser':<20}{'cases':>9}{'past syntax':>13}{'read':>9}{'refused':>9}"
    f"{'slowest, s':>12}{'memory, MB':>12}{'a second':>10}"
)


def figures(tally: Tally) -> str:
    """A parser's line of the table below `TITLES`."""
    return (
        f"{tally.parser:<20}{tally.cases:>9}{tally.share:>12.0%} {tally.accepted:>9}{tally.refused:>9}"
        f"{tally.slowest_seconds:>12.3f}{tally.growth_bytes / 2**20:>12.0f}"
        f"{tally.cases / max(tally.seconds, 1e-9):>10.0f}"
    )


def shortcomings(tallies: Sequence[Tally], of_one_case: bool) -> list[str]:
    """What is wrong, in words: failures, and parsers of which too few cases pass the first stage."""
    found = [escaped(str(failure)) for tally in tallies for failure in tally.failures]
    for tally in tallies:
        if not of_one_case and tally.cases >= _ENOUGH_CASES and tally.share < LEAST_SHARE:
            found.append(f"{tally.parser}: only {tally.share:.0%} of the cases pass the first stage")
    return found


def verdict(tallies: Sequence[Tally], seed: int, only: int | None) -> list[str]:
    """What a search without shortcomings says last.

    Args:
        only: the number of the one case that was run; then a line for each parser says what became of it.
    """
    if only is not None:
        return [f"{tally.parser}: case {only} of seed {seed}: {_end(tally)}" for tally in tallies]
    cases = tallies[0].cases
    whose = f"each of {len(tallies)} parsers" if len(tallies) > 1 else tallies[0].parser
    counted = f"{cases} cases of {whose}" if cases > 1 else f"1 case of {whose}"
    return [f"{counted}, seed {seed}: all read or refused"]


def save_failures(tally: Tally, output: Path) -> None:
    """Write the changed files of every case that failed into a folder of its own."""
    for failure in tally.failures:
        write_files(output / f"{failure.parser}-{failure.seed}-{failure.number}", failure.changed)


def _end(tally: Tally) -> str:
    """What became of a single case, on one line."""
    return f"refused: {'; '.join(tally.last_refusal.splitlines())}" if tally.refused else "read"
