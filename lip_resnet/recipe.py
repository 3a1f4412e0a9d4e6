"""YAML files and command-line overrides to a ``Config``. Every error is one line with the key and what is allowed."""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lip_resnet.config import Config, DetectionConfig, Recipe, Section
from lip_resnet.config.fields import is_section
from lip_resnet.config.optim import optimizer_problem
from lip_resnet.config.recipe import effects_of
from lip_resnet.errors import InputError

T = TypeVar("T", bound=Section)
R = TypeVar("R", bound=Recipe)
SCHEMAS: dict[str, type[Recipe]] = {"classification": Config, "detection": DetectionConfig}
"""The schema of each task, the value of a recipe's key ``task``; without that key it is a classification."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that also refuses duplicate keys, and reads 1e-4 as a number (YAML 1.1 reads a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain string", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# Plain values only: no key takes dates, bytes or sets, and a written config could not hold them.
_PLAIN = {None, *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))}
_Loader.yaml_constructors = {tag: make for tag, make in _Loader.yaml_constructors.items() if tag in _PLAIN}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: executes nothing
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise _refusal(f"{source}:{where} {problem}") from error
    # PyYAML raises these for values that do not fit their tag (!!bool maybe) and for very deep nesting.
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(f"{source}: not a YAML recipe: a value that cannot be read: {error}") from error


def _refusal(message: str) -> InputError:
    """An InputError of one line of printable characters, at most 900, whatever the file holds."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message[:900])
    return InputError(text if len(message) <= 900 else f"{text}...")


def _check_plain(tree: Any) -> None:
    """Limit the size of a tree before pydantic reads it: with anchors (``&a [*b, *b]``) few lines can mean billions.

    Raises:
        ValueError: more than 10,000 values, nested more than 20 deep, an integer of more than 64 bits, or Python's None
            for YAML's null.
    """
    todo: list[tuple[Any, tuple[Any, ...]]] = [(tree, ())]
    seen = 0
    while todo:
        value, path = todo.pop()
        seen += 1
        where = ".".join(str(part)[:100] for part in path[:3])
        if seen > 10_000 or len(path) > 20:
            raise ValueError(f"{where}: more than 10,000 values, or nested more than 20 deep; a recipe has some dozens")
        if isinstance(value, dict):
            todo += [(item, (*path, key)) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(item, (*path, index)) for index, item in enumerate(value)]
        elif isinstance(value, int) and value.bit_length() > 64:
            raise ValueError(f"{where}: a whole number of {value.bit_length()} bits; 64 are allowed")
        elif value == "None":
            raise ValueError(f"{where}: given None, which YAML reads as a word; write null for no value")


_CONFIGS = Path(__file__).with_name("configs")


def shipped_recipes() -> dict[str, Path]:
    """Name, such as ``imagenet/lip_resnet50_step90``, to file of the recipes that come with the package."""
    paths = {path.relative_to(_CONFIGS): path for path in sorted(_CONFIGS.rglob("*.yaml"))}
    return {name.with_suffix("").as_posix(): path for name, path in paths.items() if name.parts[0] != "studies"}


def find_recipe(path: str | Path) -> Path:
    """The file that ``path`` names, with or without ``.yaml``; where there is none, the shipped one of that name.

    A shipped recipe or study is named ``imagenet/lip_resnet50_step90`` or ``configs/imagenet/lip_resnet50_step90``. A
    name that is neither a file nor shipped is returned as it is.
    """
    for candidate in (str(path), f"{path}.yaml"):
        if os.path.isfile(candidate):
            return Path(candidate)
    shipped = f"{_CONFIGS}/{_recipe_name(path)}.yaml"
    return Path(shipped if os.path.isfile(shipped) else path)


