"""Imports go one way, rooms stay small, light modules stay light, and everything public says what it is."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from ebft_mega.registry.kinds import ALL_REGISTRIES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ebft_mega"

# From the ground up, in the order in which a step uses them; planning and what follows put them together. A room may
# import from itself and from earlier rooms of this list. Five files come first. Rooms within rooms have places of
# their own.
ROOMS = (
    *("shown_text", "errors", "forest", "types", "block_plan"),
    *("io", "data.text", "extension"),
    # The entries that a configuration names, each kind in a room within the room that uses it, then their tables.
    *(
        "data.text.formats",
        "data.transfer",
        "data.store.places",
        "features.maps",
        "reward.terms",
        "objective.estimators",
    ),
    *("train.schedules", "parallel.optimizers", "registry"),
    *("architecture", "config", "runtime", "metrics"),
    *("data.selection", "data.tokenizers", "data.store", "data.builder", "data.rows"),
    *("parallel", "attention", "model"),
    *("reward", "rollout", "features", "critic", "objective"),
    *("checkpoint", "cost", "planning", "evaluation", "train", "lifecycle", "apps"),
)
HEAVY = ("torch", "deepspeed", "megatron", "webdataset", "transformers", "sentencepiece", "matplotlib")
# Rooms that a dry run or a tool's --help goes through, and single modules of rooms that are heavy otherwise.
LIGHT_ROOMS = (
    *("io", "extension", "registry", "architecture", "config", "planning", "cost"),
    *("data.text.formats", "data.store.places", "features.maps", "reward.terms", "objective.estimators"),
    *("train.schedules", "parallel.optimizers"),
    *("data.text", "data.transfer", "data.selection", "data.tokenizers", "data.store", "data.builder"),
)
LIGHT_MODULES = (
    *("shown_text", "errors", "block_plan"),
    "runtime.repeatability",
    *("runtime.run_files", "runtime.run_lock", "runtime.stop_requests", "metrics.console", "metrics.sinks"),
    *("data.rows.order", "data.rows.packing", "data.rows.mixing", "data.rows.stream", "data.rows.stream_state"),
    "data.rows.row_ranges",
    "model.weights.weight_files",
    *("lifecycle.findings", "lifecycle.run_record", "lifecycle.setting_aside", "lifecycle.standing"),
    *("checkpoint.commit", "checkpoint.manifest", "checkpoint.model_folder", "checkpoint.resume_rules"),
    *("checkpoint.resume_candidates", "checkpoint.saved_run"),
    *("checkpoint.retention", "checkpoint.run_state", "checkpoint.tensor_index"),
    *("evaluation.bootstrap", "evaluation.conditions", "evaluation.crossed_interval"),
    *("evaluation.multiple_comparisons", "evaluation.student_t"),
    *("apps.noise.estimator_specs", "apps.noise.noise_request"),
    "apps.evaluation_request",
    *("apps.report.arm_comparison", "apps.report.run_report"),
    *("apps.experiment.arm_values", "apps.experiment.choosing", "apps.report.condition_evaluations"),
    *("apps.experiment.experiment_findings", "apps.experiment.experiment_report", "apps.report.experiment_plots"),
)
MAX_FILES = 15
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_IMPORTS = 40
# Longer than MAX_FILE_LINES, each with its reason.
LONG_FILES: dict[str, str] = {}


def modules():
    """Dotted names within the package, by file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[path] = name
    return found


def entries_below(folder):
    """What the modules of a folder begin with, if it is that of a registry; of any other folder nothing begins so."""
    is_of_registry = folder in {registry.folder for registry in ALL_REGISTRIES}
    return f"{folder.removeprefix('ebft_mega.')}." if is_of_registry else "no registry"


@cache
def all_modules():
    return frozenset(modules().values())


def place_of(module):
    """Number of the room that a module lies in, by the room's place in ROOMS; -1 for a package of rooms."""
    inside = f"{module}."
    matches = [(len(name), place) for place, name in enumerate(ROOMS) if inside.startswith(f"{name}.")]
    if not matches:
        assert any(name.startswith(module + ".") for name in ROOMS), f"{module} is in no room: add its folder to ROOMS"
        return -1
    return max(matches)[1]


