"""A detector under torchrun, as a user starts it: killed and resumed, evaluated by one to three processes."""

import fcntl
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.commands import done, prepare
from helpers.detection import small_detection

pytestmark = pytest.mark.slow
TIMES = ("train/images_per_second", "train/data_wait")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "detection.yaml"
    changes = {
        "data__images": 40,
        "data__workers": 1,
        "train__log_every": 1,
        "train__checkpoint_steps": 3,
        "train__ema_decay": 0.9,
    }
    path.write_text(small_detection(**changes).dump())
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    """Trained by two processes, without interruption: 20 steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done("train.py", "--config", recipe, "--output", folder, processes=2)
    return folder


def lines_of(folder: Path) -> list[dict]:
    read = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read]


@pytest.mark.parametrize("steps", [1, 5, 13])
def test_killed_and_resumed(recipe, run, tmp_path, steps):
    """SIGKILL of all processes, before the first checkpoint and in both epochs: the same bits at the end."""
    folder = tmp_path / "killed"
    command = ("train.py", "--config", recipe, "--output", folder, "--resume", "auto")
    arguments, environment = prepare(*command, processes=2)
    metrics = folder / "metrics.jsonl"
    first = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    ranks = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["kill", "-KILL", str(first.pid), *ranks], check=True)
    first.wait()
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    done(*command, processes=2)
    assert lines_of(folder) == lines_of(run)
    ours, theirs = (torch.load(path / "checkpoints" / "last.pt", weights_only=True) for path in (folder, run))
    assert (ours["step"], ours["best"]) == (theirs["step"], theirs["best"])
    for name in ("model", "ema"):
        for key, value in theirs[name].items():
            assert torch.equal(value, ours[name][key]), key
    for parameter, state in theirs["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], ours["optimizer"]["state"][parameter]["momentum_buffer"])


def test_evaluation_is_the_same_on_any_number_of_processes(run, tmp_path):
    files = []
    for processes in (1, 2, 3):
        names = [tmp_path / f"{processes}{suffix}" for suffix in (".json", "-boxes.json", ".npz")]
        options = zip(("--output", "--predictions", "--matches"), names, strict=True)
        done("eval.py", "--checkpoint", run, *(each for pair in options for each in pair), processes=processes)
        files.append(names)
    row, *others = (json.loads(names[0].read_text()) for names in files)
    for other in others:
        assert {key for key in row if row[key] != other.get(key)} <= {"environment", "command", "predictions"}
    for column in (1, 2):
        assert len({names[column].read_bytes() for names in files}) == 1
