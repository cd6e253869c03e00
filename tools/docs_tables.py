"""Write tables of the docs: keys from the schema, recipes from their plans, keys of axolotl from their table.

    python tools/docs_tables.py

What stands between two markers of the page is replaced; the rest of the page is written by hand. `make docs-tables`
runs this; tests fail when the page differs from the schema or from what a dry run prints.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the imports ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import inspect
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from ebft_mega.apps.experiment.spec import (
    Arm,
    Comparison,
    EvaluationSection,
    ExperimentSpec,
    FeatureMapChoice,
    Preparation,
    Splits,
    Tuning,
)
from ebft_mega.architecture.hf_config import Architecture
from ebft_mega.config.axolotl.axolotl_keys import AXOLOTL_KEYS, OTHER_KEYS
from ebft_mega.config.fields import allowed_text, default_text, registry_of, registry_of_names
from ebft_mega.config.input_keys import SourceConfig
from ebft_mega.config.load import load_config
from ebft_mega.config.schema import SECTIONS, Reuse, RunConfig, all_keys
from ebft_mega.extension.options import Section
from ebft_mega.io.arguments import PlainParser
from ebft_mega.io.command import run_command
from ebft_mega.planning.absent_inputs import MODEL_CONFIGS
from ebft_mega.planning.auto import REUSES, fit
from ebft_mega.planning.dry_run import GIB_BYTES
from ebft_mega.planning.memory import Choices, peak_bytes
from ebft_mega.planning.run_plan import RunPlan, plan_of_sizes
from ebft_mega.registry.kinds import ALL_REGISTRIES
from ebft_mega.registry.registry_listing import contract_file, own_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
CONFIGS = ROOT / "configs"
RECIPES = {"qwen2.5-7b-8gpu": 8, "llama-3.1-8b-8gpu": 8, "qwen2.5-7b-4nodes": 32, "qwen2.5-32b-16nodes": 128}  # ranks
GPU_BYTES = 80 * 10**9  # of an accelerator that the recipes are made for
START = "<!-- Written by `make docs-tables` from ebft_mega/config/schema.py; edit it there. -->"
END = "<!-- End of the written tables. -->"
RECIPES_START = "<!-- Written by `make docs-tables` from the plans of the recipes. -->"
RECIPES_END = "<!-- End of the written recipes. -->"
ENTRIES_START = "<!-- Written by `make docs-tables` from the registries (ebft_mega/registry/kinds.py). -->"
ENTRIES_END = "<!-- End of the written entries. -->"
AXOLOTL_PAGE = ROOT / "docs" / "axolotl.md"
AXOLOTL_START = "<!-- Written by `make docs-tables` from ebft_mega/config/axolotl/axolotl_keys.py; edit it there. -->"
AXOLOTL_END = "<!-- End of the written keys. -->"
EXPERIMENTS_PAGE = ROOT / "docs" / "experiments.md"
EXPERIMENTS_START = "<!-- Written by `make docs-tables` from ebft_mega/apps/experiment/spec.py; edit it there. -->"
EXPERIMENTS_END = "<!-- End of the written keys. -->"
HEAD = "| key | default | allowed | meaning |\n|---|---|---|---|\n"


def tables() -> str:
    """Describe every key, one table per section, in the order of the schema."""
    run = {name: field for name, field in RunConfig.model_fields.items() if name not in SECTIONS}
    parts = ["### Run\n\n" + _table("", run)]
    for name, section in SECTIONS.items():
        parts.append(f"### `{name}`\n\n{_section(f'{name}.', section)}")
        if name == "data":
            parts.append(_section("data.sources.NAME.", SourceConfig))
    return "\n".join(parts)


def _section(prefix: str, section: type[Section]) -> str:
    return f"{inspect.getdoc(section)}\n\n{_table(prefix, section.model_fields)}"


def _table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    return HEAD + "".join(f"{_row(prefix + name, field)}\n" for name, field in fields.items())


def _row(key: str, field: FieldInfo) -> str:
    default = default_text(field) or '""'
    if not field.is_required() and field.default is not None:
        default = f"`{default}`"
    return f"| `{key}` | {default} | {allowed_text(field)} | {field.description} |"


def entries() -> str:
    """The entries of the package, one table per kind, with the files of contracts and entries."""
    parts = []
    for registry in ALL_REGISTRIES:
        keys = [name for name, field in all_keys().items() if registry in _registries(field)]
        named = f"Named by {' and '.join(f'`{key}`' for key in keys)}. " if keys else ""
        lines = [
            f"### {registry.kind[0].upper()}{registry.kind[1:]}\n",
            f"{named}Contract: `{contract_file(registry)}`.\n",
            "| name | what it is | options | file |",
            "|---|---|---|---|",
        ]
        for name in registry.own_names():
            entry = registry.entry(name)
            options = "; ".join(_option(leaf, field) for leaf, field in entry.Options.model_fields.items())
            cells = (f"`{name}`", entry.summary(), options or "none", f"`{own_file(registry, name)}`")
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _registries(field: FieldInfo) -> tuple[object, ...]:
    return tuple(each for each in (registry_of(field), registry_of_names(field)) if each is not None)


def _option(name: str, field: FieldInfo) -> str:
    return f"`{name}` ({allowed_text(field)}; default `{default_text(field)}`): {field.description}"


def foreign_keys() -> str:
    """What becomes of every key of other trainers, in the order of the table."""
    lines = ["| key | of | what becomes of it | here | how, or why not |", "|---|---|---|---|---|"]
    for key in (*AXOLOTL_KEYS, *OTHER_KEYS):
        names = ", ".join(f"`{name}`" for name in key.names)
        ours = ", ".join(f"`{name}`" for name in key.ours)
        lines.append(f"| {names} | {key.program} | {key.fate.value} | {ours} | {key.words} |")
    return "\n".join(lines) + "\n"


def recipes() -> str:
    """What the recipes for published models need on their accelerators: what `--gpu-memory 80` prints of each."""
    names = ("recipe", "GPUs of 80 GB", "tensor x pipeline x data", "`auto` there", "peak, GiB")
    heads = (*names, f"with {', '.join(reversed(REUSES))}", "parameters")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, world_size in RECIPES.items():
        config = load_config(CONFIGS / f"{name}.yaml")
        assert config.model.init_from is not None, "the recipes start from published weights"
        model = config.model.init_from.name
        plan = plan_of_sizes(config, world_size, Architecture.from_directory(MODEL_CONFIGS / model))
        found, sizes = fit(config, plan, GPU_BYTES), plan.parallel
        network = "sharded" if found.choices.feature_network_is_sharded else "resident"
        peaks = [_gib(config, plan, reuse) for reuse in reversed(REUSES)]
        cells = [
            *(f"`{name}.yaml`", str(world_size)),
            f"{sizes.tensor_parallel} x {sizes.pipeline_parallel} x {sizes.data_parallel}",
            f"{found.choices.reuse_rollout}, {network}" + ", which does not fit" * (not found.fits),
            f"{found.peak_bytes / GIB_BYTES:.1f}",
            ", ".join(peaks),
            f"{plan.architecture.num_parameters:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gib(config: RunConfig, plan: RunPlan, reuse: Reuse) -> str:
    """Peak with a resident feature network."""
    return f"{peak_bytes(config, plan, Choices(reuse, feature_network_is_sharded=False)) / GIB_BYTES:.1f}"


def with_tables(page: str) -> str:
    """Replace what stands between the markers of a page.

    Raises:
        ValueError: a marker is missing, or there are several.
    """
    for start, end, text in (
        (START, END, tables()),
        (RECIPES_START, RECIPES_END, f"{recipes()}\n"),
        (ENTRIES_START, ENTRIES_END, entries()),
    ):
        before, after = page.split(start)
        _, after = after.split(end)
        page = f"{before}{start}\n\n{text}\n{end}{after}"
    return page


def with_foreign_keys(page: str) -> str:
    """Replace the table of the page about axolotl; the rest stays."""
    before, rest = page.split(f"{AXOLOTL_START}\n")
    _, after = rest.split(AXOLOTL_END)
    return f"{before}{AXOLOTL_START}\n\n{foreign_keys()}\n{AXOLOTL_END}{after}"


def experiment_keys() -> str:
    """The keys of an experiment's file, one table per section."""
    # The others have tables of their own.
    own = {name: field for name, field in ExperimentSpec.model_fields.items() if field.description}
    parts = [f"{inspect.getdoc(ExperimentSpec)}\n\n{_table('', own)}"]
    for prefix, section in (
        ("splits.", Splits),
        ("prepare.", Preparation),
        ("arms.NAME.", Arm),
        ("tuning.", Tuning),
        ("evaluation.", EvaluationSection),
        ("evaluation.feature_maps.NAME.", FeatureMapChoice),
        ("primary.", Comparison),
    ):
        parts.append(f"### `{prefix.removesuffix('.')}`\n\n{_section(prefix, section)}")
    return "\n".join(parts)


def with_experiment_keys(page: str) -> str:
    """Replace the tables of the page about experiments; the rest stays."""
    before, rest = page.split(f"{EXPERIMENTS_START}\n")
    _, after = rest.split(EXPERIMENTS_END)
    return f"{before}{EXPERIMENTS_START}\n\n{experiment_keys()}\n{EXPERIMENTS_END}{after}"


def main() -> int:
    """Command line."""
    parser = PlainParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    AXOLOTL_PAGE.write_text(with_foreign_keys(AXOLOTL_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    EXPERIMENTS_PAGE.write_text(with_experiment_keys(EXPERIMENTS_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
