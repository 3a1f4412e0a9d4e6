"""docs/first_day.md: its Python blocks and its commands, in order, in an empty folder."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.commands import call

from lip_resnet.training import run_folder

TEXT = (ROOT / "docs" / "first_day.md").read_text(encoding="utf-8").partition("\n## On ImageNet")[0]
QUICK = {
    **{"model.name": "test_resnet", "train.epochs": 3, "train.max_steps": 2, "data.batch_size": 16},
    **{"data.workers": 0, "data.last_batch": "drop"},
}
"""Overrides that make every training of the page one of seconds."""


def steps() -> list[str]:
    """Python blocks, and the lines that start Python, in order; a step that begins with "python " is a line."""
    steps = re.finditer(r"```python\n(.*?)```|^    (python (?:[^\n]*\\\n)*[^\n]*)$", TEXT, re.DOTALL | re.MULTILINE)
    return [each[1] or each[2].replace("\\\n", " ") for each in steps]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder: the project's files, and nothing else."""
    for name in ("configs", "scripts", "train.py", "eval.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(folder: Path, printed: list[str]) -> None:
    """What the page promises: printed texts of its commands in order."""
    assert len(list((folder / "data" / "photos" / "val").glob("*/*"))) == 80
    assert any("hours" in text for text in printed)
    for name in ("eval.json", "predictions.csv", "classes/confusion.png"):
        assert (folder / "runs" / "digits" / "lip_resnet50" / name).is_file()
    assert printed[-1].strip().startswith("digit_")
    assert "digit_3/0.png" in printed[-2]


def test_quickly_in_this_process(folder, capsys, monkeypatch):
    printed = []
    for step in steps():
        if not step.startswith("python "):
            exec(compile(step, "first_day.md", "exec"), {})
            printed.append(capsys.readouterr().out)
            continue
        _, script, *arguments = shlex.split(step)
        if script == "train.py":
            kept = [word for word in arguments if word.partition("=")[0] not in QUICK]
            arguments = [*kept, *(f"{key}={value}" for key, value in QUICK.items())]
        code, text, error = call(capsys, monkeypatch, importlib.import_module(Path(script).stem), *arguments)
        while run_folder._locks:
            run_folder._locks.pop().close()  # as the end of the process does
        assert code == 0, (step, error)
        printed.append(text)
    check(folder, printed)


@pytest.mark.slow
def test_as_it_stands(folder):
    printed = []
    for step in steps():
        words = shlex.split(step)[1:] if step.startswith("python ") else ["-c", step]
        result = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=1200, check=False)
        assert result.returncode == 0, (step, result.stderr)
        printed.append(result.stdout)
    check(folder, printed)
    assert float(re.search(r"Acc@1 ([\d.]+)", printed[5])[1]) > 90
    assert printed[-1].strip() == "digit_3"
