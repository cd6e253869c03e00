import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_it_prints_every_figure_on_a_tiny_size() -> None:
    command = [sys.executable, "tools/bench_data.py", "--documents", "40", "--tokens", "300", "--sequence-length", "32"]
    command += ["--batches", "1", "--repeats", "1", "--resume-documents", "50000"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    lines = answer.stdout.splitlines()
    for dtype in ("uint16", "uint32"):
        for what in ("2 processes that read for themselves", "1 process with 2 workers"):
            assert any(re.match(rf"packed rows, {dtype}, {what} +\S+ +\S+ +\d+\.\d$", line) for line in lines)
        assert any(re.match(rf"whole shards, {dtype}, 1 process +\S+ +\S+ +\d+\.\d$", line) for line in lines)
    assert "50,000 documents in 3 shards" in lines
    assert re.search(r"place of its first row: median \d+\.\d ms, longest \d+\.\d ms of 24 places", answer.stdout)
