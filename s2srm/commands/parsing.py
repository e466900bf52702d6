"""Recipe file + dotted flags -> a config dataclass, or a UserError that names the key.

jsonargparse does the parsing, the typing and --help. What is added here: shipped recipes by name,
the nearest valid key for an unknown one, and messages of one line. No torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from s2srm.bounds import rules_of
from s2srm.errors import UserError, did_you_mean

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

_OPTION = re.compile(r"--[a-z][\w.]*\+?(=|$)")
"""What looks like an option: no value, but for settings that take any text, and after `=`."""

Config = TypeVar("Config")
Fields = dict[str, Any]
"""Dotted key -> annotation, for every setting of a dataclass."""


def nearest_key(word: str, valid: Sequence[str]) -> str:
    """`did_you_mean`, where a key in a group is near to its own name without the group's."""
    key = next((key for key in valid if key.endswith(f".{word}")), word)
    return did_you_mean(key, valid, cutoff=0.5)


def parse(
    cls: type[Config], argv: Sequence[str], command: str, summary: str, texts: Sequence[str] = ()
) -> Config:
    """The command's config from its arguments: defaults < --config files < dotted flags.

    texts: settings whose value is whatever follows, also where that looks like an option. Raises
    UserError for an unknown key, a value of another type, a --config that is neither a file nor the
    name of a shipped recipe, or YAML that cannot be read. Exits 0 after --help.
    """
    arguments = normalise(argv, cls, texts)
    parser = build_parser(cls, command, summary)
    try:
        values = parser.parse_args(arguments).as_dict()
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_line(str(error), fields_of(cls))) from error
    pairs = (argument[2:].partition("=") for argument in arguments)
    given = {key: value for key, _, value in pairs}
    return _build(cls, values, given)


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
    annotations = fields_of(cls, with_bounds=True)
    for action in parser._actions:
        rules = dict.fromkeys(rules_of(annotations.get(action.dest)))
        if rules and action.help:
            action.help += f" Must {' and '.join(rules)}."
    return parser


