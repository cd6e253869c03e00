"""A tool's command line in this process."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ebft_mega.io.command import run_command

TOOLS = Path(__file__).resolve().parents[3] / "tools"


@pytest.fixture
def run_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a tool by its name: exit code, standard output and standard error."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        main = runpy.run_path(str(TOOLS / name))["main"]
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            code = run_command(main)
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
