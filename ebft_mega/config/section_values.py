"""Check one section's values, and say what is wrong with each of them and what would be right."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from ebft_mega.config.axolotl.axolotl_keys import SIMILAR, foreign_key, our_name
from ebft_mega.config.fields import allowed_text, registry_of, registry_of_names, takes_addresses, yaml_text
from ebft_mega.config.rules import refusal_reason
from ebft_mega.config.schema import SECTIONS, RunConfig, all_keys
from ebft_mega.errors import Problem
from ebft_mega.extension.options import Section
from ebft_mega.registry.registry import Registry
from ebft_mega.registry.store_addresses import address_problem
from ebft_mega.shown_text import without_secrets

OPTIONS = "options"  # the key whose sections are those of entries
ONE_OF = "one of the keys of"  # a section, and a list
NOTHING = "nothing"  # where a required key is missing
MAX_SHOWN_TEXT = 60
MAX_SHOWN_PATH = 200
MAX_EXPLAINED = 100  # problems of one section; each takes a search for what may have been meant
# Values for required keys that are missing or wrong, so that everything else can still be checked.
_STAND_INS: dict[str, Any] = {"output_dir": "unset", "sequence_length": 2}
_SLIP = 0.9  # so near to a key of its section, a name means that one


def nearest_key(wrong: str, keys: Iterable[str] | None = None) -> str:
    """Guess the valid dotted key that a wrong one means; empty when nothing is near.

    A key of the same section comes first, then the same name in another section, then a similar name there.
    """
    valid = list(all_keys() if keys is None else keys)
    section, _, leaf = wrong.rpartition(".")
    if (ours := our_name(leaf)) in valid:
        return ours
    siblings = [key for key in valid if key.rpartition(".")[0] == section]
    leaves = {key.rpartition(".")[2]: key for key in reversed(valid)}
    names = {key.rpartition(".")[2]: key for key in siblings}
    if not section:
        names |= {name: name for name in SECTIONS}
    for candidates, cutoff in ((names, 0.75), (leaves, 1.0), (names, SIMILAR), (leaves, 0.75)):
        near = difflib.get_close_matches(leaf, candidates, n=1, cutoff=cutoff)
        if near:
            return candidates[near[0]]
    return ""


def valid_part(section: type[Section], values: Mapping[str, Any], prefix: str) -> tuple[Any, list[Problem]]:
    """A section built from its valid keys (others get their default), and a problem for each other key."""
    try:
        return section.model_validate(dict(values)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    explained = [
        explain(section, prefix, tuple(map(str, item["loc"])), item["type"], values) for item in details[:MAX_EXPLAINED]
    ]
    problems = {problem.key: problem for problem in reversed(explained)}
    wrong = {str(item["loc"][0]) for item in details}
    good = {name: value for name, value in values.items() if name not in wrong}
    required = {name: value for name, value in _STAND_INS.items() if name in wrong and name in section.model_fields}
    found = list(reversed(problems.values()))
    if len(details) > MAX_EXPLAINED:
        more = f"{len(details) - MAX_EXPLAINED} more wrong keys and values"
        found.append(Problem("", prefix.rstrip(".") or "(file)", more, f"at most {len(section.model_fields)} keys"))
    return section.model_validate(required | good), found


def explain(
    section: type[Section], prefix: str, place: tuple[str, ...], kind: str, values: Mapping[str, Any]
) -> Problem:
    """Put one pydantic error into words.

    Args:
        place: path of the value within the section; kind: pydantic's name of what is wrong with it.
    """
    name = place[0]
    key = prefix + name
    if kind == "extra_forbidden" and len(place) == 1:
        return _unknown_key(section, key, values[name])
    field = section.model_fields[name]
    if name not in values:
        return Problem("", key, NOTHING, f"{allowed_text(field)} (this key is required)")
    if (registry := registry_of_names(field)) is not None and len(place) > 1:
        return _explain_named(registry, key, place[1], values[name], is_name=place[-1] == "[key]")
    inner = _section_of_values(field.annotation)
    if inner is not None and len(place) > 2 and isinstance(values[name][place[1]], Mapping) and place[2] != "[key]":
        return explain(inner, f"{key}.{place[1]}.", place[2:], kind, values[name][place[1]])
    if inner is not None and len(place) > 1:
        value, expected = values[name][place[1]], f"a section with the keys {', '.join(inner.model_fields)}"
        if place[-1] == "[key]":
            value, expected = place[1], "a name of letters, digits, _ and -, a letter first"
        return Problem("", f"{key}.{place[1]}", describe(value), expected)
    registry = registry_of(field)
    choices = list(registry.names()) if registry else [str(choice) for choice in get_args(field.annotation)]
    near = difflib.get_close_matches(str(values[name]), choices, n=1) if isinstance(values[name], str) else []
    found = describe(values[name])
    if takes_addresses(field) and isinstance(values[name], str) and "://" in values[name]:
        reason = address_problem(values[name])  # in words without the address, which may hold a secret
        found = f"{found}: {reason}" if reason else found
    return Problem("", key, found, allowed_text(field), near[0] if near else "")


def _explain_named(registry: Registry[Any], key: str, name: str, values: Mapping[Any, Any], is_name: bool) -> Problem:
    """What is wrong with a mapping of names of entries to numbers.

    Args:
        is_name: it is the name; else it is the number.
    """
    if not is_name:
        return Problem("", f"{key}.{name}", describe(values.get(name)), "a number")
    near = difflib.get_close_matches(name, registry.names(), n=1)
    expected = f"the name of a {registry.kind}: {', '.join(registry.names())}"
    return Problem("", f"{key}.{name}", describe(name), expected, "".join(near))


def _section_of_values(annotation: Any) -> type[Section] | None:
    """The section that a key maps names to (`data.sources`); None for every other kind of key."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_of_values(part))), None)


