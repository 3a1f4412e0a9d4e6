"""Names of shards as brace patterns: imagenet-train-{0000..1023}.tar, {a,b}-{0..9}.tar."""

import re
from collections.abc import Iterable, Sequence

from lip_resnet.config import EvalDataConfig, InputError

_BRACES = re.compile(r"\{([^{}]*)\}")
_NESTED = re.compile(r"\{[^}]*\{")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NUMBERED = re.compile(r"(.*?)(\d+)([^\d]*)")
_TRAIN, _EVALUATION = (re.compile(rf"(?<![a-z])({words})(?![a-z])") for words in ("train", "val|valid|validation|test"))
_MOST = 1_000_000


def shard_names(config: EvalDataConfig, split: str) -> list[str] | None:
    """The shards of a split that ``data.train`` or ``data.val`` names, sorted; None: all in the split's own folder.

    Raises:
        InputError: not a pattern of tar files below ``data.root``; or both splits name the same shard, or each other's.
    """
    patterns = {"train": config.train, "val": config.val}
    names = {key: expand(each, f"data.{key}") for key, each in patterns.items() if each}
    if len(names) == 2:
        if shared := sorted(set(names["train"]) & set(names["val"])):
            raise InputError(
                f"data.val names {len(shared):,} shards that data.train names too, the first is {shared[0]}; the two "
                "splits must have different shards"
            )
        if _all_match(_EVALUATION, names["train"]) and _all_match(_TRAIN, names["val"]):
            raise InputError(
                f"data.train names {names['train'][0]} and data.val {names['val'][0]}: the shards of each other's split"
            )
    return names.get(split)


def _all_match(pattern: re.Pattern, names: list[str]) -> bool:
    other = _TRAIN if pattern is _EVALUATION else _EVALUATION
    return all(pattern.search(name) and not other.search(name) for name in names)


def expand(patterns: Sequence[str], key: str) -> list[str]:
    """Every name that patterns stand for, sorted.

    Args:
        key: names the patterns in errors.

    Raises:
        InputError: a pattern is malformed or names no tar file below the root, or a name is given twice.
    """
    names = [name for pattern in patterns for name in _expand(pattern, key)]
    for name in names:
        if name.startswith("/") or "://" in name or ".." in name.split("/") or not name.lower().endswith(".tar"):
            raise InputError(f"{key}: {name!r}: it must be a .tar file below data.root")
    twice = next((one for one, two in zip(sorted(names), sorted(names)[1:], strict=False) if one == two), None)
    if twice is not None:
        raise InputError(f"{key} names {twice} twice")
    return sorted(names)


def _expand(pattern: str, key: str) -> list[str]:
    if _NESTED.search(pattern):
        raise InputError(f"{key}: {pattern!r} has braces in braces, which are not expanded")
    done, todo = list[str](), [pattern]
    while todo:
        text = todo.pop()
        match = _BRACES.search(text)
        if match is None:
            if wrong := next((letter for letter in "{}*?[]" if letter in text), None):
                raise InputError(f"{key}: {pattern!r} has {wrong!r}; write braces such as {{0000..1023}} or {{a,b}}")
            done.append(text)
        else:
            for choice in _choices(match[1], pattern, key):
                todo.append(text[: match.start()] + choice + text[match.end() :])
        if len(done) + len(todo) > _MOST:
            raise InputError(f"{key}: {pattern!r} names more than {_MOST:,} shards")
    return done


def _choices(content: str, pattern: str, key: str) -> Iterable[str]:
    """What one pair of braces stands for: numbers of as many digits as the longer end, if one begins with a zero."""
    limits = _RANGE.fullmatch(content)
    if limits is None:
        if "," not in content:
            raise InputError(f"{key}: {pattern!r}: braces hold a range such as {{0000..1023}} or names such as {{a,b}}")
        return content.split(",")
    first, last = limits.groups()
    if int(last) < int(first) or int(last) - int(first) >= _MOST:
        raise InputError(f"{key}: {pattern!r}: the range {content} must rise, by less than {_MOST:,}")
    width = max(map(len, limits.groups())) if first.startswith("0") or last.startswith("0") else 0
    return (f"{number:0{width}}" for number in range(int(first), int(last) + 1))


def summarise(names: Iterable[str]) -> str:
    """Names of shards, for a message: those that differ in one number as a brace pattern; the first few."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        match = _NUMBERED.fullmatch(name)
        prefix, digits, end = match.groups() if match else (name, "", "")
        groups.setdefault((prefix, end), []).append(digits)
    texts = [
        f"{prefix}{{{each[0]}..{each[-1]}}}{end}" if len(each) > 1 else f"{prefix}{each[0]}{end}"
        for (prefix, end), each in groups.items()
    ]
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "") or "none"


def split_pattern(path: str) -> tuple[str, str] | None:
    """The root and the pattern of a path or URL of shards, such as DIR/val-{0..9}.tar; None for another path."""
    if not path.lower().endswith(".tar"):
        return None
    slash = path.partition("{")[0].rfind("/")
    return path[:slash] or "/" if slash >= 0 else ".", path[slash + 1 :]
