"""Nothing in the sources can execute what a file or a rank holds: no pickles, no code from texts, no shells."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("ebft_mega", "launcher", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
# Modules whose only use is to load objects or to run code.
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jinja2.ext", "code"}
# Last parts of names of functions that unpickle, execute or open a shell.
CALLS = {
    *("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list"),
    *("send_object_list", "recv_object_list"),
    *("eval", "exec", "__import__"),
    *("system", "popen", "getoutput", "getstatusoutput"),
    *("unsafe_load", "full_load", "UnsafeLoader", "FullLoader"),
    *("read_pickle", "to_pickle", "decode_pickle"),
    "extractall",
    *("from_string", "apply_chat_template", "FileSystemLoader"),  # templates from elsewhere
}
# Names of functions that import what a text names, and where they may be called.
IMPORTS = {"import_module", "exec_module", "load_module", "spec_from_file_location", "run_path", "run_module"}
IMPORTERS = {
    "ebft_mega/registry/registry.py": {"import_module"},  # the package's own entries, each called as its file
    "ebft_mega/registry/plugins.py": {"import_module", "exec_module", "spec_from_file_location"},
}
# Called through their module; the same names mean other things elsewhere.
CALLS_OF_MODULES = {"torch": {"load", "save"}, "yaml": {"load", "load_all"}, "np": {"fromregex"}}
ARGUMENTS = {"allow_pickle": True, "shell": True, "trust_remote_code": True, "weights_only": False}


def findings(source):
    """Line and name of everything in a module's source that could execute what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            yield from ((node.lineno, name) for name in names if name in MODULES)
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in CALLS)
        elif isinstance(node, ast.Name) and node.id in CALLS:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in CALLS - {"eval"} or node.attr in CALLS_OF_MODULES.get(owner, ()):  # `model.eval()`
                yield node.lineno, f"{owner}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if value is not (not ARGUMENTS[node.arg]):
                yield node.value.lineno, f"{node.arg}, which is not {not ARGUMENTS[node.arg]}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
            if "allow_pickle" not in {argument.arg for argument in node.keywords}:
                yield node.lineno, "np.load without allow_pickle=False"


def test_sources_execute_nothing_that_they_read():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}" for path in SOURCES for line, name in findings(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "dist.all_gather_object(parts, own)",
        "from torch.distributed import broadcast_object_list",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=option)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "eval(text)",
        "yaml.load(text, Loader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "tarfile.open(path).extractall(target)",
        "tokenizer.apply_chat_template(messages)",
    ],
)
def test_the_check_can_fail(source):
    assert list(findings(source))


def imports_by_name(source):
    """Names of all functions that a module uses to import what a text names."""
    nodes = list(ast.walk(ast.parse(source)))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return used & IMPORTS


def test_only_plugins_and_entries_are_imported_by_their_names():
    found = {str(path.relative_to(ROOT)): imports_by_name(path.read_text()) for path in SOURCES}
    assert {place: names for place, names in found.items() if names} == IMPORTERS


@pytest.mark.parametrize("source", ["importlib.import_module(name)", "from runpy import run_path", "f = x.exec_module"])
def test_the_check_of_imports_by_name_can_fail(source):
    assert imports_by_name(source)


def imports_of(package, source):
    """Names that a module imports from a package, and the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == package)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_webdataset_itself_is_not_used():
    """Its own opening of names runs commands and follows variables; shards are written by Python's own tar module."""
    assert not {name for path in SOURCES for name in imports_of("webdataset", path.read_text())}


@pytest.mark.parametrize("source", ["model.eval()", "np.load(path, allow_pickle=False)", "json.load(file)"])
def test_the_check_lets_the_rest_pass(source):
    assert not list(findings(source))
