"""Every place that parses what others have written is known, and stands within the boundary or says what it takes."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Calls that parse, by the last two names of what is called.
PARSERS = {
    *("json.loads", "json.load", "np.load", "numpy.load", "np.fromfile", "yaml.compose", "yaml.load", "yaml.safe_load"),
    *("struct.unpack", "tarfile.open", "TarInfo.frombuf", "pickle.load", "pickle.loads", "torch.load", "tomllib.load"),
    *("Backend.from_str", "Tokenizer.from_file", "Tokenizer.from_str", "Backend.from_file", "zlib.decompress"),
    "zipfile.ZipFile",
    *("AutoModelForCausalLM.from_pretrained", "AutoTokenizer.from_pretrained", "gzip.decompress"),
}
PARSER_NAMES = {
    *("SentencePieceProcessor", "safe_open", "load_file", "_TreeLoader", "parse_json", "ElementTree"),
    *("ParquetFile", "_Compact"),
}
# Where a parser is called outside of a `with reading(...)`: what stands around it instead.
OTHERWISE = {
    "apps/benchmark/peak_memory.py": "the command line that the same program has written",
    "apps/convert/verifying.py": "the library's own loading is what is verified; it gets checked files only",
    "apps/fuzzing/hostile_values.py": "valid files of this program",
    "apps/fuzzing/fuzzed_parsers.py": "the syntax is judged, and nothing is read",
    "apps/fuzzing/hostile_bytes.py": "valid files of this program",
    "apps/fuzzing/syntax.py": "the syntax is judged, and nothing is read",
    "apps/fuzzing/valid_files.py": "valid files of this program",
    "apps/report/run_records.py": "a line that is none is left out and counted",
    "apps/experiment/running/phases.py": "a value that was just written as JSON",
    "apps/written_evaluation.py": "an earlier file that is none is called so in a note",
    "checkpoint/describing_files.py": "a file that is none is left out with a note",
    "checkpoint/tensors.py": "its errors are those of a broken checkpoint",
    "config/yaml_source.py": "its errors are problems with their lines",
    "data/builder/shard_writer.py": "a shard that was just written",
    "data/store/checks.py": "a header that is none is found when the document is read",
    "data/store/places/gs.py": "its errors are refusals of a server's answer",
    "data/store/places/hf.py": "its errors are refusals of a server's answer",
    "data/store/inspection.py": "its errors are those of damaged data",
    "data/text/parquet_files.py": "called within the boundary, or its errors are problems of one file",
    "data/text/parquet_pages.py": "its errors are problems of one file",
    "data/text/text_files.py": "its errors are problems of one line",
    "data/text/zip_members.py": "its errors are problems of one file, or of one member",
    "data/tokenizers/tokenizer.py": "called by `load_tokenizer` alone, within the boundary",
    "data/tokenizers/tokenizer_difference.py": "words for a message; a file that is none has a refusal of its own",
    "data/tokenizers/tokenizer_files.py": "its errors are problems of the file",
    "io/json_text.py": "the parser itself",
    "lifecycle/findings.py": "a file that is none says nothing",
    "lifecycle/run_record.py": "a value that was just written as JSON",
    "metrics/sinks.py": "a line that is none is dropped",
    "model/weights/stored_values.py": "numbers of a file whose size was checked",
    "model/weights/weight_files.py": "its errors are problems of the file",
    "model/weights/weight_sources.py": "files whose headers and sizes `stored_tensors` has checked",
    "runtime/message_text.py": "what a rank of the same run has sent",
    "runtime/run_files.py": "a file that is none says nothing",
    "runtime/run_lock.py": "a lock file that is none describes no holder",
    "runtime/witness_process.py": "a file that is none says nothing",
    "tools/bench_data.py": "an index that was just written",
}


def parsing_calls(tree: ast.AST) -> "list[tuple[int, str, bool]]":
    """Line and name of each call of a parser, and whether it stands within `with reading(...)`."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            inside = inside or any(isinstance(call.func, ast.Name) and call.func.id == "reading" for call in calls)
        if isinstance(node, ast.Call):
            names = ast.unparse(node.func).split(".")
            if ".".join(names[-2:]) in PARSERS or (len(names) == 1 and names[0] in PARSER_NAMES):
                found.append((node.lineno, ".".join(names), inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def sources():
    for folder in ("ebft_mega", "launcher", "tools"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_every_parser_stands_within_the_boundary_or_says_why_not():
    outside = {}
    for path in sources():
        place = path.relative_to(ROOT).as_posix().removeprefix("ebft_mega/")
        calls = [f"{line}: {name}" for line, name, inside in parsing_calls(ast.parse(path.read_text())) if not inside]
        if calls:
            outside[place] = calls
    unknown = {place: calls for place, calls in outside.items() if place not in OTHERWISE}
    assert not unknown, "use ebft_mega.io.parse_boundary.reading, or say here what takes its place"
    assert not OTHERWISE.keys() - outside.keys(), "these parse nothing outside of the boundary any more"


def test_a_parser_outside_of_the_boundary_is_seen():
    text = "with reading(a, b, c):\n    json.loads(x)\ndef f():\n    return np.load(y), SentencePieceProcessor(z)\n"
    found = [(name, inside) for _, name, inside in parsing_calls(ast.parse(text))]
    assert found == [("json.loads", True), ("np.load", False), ("SentencePieceProcessor", False)]
