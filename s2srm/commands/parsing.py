"""Recipe file + dotted flags -> a config dataclass, or a UserError that names the key.

jsonargparse does the parsing, the typing and --help. What is added here: shipped recipes by name,
the nearest valid key for an unknown one, and messages of one line. No torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from s2srm.errors import UserError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

Config = TypeVar("Config")
Fields = dict[str, Any]
"""Dotted key -> annotation, for every setting of a dataclass."""


def nearest(word: str, valid: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or the empty string where nothing is near."""
    matches = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def parse(cls: type[Config], argv: Sequence[str], command: str, summary: str) -> Config:
    """The command's config from its arguments: defaults < --config files < dotted flags.

    Raises UserError for an unknown key, a value of another type, a --config that is neither a file
    nor the name of a shipped recipe, or YAML that cannot be read. Exits 0 after --help.
    """
    arguments = _resolve_recipes(list(argv), cls)
    _check_flags(arguments, cls)
    arguments = _bare_switches(arguments, cls)
    parser = build_parser(cls, command, summary)
    try:
        values = parser.parse_args(arguments).as_dict()
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_line(str(error), fields_of(cls))) from error
    return _build(cls, values)


def build_parser(cls: type, command: str, summary: str) -> jsonargparse.ArgumentParser:
    """A parser whose options are the fields of the dataclass, with their doc comments as help."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"s2srm {command}",
        description=summary,
        exit_on_error=False,
        default_env=False,
        usage=f"s2srm {command} [--config RECIPE.yaml] [--key.key value ...]",
    )
    parser.add_argument(
        "--config",
        action="config",
        help=f"a YAML file, or a shipped recipe: {', '.join(recipe_names(command))}",
    )
    parser.add_class_arguments(cls, None)
    return parser


def recipe_names(command: str | None = None) -> list[str]:
    """Names of the shipped recipes, or of those for one command."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if command is None:
        return names
    exact = [name for name in names if name.endswith(f"-{command}")]
    return [name for name in exact if command != "rm" or not name.endswith("-scalar-rm")]


def fields_of(cls: Any, prefix: str = "") -> Fields:
    """Every dotted key of a config dataclass, groups included, with its annotation."""
    found: Fields = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, annotation = prefix + field.name, hints[field.name]
        found[key] = annotation
        group = _dataclass_in(annotation)
        if group is not None:
            found |= fields_of(group, f"{key}.")
    return found


def _resolve_recipes(arguments: list[str], cls: type) -> list[str]:
    """Replace every --config value by the path of a checked file."""
    resolved: list[str] = []
    expect = False
    for argument in arguments:
        if expect:
            argument, expect = str(_recipe(argument, cls)), False
        elif argument == "--config":
            expect = True
        elif argument.startswith("--config="):
            argument = f"--config={_recipe(argument.partition('=')[2], cls)}"
        resolved.append(argument)
    if expect:
        raise UserError("--config: the path of a recipe is missing")
    return resolved


def _recipe(name: str, cls: type) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = recipe_names()
        raise UserError(
            f"--config: {name!r} is neither a file nor a shipped recipe"
            f"{nearest(name, known) or '; recipes: ' + ', '.join(known)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected settings as `key: value`, got {values!r:.60}")
    _check_keys(values, fields_of(cls), str(path))
    return path


def _check_keys(values: Mapping[Any, Any], known: Fields, where: str, prefix: str = "") -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, list(known))}")
        if _dataclass_in(known[key]) is None:
            continue
        if isinstance(value, Mapping):
            _check_keys(value, known, where, f"{key}.")
        elif value is not None or not _optional(known[key]):
            raise UserError(f"{where}: {key}: expected settings as `key: value`, got {value!r}")


def _check_flags(arguments: Sequence[str], cls: type) -> None:
    known = fields_of(cls)
    free = [key for key, annotation in known.items() if typing.get_origin(annotation) is dict]
    options = [*known, "config", "help", "print_config"]
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        key = argument[2:].partition("=")[0]
        # An optional group has a help of its own.
        if key.removesuffix(".help") in options or any(
            key.startswith(f"{group}.") for group in free
        ):
            continue
        raise UserError(f"unknown option --{key}{nearest(key, options)}")


def _build(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass from parsed values; null is refused where the type does not allow it, which
    jsonargparse lets through."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        key, annotation = f"{prefix}{field.name}", hints[field.name]
        value, group = values[field.name], _dataclass_in(hints[field.name])
        if value is None and not _optional(annotation):
            raise UserError(f"{key}: expected {_type_name(annotation)}, got null")
        if group is not None and value is not None:
            if not isinstance(value, Mapping):
                raise UserError(f"{key}: expected settings as `key: value`, got {value!r}")
            value = _build(group, value, f"{key}.")
        found[field.name] = value
    return cls(**found)


def _bare_switches(arguments: Sequence[str], cls: type) -> list[str]:
    """`--overwrite` means `--overwrite true`."""
    known = fields_of(cls)
    completed: list[str] = []
    for i, argument in enumerate(arguments):
        completed.append(argument)
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if known.get(argument.removeprefix("--")) is bool and following.startswith("--"):
            completed.append("true")
    return completed


def _one_line(message: str, known: Fields) -> str:
    """jsonargparse's message as `key: expected type, got value`."""
    flat = " ".join(message.split())
    keys: list[str] = re.findall(r'Parser key "([\w.]+)"', message)
    values: list[str] = re.findall(r"(?:Got|Given) value: (.*)", message)
    # A setting inside an optional group is reported as a chain of keys, outermost first.
    key = ".".join(keys)
    if not values or key not in known:
        return flat
    return f"{key}: expected {_type_name(known[key])}, got {values[0]!r}"


def _dataclass_in(annotation: Any) -> Any | None:
    """The dataclass of `X` or `X | None`, if it is one."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _optional(annotation: Any) -> bool:
    return _is_union(annotation) and type(None) in typing.get_args(annotation)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _type_name(annotation: Any) -> str:
    """int, `int or null`, `one of a, b`, tuple[float, float]."""
    if annotation is type(None):
        return "null"
    if _is_union(annotation):
        return " or ".join(_type_name(option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(annotation))
    plain = isinstance(annotation, type) and typing.get_origin(annotation) is None
    return annotation.__name__ if plain else str(annotation)
