"""Pretraining-scale Energy-Based Fine-Tuning (strided mode): models trained on their own rollouts."""

import importlib.util
import os
import sys

__version__ = "0.1.0"
_REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NEEDED = ("numpy", "psutil", "pydantic", "filelock")  # some of the packages that everything needs


def _require_packages() -> None:
    """End a program of the repository that is not run by its virtual environment with one line and exit code 2.

    Whoever imports the package from elsewhere gets Python's own error.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    program = os.path.abspath(getattr(sys.modules.get("__main__"), "__file__", None) or "")
    folders = [os.path.join(_REPOSITORY, name) for name in ("launcher", "tools")]
    if missing and os.path.dirname(program) in folders:
        has_environment = os.path.exists(os.path.join(_REPOSITORY, ".venv", ".installed"))
        first = "" if has_environment else "`make setup`, then "
        sys.stderr.write(
            f"{os.path.basename(program)}: this Python lacks {', '.join(missing)}; in the repository: {first}"
            "`source .venv/bin/activate`\n"
        )
        raise SystemExit(2)


_require_packages()
