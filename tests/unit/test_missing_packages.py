"""Programs of the repository that another Python runs than that of its virtual environment."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a Python without installed packages."""
    done = subprocess.run([sys.executable, "-I", "-S", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("program", ["launcher/train.py", "tools/evaluate.py", "tools/quickstart.py"])
def test_a_program_says_in_one_line_how_its_packages_are_had(program):
    code, errors = run(ROOT / program, "--help")
    assert code == 2 and errors.count("\n") == 1, errors
    assert errors.startswith(f"{Path(program).name}: this Python lacks numpy, psutil, pydantic, filelock; ")
    assert errors.endswith("`source .venv/bin/activate`\n")


def test_who_imports_the_package_gets_pythons_own_error(tmp_path):
    (tmp_path / "other.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport ebft_mega.config.load\n")
    code, errors = run(tmp_path / "other.py")
    assert code == 1 and "ModuleNotFoundError: No module named" in errors
