"""Where a conversion may write, what it has written, and the time and memory it took."""

import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ebft_mega.checkpoint.model_folder import is_checkpoint
from ebft_mega.io.input_errors import bad_input
from ebft_mega.model.weights.weight_files import stored_tensors
from ebft_mega.shown_text import LONGEST_NOTE, shown

_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # getrusage's unit


def require_own_place(source: Path, output: Path) -> None:
    """Check that a model at `output` may be replaced: with it would go all that lies in its directory.

    Args:
        source: what is read.
        output: the directory to make.
    Raises:
        InputError: the source lies there, or a checkpoint, which holds more than a model.
    """
    if is_checkpoint(output):
        raise bad_input("--output", str(output), "a checkpoint of this trainer", "a directory of the model's own")
    if source.resolve().is_relative_to(output.resolve()):
        raise bad_input("--output", str(output), f"the place of {source}", "a directory of the model's own")


@dataclass(frozen=True)
class Converted:
    """A model directory that was written."""

    source: Path
    directory: Path
    dtype: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        tensors, _ = stored_tensors(self.directory)
        files = {tensor.file for tensor in tensors.values()}
        size = sum(file.stat().st_size for file in files)
        summary = f"{self.directory}: {len(tensors)} tensors in {len(files)} file(s), {size / 1e9:.3f} GB, {self.dtype}"
        lines = [summary, f"from {self.source}", *(f"note: {note}" for note in self.notes)]
        return "\n".join(shown(line, LONGEST_NOTE) for line in lines)


@dataclass(frozen=True)
class Usage:
    """Time and peak memory of this process, measured from the moment that this object is made."""

    started: float = field(default_factory=time.monotonic)  # seconds
    peak_before: int = field(default_factory=lambda: _peak_bytes())

    def __str__(self) -> str:
        """Seconds and peak memory since then, as a message."""
        seconds, peak = time.monotonic() - self.started, _peak_bytes()
        before, whole = self.peak_before / 2**20, peak / 2**20
        return f"{seconds:.1f} s; peak memory {whole:.0f} MiB, {before:.0f} MiB of it before the work began"


def _peak_bytes() -> int:
    """Peak resident memory of this process so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
