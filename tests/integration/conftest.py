"""A small dataset of real code: a few modules of the running interpreter's standard library."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from ebft_mega.data.builder.dataset_build import build_dataset
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.data.tokenizers.tokenizer_training import train_tokenizer
from tests.distributed.ranks import free_port
from tests.overrides import last_of_each

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_MODULES = ("argparse.py", "textwrap.py", "shlex.py", "string.py", "queue.py", "heapq.py")
HELD_OUT_MODULES = ("configparser.py",)
LAUNCH_TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class Data:
    """Dataset directories."""

    train: Path
    held_out: Path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Data:
    root = tmp_path_factory.mktemp("data")
    library = Path(sysconfig.get_paths()["stdlib"])
    for split, modules in (("train", TRAIN_MODULES), ("held_out", HELD_OUT_MODULES)):
        (root / "text" / split).mkdir(parents=True)
        for module in modules:
            shutil.copy(library / module, root / "text" / split / module)
    train_tokenizer(root / "text" / "train", 512, root / "tokenizer")
    for split in ("train", "held_out"):
        build_dataset(root / "text" / split, load_tokenizer(root / "tokenizer"), root / split)
    return Data(root / "train", root / "held_out")


def settings(data: Data, output: Path, *more: str) -> list[str]:
    """Overrides that make `configs/tiny_cpu.yaml` run on the test's data."""
    pairs = [f"data.shards={data.train}", f"evaluation.shards={data.held_out}", f"output_dir={output}", *more]
    return ["--set", *last_of_each(*pairs)]


def launch(arguments: list[str], ranks: int | None) -> subprocess.CompletedProcess[str]:
    """Run the launcher, through the `deepspeed` command with so many ranks or by itself (None).

    The whole process group is ended when it does not stop by itself in time.
    """
    command = [sys.executable]
    if ranks is not None:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
        command += ["--master_port", str(free_port())]
    process = subprocess.Popen(
        [*command, "launcher/train.py", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LAUNCH_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"no end after {LAUNCH_TIMEOUT_SECONDS} s:\n{output}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")
