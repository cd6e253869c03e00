"""Read and check a configuration, then print the plan (`--dry-run`) or train: the main job."""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installed package

from ebft_mega.io import process_signals  # noqa: E402

if __name__ == "__main__":
    process_signals.listen(exit_code=75)  # errors.EXIT_STOPPED, before the other imports take their time

import argparse  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

from ebft_mega.config.load import load_config  # noqa: E402
from ebft_mega.config.schema import RunConfig  # noqa: E402
from ebft_mega.cost.rollout_nodes import DistinctShares  # noqa: E402
from ebft_mega.data.store.model_copies import with_local_models  # noqa: E402
from ebft_mega.errors import (  # noqa: E402
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EbftError,
    EntryError,
    InputProblems,
    PluginError,
    SurroundingsError,
)
from ebft_mega.io.arguments import PlainParser, output_directory, path_argument, real_number, whole_number  # noqa: E402
from ebft_mega.io.command import add_overrides_option  # noqa: E402
from ebft_mega.io.expanded_paths import REPOSITORY  # noqa: E402
from ebft_mega.io.output_directory import limit_permissions  # noqa: E402
from ebft_mega.io.parse_boundary import shortage  # noqa: E402
from ebft_mega.io.process_signals import StopNow  # noqa: E402
from ebft_mega.io.standard_streams import print_line, protect_standard_streams  # noqa: E402
from ebft_mega.io.text_encoding import require_utf8  # noqa: E402
from ebft_mega.lifecycle.setting_aside import Fresh, planned_standing  # noqa: E402
from ebft_mega.lifecycle.standing import Action, conclude_early, early_standing  # noqa: E402
from ebft_mega.metrics.announcer import Announcer  # noqa: E402
from ebft_mega.planning.dry_run import GIGABYTE, describe_run  # noqa: E402
from ebft_mega.planning.run_plan import RunPlan, check_run  # noqa: E402
from ebft_mega.planning.short_plan import TraceRequest, short_plan  # noqa: E402
from ebft_mega.registry.registry_listing import listed_entries  # noqa: E402
from ebft_mega.runtime.launch_environment import MAX_PROCESSES, enter_launch, speaks_for_machine  # noqa: E402
from ebft_mega.runtime.repeatability import require_repeatable_workspace  # noqa: E402
from ebft_mega.runtime.run_files import RESOLVED_CONFIG_NAME  # noqa: E402
from ebft_mega.runtime.stop_requests import Signals  # noqa: E402

MAX_GPU_MEMORY = 1e6  # in 1e9 bytes, as the option