def recipe_names(command: str | None = None) -> list[str]:
    """Names of the shipped recipes, or of those for one command."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if command is None:
        return names
    exact = [name for name in names if name.endswith(f"-{command}")]
    return [name for name in exact if command != "rm" or not name.endswith("-scalar-rm")]


def fields_of(cls: Any, prefix: str = "", *, with_bounds: bool = False) -> Fields:
    """Every dotted key of a config dataclass, groups included, with its annotation.

    with_bounds: as `Annotated`, where it is.
    """
    found: Fields = {}
    hints = typing.get_type_hints(cls, include_extras=with_bounds)
    for field in dataclasses.fields(cls):
        key, annotation = prefix + field.name, hints[field.name]
        found[key] = annotation
        group = _dataclass_in(annotation)
        if group is not None:
            found |= fields_of(group, f"{key}.", with_bounds=with_bounds)
    return found


def normalise(argv: Sequence[str], cls: type, texts: Sequence[str] = ()) -> list[str]:
    """Every setting as one `--key=value`, so that a value may begin with a dash.

    `--switch` alone becomes `--switch=true`, a --config the path of a checked file.
    """
    known = fields_of(cls)
    free = [key for key, annotation in known.items() if typing.get_origin(annotation) is dict]
    rest = list(reversed(argv))
    done: list[str] = []
    while rest:
        argument = rest.pop()
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument == "-h" or (not equals and key.split(".")[-1] in ("help", "print_config")):
            done.append(argument)
            continue
        if not argument.startswith("--"):
            raise UserError(
                f"unexpected argument {argument!r}: a setting is --key value, a list is one value "
                "as in --key '[a, b]', and a text with spaces needs quotes"
            )
        in_mapping = any(key.startswith(f"{group}.") for group in free)
        if key.removesuffix("+") not in known and key != "config" and not in_mapping:
            raise UserError(f"unknown option --{key}{nearest_key(key, [*known, 'config'])}")
        if not equals:
            if rest and (key in texts or not _OPTION.match(rest[-1])):
                value = rest.pop()
            elif known.get(key) is bool:
                value = "true"
            else:
                what = "the path of a recipe" if key == "config" else "its value"
                before = f" before {rest[-1]} (or is that it: --{key}={rest[-1]}?)" if rest else ""
                raise UserError(f"--{key}: {what} is missing{before}")
        if key == "config":
            value = str(_recipe(value, cls))
        elif _dataclass_in(known.get(key)) is not None and value != "null" and value[:1] != "{":
            does = f"; did you mean --{key}.path?" if f"{key}.path" in known else ""
            raise UserError(f"--{key}: it has settings of its own, got {value!r}{does}")
        done.append(f"--{key}={value}")
    return done


def recipe_path(name: str) -> Path:
    """The file of a --config: a path, or the name of a shipped recipe. UserError if neither."""
    path = Path(name).expanduser()
    if not path.is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = recipe_names()
        raise UserError(
            f"--config: {name!r} is neither a file nor a shipped recipe"
            f"{did_you_mean(name, known, cutoff=0.5) or '; recipes: ' + ', '.join(known)}"
        )
    return path


def _recipe(name: str, cls: type) -> Path:
    path = recipe_path(name)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected settings as `key: value`, got {values!r:.60}")
    _check_keys(values, fields_of(cls), str(path))
    return path


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own loaders keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for (key, _), i in zip(node.value, range(len(keys)), strict=True):
            if key.value in keys[:i] and key.value != "<<":
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _check_keys(values: Mapping[Any, Any], known: Fields, where: str, prefix: str = "") -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest_key(key, list(known))}")
        if _dataclass_in(known[key]) is None:
            if value is None and not _optional(known[key]):
                wanted = _type_name(known[key])
                raise UserError(f"{where}: {key}: expected {wanted}, got null (nothing after it)")
            continue
        if isinstance(value, Mapping):
            _check_keys(value, known, where, f"{key}.")
        elif value is not None or not _optional(known[key]):
            raise UserError(f"{where}: {key}: expected settings as `key: value`, got {value!r}")


def _build(cls: Any, values: Mapping[str, Any], given: Mapping[str, str], prefix: str = "") -> Any:
    """The dataclass from parsed values.

    null is refused where the type does not allow it, which jsonargparse lets through. A text that
    YAML takes for null (`---`, `~`) is a text, except for the word itself. given: flag -> value.
    """
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        key, annotation = f"{prefix}{field.name}", hints[field.name]
        value, group = values[field.name], _dataclass_in(hints[field.name])
        if value is None and str in typing.get_args(annotation):
            value = None if given.get(key) == "null" else given.get(key)
        if value is None and not _optional(annotation):
            raise UserError(f"{key}: expected {_type_name(annotation)}, got null")
        if group is not None and value is not None:
            if not isinstance(value, Mapping):
                raise UserError(f"{key}: expected settings as `key: value`, got {value!r}")
            value = _build(group, value, given, f"{key}.")
        found[field.name] = value
    return cls(**found)


def _one_line(message: str, known: Fields) -> str:
    """jsonargparse's message as `key: expected type, got value`."""
    flat = " ".join(message.split())
    keys: list[str] = re.findall(r'Parser key "([\w.]+)"', message)
    values: list[str] = re.findall(r"(?:Got|Given) value: (.*)", message)
    # A setting inside an optional group is reported as a chain of keys, outermost first.
    key = ".".join(keys)
    if not values or key not in known:
        return flat
    got = "null" if values[0] == "None" else repr(values[0])
    return f"{key}: expected {_type_name(known[key])}, got {got}{_example(key, known[key])}"


def _example(key: str, annotation: Any) -> str:
    """How a list or mapping is written on the command line."""
    if typing.get_origin(annotation) is dict:
        return f" (as in --{key}.NAME VALUE)"
    return f" (as in --{key} '[a, b]')" if typing.get_origin(annotation) is list else ""


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
    if annotation is bool:
        return "true or false"
    if _is_union(annotation):
        return " or ".join(_type_name(option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(annotation))
    plain = isinstance(annotation, type) and typing.get_origin(annotation) is None
    return annotation.__name__ if plain else str(annotation)
