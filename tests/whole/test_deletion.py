"""No command deletes what it did not make: make clean, make install, a run that is continued in its folder."""

import shutil
import subprocess

import pytest
from helpers import ROOT, small_config

from lip_resnet.training import run_folder
from lip_resnet.training.checkpoints import Checkpoints


def make(target: str, folder, *flags: str) -> str:
    command = ["make", "-f", str(ROOT / "Makefile"), *flags, target]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no `make` command")
def test_make(tmp_path):
    user_s = [tmp_path / ".venv" / "bin" / "python", tmp_path / "runs" / "demo" / "mine" / "last.pt"]
    demo_s = [tmp_path / "runs" / "demo" / name for name in ("lip_resnet50/eval.json", "resnet50/a.pt", "table.md")]
    for path in (*user_s, *demo_s, tmp_path / "requirements.txt", tmp_path / "pyproject.toml"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert "--clear" not in make("install", tmp_path, "--dry-run")
    make("clean", tmp_path)
    assert all(path.exists() for path in user_s)
    assert not any(path.exists() for path in demo_s)
    (tmp_path / ".venv" / "made-by-make").touch()
    shutil.rmtree(user_s[1].parent)
    make("clean", tmp_path)
    assert not (tmp_path / ".venv").exists()
    assert not (tmp_path / "runs" / "demo").exists()
    make("clean", tmp_path)


def test_a_continued_run(tmp_path):
    """Half-written files of a killed process go, and the oldest checkpoints; whatever else has a like name stays."""
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    (run / "notes").mkdir(parents=True)
    checkpoints.mkdir()
    user_s = [run / ".thesis.tmp", run / "notes" / ".draft.77.tmp", checkpoints / "step-best-ever.pt"]
    for path in user_s:
        path.write_text("mine")
    config = small_config()
    (run / "config.yaml").write_text(config.dump())
    half_written = [run / ".config.yaml.77.tmp", checkpoints / ".last.pt.77.tmp"]
    for path in half_written:
        path.touch()
    try:
        run_folder.open_run(run, config, "auto")
    finally:
        run_folder._locks.pop().close()
    assert not any(path.exists() for path in half_written)
    writer = Checkpoints(checkpoints, keep=1)
    for step in (5, 10):
        writer.save({"step": step}, best=False)
        writer.wait()
    assert all(path.read_text() == "mine" for path in user_s)
    assert sorted(path.name for path in checkpoints.glob("*.pt")) == [
        "last.pt",
        "step-00000010.pt",
        "step-best-ever.pt",
    ]


def test_a_folder_of_others_is_no_run(tmp_path):
    (tmp_path / ".thesis.tmp").write_text("mine")
    with pytest.raises(run_folder.InputError, match="exists and is not a run"):
        run_folder.open_run(tmp_path, small_config(), "none")
    assert (tmp_path / ".thesis.tmp").read_text() == "mine"
