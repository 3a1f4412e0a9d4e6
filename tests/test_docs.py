"""The generated parts of the documentation are current; nothing is measured. docs/paper.md: test_reproduce_paper.py."""

import sys

import pytest
from conftest import ROOT

from lip_resnet.config import InputError

sys.path.insert(0, str(ROOT / "scripts"))
import make_docs


@pytest.mark.parametrize("page", [page for page in make_docs.PAGES if page != "docs/paper.md"])
def test_generated_parts_are_current(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert make_docs.refresh(text, make_docs.PAGES[page]) == text, "refresh: python scripts/make_docs.py"


def test_a_stale_part_is_noticed():
    sections = make_docs.PAGES["docs/layers.md"]
    page = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
    stale = page.replace("| `softpool` ", "| `hardpool` ")
    assert stale != page
    assert make_docs.refresh(stale, sections) == page
    with pytest.raises(InputError, match="zoo:begin"):
        make_docs.refresh("nothing", sections)
