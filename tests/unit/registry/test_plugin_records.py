"""What is said and written of plugins, and which of them count as changed."""

from pathlib import Path

from ebft_mega.registry.kinds import ALL_REGISTRIES
from ebft_mega.registry.plugin_records import (
    PluginRecord,
    changed_plugins,
    plugin_records,
    plugin_rows,
    plugins_in_words,
    slow_imports,
)
from ebft_mega.registry.plugins import Plugin, PluginEntry
from ebft_mega.registry.registry_listing import contract_file, listed_entries, own_file

ROOT = Path(__file__).resolve().parents[3]


def plugin(name="rewards/mine.py", sha="a", loads_torch=False):
    entries = (PluginEntry("reward term", "mine", "/own/rewards/mine.py:5", "Counts."),)
    resolved = f"/own/{name}" if "/" in name else name
    return Plugin(name, resolved, Path(f"/own/{name}"), sha * 64, entries, loads_torch, 2.25)


def changes(then, now):
    return list(changed_plugins(plugin_records(then), plugin_records(now)))


def test_records_hold_name_file_and_hash():
    assert plugin_records([plugin()]) == (
        PluginRecord(name="/own/rewards/mine.py", file="/own/rewards/mine.py", sha256="a" * 64),
    )


def test_words_for_ranks_differ_with_the_code():
    assert plugins_in_words([]) == "none"
    assert plugins_in_words([plugin()]) == "/own/rewards/mine.py (sha256 aaaaaaaaaaaa)"
    assert plugins_in_words([plugin(sha="b")]) != plugins_in_words([plugin()])


def test_the_dry_run_lists_entries_with_their_options():
    assert list(plugin_rows([plugin()], {"mine": {"scale": 2.0}, "other": {"x": 1}})) == [
        ("rewards/mine.py", "/own/rewards/mine.py, sha256 aaaaaaaaaaaa"),
        ("  reward term mine", "Counts."),
        ("    scale", "2.0"),
    ]


def test_only_what_imports_torch_is_slow():
    assert list(slow_imports([plugin()])) == []
    (note,) = slow_imports([plugin(), plugin("slow.py", loads_torch=True)])
    assert note.startswith("plugins: slow.py imports torch, which a dry run waits for (2.2 s")


def test_the_same_code_elsewhere_is_no_change():
    assert changes([plugin()], [plugin()]) == []
    assert changes([plugin()], [plugin("moved/mine.py")]) == []
    assert changes([], []) == []


def test_changed_new_and_missing_plugins_are_told():
    assert changes([plugin()], [plugin(sha="b")]) == [
        "the code of the plugin /own/rewards/mine.py is another one than at the checkpoint: sha256 "
        "aaaaaaaaaaaa -> bbbbbbbbbbbb"
    ]
    (note,) = changes([plugin()], [plugin("moved/mine.py", "b")])
    assert note.startswith("the code of the plugin /own/moved/mine.py is another one")
    assert changes([plugin()], []) == [
        "the plugin /own/rewards/mine.py (sha256 aaaaaaaaaaaa) of the checkpoint is not in use any more"
    ]
    assert changes([], [plugin()]) == [
        "the plugin /own/rewards/mine.py (sha256 aaaaaaaaaaaa) was not in use at the checkpoint"
    ]
    both = changes([plugin(), plugin("x/one.py", "c")], [plugin(sha="b"), plugin("x/two.py", "d")])
    assert [note.split(" (")[0] for note in both[1:]] == ["the plugin /own/x/two.py", "the plugin /own/x/one.py"]


def test_help_lists_every_entry_with_what_it_is():
    lines = listed_entries().splitlines()
    for registry in ALL_REGISTRIES:
        start = lines.index(f"  {registry.kind}:")
        for name, summary in registry.summaries().items():
            assert summary and any(line.startswith(f"    {name}: {summary[:20]}") for line in lines[start:])
    assert max(map(len, lines)) <= 110


def test_the_files_of_the_tables_exist():
    for registry in ALL_REGISTRIES:
        files = [contract_file(registry), *(own_file(registry, name) for name in registry.own_names())]
        assert [file for file in files if not (ROOT / file).is_file()] == []
