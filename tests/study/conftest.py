"""Studies of stand-ins for train.py and eval.py."""

import shutil

import pytest
from helpers.studies import finish, make_stand_ins, write

from lip_resnet.study import cells, design


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """train.py and eval.py that answer at once, started without PyTorch."""
    root = make_stand_ins(tmp_path)
    monkeypatch.setattr(cells, "ROOT", root)
    plain = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    monkeypatch.setattr(cells, "_CHILD", plain)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    study = design.load_design(write(folder), output=folder / "out")
    design.write_design(study)
    finish(study, make_stand_ins(folder))
    return study.folder


@pytest.fixture
def finished(tmp_path, trained):
    """A finished study, the test's own copy."""
    shutil.copytree(trained, tmp_path / "out")
    return design.load_record(tmp_path / "out")
