"""Check the classes that a plugin defines, as far as it can be known before anything has started. No torch."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from ebft_mega.errors import Problem
from ebft_mega.extension.entry import Entry, place_of_entry
from ebft_mega.extension.options import Section
from ebft_mega.registry.plugin_sources import KEY
from ebft_mega.registry.registry import Registry

NAME = re.compile(r"[a-z][a-z0-9_]*")
_CHECKED = ("name", "Options")  # attributes of an entry with checks of their own


def classes_of(module: ModuleType) -> list[type[Entry]]:
    """The classes that a module defines itself and derives from a contract, or from the base of all contracts."""
    found = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Entry))
    return list(dict.fromkeys(kind for kind in found if kind.__module__ == module.__name__))


def wrong_entries(module: ModuleType, file: str, registries: Sequence[Registry[Any]]) -> list[Problem]:
    """List what is wrong with the entries of a module by themselves (`where` is empty).

    Args:
        file: of the module, for messages.
    """
    classes = classes_of(module)
    problems = [problem for kind in classes for problem in _wrong_entry(kind, registries)]
    if any(kind.name and _registries_of(kind, registries) for kind in classes) or problems:
        return problems
    found = "no entry"
    if classes:
        found += f": {', '.join(f'{kind.__name__} (line {_line_of(kind)}) has no name' for kind in classes)}"
    contracts = ", ".join(registry.contract.__name__ for registry in registries)
    expected = f"a class with a name that is defined in this file and derived from {contracts}"
    return [_problem(file, found, expected)]


def _wrong_entry(kind: type[Entry], registries: Sequence[Registry[Any]]) -> Iterator[Problem]:
    """What is wrong with one class; nothing if it has no name, as a base of others."""
    if not kind.name:
        return
    place, title = place_of_entry(kind), kind.__name__
    if not isinstance(kind.name, str) or not NAME.fullmatch(kind.name):
        yield _problem(place, f"{title} with the name {kind.name!r}", "a name of a-z, 0-9 and _, a letter first")
        return
    own = _registries_of(kind, registries)
    if not own:
        contracts = ", ".join(registry.contract.__name__ for registry in registries)
        yield _problem(place, f"{title}, which is derived from no contract", f"one of {contracts}")
    if not (isinstance(kind.Options, type) and issubclass(kind.Options, Section)):
        yield _problem(place, f"{title}.Options, which is {kind.Options!r}", "a class derived from Section")
    for registry in own:
        yield from _unlike_contract(kind, registry.contract, place)


def _unlike_contract(kind: type[Entry], contract: type[Entry], place: str) -> Iterator[Problem]:
    """Methods and attributes of an entry that its contract does not allow."""
    title = kind.__name__
    for name, method in abstract_methods(contract).items():
        if getattr(kind, name) is method:
            expected = f"a method {name}{_parameters(_function(method))} of its own, as {contract.__name__} says"
            yield _problem(place, f"{title} without {name}", expected)
    for name, method in inspect.getmembers(contract, inspect.isfunction):
        own = getattr(kind, name)
        if name.startswith("_") or own is method or not inspect.isfunction(own):
            continue
        try:
            inspect.signature(own).bind(*inspect.signature(method).parameters)
        except TypeError:
            yield _problem(place, f"{title}.{name}{_parameters(own)}", f"{name}{_parameters(method)}")
    for name, wanted_type in _attributes(contract):
        value = getattr(kind, name)
        try:
            TypeAdapter(wanted_type).validate_python(value)
        except ValidationError as error:
            yield _problem(place, f"{title}.{name} = {value!r}", _type_words(error, wanted_type))
        except PydanticSchemaGenerationError:  # not of a kind that can be checked
            continue


def abstract_methods(contract: type[Entry]) -> dict[str, Any]:
    """Methods and properties of a contract that every entry must have: those that raise NotImplementedError."""
    members = inspect.getmembers(contract, lambda value: inspect.isfunction(value) or isinstance(value, property))
    return {name: value for name, value in members if "NotImplementedError" in _function(value).__code__.co_names}


def _function(value: Any) -> FunctionType:
    function = value.fget if isinstance(value, property) else value
    assert isinstance(function, FunctionType), "methods of a contract are Python functions"
    return function


def _parameters(function: Callable[..., Any]) -> str:
    return f"({', '.join(inspect.signature(function).parameters)})"


def _attributes(contract: type[Entry]) -> Iterator[tuple[str, Any]]:
    """Class attributes of a contract with their types."""
    for name, hint in get_type_hints(contract).items():
        if get_origin(hint) is ClassVar and name not in _CHECKED:
            yield name, get_args(hint)[0]


def _type_words(error: ValidationError, wanted: Any) -> str:
    first = error.errors(include_url=False)[0]
    return f"{str(wanted).replace('typing.', '')} ({first['msg']})"


def _registries_of(kind: type[Entry], registries: Sequence[Registry[Any]]) -> list[Registry[Any]]:
    return [registry for registry in registries if issubclass(kind, registry.contract)]


def _line_of(kind: type[Entry]) -> str:
    return place_of_entry(kind).rpartition(":")[2]


def _problem(place: str, found: str, expected: str) -> Problem:
    return Problem("", f"{KEY}: {place}", found, expected)
