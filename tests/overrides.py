"""`--set` texts of tests that build on one another."""

from ebft_mega.config.overrides import replace_overrides


def last_of_each(*texts: str) -> list[str]:
    """Of `key=value` texts with the same key only the last; the program refuses a key that is set twice."""
    chosen: list[str] = []
    for text in texts:
        chosen = replace_overrides(chosen, [text])
    return chosen
