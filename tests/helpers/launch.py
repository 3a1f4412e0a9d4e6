"""The launch files, the programs that stand in for what they call, and what torchrun and train.py make of the calls."""

import argparse
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from helpers import ROOT
from lip_resnet.recipe import load_config

LAUNCH = ROOT / "scripts" / "launch"
SLURM, TWO_NODES, PYTORCHJOB = (LAUNCH / name for name in ("slurm.sbatch", "two_nodes.sh", "pytorchjob.yaml"))
ARRAY = LAUNCH / "study.sbatch"
ON_NODE = LAUNCH / "train_and_evaluate.sh"
# What the launch files call, replaced: it writes down how it was called.
FAKES = {
    "torchrun": 'code=0; case " $* " in *" --dry-run "*) name=dry_run code=${DRY_RUN:-0};; *eval.py*) name=evaluate;; '
    '*) name=torchrun; env > "$RECORD/env";; esac; printf "%s\\n" "$@" > "$RECORD/$name"; exit $code',
    # srun: its own options end where the command begins. It passes USR1 on; a TERM it answers by killing its tasks.
    "srun": 'printf "%s\\n" "$@" > "$RECORD/srun"; while [ "${1#-}" != "$1" ]; do shift; done; "$@" & task=$!; '
    'trap "kill -USR1 $task" USR1; trap "kill -KILL $task" TERM; '
    "while kill -0 $task 2>/dev/null; do wait $task; done; wait $task",
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> "$RECORD/scontrol"; fi',
    "apptainer": 'printf "%s\\n" "$@" > "$RECORD/apptainer"; shift 3; exec "$@"',
}


def executable(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def call(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def torchrun_options(record: Path, name: str = "torchrun") -> argparse.Namespace:
    """What torchrun's own parser makes of a recorded command line and the environment of its call."""
    environment = dict(line.split("=", 1) for line in words(record / "env") if line.startswith("PET_"))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        return get_args_parser().parse_args(words(record / name))


def check_command(record: Path) -> tuple[argparse.Namespace, dict[str, str]]:
    """torchrun's own parser and our recipe loader accept it; returns torchrun's options, train.py's as a dict."""
    options = torchrun_options(record)
    assert options.training_script == "train.py"
    given = options.training_script_args
    flags = {given[i]: given[i + 1] for i in range(len(given)) if given[i].startswith("--")}
    overrides = [word for word in given if not word.startswith("--") and word not in flags.values()]
    load_config(ROOT / flags["--config"], overrides)
    assert flags["--resume"] == "auto"
    assert set(flags) <= {"--config", "--resume", "--output"}
    assert set(options.signals_to_handle.split(",")) == {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"}
    return options, flags


def words(path: Path) -> list[str]:
    return path.read_text().splitlines()