def _unknown_key(section: type[Section], key: str, value: Any) -> Problem:
    holder, _, leaf = key.rpartition(".")
    if key.startswith(f"{OPTIONS}."):
        near = difflib.get_close_matches(leaf, section.model_fields, n=1, cutoff=SIMILAR)
        expected = f"{ONE_OF} {holder}: {', '.join(section.model_fields)}"
        return Problem(
            "", key, f"an unknown option (value {describe(value)})", expected, f"{holder}.{near[0]}" if near else ""
        )
    reason = refusal_reason(leaf)
    if reason:
        return Problem("", key, describe(value), f"no such key: {reason}")
    foreign = foreign_key(key) or foreign_key(leaf)
    is_ours = leaf in {each.rpartition(".")[2] for each in all_keys()}
    is_slip = bool(difflib.get_close_matches(leaf, section.model_fields, n=1, cutoff=_SLIP))
    if foreign is not None and (foreign.ours or not is_ours) and not is_slip:
        return Problem("", key, f"a key of {foreign.program} (value {describe(value)})", foreign.meaning)
    holder = holder or "the file"
    expected = f"{ONE_OF} {holder}: {', '.join(section.model_fields)}"
    known = [*all_keys(), *(f"{holder}.{name}" for name in section.model_fields if section is not RunConfig)]
    return Problem("", key, f"an unknown key (value {describe(value)})", expected, nearest_key(key, known))


def describe(value: Any) -> str:
    """A value and its kind, as the file has it."""
    if isinstance(value, str):
        value = without_secrets(value)  # before it is cut, which could take the end of a password away
        longest = MAX_SHOWN_PATH if "/" in value else MAX_SHOWN_TEXT
        return repr(value if len(value) <= longest else f"{value[: longest - 3]}...")
    text = yaml_text(value) if value is None or isinstance(value, bool | int | float) else without_secrets(repr(value))
    return text if len(text) <= MAX_SHOWN_TEXT else f"{text[: MAX_SHOWN_TEXT - 3]}..."
