"""Evaluate a model on held-out rows: cross-entropy, alignment, cosine, feature matching, duplicates.

With --distinct-shares nothing is evaluated: it counts how many rows of rollouts are left to compute when rollouts that
begin alike are merged, at several n, G and temperatures.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ebft_mega.apps.feature_choice import choose_feature_network
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.input_keys import DataConfig, ModelConfig
from ebft_mega.config.load import load_config
from ebft_mega.config.schema import EbftConfig, RunConfig, TrainConfig
from ebft_mega.data.store.model_copies import with_local_models
from ebft_mega.io.arguments import ToolParser, output_directory, path_argument, real_number, whole_number
from ebft_mega.io.command import add_overrides_option, add_permissions_option, run_command
from ebft_mega.io.standard_streams import print_line

LONGEST_DEFAULT_ROW = 1024


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--model", type=path_argument, required=True, help="Hugging Face directory or checkpoint folder"
    )
    parser.add_argument("--data", type=path_argument, required=True, help="held-out dataset directory")
    parser.add_argument(
        "--output", type=output_directory, required=True, help="directory for evaluation.json and plots"
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
    parser.add_argument(
        "--distinct-shares", action="store_true", help="print the shares of rows of rollouts that are distinct instead"
    )
    lists = parser.add_argument_group("with --distinct-shares (default: n, G and temperature of the configuration)")
    lists.add_argument("--samples", type=whole_number(), nargs="+", metavar="N", help="n, rollouts of an anchor")
    lists.add_argument("--lengths", type=whole_number(), nargs="+", metavar="G", help="tokens of a rollout")
    lists.add_argument("--temperatures", type=real_number(above=True), nargs="+", metavar="T", help="of the sampling")
    parser.add_argument("--skip-rows", type=whole_number(0), default=0, help="rows at the start that are left out")
    arguments = parser.parse_args()
    if arguments.overrides and arguments.config is None:
        parser.error("--set overrides keys of --config, which is not given")
    for name in ("samples", "lengths", "temperatures"):
        if getattr(arguments, name) is not None and not arguments.distinct_shares:
            parser.error(f"--{name} goes with --distinct-shares")
    return arguments


def settings(arguments: argparse.Namespace) -> RunConfig:
    """The configuration to evaluate under: the file's, or defaults, with rows as long as the model reads (or 1024)."""
    if arguments.config is not None:
        config = load_config(arguments.config, arguments.overrides)
        return config if arguments.feature_model else with_local_models(config)
    directories = dict.fromkeys((arguments.model, arguments.feature_model or arguments.model))
    models = [Architecture.from_directory(directory) for directory in directories]
    limits = [limit for model in models for limit in (model.max_position_embeddings, model.sliding_window) if limit]
    longest = min(LONGEST_DEFAULT_ROW, *limits)
    defaults = EbftConfig()
    # Whole blocks: (P - G - c) must be divisible by the stride.
    beyond_first_block = longest - defaults.generate_max_len - defaults.context_length
    sequence_length = longest - beyond_first_block % defaults.stride
    return RunConfig(
        output_dir=arguments.output,
        model=ModelConfig(init_from=arguments.model),
        data=DataConfig(shards=arguments.data, sequence_length=sequence_length),
        train=TrainConfig(max_steps=1, dtype="float32"),
    )


def figure_lines(content: Mapping[str, Any]) -> list[str]:
    """The means of an evaluation over its rows, a line each; the file holds every row's figures, too."""
    means = {key: value for key, value in content.items() if key.startswith("eval/")}
    width = max(map(len, means), default=0)
    texts = {key: "null" if value is None else f"{value:.6g}" for key, value in means.items()}
    return [f"{key:<{width}}  {text}" for key, text in sorted(texts.items())]


def main() -> None:
    """Evaluate, draw histograms, and print the figures and the paths of the files."""
    arguments = parse_arguments()
    config = settings(arguments)

    from ebft_mega.apps.evaluate_model import EvaluationRequest, evaluate_directory
    from ebft_mega.apps.report.evaluation_plot import plot_evaluation
    from ebft_mega.apps.report.run_records import read_json

    of_run = None if arguments.config is None else config
    features = choose_feature_network(arguments.feature_model, of_run, str(arguments.config), arguments.model)
    for line in (features.words, *[f"note: {features.note}"] * bool(features.note)):
        print_line(line, sys.stdout)
    request = EvaluationRequest(
        model=arguments.model,
        feature_model=features.directory,
        feature_key=features.key,
        data=arguments.data,
        rows=arguments.rows or config.evaluation.rows,
        skip_rows=arguments.skip_rows,
    )
    if arguments.distinct_shares:
        from ebft_mega.apps.distinct_rows import Choices, measure_distinct_rows

        choices = Choices.of(config, arguments.samples, arguments.lengths, arguments.temperatures)
        print_line(str(measure_distinct_rows(request, choices, config, arguments.output)), sys.stdout)
        return
    path = evaluate_directory(request, config, arguments.output)
    for line in (*figure_lines(read_json(path)), str(path), str(plot_evaluation(path))):
        print_line(line, sys.stdout)


if __name__ == "__main__":
    sys.exit(run_command(main))
