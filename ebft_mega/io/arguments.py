"""A command line on which no option is given twice."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

# Actions that add to what was given before.
_REPEATABLE = ("_AppendAction", "_ExtendAction", "_CountAction")


class ToolParser(argparse.ArgumentParser):
    """The standard parser, which lets the last of two contradicting options win; this one refuses the second."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as the standard parser does, which calls this for the arguments of subcommands, too.

        Args:
            args: the command line; the process's own if None.
            namespace: takes the values; a new one if None.
        """
        arguments = sys.argv[1:] if args is None else list(args)
        given = arguments[: arguments.index("--")] if "--" in arguments else arguments
        counts = Counter(name for argument in given if (name := self._single_option(argument)))
        for name, count in counts.items():
            if count > 1:
                self.error(f"{name}: found {count} times; expected at most once")
        return super().parse_known_args(arguments, namespace)

    def _single_option(self, argument: str) -> str | None:
        """Name of the option that an argument is, shortened or not, if it may be given once only."""
        if not argument.startswith("--"):
            return None
        name = argument.partition("=")[0]
        known = self._option_string_actions
        actions = {
            id(known[each]): known[each] for each in ([name] if name in known else known) if each.startswith(name)
        }
        if len(actions) != 1:
            return None
        (action,) = actions.values()
        return None if type(action).__name__ in _REPEATABLE else action.option_strings[0]
