"""Mutations of JSON values and of lines of YAML: what is written stays JSON or YAML most of the time."""

import json
import random
from collections.abc import Callable
from typing import Any

Random = random.Random

# Stand for texts that Python's writer of JSON would not write: they are put in afterwards.
_RAW_TEXTS = (
    "9" * 5000,
    "-" + "9" * 5000,
    "9" * 400,
    "1e999",
    "-1e999",
    "1e-999",
    "NaN",
    "-Infinity",
    "[" * 60 + "]" * 60,
    "[" * 3000 + "]" * 3000,
    "[" * 30_000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '"\\ud800"',
    '"\\u0000"',
    "'",
    '{"a": 1, "a": 2}',
    "0x10",
    "1_000",
    "+1",
    "01",
)
_RAW = "\ufdd0raw-{}\ufdd1"
_HOSTILE_TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\x1b[31m",
    "\u202e",
    "\ufeff",
    "\u2028",
    "<script>alert(1)</script>",
    "../../../etc/passwd",
    "/etc/passwd",
    "a" * 300,
    "a" * 5000,
    "a/" * 3000,
    "nan",
    "inf",
    "-1",
    "1",
    "true",
    "null",
    "pipe:touch owned",
    "https://example.invalid/x",
    "file:///etc/passwd",
    "${HOME}",
    "~",
    "*",
    "%s%s%n",
    "{}",
    "{0.__class__}",
    "\U0010ffff",
    "(a+)+$",
    "o" * 64,
    "0" * 64,
    "1/0",
    "0/1",
    "1/3",
)
_HOSTILE_NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**45),
    *(0.0, -0.0, 0.5, 1.5, 1e-320, 1e-8, 1e22, 1e308, -1e308),
)


def hostile_value(random: Random) -> Any:
    """A value that hardly any key expects."""
    kind = random.randrange(10)
    if kind < 2:
        return random.choice(_HOSTILE_TEXTS)
    if kind < 5:
        return random.choice(_HOSTILE_NUMBERS)
    if kind < 6:
        return _RAW.format(random.randrange(len(_RAW_TEXTS)))
    plain: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], [0], [""], {"": None}, {"a": {}}, [{}], [1] * 50)
    return random.choice(plain)


def mutated_json(random: Random, text: str) -> bytes:
    """JSON text with one to three of its values changed, removed, renamed, moved, wrapped or grown."""
    value = json.loads(text)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _mutated(random, value)
    written = json.dumps(value, ensure_ascii=random.random() < 0.5)
    if "raw-" in written:
        for number, raw in enumerate(_RAW_TEXTS):
            name = _RAW.format(number)
            written = written.replace(json.dumps(name), raw).replace(f'"{name}"', raw)
    if random.random() < 0.03:  # a key twice
        name = random.choice(list(value)) if isinstance(value, dict) and value else "a"
        written = written.replace("{", f"{{{json.dumps(name)}: {json.dumps(random.choice(_HOSTILE_NUMBERS))}, ", 1)
    return written.encode("utf-8", "surrogatepass")


def _mutated(random: Random, value: Any) -> Any:
    """The value with one change somewhere in it; it is changed in place where it can be."""
    parents: list[tuple[Any, Any]] = []
    place: Any = value
    while isinstance(place, dict | list) and place and (not parents or random.random() < 0.75):
        key = random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
        parents.append((place, key))
        place = place[key]
    if not parents:
        return hostile_value(random)
    holder, key = parents[-1]
    random.choice(_CHANGES)(random, holder, key)
    return value


def _replace(random: Random, holder: Any, key: Any) -> None:
    holder[key] = hostile_value(random)


def _remove(random: Random, holder: Any, key: Any) -> None:
    del holder[key]


