"""The commands, in processes of their own or in this one."""

import functools
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import eval as eval_command
import train
from helpers import ROOT
from helpers.forks import Ended, fork
from lip_resnet import cli

RECIPE = """
model: {name: test_resnet, num_classes: 10}
data:
  {name: digits, batch_size: 64, eval_batch_size: 50, size: 32, eval_size: 32, eval_resize: 32, flip: 0.0, workers: 1}
optim: {lr: 0.05, clip_norm: 5.0, schedule: cosine, warmup_epochs: 1}
train: {epochs: 2, log_every: 10, ema_decay: 0.9, drop_path: 0.1}
"""


def prepare(*command: object, processes: int = 1) -> tuple[list[str], dict[str, str]]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [*launcher, *map(str, command)], environment


def start(*command: object, processes: int = 1) -> subprocess.CompletedProcess:
    arguments, environment = prepare(*command, processes=processes)
    return subprocess.run(
        arguments, cwd=ROOT, capture_output=True, text=True, check=False, env=environment, timeout=240
    )


def done(*command: object, processes: int = 1) -> subprocess.CompletedProcess:
    result = start(*command, processes=processes)
    assert result.returncode == 0, result.stderr
    return result


def stop_when_logged(recipe: Path, folder: Path, processes: int, *overrides: str) -> None:
    """Start a run and send it SIGTERM when its first numbers are there."""
    command = ("train.py", "--config", recipe, "--output", folder, *overrides)
    arguments, environment = prepare(*command, processes=processes)
    run = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    _, printed = run.communicate(timeout=120)
    assert run.returncode == (75 if processes == 1 else 1), printed
    assert printed.count("train.py: stopped: SIGTERM at step") == 1


def fork_ranks(module, *arguments: object, processes: int = 1) -> Ended:
    """Run a command in forks of this process, one for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    command = [module.__name__, *map(str, arguments)]
    return fork(*(functools.partial(_run, command, rank if processes > 1 else {}) for rank in ranks))


def _run(command: list[str], environment: dict[str, str]) -> None:
    os.environ |= environment
    sys.argv = [f"{command[0]}.py", *command[1:]]
    importlib.import_module(command[0]).main()


def call(capsys, monkeypatch, module, *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process: (exit code, what it printed, what it printed to stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        module.main() if module in (train, eval_command) else cli.launch(module.main)
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err


def refuse(capsys, monkeypatch, module, *arguments: object) -> str:
    """Run a command in this process and return the one line that it prints."""
    code, out, line = call(capsys, monkeypatch, module, *arguments)
    assert (code, out, len(line.splitlines())) == (2, "", 1), (code, out, line)
    return line
