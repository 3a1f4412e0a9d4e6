"""The pages of docs/ name recipes and scripts that exist."""

import re

import pytest
from conftest import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"configs/[\w/*]+\.yaml", text)):
        assert list(ROOT.glob(name)), name
    for name in set(re.findall(r"(?<![\w/.])(?:scripts/|tests/)?(?:\w+/)*\w+\.(?:sbatch|sh|py)\b", text)):
        assert list(ROOT.rglob(name)) or name == "lars_util.py", name  # lars_util.py is the TPU code's


def test_scaling_is_short():
    assert (ROOT / "docs" / "scaling.md").stat().st_size <= 4096
