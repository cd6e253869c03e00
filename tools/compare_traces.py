"""Print where two step traces first differ; exit 1 if they do.

    python tools/compare_traces.py A B [--tolerance 1e-4]

A and B are directories written by `launcher/train.py --trace-step`. Tensors are compared in the order in which a
step makes them, so the first difference is the place to look.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.io.arguments import ToolParser, path_argument, real_number
from ebft_mega.io.command import run_command
from ebft_mega.io.parse_boundary import reading
from ebft_mega.io.standard_streams import print_line

ORDER = (
    "tokens",
    "kept",
    "rollouts",
    "token_table",
    "prefix_weights",
    "token_weights",
    "gram",
    "alignment",
    "diversity",
    "reward",
    "advantage",
    "critic_direction",
    "critic_value",
    "logprobs",
    "target_logprobs",
)
NUMBERS = (
    "rl_loss",
    "ce_loss",
    "cfm_loss",
    "loss",
    "grad_norm",
    "parameter_checksum_before",
    "parameter_checksum_after",
    "update_norm",
)
PROJECTIONS = "gradient_projections"


def compare(first: Path, second: Path, tolerance: float) -> list[str]:
    """List the differences between two traces, in the order of the step.

    Args:
        tolerance: absolute for tensors, relative to the larger magnitude for the numbers and to the gradient's norm for
            its projections; token ids must be equal.
    Returns:
        One line per tensor or number that differs.
    """
    from safetensors.torch import load_file

    tensors = []
    numbers: list[dict[str, Any]] = []
    projections: list[Any] = []
    for path in (first, second):
        with reading(path / "step.safetensors", "step.safetensors", "the tensors of a trace"):
            tensors.append(load_file(path / "step.safetensors"))
        with reading(path / "step.json", "step.json", "the numbers of a trace"):
            found = json.loads((path / "step.json").read_text(encoding="utf-8"))
            numbers.append({name: None if found[name] is None else float(found[name]) for name in NUMBERS})
            values = found.get(PROJECTIONS, ())  # older traces have none
            projections.append(None if values is None else [float(value) for value in values])
    lines = []
    found = {name for trace in tensors for name in trace}
    terms_end = ORDER.index("reward")
    further_terms = sorted(found.difference(ORDER))
    ordered = (*ORDER[:terms_end], *further_terms, *ORDER[terms_end:])
    for name in filter(found.__contains__, ordered):
        left, right = (trace.get(name) for trace in tensors)
        if left is None or right is None:
            lines.append(f"{name}: only in {second if left is None else first}")
        elif left.shape != right.shape:
            lines.append(f"{name}: shape {tuple(left.shape)} against {tuple(right.shape)}")
        else:
            allowed = tolerance if left.is_floating_point() else 0.0
            difference = (left.double() - right.double()).abs()
            wrong = ~(difference <= allowed)  # NaN counts as different
            if wrong.any():
                place = tuple(wrong.nonzero()[0].tolist())
                lines.append(
                    f"{name}{list(place)}: {left[place].item()} against {right[place].item()}; "
                    f"{int(wrong.sum())} of {wrong.numel()} differ, at most by {difference.max().item():.3g}"
                )
    for name in NUMBERS:
        # What is not finite is a word in the file.
        one, other = (None if trace[name] is None else float(trace[name]) for trace in numbers)
        if one is None or other is None:
            if one is not other:
                lines.append(f"{name}: {one} against {other}")
        elif not abs(one - other) <= tolerance * max(1.0, abs(one), abs(other)):
            lines.append(f"{name}: {one} against {other}")
    scale = min(numbers[0]["grad_norm"], numbers[1]["grad_norm"])
    return lines + different_projections(projections[0], projections[1], tolerance * scale, (first, second))


def different_projections(
    left: list[float] | None, right: list[float] | None, allowed: float, places: tuple[Path, Path]
) -> list[str]:
    """Say where the projections of two gradients differ, in at most one line.

    Args:
        left, right: empty where a trace has none; None: its step was skipped.
        allowed: the difference of two of them.
        places: of the traces.
    """
    if left == right:
        return []
    if left is None or right is None:
        return [f"{PROJECTIONS}: {left} against {right}"]
    if not left or not right:
        return [f"{PROJECTIONS}: only in {places[0] if left else places[1]}"]
    if len(left) != len(right):
        return [f"{PROJECTIONS}: {len(left)} against {len(right)}"]
    pairs = list(zip(left, right, strict=True))
    wrong = [index for index, (one, other) in enumerate(pairs) if not abs(one - other) <= allowed]
    if not wrong:
        return []
    one, other = pairs[wrong[0]]
    largest = max(abs(one - other) for one, other in pairs)
    counted = f"{len(wrong)} of {len(pairs)} differ, at most by {largest:.3g}"
    return [f"{PROJECTIONS}[{wrong[0]}]: {one} against {other}; {counted}"]


def main() -> int:
    """Compare the two directories of the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=path_argument, metavar="A", help="directory of the first trace")
    parser.add_argument("second", type=path_argument, metavar="B", help="directory of the second trace")
    parser.add_argument("--tolerance", type=real_number(), default=1e-4, help="allowed difference (default 1e-4)")
    arguments = parser.parse_args()
    missing = [
        str(path / file)
        for path in (arguments.first, arguments.second)
        for file in ("step.safetensors", "step.json")
        if not (path / file).exists()
    ]
    if missing:
        print_line("no such file: " + ", ".join(missing))
        return 2
    lines = compare(arguments.first, arguments.second, arguments.tolerance)
    for line in lines or ["the traces agree"]:
        print_line(line, sys.stdout)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(run_command(main, prints_its_result=True))
