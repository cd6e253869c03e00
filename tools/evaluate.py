"""Evaluate models on held-out rows: cross-entropy, calibration, alignment, cosine, feature matching, duplicates.

Several models see the same rows with the same noise, and a page compares them. Under torchrun or deepspeed the
processes share the rows, and a model as parallel.* of --config says.

With --distinct-shares nothing is evaluated: it counts how many rows of rollouts are left to compute when rollouts that
begin alike are merged, at several n, G and temperatures.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.evaluation_request import (
    MAP_KEYS,
    EvaluationGrid,
    Findings,
    MapChoice,
    check_lengths,
    read_maps,
    read_models,
    read_numbers,
)
from ebft_mega.apps.feature_choice import choose_feature_network
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.input_keys import DataConfig, ModelConfig
from ebft_mega.config.load import load_config
from ebft_mega.config.schema import EbftConfig, RunConfig, TrainConfig
from ebft_mega.cost.cost_table import aligned
from ebft_mega.data.store.model_copies import with_local_models
from ebft_mega.errors import InputProblems, SurroundingsError
from ebft_mega.evaluation.conditions import Condition
from ebft_mega.io.arguments import ToolParser, output_directory, path_argument, whole_number
from ebft_mega.io.command import add_overrides_option, add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line
from ebft_mega.runtime.launch_environment import enter_launch

LONGEST_DEFAULT_ROW = 1024


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        required=True,
        metavar="[NAME=]PATH",
        help="Hugging Face directory or checkpoint folder; several need names",
    )
    parser.add_argument("--data", type=path_argument, required=True, help="held-out dataset directory")
    parser.add_argument(
        "--output",
        type=output_directory,
        required=True,
        help="directory for evaluation.json and plots; for a model with a name they lie in OUTPUT/NAME",
    )
    parser.add_argument("--config", type=path_argument, help="run configuration to take ebft.*, seed and lengths from")
    add_permissions_option(parser)
    add_overrides_option(parser, "override keys of --config")
    parser.add_argument(
        "--feature-model",
        type=path_argument,
        help="frozen feature network (default: that of the run: ebft.feature_model, else model.init_from of --config; "
        "without them --model)",
    )
    parser.add_argument("--rows", type=whole_number(), help="held-out rows (default: evaluation.rows, 64)")
    parser.add_argument("--skip-rows", type=whole_number(0), default=0, help="rows at the start that are left out")
    parser.add_argument(
        "--temperatures", nargs="+", metavar="T", help="of the sampling, beside the configuration's; calibration, too"
    )
    parser.add_argument(
        "--completion-lengths",
        nargs="+",
        metavar="G",
        help="tokens of completions, beside the configuration's; anchors are those of the longest",
    )
    parser.add_argument(
        "--feature-map",
        dest="feature_maps",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help=f"another feature map to look at completions with, by any of {', '.join(MAP_KEYS)}; may be given again",
    )
    parser.add_argument("--samples", nargs="+", metavar="N", help="n, rollouts of an anchor (default: configuration's)")
    parser.add_argument(
        "--distinct-shares", action="store_true", help="print the shares of rows of rollouts that are distinct instead"
    )
    lists = parser.add_argument_group("with --distinct-shares also several of --samples, and")
    lists.add_argument("--lengths", nargs="+", metavar="G", help="tokens of a rollout (default: configuration's)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by launchers
    return parser.parse_args()


@dataclass(frozen=True)
class Asked:
    """What a command line asks for, as far as it can be told without a configuration."""

    models: dict[str, Path]
    samples: tuple[int, ...]
    temperatures: tuple[float, ...]
    lengths: tuple[int, ...]  # of completions, or with --distinct-shares of rollouts


def asked(arguments: argparse.Namespace, findings: Findings) -> Asked:
    """Read what argparse has left as texts, and refuse what does not go together."""
    if arguments.overrides and arguments.config is None:
        findings.refuse("--set", " ".join(arguments.overrides), "keys of --config, which is not given")
    counts_shares = arguments.distinct_shares
    if counts_shares:
        wrong = {"--completion-lengths": arguments.completion_lengths, "--feature-map": arguments.feature_maps}
        for name, value in wrong.items():
            if value:
                findings.refuse(name, "this option with --distinct-shares", "it without, or --lengths")
        if len(arguments.models) > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            findings.refuse("--distinct-shares", "several models or processes", "one of each")
    elif arguments.lengths is not None:
        findings.refuse("--lengths", "this option", "it with --distinct-shares; --completion-lengths without")
    if not counts_shares and len(arguments.samples or ()) > 1:
        expected = "one number; several go with --distinct-shares"
        findings.refuse("--samples", " ".join(arguments.samples), expected)
    option = "--lengths" if counts_shares else "--completion-lengths"
    lengths = arguments.lengths if counts_shares else arguments.completion_lengths
    return Asked(
        models=read_models(arguments.models, findings),
        samples=read_numbers("--samples", arguments.samples, int, findings),
        temperatures=read_numbers("--temperatures", arguments.temperatures, float, findings),
        lengths=read_numbers(option, lengths, int, findings),
    )


def settings(arguments: argparse.Namespace, models: Collection[Path]) -> RunConfig:
    """The configuration to evaluate under: the file's, or defaults, with rows as long as models read (or 1024)."""
    if arguments.config is not None:
        config = load_config(arguments.config, arguments.overrides)
        return config if arguments.feature_model else with_local_models(config)
    first, *_ = models
    directories = dict.fromkeys((*models, arguments.feature_model or first))
    known = [Architecture.from_directory(directory) for directory in directories]
    limits = [limit for model in known for limit in (model.max_position_embeddings, model.sliding_window) if limit]
    longest = min(LONGEST_DEFAULT_ROW, *limits)
    defaults = EbftConfig()
    # Whole blocks: (P - G - c) must be divisible by the stride.
    beyond_first_block = longest - defaults.generate_max_len - defaults.context_length
    sequence_length = longest - beyond_first_block % defaults.stride
    return RunConfig(
        output_dir=arguments.output,
        model=ModelConfig(init_from=first),
        data=DataConfig(shards=arguments.data, sequence_length=sequence_length),
        train=TrainConfig(max_steps=1, dtype="float32"),
    )


