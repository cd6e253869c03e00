"""Import Hugging Face models, export checkpoints as Hugging Face models, and compare logits with transformers."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.errors import EXIT_DONE, EXIT_FAILED
from ebft_mega.io.arguments import ToolParser, path_argument, real_number
from ebft_mega.io.command import add_permissions_option, run_command

DTYPES = ("bfloat16", "float32", "float16")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    summary = "check an untrusted Hugging Face directory and rewrite it for training"
    importing = commands.add_parser("import", help=summary, description=summary)
    importing.add_argument("--input", type=path_argument, required=True, help="Hugging Face model directory")
    importing.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")

    summary = "write a checkpoint of this trainer as a Hugging Face directory"
    exporting = commands.add_parser("export", help=summary, description=summary)
    source = "checkpoint folder, or a run directory or its `checkpoints` (then the newest one)"
    exporting.add_argument("--checkpoint", type=path_argument, required=True, help=source)
    exporting.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")

    for command in (importing, exporting):
        command.add_argument("--output", type=path_argument, required=True, help="model directory to make")
        size = "tensors in one file (default: 4)"
        command.add_argument("--shard-gigabytes", type=gigabytes, default=4.0, metavar="GB", help=size)
        add_permissions_option(command)
        command.add_argument("--overwrite", action="store_true", help="replace an existing model")

    summary = "compare the logits of the model as it is trained here with transformers', on a text"
    verifying = commands.add_parser("verify", help=summary, description=summary)
    verifying.add_argument(
        "--model", type=path_argument, required=True, help="Hugging Face directory or checkpoint folder"
    )
    reference = "Hugging Face directory for transformers (default: --model)"
    verifying.add_argument("--reference", type=path_argument, help=reference)
    verifying.add_argument("--text", type=path_argument, required=True, help="UTF-8 text file")
    verifying.add_argument("--positions", type=positive, default=512, help="tokens of it to read (default: 512)")
    tolerance = "largest absolute difference that passes (default: 1e-3)"
    verifying.add_argument("--tolerance", type=real_number(), default=1e-3, metavar="X", help=tolerance)
    return parser.parse_args()


def gigabytes(text: str) -> float:
    """Parse a size above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no size above 0")
    return value


def positive(text: str) -> int:
    """Parse a count of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main() -> int:
    """Run the chosen command."""
    arguments = parse_arguments()
    if arguments.command == "verify":
        return verify(arguments)

    from ebft_mega.apps.convert.exporting import export_checkpoint
    from ebft_mega.apps.convert.importing import import_model
    from ebft_mega.apps.convert.result import Usage

    usage = Usage()
    shard_bytes = int(arguments.shard_gigabytes * 1e9)
    if arguments.command == "import":
        result = import_model(arguments.input, arguments.output, arguments.dtype, shard_bytes, arguments.overwrite)
    else:
        result = export_checkpoint(
            arguments.checkpoint, arguments.output, arguments.dtype, shard_bytes, arguments.overwrite
        )
    print(f"{result}\n{usage}")
    return EXIT_DONE


def verify(arguments: argparse.Namespace) -> int:
    """Compare logits; the exit code says whether they are within the tolerance."""
    from ebft_mega.apps.convert.result import Usage
    from ebft_mega.apps.convert.verifying import compare_logits
    from ebft_mega.parallel.groups import connect, make_process_groups

    groups = make_process_groups(connect())
    usage = Usage()
    comparison = compare_logits(arguments.model, arguments.reference, arguments.text, arguments.positions, groups)
    passed = comparison.max_difference <= arguments.tolerance
    verdict = "within" if passed else "ABOVE"
    print(f"{comparison}\n{verdict} the tolerance of {arguments.tolerance:g}\n{usage}")
    return EXIT_DONE if passed else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(run_command(main))
