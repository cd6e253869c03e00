import re
import subprocess
import sys
from pathlib import Path

from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer

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


def test_it_compares_builds_with_one_process_and_with_two(tmp_path: Path) -> None:
    tokenizer_directory = tmp_path / "tokenizer"
    train_tokenizer(ROOT / "launcher", 400, tokenizer_directory)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "number = {number}"}}\n' for number in range(20)))
    command = [sys.executable, "tools/bench_data.py", "--build", str(text), "--tokenizer", str(tokenizer_directory)]
    answer = subprocess.run(
        [*command, "--repeats", "1"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert [row[0] for row in rows[1:3]] == ["1", "2"]
    assert re.search(r"^[0-9,]+ tokens; 2 processes are \d+\.\d\d times as fast as one$", answer.stdout, re.MULTILINE)
    refused = subprocess.run(command[:4], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "--build, --tokenizer" in refused.stderr
