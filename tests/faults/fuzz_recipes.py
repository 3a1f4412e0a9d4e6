"""Fuzzed recipes, and what the config loader makes of each:  fuzz_recipes.py FOLDER COUNT

Real recipes with keys removed, renamed, repeated and given values of every kind; real recipes as text, cut and spliced;
random YAML; random bytes; random overrides. Every one must end as a valid config or in one clear line.
The command examines COUNT of them and prints the outcomes as a line of JSON.
"""

import copy
import json
import re
import resource
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from processes import ROOT

from lip_resnet.config import Config, InputError
from lip_resnet.recipe import load_recipe, parse_recipe

MEMORY_MB = 256
"""Peak memory that the recipes may take."""
TEXTS = [
    path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if path.parent.name != "studies"
]
TREES = [yaml.safe_load(text) for text in TEXTS]
KEYS = [(section, key) for section, kind in Config.model_fields.items() for key in kind.annotation.model_fields]
INDICATORS = "{}[]:,-?#&*!|>'\"%@`\\ \n\t~=<"
"""Characters with a meaning in YAML."""


@dataclass(frozen=True)
class Case:
    """A recipe file and the overrides that it is read with."""

    content: bytes
    overrides: tuple[str, ...] = ()
    keys: frozenset[str] = field(default=frozenset())
    """The names that were touched; a refusal must say one of them, or a line. Empty: the text as a whole is odd."""


# Values that YAML's safe loader builds beside plain ones, or fails on.
_TAGGED = [
    *("!!timestamp 2001-13-40", "!!binary '%%%'", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1, a: 2]"),
    *("!!int x", "2001-01-01", "2001-01-01T00:00:00Z", "0x" + "f" * 5000, "9" * 5000, "190:20:30", "0b11"),
    *("1_000", "!!float x", "!!binary AAEC", "!!null ''", "!!bool maybe", "!!python/name:os.system", "!local x"),
    *(".inf", "-.inf", ".nan", "!!str [a]", "!!map 3", "!!seq {a: 1}", "&a [*a]", "*nowhere", "1e999", "<<"),
    *("{<<: 3}", "{<<: {a: 1}}", "{? [a] : 1}", "{1: 2}", "{null: 1}", "{true: 1}", "{1.5: 1}", "'\\0'"),
    *('"\\0"', '"\\ud800"', '"a\\nb"', '"\\u2028"'),
]

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=6),
    st.dates(),
    st.datetimes(),
    st.sampled_from(["lip_resnet50", "sgd", "folder", "auto", "1e-4", "on", "", " ", "../..", "0", "nan", "inf"]),
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
)
_entries = st.sampled_from(KEYS)
_names = st.text(max_size=12) | st.sampled_from([key for _, key in KEYS])


@st.composite
def trees(draw: st.DrawFn) -> Case:
    """A real recipe with one to three keys removed, renamed, added or given another value."""
    tree, touched = copy.deepcopy(draw(st.sampled_from(TREES))), set()
    for _ in range(draw(st.integers(1, 3))):
        section, key = draw(_entries)
        change = draw(st.sampled_from(["drop", "rename", "value", "value", "value", "add", "section"]))
        inside = tree.get(section)
        touched |= {section, key}
        if change == "section" or not isinstance(inside, dict):
            tree[section] = draw(_values)
        elif change == "drop":
            inside.pop(key, None)
        elif change == "value":
            inside[key] = draw(_values)
        else:
            name = draw(_names)
            inside[name] = inside.pop(key, None) if change == "rename" else draw(_values)
    text = yaml.safe_dump(tree, allow_unicode=draw(st.booleans()), default_flow_style=draw(st.booleans()))
    return Case(text.encode(), keys=frozenset(touched))


