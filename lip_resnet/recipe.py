"""YAML files and command-line overrides to a ``Config``, strictly: every refusal is one line, with key and remedy."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lip_resnet.config import Config, InputError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys and reads 1e-4 as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{source}:{where} {problem}") from None
    except (ValueError, RecursionError) as error:  # such as a date that is none, or nesting without end
        raise InputError(f"{source}: not a YAML recipe: {error}") from None


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a recipe and apply ``section.key=value`` overrides, whose values are YAML too.

    Raises:
        InputError: one line naming file, key, what was given, what is allowed, and the nearest valid key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: cannot read the recipe: {reason}") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        given = "an empty file" if tree is None else f"a {type(tree).__name__}"
        raise InputError(f"{path}: {given}; a recipe is a mapping of {', '.join(Config.model_fields)}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Validate a mapping, such as the config stored in a checkpoint; ``source`` names it in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error.errors()[0])}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise InputError(f"override {override!r}: it must be section.key=value, such as optim.lr=0.05")
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise InputError(f"override {override!r}: {key} is not a section")
    tree[keys[-1]] = _parse_yaml(value, f"override {override!r}")


def _explain(error: ErrorDetails) -> str:
    """pydantic's account of one error as half a line: key, what was given, what is allowed."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        section = Config
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        allowed = list(section.model_fields)
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        prefix = ".".join([*location[:-1], ""])
        hint = f"did you mean {prefix}{near[0]}?" if near else f"allowed: {', '.join(allowed)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    given = repr(error["input"])
    given = given if len(given) < 80 else given[:77] + "..."
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(str(error["input"]), re.findall(r"'([^']*)'", message), n=1)
        message += f"; did you mean {near[0]}?" if near else ""
    return f"{key}: given {given} ({type(error['input']).__name__}); {message[0].lower()}{message[1:]}"
