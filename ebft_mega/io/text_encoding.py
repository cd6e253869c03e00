"""Refuse a locale in which not all names of files can be written. No torch."""

import os
import sys

from ebft_mega.errors import Problem, SurroundingsError

# The first that is set decides (man 7 locale).
LOCALE_VARIABLES = ("LC_ALL", "LC_CTYPE", "LANG")


def require_utf8() -> None:
    """Check that names of files are UTF-8 here.

    Python takes UTF-8 under `LC_ALL=C`, too, unless PYTHONUTF8=0 and PYTHONCOERCECLOCALE=0 forbid it.

    Raises:
        SurroundingsError: the locale's encoding is another one.
    """
    encoding = sys.getfilesystemencoding()
    if encoding.lower() not in ("utf-8", "utf8"):
        name = next((name for name in LOCALE_VARIABLES if os.environ.get(name)), LOCALE_VARIABLES[0])
        found = f"{os.environ.get(name, 'nothing')!r}, whose encoding is {encoding}"
        raise SurroundingsError([Problem("environment", name, found, "UTF-8: LC_ALL=C.UTF-8, or PYTHONUTF8=1")])
