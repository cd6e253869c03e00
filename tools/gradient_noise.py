"""Measure how noisy the policy gradient is: its variance within rows of text and between them, by estimator.

Every estimator sees the same rows, rollouts and random numbers; each gradient is one backward pass of the trainer on
one row. NAME is an entry of ebft.advantage_estimator, or optimal_token_baseline or prefix_values, which others propose;
KEY is n, G, T, pooling, a key of the section ebft, or an option of the estimator. The first estimator of those that
agree in G, temperature and features is the one that the others are compared with.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.noise.estimator_specs import OPTION, expanded_specs, read_specs, references
from ebft_mega.apps.noise.noise_request import WARMUP_BATCHES, NoiseRequest, check_request
from ebft_mega.io.arguments import ToolParser, output_directory, path_argument, real_number, whole_number
from ebft_mega.io.command import add_overrides_option, add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line

DEFAULT = ("rloo:alignment=inner_product", "token_critic:alignment=inner_product")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=path_argument, required=True, help="the policy: Hugging Face directory or checkpoint folder"
    )
    parser.add_argument("--data", type=path_argument, required=True, help="dataset directory")
    parser.add_argument(
        "--config", type=path_argument, required=True, help="run configuration; its initial model gives the features"
    )
    parser.add_argument(
        OPTION,
        nargs="+",
        default=DEFAULT,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"what is compared (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument("--rows", type=whole_number(2), default=32, help="measured rows (default %(default)s)")
    parser.add_argument(
        "--replicates", type=whole_number(2), default=4, help="samplings of each row (default %(default)s)"
    )
    parser.add_argument("--directions", type=whole_number(), default=64, help="of random signs (default %(default)s)")
    parser.add_argument(
        "--warmup-batches",
        type=whole_number(0),
        default=WARMUP_BATCHES,
        help="global batches before the measured rows, which critics are fitted on (default %(default)s)",
    )
    parser.add_argument("--by-token", action="store_true", help="measure what each token of the rollouts adds, too")
    lists = parser.add_argument_group("every estimator with each of these, unless it names its own")
    lists.add_argument("--samples", type=whole_number(), nargs="+", metavar="N", help="n, rollouts of an anchor")
    lists.add_argument("--lengths", type=whole_number(), nargs="+", metavar="G", help="tokens of a rollout")
    lists.add_argument("--temperatures", type=real_number(above=True), nargs="+", metavar="T", help="of the sampling")
    lists.add_argument("--poolings", nargs="+", metavar="MAP", help="ebft.embed_method")
    parser.add_argument(
        "--output", type=output_directory, required=True, help="directory of noise.json and projections.npz"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be measured")
    add_permissions_option(parser)
    add_overrides_option(parser, "override keys of --config")
    return parser.parse_args()


def requested(arguments: argparse.Namespace) -> NoiseRequest:
    """What a command line asks for."""
    choices = {
        "n": arguments.samples,
        "G": arguments.lengths,
        "T": arguments.temperatures,
        "pooling": arguments.poolings,
    }
    texts = expanded_specs(arguments.estimators, choices)
    return NoiseRequest(
        model=arguments.model,
        data=arguments.data,
        specs=read_specs(texts, arguments.config, arguments.overrides),
        rows=arguments.rows,
        replicates=arguments.replicates,
        directions=arguments.directions,
        warmup_batches=arguments.warmup_batches,
        by_token=arguments.by_token,
    )


def plan_lines(request: NoiseRequest) -> list[str]:
    """What will be measured."""
    specs = request.specs
    lines = [
        f"{spec.label}: compared with {specs[reference].label}"
        for spec, reference in zip(specs, references(specs), strict=True)
    ]
    passes = len(request.labels) * request.rows * request.replicates
    return [
        *lines,
        f"rows {request.first_row} to {request.first_row + request.rows - 1} of the run, {request.replicates} times, "
        f"in {request.directions} directions: {passes} backward passes",
    ]


def main() -> None:
    """Measure, print a table and the paths of the files."""
    arguments = parse_arguments()
    request = requested(arguments)
    plan = check_request(request)
    for line in (*(f"note: {note}" for note in plan.notes), *plan_lines(request)):
        print_line(line, sys.stdout)
    if arguments.dry_run:
        return

    from ebft_mega.apps.noise.noise_measurement import measure_noise
    from ebft_mega.apps.noise.noise_report import ADAM, EUCLIDEAN, noise_report, table_lines, write_report

    measured = measure_noise(request, plan)
    report = noise_report(request, plan, measured)
    for metric in (EUCLIDEAN, ADAM)[: 1 if measured.scaled is None else 2]:
        print_line(f"variance of a row's gradient, {metric} metric", sys.stdout)
        for line in table_lines(report, metric):
            print_line(line, sys.stdout)
    print_line(str(write_report(report, request, measured, arguments.output)), sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