@st.composite
def tagged(draw: st.DrawFn) -> Case:
    """A real recipe in which one value is a YAML oddity."""
    tree = copy.deepcopy(draw(st.sampled_from(TREES)))
    section, key = draw(_entries)
    tree[section][key] = "PLACE"
    return Case(yaml.safe_dump(tree).replace("PLACE", draw(st.sampled_from(_TAGGED))).encode())


@st.composite
def spliced(draw: st.DrawFn) -> Case:
    """A real recipe's text with a stretch cut out and something else put in."""
    text = draw(st.sampled_from(TEXTS))
    start = draw(st.integers(0, len(text)))
    end = min(len(text), start + draw(st.integers(0, 80)))
    other = draw(st.sampled_from(TEXTS))
    stretch = draw(st.integers(0, len(other)))
    put = draw(st.text(INDICATORS, max_size=8) | st.text(max_size=8) | st.just(other[stretch : stretch + 60]))
    return Case((text[:start] + put + text[end:]).encode())


noise = st.builds(
    Case,
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(str.encode),
        st.text(INDICATORS + "ab01", max_size=60).map(str.encode),
        st.integers(1, 30).map(lambda depth: b"[" * 1000 * depth),
    ),
)


@st.composite
def overridden(draw: st.DrawFn) -> Case:
    """A real recipe and overrides that may be none."""
    overrides, touched = [], set()
    for _ in range(draw(st.integers(1, 3))):
        section, key = draw(_entries)
        value = yaml.safe_dump(draw(_values), default_flow_style=True, width=1 << 20).removesuffix("\n...\n").strip()
        overrides.append(
            draw(st.sampled_from([f"{section}.{key}={value}"] * 4 + [value, f"{key}={value}", f"{section}.{value}"]))
        )
        touched |= {section, key, "override"}
    return Case(draw(st.sampled_from(TEXTS)).encode(), tuple(overrides), frozenset(touched))


cases = st.one_of(trees(), trees(), tagged(), spliced(), overridden(), noise)


def examine(case: Case, path: Path) -> str:
    """Load a case as a recipe: "valid" or "refused".

    Raises:
        AssertionError: the config does not survive its own dump, or the refusal is not one line that names the file
            (or the override) and a key that was touched.
    """
    path.write_bytes(case.content)
    try:
        config = load_recipe(path, case.overrides)
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, f"not one line: {message!r}"
        assert message.isprintable(), f"not printable: {message!r}"
        assert len(message) < 1000, f"{len(message)} characters: {message[:200]}"
        assert message.startswith((str(path), "override")), f"names no file: {message}"
        named = any(key in message for key in case.keys) or re.search(r": line \d+ ", message)
        assert not case.keys or named, f"names no line and none of {set(case.keys)}: {message}"
        return "refused"
    assert parse_recipe(yaml.safe_load(config.dump()), "its dump") == config, f"changed by its own dump: {config}"
    return "valid"


def fuzz(path: Path, count: int) -> dict[str, object]:
    """Examine ``count`` cases, written to ``path`` one after the other, 500 for each seed; what became of them.

    Memory is that beyond the first 20 cases, when hypothesis has built its tables.
    """
    became: Counter[str] = Counter()
    failed: list[str] = []
    first_peak = 0
    for number in range(0, count, 500):

        @seed(number)
        @settings(
            max_examples=min(500, count - number), database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(cases)
        def examine_one(case: Case) -> None:
            nonlocal first_peak
            if sum(became.values()) <= 20:
                first_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                became[examine(case, path)] += 1
            except Exception as error:  # anything else that the loader raises is a defect
                became["defect"] += 1
                failed.append(f"{type(error).__name__}: {error} {case}"[:600])

        examine_one()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first_peak) >> 10
    if memory > MEMORY_MB:
        failed.append(f"they took {memory} MB")
    return {"cases": sum(became.values()), "became": dict(became.most_common()), "failed": failed, "memory_mb": memory}


if __name__ == "__main__":
    print(json.dumps(fuzz(Path(sys.argv[1]) / "recipe.yaml", int(sys.argv[2]))))
