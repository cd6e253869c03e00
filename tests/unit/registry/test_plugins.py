"""Plugins: what is imported, what is refused with which words, and what the registries hold afterwards."""

import importlib.util
import os
import py_compile
import sys
import zipfile
from pathlib import Path

import pytest

from ebft_mega.data.store.format import MANIFEST_NAME
from ebft_mega.errors import ConfigError
from ebft_mega.registry.entry_checks import abstract_methods
from ebft_mega.registry.kinds import ALL_REGISTRIES, REWARD_TERMS, SCHEDULES
from ebft_mega.registry.plugin_sources import MARKERS
from ebft_mega.registry.plugins import use_plugins
from ebft_mega.runtime.run_files import RESOLVED_CONFIG_NAME

HEAD = """\
from ebft_mega.extension.options import Section, key
from ebft_mega.extension.reward_term import RewardTerm


"""
MINE = """\
class Mine(RewardTerm):
    \"\"\"Counts something.

    More words.
    \"\"\"

    name = "mine"

    def values(self, inputs):
        return inputs.gram
"""


@pytest.fixture(autouse=True)
def no_plugins_afterwards():
    yield
    use_plugins([], None, {})


@pytest.fixture
def plugin(tmp_path):
    """Write a plugin into the folder of the configuration."""

    def write(text, name="mine.py", head=HEAD):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(head + text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def problems(tmp_path):
    """The problems of plugins, as lines without the folder."""

    def lines(*names, forbidden=None):
        with pytest.raises(ConfigError) as caught:
            use_plugins(names, tmp_path, forbidden or {}, [f"c.yaml:{number + 3}" for number in range(len(names))])
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return lines


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder on Python's path; what is imported from it is forgotten."""
    folder = tmp_path / "installed"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_file_beside_the_configuration_adds_its_entries(plugin, tmp_path):
    path = plugin(MINE, "rewards/mine.py")
    (found,) = use_plugins(["rewards/mine.py"], tmp_path, {})
    (entry,) = found.entries
    assert (entry.kind, entry.name, entry.summary) == ("reward term", "mine", "Counts something.")
    assert entry.place == f"{path}:5" and found.file == path and found.resolved == str(path)
    assert not found.loads_torch and 0 < found.seconds < 10
    assert REWARD_TERMS.names()[-1] == "mine" and REWARD_TERMS.entry("mine")().summary() == entry.summary
    assert [registry.added for registry in ALL_REGISTRIES if registry is not REWARD_TERMS] == [{}] * 6


def test_every_configuration_starts_with_the_entries_of_the_package_alone(plugin, tmp_path):
    plugin(MINE)
    plugin(MINE.replace("mine", "other"), "other.py")
    use_plugins(["mine.py"], tmp_path, {})
    use_plugins(["other.py"], tmp_path, {})
    assert list(REWARD_TERMS.added) == ["other"]
    use_plugins([], tmp_path, {})
    assert REWARD_TERMS.names() == REWARD_TERMS.own_names()


def test_code_is_run_once_for_each_version_of_it(plugin, tmp_path, capsys):
    sums = []
    for text in (f"print('ran')\n{MINE}", f"print('ran')\n\n{MINE}", f"print('ran')\n{MINE}"):
        plugin(text)
        (found,) = use_plugins(["mine.py"], tmp_path, {})
        (again,) = use_plugins([found.resolved], tmp_path / "elsewhere", {})
        assert again.sha256 == found.sha256 and again.entries == found.entries
        sums.append((found.sha256, capsys.readouterr().out))
    assert [out for _, out in sums] == ["ran\n", "ran\n", ""] and sums[0][0] == sums[2][0] != sums[1][0]


def test_compiled_code_beside_the_file_is_neither_read_nor_written(plugin, tmp_path, monkeypatch):
    """Not even code that claims to be compiled from this very file, which Python would run in its place."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = plugin(MINE)
    use_plugins(["mine.py"], tmp_path, {})
    assert [each.name for each in tmp_path.iterdir()] == ["mine.py"]
    path = plugin(f"{MINE}\n", "other.py")
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    compiled = Path(importlib.util.cache_from_source(str(path)))
    py_compile.compile(str(tmp_path / "planted.py"), str(compiled), doraise=True)
    content, stat = bytearray(compiled.read_bytes()), path.stat()
    content[8:16] = int(stat.st_mtime).to_bytes(4, "little") + stat.st_size.to_bytes(4, "little")
    compiled.write_bytes(content)
    use_plugins(["other.py"], tmp_path, {})
    assert "mine" in REWARD_TERMS.added and not (tmp_path / "ran").exists()


def test_an_installed_module(installed, tmp_path):
    package = installed / "own_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(HEAD + MINE)
    (found,) = use_plugins(["own_rewards.mine"], tmp_path, {})
    assert (found.resolved, found.file) == ("own_rewards.mine", package / "mine.py")
    assert REWARD_TERMS.entry("mine").__module__ == "own_rewards.mine"


def test_a_dollar_sign_in_a_resolved_path_is_none_of_a_variable(plugin, tmp_path):
    plugin(MINE, "$mine.py")
    (found,) = use_plugins(["$$mine.py"], tmp_path, {})
    assert use_plugins([found.resolved], tmp_path / "elsewhere", {})[0].file == tmp_path / "$mine.py"


def test_torch_is_named_where_it_was_loaded_before(plugin, tmp_path):
    import torch  # noqa: F401

    plugin(f"import torch\n\n{MINE}")
    plugin(f"from torch import Tensor\n\n{MINE.replace('mine', 'other')}", "other.py")
    assert [found.loads_torch for found in use_plugins(["mine.py", "other.py"], tmp_path, {})] == [True, True]


# What is written into mine.py, and what stands in the line about it after its place in the configuration.
WRONG = [
    (
        "import absent_module\n",
        "mine.py:5: found ModuleNotFoundError: No module named 'absent_module'; expected Python",
    ),
    ("x = 1 / 0\n", "mine.py:5: found ZeroDivisionError: division by zero; expected Python code that can be imported"),
    ("def f(:\n", "mine.py:5: found SyntaxError: invalid syntax"),
    ("raise SystemExit(3)\n", "mine.py:5: found SystemExit: 3; expected Python code that can be imported"),
    ("raise Exception\n", "mine.py:5: found Exception; expected"),
    ("x = 1\n", "mine.py: found no entry; expected a class with a name that is defined in this file and derived from"),
    (MINE.replace('    name = "mine"\n', ""), "mine.py: found no entry: Mine (line 5) has no name; expected a class"),
    (
        f"{MINE}\n\nclass Other(Mine):\n    pass\n",
        "mine.py:17: found reward term 'mine' a second time; expected a name",
    ),
    (
        MINE.replace('"mine"', '"alignment"'),
        "mine.py:5: found reward term 'alignment' a second time; expected a name of",
    ),
    (MINE.replace('"mine"', '"Mine"'), "mine.py:5: found Mine with the name 'Mine'; expected a name of a-z, 0-9 and _"),
    (MINE.replace('"mine"', "7"), "mine.py:5: found Mine with the name 7; expected"),
    (
        MINE.replace("    def", "    Options = dict\n\n    def"),
        "mine.py:5: found Mine.Options, which is <class 'dict'>;",
    ),
    (
        MINE.replace("values", "value"),
        "mine.py:5: found Mine without values; expected a method values(self, inputs) of",
    ),
    (MINE.replace("(self, inputs)", "(self)"), "mine.py:5: found Mine.values(self); expected values(self, inputs)"),
    (MINE.replace("    def", "    needs = {'token'}\n\n    def"), "mine.py:5: found Mine.needs = {'token'}; expected"),
    (MINE.replace("    def", "    baseline = 'x'\n\n    def"), "mine.py:5: found Mine.baseline = 'x'; expected"),
    (
        "from ebft_mega.extension.entry import Entry\n\n\nclass Mine(Entry):\n    name = 'mine'\n",
        "mine.py:8: found Mine, which is derived from no contract; expected one of FeatureMap, RewardTerm",
    ),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_code_that_cannot_be_a_plugin(plugin, problems, text, words):
    plugin(text)
    (line,) = problems("mine.py")
    assert line.startswith(f"c.yaml:3: plugins: {words}"), line
    assert REWARD_TERMS.added == {}


def test_every_problem_is_told_at_once_and_what_is_right_is_used(plugin, problems):
    plugin("x = 1\n", "empty.py")
    plugin(MINE)
    plugin(MINE, "twin.py")
    lines = problems("empty.py", "mine.py", "twin.py", "mine.py", "absent.py")
    assert [line.split(": found ")[0] for line in lines] == [
        "c.yaml:3: plugins: empty.py",
        "c.yaml:5: plugins: twin.py:5",
        "c.yaml:6: plugins",
        "c.yaml:7: plugins",
    ]
    assert "a name of its own: mine.py:5 has this one" in lines[1]
    assert "'mine.py', which is mine.py as 'mine.py' is; expected every plugin once" in lines[2]


def test_names_that_lead_to_no_file_have_a_near_one(plugin, problems):
    plugin(MINE, "rewards/mine.py")
    plugin(MINE, "own.py")
    lines = problems("rewards/mime.py", "reward/mine.py", "own", "rewards", "rewards/mine.txt", "$ABSENT_1/mine.py", "")
    assert [line.rpartition("Did you mean ")[2] for line in lines[:3]] == ["'rewards/mine.py'?"] * 2 + ["'own.py'?"]
    assert "rewards/mime.py: no such file; expected a Python file" in lines[0]
    assert "'own', which is no installed module; expected the name of an installed module" in lines[2]
    assert "'rewards', which is no installed module" in lines[3]
    assert "'rewards/mine.txt'; expected the name of an installed module, or the path" in lines[4]
    assert "ABSENT_1 is not set" in lines[5]
    assert "plugins: found ''" in lines[6]


def test_modules_without_a_file_of_source_are_refused(installed, tmp_path, problems):
    (installed / "own_space").mkdir()
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("own_packed.py", HEAD + MINE)
    sys.path.insert(0, str(tmp_path / "packed.zip"))
    try:
        lines = problems(
            "own_packed", "own_space", "sys", "json.decode", "json.decoder.more", f"{tmp_path}/packed.zip/own_packed.py"
        )
    finally:
        sys.path.remove(str(tmp_path / "packed.zip"))
    assert "'own_packed', which is a module in a zip archive" in lines[0]
    assert "'own_space', which is a folder without __init__.py" in lines[1]
    assert "'sys', which is a module without its source" in lines[2]
    assert "Did you mean 'json.decoder'?" in lines[3] and "Did you mean 'json.decoder'?" in lines[4]
    assert "own_packed.py: no such file" in lines[5]
    assert not {name for name in sys.modules if name.startswith("own_")}


def test_a_module_beside_the_file_is_not_on_the_path(plugin, problems):
    plugin("x = 1\n", "own_helper.py")
    plugin(f"import own_helper\n\n{MINE}")
    (line,) = problems("mine.py")
    assert "mine.py:5: found ModuleNotFoundError" in line and "own_helper.py beside it is not on Python's path" in line


RAN = "open(__file__ + '.ran', 'w').close()\n" + MINE


def test_nothing_is_imported_from_places_that_the_configuration_names(plugin, problems, tmp_path):
    """Models, data sets, caches and runs; also through links into them and links out of them."""
    plugin(RAN, "model/mine.py")
    own = plugin(RAN, "own.py")
    (tmp_path / "link.py").symlink_to(tmp_path / "model" / "mine.py")
    (tmp_path / "folder").symlink_to(tmp_path / "model")
    (tmp_path / "model" / "out.py").symlink_to(own)
    (tmp_path / "way.py").symlink_to(tmp_path / "model" / "out.py")
    names = ("model/mine.py", "link.py", "folder/mine.py", "model/out.py", "way.py", "folder/../model/mine.py")
    lines = problems(*names, forbidden={tmp_path / "model": "model.init_from of this configuration"})
    assert len(lines) == len(names)
    assert all(
        "which lies in model, model.init_from of this configuration; expected a file of your own" in x for x in lines
    )
    assert "link.py through a link to model, which" in lines[1]
    lines = problems("model/mine.py", forbidden={tmp_path / "folder": "data.shards of this configuration"})
    assert "which lies in folder, data.shards" in lines[0]
    assert not list(tmp_path.rglob("*.ran"))


@pytest.mark.parametrize("marker", MARKERS)
def test_nothing_is_imported_from_a_run_a_data_set_or_a_model_whoever_names_it(plugin, problems, tmp_path, marker):
    plugin(RAN, "there/mine.py")
    (tmp_path / "there" / marker).write_text("")
    (line,) = problems("there/mine.py")
    assert f"which lies in there, {MARKERS[marker]} (with {marker}); expected a file of your own" in line
    assert not list(tmp_path.rglob("*.ran"))


def test_markers_are_the_names_of_the_files():
    assert {RESOLVED_CONFIG_NAME, MANIFEST_NAME} <= MARKERS.keys()


def test_no_module_is_imported_from_there_nor_the_packages_around_it(installed, problems, tmp_path):
    (installed / "own_bad").mkdir()
    (installed / "own_bad" / "__init__.py").write_text("open(__file__ + '.ran', 'w').close()\n")
    (installed / "own_bad" / "mine.py").write_text(HEAD + RAN)
    (line,) = problems("own_bad.mine", forbidden={installed: "data.cache of this configuration"})
    assert "'own_bad.mine': installed/own_bad/__init__.py, which lies in installed, data.cache" in line
    assert not list(tmp_path.rglob("*.ran")) and "own_bad" not in sys.modules


def test_nothing_is_imported_that_every_user_may_write(plugin, problems, tmp_path):
    path = plugin(RAN, "shared/mine.py")
    path.chmod(0o666)
    (line,) = problems("shared/mine.py")
    assert "where shared/mine.py may be written by every user (mode 0666); expected" in line and "chmod o-w" in line
    path.chmod(0o660)  # a group is a team
    path.parent.chmod(0o777)
    (line,) = problems("shared/mine.py")
    assert "where shared may be written by every user (mode 0777)" in line
    path.parent.chmod(0o1777)  # as /tmp: what lies there is its owner's
    assert not list(tmp_path.rglob("*.ran"))
    assert use_plugins(["shared/mine.py"], tmp_path, {})


def test_a_pipe_in_place_of_a_plugin_is_not_waited_for(problems, tmp_path):
    os.mkfifo(tmp_path / "mine.py")
    (line,) = problems("mine.py")
    assert "mine.py: a FIFO; expected a Python file" in line


def test_every_contract_says_what_an_entry_must_have():
    required = {registry.kind: sorted(abstract_methods(registry.contract)) for registry in ALL_REGISTRIES}
    assert required[REWARD_TERMS.kind] == ["values"] and required[SCHEDULES.kind] == ["factor"]
