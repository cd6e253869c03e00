"""Imports go one way, light modules stay light, and everything public says what it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ebft_mega"

# From the bottom up: a package may import from its own layer's earlier packages and from lower layers only.
# Packages of one layer do not know each other.
LAYERS = (
    ("errors",),
    ("types", "metrics", "rollout.plan", "model.architecture", "model.partition", "model.sizes", "model.weight_files"),
    ("cost", "data"),
    # What a dry run reads of a checkpoint.
    (
        *("checkpoint.manifest", "checkpoint.records", "checkpoint.folders", "checkpoint.retention"),
        *("checkpoint.run_state", "checkpoint.tensor_index", "checkpoint.model_folder"),
    ),
    ("attention", "config", "parallel"),
    ("cost.mfu", "cost.ours", "cost.naive", "model"),
    ("checkpoint",),
    ("objective", "reward"),
    ("rollout",),
    ("features",),
    ("conversion", "evaluation"),
    ("report",),
    ("experiment", "train"),
    ("benchmark",),
)
HEAVY = ("torch", "deepspeed", "megatron", "webdataset", "transformers", "sentencepiece", "matplotlib")
LIGHT_MODULES = (
    "ebft_mega.errors",
    "ebft_mega.block_plan",
    "ebft_mega.architecture.hf_config",
    "ebft_mega.architecture.partition",
    "ebft_mega.architecture.sizes",
    "ebft_mega.model.weights.weight_files",
    "ebft_mega.data.builder.dataset_build",
    "ebft_mega.data.store.dataset",
    "ebft_mega.data.store.inspection",
    "ebft_mega.data.store.opening",
    "ebft_mega.data.store.verify",
    "ebft_mega.data.store.remote",
    "ebft_mega.data.store.https",
    "ebft_mega.data.store.shard_cache",
    "ebft_mega.data.builder.on_demand",
    "ebft_mega.data.rows.stream",
    "ebft_mega.metrics.sinks",
    "ebft_mega.apps.report.arm_comparison",
    "ebft_mega.apps.report.run_report",
    "ebft_mega.io.records",
    "ebft_mega.checkpoint.manifest",
    "ebft_mega.checkpoint.commit",
    "ebft_mega.checkpoint.retention",
    "ebft_mega.checkpoint.run_state",
    "ebft_mega.checkpoint.tensor_index",
    "ebft_mega.checkpoint.resume_rules",
    "ebft_mega.evaluation.bootstrap",
    "ebft_mega.apps.study.arms",
    "ebft_mega.runtime.run_lock",
    "ebft_mega.runtime.stop_requests",
    "ebft_mega.cost.mfu",
    "ebft_mega.cost.naive_cost",
)


def modules():
    """Dotted names within the package, by file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[path] = name
    return found


def layer_of(module):
    """Number of the layer with the longest name that the module lies in."""
    matches = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    assert matches, f"{module} is in no layer: add its package to LAYERS"
    return max(matches)[1]


def imported_modules(tree):
    """Dotted names within the package that a module imports anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if (ROOT / (name.replace(".", "/") + ".py")).exists() else node.module for name in submodules]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["<relative import>"]
        else:
            continue
        for name in names:
            assert name != "<relative import>", "imports are absolute"
            if name.startswith("ebft_mega."):
                yield node.lineno, name.removeprefix("ebft_mega.")


def test_imports_point_downwards():
    wrong = []
    for path, module in modules().items():
        own = layer_of(module)
        for line, imported in imported_modules(ast.parse(path.read_text())):
            package, other = module.split(".")[0], imported.split(".")[0]
            if layer_of(imported) > own or (layer_of(imported) == own and package != other):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {imported}")
    assert wrong == []


def loaded_by(statement):
    """Heavy packages that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return answer.stdout.split()


def light_modules():
    config = [f"ebft_mega.{name}" for name in modules().values() if name.startswith("config.")]
    return [*LIGHT_MODULES, *config]


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