class RunParser(PlainParser):
    """The parser of a run, whose help also lists what a configuration can name."""

    def format_help(self) -> str:
        """The options, and below them the entries of all kinds."""
        return f"{super().format_help()}\n{listed_entries()}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line; an unknown option ends the program with exit code 2."""
    parser = RunParser(description=__doc__, allow_abbrev=False)
    option = parser.add_argument
    option("--config", type=path_argument, required=True, help="YAML file; docs/configuration.md lists its keys")
    add_overrides_option(parser, "set a key, such as train.lr=1e-5; may be given again")
    option("--dry-run", action="store_true", help="print the plan and the memory table, and stop")
    option(
        "--world-size",
        type=whole_number(1, MAX_PROCESSES),
        metavar="N",
        help="number of processes that --dry-run plans for",
    )
    option(
        "--without-data",
        action="store_true",
        help="with --dry-run: list datasets, tokenizers and weights that are not there, and plan without them",
    )
    option(
        "--gpu-memory",
        type=real_number(0, MAX_GPU_MEMORY, above=True),
        metavar="GB",
        help="with --dry-run: memory of an accelerator in 1e9 bytes, for which `auto` is resolved",
    )
    option(
        "--distinct-shares",
        type=real_number(0, 1),
        nargs="+",
        metavar="SHARE",
        help="with --dry-run: shares of distinct rows of rollouts in features, the policy and its head (as "
        "`tools/evaluate.py --distinct-shares` prints them, or one for all), for which the work of a step is counted",
    )
    add_trace_options(parser)
    option("--fresh", action="store_true", help="set what is in output_dir aside (in previous/) and begin anew")
    option("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by launchers
    arguments = parser.parse_args()
    of_plans = {
        "--world-size": arguments.world_size is not None,
        "--without-data": arguments.without_data,
        "--gpu-memory": arguments.gpu_memory is not None,
        "--distinct-shares": arguments.distinct_shares is not None,
    }
    for name, is_given in of_plans.items():
        if is_given and not arguments.dry_run:
            parser.error(f"{name} goes with --dry-run")
    if len(arguments.distinct_shares or []) > 3:
        parser.error(f"--distinct-shares: found {len(arguments.distinct_shares)} numbers; expected at most 3")
    of_traces = {"--trace-warmup": arguments.trace_warmup, "--trace-noise": arguments.trace_noise}
    for name, value in of_traces.items():
        if value is not None and arguments.trace_step is None:
            parser.error(f"{name} goes with --trace-step")
    if arguments.fresh and arguments.trace_step is not None:
        parser.error("--fresh goes with a run; --trace-step neither reads nor writes its output_dir")
    return arguments


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a trace."""
    option = parser.add_argument
    option("--trace-step", type=output_directory, metavar="DIR", help="run one optimizer step and write its trace")
    option(
        "--trace-warmup",
        type=whole_number(0),
        metavar="M",
        help="with --trace-step: let estimators that learn do so on the first M global batches, with unchanged "
        "weights, and trace the batch after them as step M (default 0)",
    )
    option(
        "--trace-noise",
        type=whole_number(0),
        metavar="N",
        help="with --trace-step: add N to the seed of the traced step's sampling noise, not to the warm-up's; rows "
        "stay (default 0)",
    )


def trace_request(arguments: argparse.Namespace) -> TraceRequest | None:
    """The trace that the command line asks for; None: a run."""
    if arguments.trace_step is None:
        return None
    return TraceRequest(arguments.trace_step, arguments.trace_warmup or 0, arguments.trace_noise or 0)


def is_first_rank() -> bool:
    """Whether this process speaks for the job; without a launcher it does."""
    return os.environ.get("RANK", "0") == "0"


def has_nothing_to_do(config: RunConfig, plan: RunPlan, announcer: Announcer) -> bool:
    """Whether all ranks see that the run is done.

    Raises:
        ConfigError: all ranks see that the start is refused.
    """
    with announcer.phase(f"looking at what is in {config.output_dir}"):
        standing = early_standing(config, plan)
    return standing is not None and standing.action is Action.NOTHING


def print_plan(
    config: RunConfig, plan: RunPlan, fresh: Fresh, gpu_memory: float | None, shares: DistinctShares | None
) -> None:
    """Print the plan and what a start would do, on the first rank.

    Args:
        gpu_memory: of an accelerator, in 1e9 bytes; None: not known.
        shares: of distinct rows of rollouts; None: not known.
    Raises:
        ConfigError: a start would be refused.
    """
    if is_first_rank():
        memory_bytes = None if gpu_memory is None else round(gpu_memory * GIGABYTE)
        print(describe_run(config, plan, memory_bytes, shares), flush=True)
    standing = planned_standing(config, plan, fresh)
    if is_first_rank():
        for line in ("", *standing.notes, standing.words):
            print_line(line, sys.stdout)


def write_report(output_dir: Path) -> Path:
    """Write the report page of a run; it draws plots, which neither a dry run nor a refusal should wait for."""
    from ebft_mega.apps.report.run_report import write_run_report

    return write_run_report(output_dir)


def main() -> int:
    """Run the job and return the exit code."""
    started = time.monotonic()
    try:
        protect_standard_streams()
        signals = Signals.listen()
        code = run(signals, started)
        signals.done()
        return code
    except StopNow as stop:
        if is_first_rank():
            print_line(f"stopped during the start ({stop}): nothing is lost, start it again")
        process_signals.leave(EXIT_STOPPED)


def run(signals: Signals, started: float) -> int:
    """Run the job and return the exit code.

    Args:
        signals: those that this process gets; until the first step they raise `StopNow`.
        started: by `time.monotonic()`.
    """
    arguments = parse_arguments()
    try:
        require_utf8()
        enter_launch(os.environ, starts=not arguments.dry_run, meets=arguments.world_size is None)
        config = load_config(arguments.config, arguments.overrides)
        limit_permissions(config.permissions)
        if config.deterministic:
            require_repeatable_workspace(os.environ)
        os.chdir(REPOSITORY)
        signals.remember_files(config.output_dir)
        # A new run writes its own resolved configuration.
        own_files = [config.data.cache, *[arguments.config] * (arguments.config.name != RESOLVED_CONFIG_NAME)]
        fresh = Fresh.of(arguments.fresh, own_files)
        world_size = arguments.world_size or int(os.environ.get("WORLD_SIZE", "1"))
        announcer = Announcer.of_start(speaks=is_first_rank() and not arguments.dry_run)
        if not arguments.without_data:
            with announcer.phase("copying models that lie in stores", is_announced=False):
                config = with_local_models(config, weights=not arguments.dry_run)
        with announcer.phase("checking the model's and the datasets' small files, and sizes"):
            plan = check_run(config, world_size, without_data=arguments.without_data)
        if arguments.dry_run:
            shares = DistinctShares(*arguments.distinct_shares) if arguments.distinct_shares else None
            print_plan(config, plan, fresh, arguments.gpu_memory, shares)
            return EXIT_DONE
        trace = trace_request(arguments)
        if trace is None and not fresh.acts and has_nothing_to_do(config, plan, announcer):
            return conclude_early(config, plan, write_report) if is_first_rank() else EXIT_DONE
        for line in short_plan(config, plan, trace):
            announcer.note(line)
        with announcer.phase("loading torch, megatron-core and DeepSpeed"):
            from ebft_mega.lifecycle.run import run_training

        return run_training(config, plan, trace, signals, started, write_report, fresh, announcer)
    except EbftError as error:
        signals.fail_undisturbed()
        speaks = (
            speaks_for_machine(os.environ) if isinstance(error, SurroundingsError | PluginError) else is_first_rank()
        )
        # All ranks find the same bad input, and are told of the same fault of an entry.
        if speaks or not isinstance(error, InputProblems | EntryError):
            print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if (words := shortage(error)) is None:
            raise
        signals.fail_undisturbed()
        print_line(words)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
