"""Time and count one optimizer step of a naive baseline and of this trainer, side by side.

Both run on the same model (a toy by default), weights and rows in this process, in turns; peak memory is measured in a
process for each. The counts are checked against a running step. The toy takes about 40 minutes on two cores; `--quick`
takes some seconds. With a model's directory and its data, this trainer is compared with and without merging of
rollouts that begin alike.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.benchmark.case import MODELS, BenchCase, BenchModel
from ebft_mega.apps.benchmark.suite import CASES, QUICK_CASES, run_suite
from ebft_mega.apps.benchmark.tables import SIDE_NAMES, report
from ebft_mega.block_plan import BlockPlan
from ebft_mega.io.arguments import ToolParser, output_file, path_argument, real_number, whole_number
from ebft_mega.io.command import run_command
from ebft_mega.registry.kinds import FEATURE_MAPS

# Of a model with its weights: what the baseline takes is known of the toy.
SIDES_OF_DIRECTORIES = ("ours_unmerged", "ours")


def parse_arguments() -> tuple[argparse.Namespace, tuple[BenchCase, ...]]:
    """Read the command line, and the cases that it asks for."""
    parser = ToolParser(description=__doc__.splitlines()[0], epilog=f"cases: {', '.join(case.name for case in CASES)}")
    parser.add_argument(
        "--output", type=output_file, required=True, metavar="FILE.json", help="the bench file to write"
    )
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw cost against L, n and stride")
    parser.add_argument("--markdown", type=output_file, metavar="FILE.md", help="write the tables that are printed")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument(
        "--model",
        type=_model,
        default="toy",
        metavar="SIZE|DIRECTORY",
        help=f"its size ({', '.join(MODELS)}; default: toy; from 1.5b on for a GPU), or a Hugging Face directory",
    )
    parser.add_argument("--data", type=path_argument, help="dataset directory whose rows a model directory is run on")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="default: float32 for the toy, 0.2b and a model directory, else bfloat16",
    )
    parser.add_argument(
        "--attention",
        choices=("auto", "two_part", "flex", "dense"),
        default="auto",
        help="train.attention of this trainer's sides",
    )
    parser.add_argument("--quick", action="store_true", help="one short row, one run: checks that everything works")
    _add_geometry(parser)
    options = parser.parse_args()
    if isinstance(options.model, Path) != (options.data is not None):
        parser.error("a model directory goes with --data, and --data with a model directory")
    return options, _cases(parser, options)


def _add_geometry(parser: argparse.ArgumentParser) -> None:
    """Options of cases of one's own, under the names of the configuration's keys."""
    geometry = parser.add_argument_group("a case of its own for each n of --samples; without these those of --cases")
    for name, what in (
        ("sequence-length", "tokens in a row"),
        ("stride", "tokens from one anchor to the next"),
        ("context-length", "tokens before the first anchor"),
        ("generate-length", "G, tokens of each rollout"),
        ("rows", "rows of a step, which are one micro-batch"),
        ("runs", "steps that are timed"),
    ):
        geometry.add_argument(f"--{name}", type=whole_number(), metavar="N", help=what)
    geometry.add_argument("--samples", type=whole_number(), nargs="+", metavar="N", help="n, rollouts of each anchor")
    geometry.add_argument("--temperature", type=real_number(above=True), metavar="T", help="sampling temperature")
    geometry.add_argument("--embed-method", choices=FEATURE_MAPS.names(), help="how token features become one vector")
    geometry.add_argument("--ce-coef", type=real_number(), metavar="X", help="weight of the cross-entropy on the row")
    geometry.add_argument("--sides", nargs="+", choices=list(SIDE_NAMES), help="what is compared")


def _model(text: str) -> str | Path:
    return text if text in MODELS else path_argument(text)


def _cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[BenchCase, ...]:
    """The cases that are asked for."""
    geometry = ("sequence_length", "stride", "context_length", "generate_length", "rows", "runs", "temperature")
    names = (*geometry, "embed_method", "ce_coef", "sides")
    own = {name: value for name in names if (value := getattr(options, name)) is not None}
    of_directory = isinstance(options.model, Path)
    if not (own or options.samples or of_directory):
        if options.cases:
            return tuple(case for case in CASES if case.name in options.cases)
        return QUICK_CASES if options.quick else CASES
    if options.cases or options.quick:
        parser.error("--cases and --quick go without a model directory and a geometry of its own")
    own.setdefault("sequence_length", 256)
    if of_directory:
        own.setdefault("sides", SIDES_OF_DIRECTORIES)
    own["sides"] = tuple(own.get("sides", BenchCase("", 0).sides))
    cases = tuple(BenchCase(f"n{samples}", samples=samples, **own) for samples in options.samples or [4])
    try:
        for case in cases:
            BlockPlan(case.sequence_length, case.stride, case.context_length, case.generate_length, case.samples)
    except ValueError as error:
        parser.error(str(error))
    return cases


def main() -> int:
    """Run the benchmark and write its file."""
    options, cases = parse_arguments()
    if isinstance(options.model, Path):
        from ebft_mega.apps.benchmark.benchmark_inputs import check_directory

        check_directory(options.model, options.data, cases)
        chosen = BenchModel.of_directory(options.model, options.data, options.dtype or "float32")
    else:
        chosen = MODELS[options.model]
    model = dataclasses.replace(chosen, attention=options.attention, dtype=options.dtype or chosen.dtype)
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
