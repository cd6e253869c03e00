"""Time and count one optimizer step of a naive baseline and of this trainer, side by side.

Both run on the same model (a toy by default), weights and rows in this process, in turns; peak memory is measured in a
process for each. The counts are checked against a running step. The toy takes about 35 minutes on two cores; `--quick`
takes some seconds.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.benchmark.case import MODELS, BenchCase
from ebft_mega.apps.benchmark.suite import CASES, QUICK_CASES, run_suite
from ebft_mega.apps.benchmark.tables import report
from ebft_mega.io.arguments import ToolParser, output_file
from ebft_mega.io.command import run_command


def main() -> int:
    """Run the benchmark and write its file."""
    parser = ToolParser(description=__doc__.splitlines()[0], epilog=f"cases: {', '.join(case.name for case in CASES)}")
    parser.add_argument(
        "--output", type=output_file, required=True, metavar="FILE.json", help="the bench file to write"
    )
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw cost against L, n and stride")
    parser.add_argument("--markdown", type=output_file, metavar="FILE.md", help="write the tables that are printed")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument(
        "--model", choices=list(MODELS), default="toy", help="its size (default: toy); others need a GPU"
    )
    parser.add_argument(
        "--attention",
        choices=("auto", "two_part", "flex", "dense"),
        default="auto",
        help="train.attention of this trainer's sides",
    )
    parser.add_argument("--quick", action="store_true", help="one short row, one run: checks that everything works")
    options = parser.parse_args()

    cases: tuple[BenchCase, ...] = QUICK_CASES if options.quick else CASES
    if options.cases:
        cases = tuple(case for case in CASES if case.name in options.cases)
    model = dataclasses.replace(MODELS[options.model], attention=options.attention)
    bench = run_suite(cases, model, lambda words: print(words, file=sys.stderr, flush=True))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(bench, indent=1) + "\n", encoding="utf-8")
    tables = report(bench)
    print(tables)
    if options.markdown is not None:
        options.markdown.write_text(tables, encoding="utf-8")
    if options.plot is not None:
        from ebft_mega.apps.benchmark.cost_plots import draw_costs

        draw_costs(bench["cases"], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
