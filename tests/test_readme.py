"""The files, commands, keys and models that the README names exist."""

import re

import timm
from conftest import ROOT

import lip_resnet  # noqa: F401
from lip_resnet.recipe import load_config

README = (ROOT / "README.md").read_text(encoding="utf-8")


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
