"""YAML text as plain values, each with the line it stands on. Nothing in the text can name a Python object.

The scalars are those of YAML 1.2: `1e-5` is a number, and only `true` and `false` are booleans, so that
`reuse_rollout: off` is a word. Repeated keys, tags, anchors and aliases are refused.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from ebft_mega.errors import Problem
from ebft_mega.shown_text import escaped

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
MAX_INTEGER_CHARACTERS = 40  # Python refuses to read an integer of thousands of digits
MAX_INTEGER = 2**63 - 1  # beyond it an integer is text, which no key takes for a number
MAX_DEPTH = 50
MAX_TEXT_BYTES = 128 * 1024  # of a file, or of all values on a command line; a file with every key has 5,000
# Of one text, keys counted, too. What a run writes for a file of so many, with all keys and their defaults, has more.
MAX_VALUES = 10_000
MAX_WRITTEN_VALUES = 2 * MAX_VALUES
MAX_KEY_CHARACTERS = 256
_MAX_SHOWN = 200
_LINE_BREAKS = frozenset("\x85\u2028\u2029\ufeff")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
}
_SPECIAL_FLOATS = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


@dataclass
class YamlSource:
    """What was read: a plain value, the line (from 1) of every dotted key, and what is wrong."""

    name: str
    value: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _TreeLoader(yaml.SafeLoader):
    """A loader used only to compose nodes; each node is written out once, without a tag, and not too deep."""

    depth = 0
    num_values = 0
    max_values = MAX_VALUES

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise yaml.MarkedYAMLError(problem="an anchor or alias", problem_mark=event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem=f"the tag {event.tag}", problem_mark=event.start_mark)
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.num_values += 1
        if self.num_values > self.max_values:
            found = f"more than {self.max_values} keys and values"
            raise yaml.MarkedYAMLError(problem=found, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(text: str, name: str, max_values: int = MAX_VALUES) -> YamlSource:
    """Read one YAML document. The time it takes is proportional to its length, and to `max_values`.

    Args:
        text: the document.
        name: what to call it in problems: the file's path.
        max_values: more keys and values than so many are a problem.
    """
    source = YamlSource(name)
    try:
        loader = _TreeLoader(text)
        loader.max_values = max_values
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        where = f"{name}:{text.count(chr(10), 0, error.position) + 1}"
        found = f"the character U+{ord(text[error.position]):04X}"
        source.problems.append(Problem(where, "(text)", found, "text that YAML allows"))
        return source
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        found = getattr(error, "problem", None) or " ".join(str(error).split())
        expected = "plain YAML without anchors, aliases and tags"
        source.problems.append(Problem(where, "(text)", found[:_MAX_SHOWN], expected))
        return source
    if node is not None:
        source.value = _plain(node, "", source)
    return source


class _TreeDumper(yaml.SafeDumper):
    """Write what `read_yaml` reads back: no aliases, and quotes around text that would be read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes by the rules of YAML 1.1, to which `1e5` is text.
    style = None if isinstance(plain_scalar(text), str) else "'"
    if _LINE_BREAKS.intersection(text):  # escaped only in double quotes
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_TreeDumper.add_representer(str, _represent_text)


def write_yaml(value: Any) -> str:
    """Plain values as YAML text, keys in their order, with every text on a line of its own that is never folded."""
    text: str = yaml.dump(value, Dumper=_TreeDumper, sort_keys=False, allow_unicode=True, width=math.inf)
    if escaped(text, "\n") == text:
        return text
    # With escapes, read back alike.
    return yaml.dump(value, Dumper=_TreeDumper, sort_keys=False, allow_unicode=False, width=math.inf)


class _LineDumper(_TreeDumper):
    """Write everything on one line; texts with characters that are not simply drawn stand in double quotes."""


def _represent_on_one_line(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    if escaped(text) != text:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
    return _represent_text(dumper, text)


_LineDumper.add_representer(str, _represent_on_one_line)


def write_value(value: Any) -> str:
    """Write a plain value as that of a key: one line, whatever its length, so that it may stand at any depth."""
    is_drawn = escaped(str(value)) == str(value)
    options: dict[str, Any] = {"sort_keys": False, "width": math.inf, "default_flow_style": True}
    text: str = yaml.dump([value], Dumper=_LineDumper, allow_unicode=is_drawn, **options)
    return text.removesuffix("\n")[1:-1]


def _plain(node: yaml.Node, key: str, source: YamlSource) -> Any:
    """The value of a node; lines and problems go to `source`."""
    source.lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, key, source)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{key}.{index}", source) for index, item in enumerate(node.value)]
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return plain_scalar(node.value) if is_plain else node.value


def _mapping(node: yaml.MappingNode, prefix: str, source: YamlSource) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        line = name_node.start_mark.line + 1
        where = f"{source.name}:{line}"
        if not isinstance(name_node, yaml.ScalarNode):
            source.problems.append(Problem(where, prefix or "(text)", "a list or mapping as a key", "a word as a key"))
            continue
        if len(name_node.value) > MAX_KEY_CHARACTERS:
            found, expected = f"a key of {len(name_node.value)} characters", f"at most {MAX_KEY_CHARACTERS}"
            source.problems.append(Problem(where, prefix or "(text)", found, expected))
            continue
        key = f"{prefix}.{name_node.value}" if prefix else name_node.value
        if name_node.value in values:
            found = f"this key a second time (the first is in line {source.lines[key]})"
            source.problems.append(Problem(where, key, found, "every key once"))
            continue
        source.lines[key] = line
        values[name_node.value] = _plain(value_node, key, source)
    return values


def plain_scalar(text: str) -> str | int | float | bool | None:
    """The value of an unquoted YAML scalar: a number, true, false, null, or the text itself."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        short = len(text) <= MAX_INTEGER_CHARACTERS
        return value if short and abs(value := int(text.replace("_", ""))) <= MAX_INTEGER else text
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    special = _SPECIAL_FLOATS.get(text.lower())
    return float(special) if special else text
