"""Import and export in a process of its own; of each, print the most memory beyond what it began with, in bytes.

    python -m tests.unit.apps.convert.peak MODEL RUN OUTPUT SHARD_BYTES

Everything is imported, and a small model converted, before the measurement begins.
"""

import sys
import tempfile
from pathlib import Path

from ebft_mega.apps.convert.exporting import export_checkpoint
from ebft_mega.apps.convert.importing import import_model
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.architecture.tensor_shapes import hf_shapes
from ebft_mega.model.weights.model_directory import write_model
from ebft_mega.model.weights.weight_sources import RandomWeights
from tests.conftest import tiny_config
from tests.unit.written_checkpoint import write_checkpoint


def resident(name: str) -> int:
    """A line of this process's memory, in bytes: VmRSS now, VmHWM the most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def warm_up() -> None:
    """Convert a tiny model both ways."""
    architecture = Architecture.from_hf(tiny_config("llama", num_hidden_layers=1), "warm-up")
    source = RandomWeights(architecture, 1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        tensors = ((name, source.tensor(name)) for name in hf_shapes(architecture))
        write_model(root / "hf", architecture, tensors, source.tensor("model.norm.weight").dtype)
        import_model(root / "hf", root / "imported", "bfloat16", 10**9)
        folder = write_checkpoint(root / "checkpoints", architecture, source)
        export_checkpoint(folder, root / "exported", "bfloat16", 10**9)


if __name__ == "__main__":
    model, run, output, shard_bytes = sys.argv[1:]
    warm_up()
    for convert, source in ((import_model, model), (export_checkpoint, run)):
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark so far becomes what is resident now
        before = resident("VmRSS")
        convert(Path(source), Path(output) / convert.__name__, "bfloat16", int(shard_bytes))
        print(resident("VmHWM") - before)