def _recipe_name(path: str | Path) -> str:
    return Path(path).as_posix().removeprefix("configs/").removesuffix(".yaml")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """As ``load_recipe``, of a classification.

    Raises:
        InputError: as ``load_recipe``; or it is a recipe of another task.
    """
    return of_task(load_recipe(path, overrides), Config, str(path))


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, found by ``find_recipe``, and apply ``section.key=value`` overrides, whose values are YAML.

    Raises:
        InputError: one line naming file, key, what was given, what is allowed, and the nearest valid key.
    """
    tree, source = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    for key in ("data.train", "data.val"):  # of a pattern without quotes the shell makes many overrides
        if sum(override.startswith(f"{key}=") for override in overrides) > 1:
            raise _refusal(f"{key} is given more than once; quote the pattern: '{key}=imagenet-{{0000..1023}}.tar'")
    config = parse_recipe(tree, source)
    # Not rules of the schema: checkpoints may hold such a schedule, or be of another version of timm.
    if problem := optimizer_problem(config.optim.name):
        raise _refusal(f"{source}: optim.name: {problem}")
    schedule = config.data.size_schedule if isinstance(config, Config) else ()
    if never := [epoch for epoch, _ in schedule if epoch >= config.train.epochs]:
        raise _refusal(
            f"{source}: data.size_schedule changes at epoch {never[0]}, which is never reached; epochs count from 0 "
            f"and must be below train.epochs {config.train.epochs}"
        )
    return config


def of_task(recipe: Recipe, schema: type[R], source: str) -> R:
    """The recipe, if it is of the task of ``schema``; ``source`` names it in errors.

    Raises:
        InputError: it is not.
    """
    if isinstance(recipe, schema):
        return recipe
    given, allowed = (next(task for task, each in SCHEMAS.items() if each is kind) for kind in (type(recipe), schema))
    raise InputError(f"{source} is of task: {given}; here it must be of task: {allowed}")


def task_of(tree: Any) -> Any:
    """The task of a recipe before it is validated."""
    return tree.get("task", "classification") if isinstance(tree, dict) else "classification"


def read_tree(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read a YAML file, found by ``find_recipe``, without validation: its mapping, and its name for errors.

    Raises:
        InputError: the file cannot be read, or is not a mapping.
    """
    path = find_recipe(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a text file"
        if isinstance(error, FileNotFoundError):
            near = difflib.get_close_matches(_recipe_name(path), shipped_recipes(), n=3)
            reason += f"; shipped recipes with a similar name: {', '.join(near)}" if near else ""
        raise _refusal(f"{path}: cannot read the recipe: {reason}") from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        given = "an empty file" if tree is None else f"a {type(tree).__name__}"
        raise _refusal(f"{path}: {given}; a recipe is a mapping of {', '.join(Config.model_fields)}")
    return tree, str(path)


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """As ``parse_recipe``, of a classification.

    Raises:
        InputError: as ``parse_recipe``; or it is a recipe of another task.
    """
    return of_task(parse_recipe(tree, source), Config, source)


def parse_recipe(tree: dict[str, Any], source: str) -> Recipe:
    """``parse_section`` of a whole recipe by the schema of its task, such as the config stored in a checkpoint."""
    task = task_of(tree)
    if not isinstance(task, str) or task not in SCHEMAS:
        raise _refusal(f"{source}: task: given {str(task)[:80]!r}; it must be one of {', '.join(SCHEMAS)}")
    if isinstance(tree, dict) and task == "classification":  # not a key of Config: earlier versions did not have it
        tree = {key: value for key, value in tree.items() if key != "task"}
    return parse_section(tree, source, SCHEMAS[task])


def parse_section(tree: dict[str, Any], source: str, schema: type[T]) -> T:
    """Validate a mapping against a schema; ``source`` names it in errors.

    Raises:
        InputError: one line, as ``load_config``'s.
    """
    try:
        _check_plain(tree)
        return schema.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # A wrong name shows as two errors, an unknown key and a missing one: both are shown, the unknown key first.
        names = [each for kind in ("extra_forbidden", "missing") for each in errors if each["type"] == kind]
        lines = [_explain(each, schema) for each in names[:4] or errors[:1]]
        raise _refusal(f"{source}: {'; also '.join(lines)}") from error
    except ValueError as error:
        raise _refusal(f"{source}: {error}") from error


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set a key of a mapping of sections by ``section.key=value``, in place; the value is YAML.

    Raises:
        InputError: it has not this form.
    """
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise _refusal(f"override {override[:200]!r}: it must be section.key=value, such as optim.lr=0.05")
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise _refusal(f"override {override[:200]!r}: {key} is not a section")
    tree[keys[-1]] = _parse_yaml(value, f"override {override[:200]!r}")


def _explain(error: ErrorDetails, section: type[Section]) -> str:
    """A validation error as text: key, what was given, what is allowed."""
    location = [str(part)[:100] for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_allowed(location, section)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    given = repr(error["input"])
    given = f"{given if len(given) < 80 else given[:77] + '...'} ({type(error['input']).__name__})"
    indexed = any(isinstance(part, int) for part in error["loc"])
    if error["type"] == "missing" and not indexed:
        return f"{key}: missing; this key is required"
    if error["type"] in _SHAPES:
        key = ".".join(part for part in location if not part.isdigit())
        return f"{key}: given {given}; write it as {_example(location, section)}"
    if error["type"] == "literal_error":
        near = difflib.get_close_matches(str(error["input"]), re.findall(r"'([^']*)'", message), n=1)
        message += f"; did you mean {near[0]}?" if near else ""
    if str(error["input"]).lower() == "none":
        message += "; null is YAML's word for no value"
    return f"{key}: given {given}; {message[0].lower()}{message[1:]}"


_SHAPES = ("missing", "tuple_type", "too_long", "too_short", "dict_type", "model_type")
"""pydantic's errors on a value that is not the list or mapping that it must be, or one of another length."""


def _allowed(location: list[str], schema: type[Section]) -> str:
    """The key that an unknown one probably means, else all keys of its section."""
    parent: Any = schema
    for part in location[:-1]:
        parent = parent.model_fields[part].annotation
    allowed = list(parent.model_fields)
    if near := difflib.get_close_matches(location[-1], allowed, n=1):
        return f"did you mean {'.'.join([*location[:-1], near[0]])}?"
    elsewhere = [name for name in effects_of(schema) if name.endswith(f".{location[-1]}")]
    return f"did you mean {elsewhere[0]}?" if elsewhere else f"allowed: {', '.join(allowed)}"


def _example(location: list[str], schema: type[Section]) -> str:
    """The YAML of a list or mapping: the field's example, else its default; of a section, the keys it must have."""
    parent: Any = schema
    for part in location:
        field = parent.model_fields[part]
        parent = field.annotation
        if not is_section(parent):
            if field.is_required() and not field.examples:
                return f"{part}: ..."
            value = field.examples[0] if field.examples else field.default
            return f"{part}: {json.dumps(value).replace(chr(34), '')}"
    required = (f"{name}: ..." for name, field in parent.model_fields.items() if field.is_required())
    keys = f"{{{', '.join(required)}}}"
    return f"{location[-1]}: {keys}" if location else keys
