"""Who may use what a process makes: its owner alone, the group too, or whoever the umask leaves."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ebft_mega.io import output_directory
from ebft_mega.io.arguments import ToolParser
from ebft_mega.io.command import add_permissions_option, run_command
from ebft_mega.io.durable import write_json
from ebft_mega.io.output_directory import limit_permissions, new_directory

ROOT = Path(__file__).resolve().parents[3]
# A directory and a file, under umask 002 and the key.
MODES = {"private": (0o700, 0o600), "group": (0o770, 0o660), "umask": (0o775, 0o664)}


@pytest.fixture(autouse=True)
def open_umask(monkeypatch):
    monkeypatch.setattr(output_directory, "_umask_at_start", 0o002)
    before = os.umask(0o002)
    yield
    os.umask(before)


def modes(directory):
    found = {name: stat.S_IMODE(path.stat().st_mode) for name, path in ((".", directory), ("f", directory / "f.json"))}
    return found["."], found["f"]


def make(directory):
    with new_directory(directory, "f.json", overwrite=True) as temporary:
        write_json(temporary / "f.json", {})


@pytest.mark.parametrize("permissions", MODES)
def test_what_is_made_and_renamed(tmp_path, permissions):
    limit_permissions(permissions)
    make(tmp_path / "made")
    assert modes(tmp_path / "made") == MODES[permissions]


def test_what_exists_keeps_its_mode(tmp_path):
    (tmp_path / "there").mkdir(mode=0o755)
    limit_permissions("private")
    (tmp_path / "there").mkdir(exist_ok=True)
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o755


@pytest.mark.parametrize("options", [[], *(["--permissions", name] for name in MODES)])
def test_a_tool_is_private_unless_it_is_told(tmp_path, options):
    def main():
        parser = ToolParser()
        add_permissions_option(parser)
        parser.parse_args(options)
        make(tmp_path / "made")

    assert run_command(main) == 0
    assert modes(tmp_path / "made") == MODES[options[-1] if options else "private"]
    make(tmp_path / "afterwards")
    assert modes(tmp_path / "afterwards") == MODES["umask"]


def test_a_process_that_is_started_inherits_them(tmp_path):
    limit_permissions("private")
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()"
    subprocess.run([sys.executable, "-c", code, tmp_path / "made"], check=True, timeout=60)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_runs_where_its_output_is_private(name):
    """Through `run_command`; the tools that make a directory for others have the option."""
    source = (ROOT / "tools" / name).read_text()
    assert "sys.exit(run_command(main" in source
    assert ("add_permissions_option(" in source) == (name in WITH_OPTION)


WITH_OPTION = {
    *("build_corpus.py", "build_shards.py", "train_tokenizer.py"),
    *("convert_hf.py", "evaluate.py", "compare_arms.py", "new_config.py", "import_axolotl.py"),
    *("gradient_noise.py", "experiment.py"),
}