def figure_lines(content: Mapping[str, Any]) -> list[str]:
    """The means of an evaluation over its rows, a line each; the file holds every row's figures, too."""
    means = {key: value for key, value in content.items() if key.startswith("eval/")}
    width = max(map(len, means), default=0)
    texts = {key: "null" if value is None else f"{value:.6g}" for key, value in means.items()}
    return [f"{key:<{width}}  {text}" for key, text in sorted(texts.items())]


def condition_lines(content: Mapping[str, Any]) -> list[str]:
    """A table of the conditions and one of the calibration, where there are several."""
    keys = ("eval/feature_matching_loss", "eval/raw_cosine", "eval/alignment", "eval/duplicate_share")
    found = content.get("conditions", [])
    lines: list[str] = []
    if len(found) > 1:
        rows: list[tuple[str, ...]] = [("condition", *keys)]
        for each in found:
            condition = Condition(each["temperature"], each["completion_length"], each["features"])
            rows.append((condition.label, *(_short(each["means"].get(key)) for key in keys)))
        lines += aligned(rows)
    of_tokens = ("eval/brier", "eval/calibration_error")
    found = content.get("calibration", [])
    lines_of_tokens = [("next token", *of_tokens)]
    for each in found:
        brier, error = (_short(each["means"].get(key)) for key in of_tokens)
        lines_of_tokens.append((f"T={each['temperature']:g}", brier, error))
    return lines + aligned(lines_of_tokens) * bool(found)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def main() -> None:
    """Evaluate, draw histograms, and print the figures and the paths of the files, on the first rank."""
    arguments = parse_arguments()
    enter_launch(os.environ, starts=True, meets=True)
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        evaluate(arguments, speaks)
    except InputProblems as error:
        # All ranks find the same bad input.
        if speaks or isinstance(error, SurroundingsError):
            raise
        sys.exit(error.exit_code)


def evaluate(arguments: argparse.Namespace, speaks: bool) -> None:
    """Do what the command line asks for.

    Args:
        speaks: whether this process prints.
    """
    findings = Findings()
    wanted = asked(arguments, findings)
    models = list(wanted.models.values())
    config = findings.attempt(lambda: settings(arguments, models)) if models else None
    maps: tuple[MapChoice, ...] = ()
    if config is not None:
        maps = read_maps(arguments.feature_maps, config, findings)
        check_lengths(config, () if arguments.distinct_shares else wanted.lengths, findings)
    findings.require_none()
    assert config is not None, "its problems have been raised"

    from ebft_mega.apps.evaluate_model import evaluate_models
    from ebft_mega.apps.evaluation_inputs import EvaluationRequest
    from ebft_mega.apps.report.arm_comparison import write_comparison
    from ebft_mega.apps.report.evaluation_plot import plot_evaluation
    from ebft_mega.apps.report.run_records import read_json

    of_run = None if arguments.config is None else config
    features = choose_feature_network(arguments.feature_model, of_run, str(arguments.config), models[0])
    for line in (features.words, *[f"note: {features.note}"] * bool(features.note)) if speaks else ():
        print_line(line, sys.stdout)
    requests = {
        name: EvaluationRequest(
            model=model,
            feature_model=features.directory,
            feature_key=features.key,
            data=arguments.data,
            rows=arguments.rows or config.evaluation.rows,
            skip_rows=arguments.skip_rows,
        )
        for name, model in wanted.models.items()
    }
    if arguments.distinct_shares:
        from ebft_mega.apps.distinct_rows import Choices, measure_distinct_rows

        (request,) = requests.values()
        choices = Choices.of(config, wanted.samples, wanted.lengths, wanted.temperatures)
        print_line(str(measure_distinct_rows(request, choices, config, arguments.output)), sys.stdout)
        return
    samples = wanted.samples[0] if wanted.samples else None
    grid = EvaluationGrid.of(config, wanted.temperatures, wanted.lengths, samples, maps)
    paths = evaluate_models(requests, grid, arguments.output)
    if paths is None:
        return
    for name, path in paths.items():
        content = read_json(path)
        for line in (*[f"{name}:"] * bool(name), *figure_lines(content), *condition_lines(content)):
            print_line(line, sys.stdout)
        for line in (str(path), str(plot_evaluation(path))):
            print_line(line, sys.stdout)
    if len(paths) > 1:
        print_line(f"Report: {write_comparison(paths, arguments.output)}", sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