def _rename(random: Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        other = key + random.choice("_s \0") if random.random() < 0.5 else random.choice((*_HOSTILE_TEXTS, *holder))
        holder[other] = holder.pop(key)
    else:
        holder.insert(key, holder[key])


def _wrap(random: Random, holder: Any, key: Any) -> None:
    value = holder[key]
    holder[key] = random.choice(([value], {"a": value}, [value] * 100, {str(key): value}, str(value)[:1000]))


def _swap(random: Random, holder: Any, key: Any) -> None:
    other = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    holder[key], holder[other] = holder[other], holder[key]


def _perturb(random: Random, holder: Any, key: Any) -> None:
    """A near value of the same kind, which gets further than a strange one."""
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int):
        holder[key] = random.choice((value + 1, value - 1, -value, value * 2, value * 1000, value // 2, 2**40, 10**12))
    elif isinstance(value, float):
        holder[key] = random.choice((-value, value * 1e10, value * 1e-10, value // 1))
    elif isinstance(value, str) and value:
        at = random.randrange(len(value))
        before, after = value[:at], value[at + 1 :]
        with_other = before + random.choice("0aZ/. \n\u00e9\0\u202e") + after
        holder[key] = random.choice((with_other, before, value + value, before + after, value.upper()))
    elif isinstance(value, list):
        holder[key] = random.choice((value * 2, value[::-1], value[:-1], [*value, *value[:1]]))
    elif isinstance(value, dict):
        holder[key] = {**value, random.choice(_HOSTILE_TEXTS): hostile_value(random)}
    else:
        holder[key] = random.choice(_HOSTILE_NUMBERS)


def _add(random: Random, holder: Any, key: Any) -> None:
    if isinstance(holder, dict):
        holder[random.choice(_HOSTILE_TEXTS)] = hostile_value(random)
    else:
        holder.append(hostile_value(random))


_CHANGES: tuple[Callable[[Random, Any, Any], None], ...] = (
    *(_replace, _replace, _replace),
    *(_perturb, _perturb, _perturb),
    *(_remove, _rename, _wrap, _swap, _add),
)

_YAML_TEXTS = (
    *("!!python/object/apply:os.system [touch owned]", "!!binary aGVsbG8=", "&a [*a]", "*a", "<<: *a", "? [a]: b"),
    *("|\n    text", ">-\n    folded", "'", '"\\ud800"', '"\\x00"', "[" * 60, "{a: {b: {c: d}}}", "[a, b", "0o17"),
    *("1e5", "1e400", ".inf", "-.inf", ".nan", "1_000", "0x1F", "2024-01-01", "yes", "off", "~", "null", "- a"),
    *("9" * 50, "9" * 5000, "%TAG ! a", "@", "`", "\t", "\u2028", "\ufeff", "a: b: c", "---", "..."),
)


def mutated_yaml(random: Random, text: str) -> bytes:
    """Block YAML with one to three of its lines changed, removed, renamed, moved or repeated."""
    lines = text.splitlines()
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        at = random.randrange(len(lines))
        name, colon, value = lines[at].partition(":")
        kind = random.randrange(9)
        if kind < 3 and colon:
            lines[at] = f"{name}: {_yaml_value(random)}"
        elif kind == 3:
            del lines[at]
        elif kind == 4:
            lines.insert(random.randrange(len(lines) + 1), lines[at])
        elif kind == 5 and colon:
            lines[at] = f"{name}{random.choice('s_ x')}:{value}"
        elif kind == 6:
            lines[at] = random.choice(("  ", "\t", "- ", "   ")) + lines[at]
        elif kind == 7:
            lines[at] = lines[at].lstrip()
        else:
            other = random.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        lines = lines or [""]
    return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")


def _yaml_value(random: Random) -> str:
    if random.random() < 0.4:
        return random.choice(_YAML_TEXTS)
    value = json.dumps(hostile_value(random))
    for number, raw in enumerate(_RAW_TEXTS) if "raw-" in value else ():
        value = value.replace(json.dumps(_RAW.format(number)), raw)
    return value
