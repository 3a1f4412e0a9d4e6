"""The config loader under fuzz: every recipe ends as a valid config or in one clear line."""

import fuzz_recipes
import pytest
from fuzz_recipes import Case, examine
from hypothesis import HealthCheck, given, settings

from lip_resnet import recipe
from lip_resnet.config import InputError

# The same cases every time, and no folder of its own.
FUZZ = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
MINIMAL = "model: {name: resnet50}\ndata: {root: x, batch_size: 8}\noptim: {lr: 0.1}\ntrain: {epochs: 2}\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "recipe.yaml"


@settings(max_examples=300, **FUZZ)
@given(case=fuzz_recipes.cases)
def test_fuzzed_recipes(path, case):
    examine(case, path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('data."a\nb"=1', r'data."a\nb": unknown key'),
        ('model.args={"\\u2028": {"\\u2028": 1, 2: 3}}', "model.args"),
        ("model.args.x=.nan", "model.args.x"),
        ("model.args.x={1: 2}", "model.args.x"),
        ("data.interpolation=0x" + "f" * 5000, "data.interpolation: a whole number of 20000 bits"),
        ("data.flip=!!bool maybe", "a value that cannot be read"),
        ("data.flip=!!timestamp x", "could not determine a constructor"),
        ("data.flip=!!int ''", "a value that cannot be read"),
        ("data.flip=!!binary AAEC", "could not determine a constructor"),
        ("data.flip=2001-01-01", "data.flip: given '2001-01-01'"),
        ("model.args.x=&a [*a]", "model.args.x: more than 10,000 values"),
        ("model.args.x=" + "[" * 30 + "]" * 30, "nested more than 20 deep"),
    ],
)
def test_refusals_that_fuzzing_has_found(path, override, words):
    path.write_text(MINIMAL)
    with pytest.raises(InputError) as caught:
        recipe.load_config(path, [override])
    message = str(caught.value)
    assert words in message
    assert message.isprintable()


def test_a_few_lines_that_stand_for_a_billion(path):
    rows = [f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]" for number in range(1, 10)]
    examine(Case("\n".join(["a0: &a0 x", *rows]).encode()), path)


def test_the_examination_notices(path, monkeypatch):
    """Planted: refusals as they come, with whatever was in the file."""
    odd = Case((MINIMAL + '"a\\nb": 1\n').encode())
    assert examine(odd, path) == "refused"
    monkeypatch.setattr(recipe, "_refusal", InputError)
    with pytest.raises(AssertionError, match="not one line"):
        examine(odd, path)
    monkeypatch.setattr(recipe, "_refusal", lambda _: InputError(f"{path}: something is wrong"))
    with pytest.raises(AssertionError, match="names no line"):
        examine(Case((MINIMAL + "modle: 1\n").encode(), keys=frozenset({"modle"})), path)
    monkeypatch.setattr(recipe, "parse_recipe", lambda tree, source: tree["nothing"])
    with pytest.raises(KeyError):
        examine(Case(MINIMAL.encode()), path)
