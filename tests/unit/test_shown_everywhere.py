"""Everything that shows text does it through what escapes it; a source that goes around it is named here."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a program prints beside `print_line` and formatted numbers, each harmless by itself: lines that `shown` has made,
# JSON in ASCII, numbers and tables of them, or a document, whose newlines are meant.
PRINTED = {
    "launcher/train.py": {"describe_run(config, plan, memory_bytes, shares)", "error"},
    "tools/inspect_shards.py": {
        *(
            "number",
            "manifest.eos_id",
            "manifest.dtype",
            "manifest.tokenizer_sha256",
            "manifest.fingerprint",
            "key",
            "percentiles",
        ),
        *("'\\n'.join(length_histogram(lengths))", "counts", "outcome", "text"),
        "json.dumps({'document': number, 'metadata': metadata, 'tokens': tokens.tolist(), 'text': text})",
        "json.dumps({'dataset': fields, **parts, 'metadata': metadata})",
    },
    "ebft_mega/apps/written_evaluation.py": {"blocks", "rows"},
    "tools/convert_hf.py": {"result", "usage", "comparison", "verdict"},
    "tools/bench_step.py": {"words", "tables"},
    "tools/bench_data.py": {"what", "options.processes", "processes"},
    "tools/fuzz.py": {"TITLES", "figures(tally)"},
    "ebft_mega/io/standard_streams.py": {"shown(text, LONGEST_NOTE)"},
    "ebft_mega/io/progress_bar.py": {"shown(text, LONGEST_NOTE)"},
    "ebft_mega/apps/benchmark/peak_memory.py": {
        "measure(wanted['side'], BenchCase(**wanted['case']), BenchModel(**wanted['model']))"
    },
}
# Words of their own, where nothing else can be relied on: packages that lack, signals, a process that hangs, one that
# was killed.
WRITING_PAST_THE_STREAMS = {
    "ebft_mega/__init__.py",
    "ebft_mega/io/process_signals.py",
    "ebft_mega/runtime/watchdog.py",
    "ebft_mega/runtime/witness_process.py",
}
# Programs that another one starts, and reads: they print a number, or write past the streams.
STARTED_BY_OTHERS = {"ebft_mega/apps/benchmark/peak_memory.py", "ebft_mega/runtime/witness_process.py"}
OWNERS = {  # of what shows text
    "ArgumentParser": {"ebft_mega/io/arguments.py"},
    "StreamHandler": {"ebft_mega/runtime/run_files.py"},
    "FileHandler": {"ebft_mega/runtime/run_files.py"},
    "Formatter": {"ebft_mega/shown_text.py"},
    "basicConfig": set(),
    "SummaryWriter": {"ebft_mega/metrics/sinks.py"},
    "Environment": {"ebft_mega/apps/report/page.py"},
    "Markup": set(),
}
LOGGED = ("debug", "info", "warning", "error", "exception", "critical")
LABELS = ("label", "labels", "title", "xlabel", "ylabel", "suptitle")
OWN_LABELS = {
    "label",
    "quantity",
    "SIDE_NAMES[name]",
    "labels",
    "labels or [''] * len(intervals)",
}  # the program's own, or made by `shown_label`


@cache
def sources():
    """All of the program: by file, its tree and its nodes."""
    paths = [path for room in ("ebft_mega", "launcher", "tools") for path in sorted((ROOT / room).rglob("*.py"))]
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    return {path: (tree, tuple(ast.walk(tree))) for path, tree in trees.items()}


@cache
def calls():
    """By file, its calls, each with the last part of the called name."""
    return {
        path: [(node, _last_name(node.func)) for node in nodes if isinstance(node, ast.Call)]
        for path, (_, nodes) in sources().items()
    }


def _last_name(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def printed_values(calls_of_file):
    """What `print` shows that is neither a constant nor a number with a format of its own."""
    for argument in (argument for call, name in calls_of_file if name == "print" for argument in call.args):
        for part in argument.values if isinstance(argument, ast.JoinedStr) else [argument]:
            value = part.value if isinstance(part, ast.FormattedValue) else part
            if not isinstance(value, ast.Constant) and not (value is not part and _is_number(part)):
                yield ast.unparse(value)


def _is_number(part):
    spec = "".join(value.value for value in part.format_spec.values) if part.format_spec else ""
    return (
        bool(re.search(r"[,dfge%]$", spec))
        or isinstance(part.value, ast.Call)
        and ast.unparse(part.value.func) == "len"
    )


def test_what_is_printed_goes_through_one_function():
    wrong = {}
    for path, found_calls in calls().items():
        found = set(printed_values(found_calls)) - PRINTED.get(path, set())
        if found:
            wrong[path] = found
    assert wrong == {}, "print_line (io/standard_streams.py) shows what may hold foreign text"


def test_every_program_protects_its_streams():
    unprotected = set()
    for path, (tree, _) in sources().items():
        is_program = any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)
        names = {name for _, name in calls()[path]}
        if is_program and not names & {"run_command", "protect_standard_streams"}:
            unprotected.add(path)
    assert unprotected == STARTED_BY_OTHERS


def test_nothing_is_written_past_the_streams():
    wrong = []
    for path, (_, nodes) in sources().items():
        for node in nodes:
            is_past = isinstance(node, ast.Attribute) and node.attr in ("write", "buffer", "__stdout__", "__stderr__")
            text = ast.unparse(node) if is_past else ""
            past = re.search(r"std(out|err)__$|std(out|err)\.(buffer|write)|^os\.write$", text)
            if past and path not in WRITING_PAST_THE_STREAMS:
                wrong.append(f"{path}:{node.lineno}: {text}")
    assert wrong == []


def test_what_shows_text_has_one_owner():
    found = {name: set() for name in OWNERS}
    for path, (_, nodes) in sources().items():
        names = {name for _, name in calls()[path]}
        names |= {_last_name(base) for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases}
        for name in names & OWNERS.keys():
            found[name].add(path)
    assert found == OWNERS


def test_a_log_message_is_a_constant_line_and_its_values_are_arguments():
    wrong = []
    for path, found in calls().items():
        for call, name in found:
            if name in LOGGED and isinstance(call.func, ast.Attribute) and _last_name(call.func.value) == "logger":
                message = call.args[0]
                if not (
                    isinstance(message, ast.Constant) and isinstance(message.value, str) and "\n" not in message.value
                ):
                    wrong.append(f"{path}:{call.lineno}")
    assert wrong == []


def test_labels_of_plots_are_constants_or_escaped():
    wrong = []
    for path, found in calls().items():
        if "matplotlib" not in (ROOT / path).read_text(encoding="utf-8"):
            continue
        for call, name in found:
            texts = [keyword.value for keyword in call.keywords if keyword.arg in LABELS]
            texts += call.args[:1] if name.removeprefix("set_") in LABELS else []
            for text in texts:
                words = ast.unparse(text)
                if not isinstance(text, ast.Constant) and "shown_label(" not in words and words not in OWN_LABELS:
                    wrong.append(f"{path}:{call.lineno}: {words}")
    assert wrong == []


def test_no_template_marks_text_as_html():
    templates = sorted((ROOT / "ebft_mega/apps/report/templates").glob("*.html"))
    assert templates
    for path in templates:
        assert not re.search(r"\|\s*(safe|forceescape)|autoescape|<script", path.read_text(encoding="utf-8")), path.name
        assert not re.search(r'(href|src)="\{\{(?![^}]*\| (address|picture)\b)', path.read_text(encoding="utf-8")), (
            path.name
        )
