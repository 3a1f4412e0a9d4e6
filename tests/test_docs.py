"""The README keeps its promises: its generated parts are current, its files and commands exist."""

import re
import sys

import pytest
import timm
from conftest import ROOT

import lip_resnet  # noqa: F401
from lip_resnet.config import InputError
from lip_resnet.recipe import load_config

sys.path.insert(0, str(ROOT / "scripts"))
import update_readme

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_parts_are_current():
    assert update_readme.refresh(README) == README


def test_a_stale_part_is_noticed():
    stale = README.replace("| `softpool` |", "| `hardpool` |")
    assert stale != README
    assert update_readme.refresh(stale) == README
    with pytest.raises(InputError, match="zoo:begin"):
        update_readme.refresh("nothing")


def test_recipes_and_scripts_exist():
    for name in set(re.findall(r"configs/[\w/]+\.yaml", README)):
        load_config(ROOT / name)
    for name in set(re.findall(r"(?<![\w/.])(?:scripts/)?\w+\.py\b", README)):
        assert list(ROOT.rglob(name)), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_overrides_are_keys():
    config = load_config(ROOT / "configs" / "digits" / "resnet50.yaml").model_dump()
    for section, key in set(re.findall(r"\b(data|optim|train)\.(?!py\b)(\w+)[=`]", README)):
        assert key in config[section], f"{section}.{key}"


def test_models_named_exist():
    for name in set(re.findall(r"\blip_(?:resnet|densenet)\d+\b", README)):
        assert timm.is_model(name), name