def imported_modules(tree):
    """Dotted names within the package that a module imports anywhere, also inside functions and as strings.

    A table's targets count: the folder of a registry stands for every module in it, which is imported by its name.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in submodules]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_module(node.value.split(":")[0]):
            names = [node.value.split(":")[0]]
            names += [f"ebft_mega.{name}" for name in all_modules() if name.startswith(entries_below(names[0]))]
        else:
            continue
        for name in names:
            if name.startswith("ebft_mega."):
                yield node.lineno, name.removeprefix("ebft_mega.")


def is_module(dotted):
    """Whether a text is the name of a module or a room of this package."""
    if not re.fullmatch(r"ebft_mega(\.[a-z_0-9]+)+", dotted):
        return False
    path = ROOT / dotted.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports_of_later_rooms(module, source):
    """Line and name of every import of a module from a room that comes later in ROOMS than its own."""
    own = place_of(module)
    return [(line, name) for line, name in imported_modules(ast.parse(source)) if place_of(name) > own >= 0]


def test_imports_go_to_earlier_rooms():
    wrong = []
    for path, module in modules().items():
        found = imports_of_later_rooms(module, path.read_text())
        wrong += [f"{path.relative_to(ROOT)}:{line} imports {name}" for line, name in found]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        "from ebft_mega.train.step import train_step",
        "def later():\n    import ebft_mega.train.step",
        "COMMAND = [python, '-m', 'ebft_mega.train.step']",
        "PLACE = 'ebft_mega.train.step:train_step'",
        "from ebft_mega import train",
    ],
)
def test_the_check_for_later_rooms_can_fail(source):
    assert [name for _, name in imports_of_later_rooms("rollout.noise", source)] in (["train.step"], ["train"])
    assert imports_of_later_rooms("train.loop", source) == []


def test_no_import_goes_in_a_circle():
    assert circles({module: path.read_text() for path, module in modules().items()}) == set()


def circles(sources):
    """The modules that import each other in a circle, or lead to one, by the sources of all modules."""
    graph = {
        module: sources.keys() & {name for _, name in imported_modules(ast.parse(source))} - {module}
        for module, source in sources.items()
    }
    while leaves := [module for module, above in graph.items() if not above & graph.keys()]:
        for module in leaves:
            del graph[module]
    return set(graph)


KINDS = "registry.kinds"
TABLE = "TERMS = Registry('reward term', RewardTerm, 'ebft_mega.reward.terms')"


def test_the_folder_of_a_registry_counts_as_an_import_of_its_entries():
    entries = {name for name in all_modules() if name.startswith("reward.terms.")}
    assert len(entries) >= 2 and entries <= {name for _, name in imported_modules(ast.parse(TABLE))}
    assert imports_of_later_rooms("extension.entry", TABLE) and not imports_of_later_rooms(KINDS, TABLE)
    entry = "reward.terms.alignment"
    lazy = "def values(self):\n    from ebft_mega.registry import kinds"
    assert circles({KINDS: TABLE, entry: lazy}) == {KINDS, entry}
    assert circles({KINDS: TABLE, entry: ""}) == set()


def test_every_registry_names_its_folder_where_the_checks_see_it():
    source = (PACKAGE / "registry" / "kinds.py").read_text()
    named = {name for _, name in imported_modules(ast.parse(source))}
    for registry in ALL_REGISTRIES:
        folder = registry.folder.removeprefix("ebft_mega.")
        assert {f"{folder}.{name}" for name in registry.own_names()} | {folder} <= named
        assert folder in ROOMS and folder in LIGHT_ROOMS


def test_rooms_are_small():
    counts = Counter(path.parent for path in modules() if path.name != "__init__.py")
    assert {str(room.relative_to(ROOT)): count for room, count in counts.items() if count > MAX_FILES} == {}


def test_one_name_is_one_thing():
    """A file's name says what it does: no two of the package, the tools and the launcher have the same one."""
    files = [*modules(), *(ROOT / "tools").glob("*.py"), *(ROOT / "launcher").glob("*.py")]
    counts = Counter(path.name for path in files if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_files_and_functions_are_short():
    too_long = []
    for path in [*modules(), *(ROOT / "tools").glob("*.py"), *(ROOT / "launcher").glob("*.py")]:
        name, source = str(path.relative_to(ROOT)), path.read_text()
        lines = source.count("\n")
        if (lines > MAX_FILE_LINES) != (name in LONG_FILES):
            too_long.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long.append(f"{name}: {node.name}, {length} lines")
    assert too_long == []


def test_no_file_imports_half_the_house():
    many = {}
    for path in modules():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        from_modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        if max(len(names), len(from_modules)) > MAX_IMPORTS:
            many[str(path.relative_to(ROOT))] = (len(names), len(from_modules))
    assert many == {}


def loaded_by(statement):
    """Heavy packages that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return answer.stdout.split()


def light_modules():
    rooms = [name for name in modules().values() if any(name.startswith(room + ".") for room in LIGHT_ROOMS)]
    return [f"ebft_mega.{name}" for name in (*rooms, *LIGHT_MODULES)]


def test_light_modules_import_nothing_heavy():
    assert loaded_by("import " + ", ".join(light_modules())) == []


def test_the_check_for_heavy_imports_can_fail():
    assert loaded_by("import webdataset")


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_tools_answer_help_without_heavy_imports(tool):
    statement = (
        "import runpy, sys\n"
        f"sys.argv = ['{tool}', '--help']\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):\n"
        f"    runpy.run_path('tools/{tool}', run_name='__main__')\n"
        "assert 'usage' in shown.getvalue()"
    )
    assert loaded_by(statement) == []


def public_definitions(tree):
    """Public classes and functions of a module, and public methods of public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name[0] != "_":
                    yield f"{node.name}.{inner.name}", inner


def test_everything_public_has_a_docstring():
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules()
        for name, node in public_definitions(ast.parse(path.read_text()))
        if not ast.get_docstring(node)
    ]
    assert missing == []


def test_every_module_says_what_it_is_for():
    missing = [str(path.relative_to(ROOT)) for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert missing == []
