"""The launch files: every command line in them is one that torchrun and train.py take; Slurm's script comes back."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, small_config
from helpers.launch import (
    ARRAY,
    FAKES,
    ON_NODE,
    PYTORCHJOB,
    SLURM,
    TWO_NODES,
    call,
    check_command,
    executable,
    torchrun_options,
    words,
)

import lip_commands
from lip_resnet.config import InputError

RECIPE = "configs/imagenet/lip_resnet50_step90.yaml"
# A run in the place of torchrun: trains until it is asked to stop, saves for a moment, asks to come back.
RUN = """
case " $* " in *" --dry-run "*) exit 0;; esac
trap 'sleep 0.3; touch "$FOLDER/requeue"; exit 1' USR1 TERM
echo started > "$RECORD/started"
for _ in $(seq 1000); do sleep 0.01; done
exit 3
"""


@pytest.mark.parametrize("path", [SLURM, TWO_NODES, ARRAY], ids=lambda path: path.name)
def test_shell_syntax(path):
    assert call("bash", "-n", path).returncode == 0
    assert call("bash", path).returncode == 2  # no recipe: how to use it
    assert "usage:" in call("bash", path).stderr


def directives(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", line) for line in found), found
    names = [line.partition("=")[0] for line in found]
    assert len(names) == len(set(names))
    # sbatch stops reading at the first command.
    assert text.rindex("#SBATCH") < re.search(r"^[^#\n]", text, re.MULTILINE).start()
    return {line.partition("=")[0]: line.partition("=")[2] for line in found}


def test_sbatch_directives():
    text = SLURM.read_text()
    found = directives(text)
    known = {"--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--mem", "--time"}
    known |= {"--signal", "--requeue", "--open-mode", "--output"}
    assert set(found) == known
    assert found["--ntasks-per-node"] == "1"  # one torchrun a node
    assert found["--requeue"] == ""
    assert found["--open-mode"] == "append"  # a requeued job's log goes on
    lead = re.fullmatch(r"B:USR1@(\d+)", found["--signal"])
    patience = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)
    assert 0 < int(patience[1]) < int(lead[1])


def test_slurm_command(stage):
    result = call("bash", SLURM, RECIPE, "--output", "runs/x", "data.root=/data", "data.workers=11")
    assert result.returncode == 0, result.stderr
    options, flags = check_command(stage)
    assert (options.nnodes, options.nproc_per_node, int(options.max_restarts)) == ("2", "8", 3)
    assert (options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id) == ("c10d", "node7:26912", "123456")
    assert flags == {"--config": RECIPE, "--resume": "auto", "--output": "runs/x"}
    assert words(stage / "srun")[0] == "--kill-on-bad-exit=1"
    assert {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240", "SRUN_CPUS_PER_TASK=96"} <= set(words(stage / "env"))
    assert not (stage / "scontrol").exists()
    for name, script in (("dry_run", "train.py"), ("evaluate", "eval.py")):
        other = torchrun_options(stage, name)
        assert (other.training_script, other.nnodes, other.nproc_per_node, other.max_restarts) == (script, "2", "8", 0)
        assert other.rdzv_endpoint == "node7:26913"  # not the port of the training, whose store may still be there
        command = lip_commands.train_parser() if name == "dry_run" else lip_commands.eval_parser()
        given = command.parse_args(other.training_script_args)
        assert given.dry_run if name == "dry_run" else given.checkpoint == "runs/x"


def test_a_run_is_tried_once_and_evaluated_once(stage, tmp_path, monkeypatch):
    """A run that continues needs neither model.weights nor data.classes: its dry run could fail."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    (folder / "eval.json").touch()
    assert call("bash", SLURM, RECIPE, "--output", folder).returncode == 0
    assert {path.name for path in stage.iterdir()} == {"srun", "torchrun", "env"}
    (folder / "eval.json").unlink()
    executable(tmp_path / "tools" / "torchrun", 'case " $* " in *" eval.py "*) exit 4;; esac')
    assert call("bash", SLURM, RECIPE, "--output", folder).returncode == 4
    assert not (folder / "requeue").exists()


def test_a_wrong_word_in_a_command_is_seen(stage):
    call("bash", SLURM, RECIPE, "data.rot=/data")
    with pytest.raises(InputError, match=r"data\.root"):
        check_command(stage)
    (stage / "torchrun").write_text(f"--nodes=2\ntrain.py\n--config\n{RECIPE}\n")
    with pytest.raises(SystemExit):
        check_command(stage)


def test_slurm_in_a_container(stage, monkeypatch):
    monkeypatch.setenv("CONTAINER", "/images/lip resnet.sif")
    monkeypatch.setenv("VENV", "/nonexistent")
    assert call("bash", SLURM, RECIPE, "data.root=/data").returncode == 0
    script = str(ON_NODE.relative_to(ROOT))
    assert words(stage / "apptainer")[:4] == ["exec", "--nv", "/images/lip resnet.sif", script]
    check_command(stage)
    monkeypatch.delenv("CONTAINER")
    assert call("bash", SLURM, RECIPE, "data.root=/data").returncode == 2  # no such venv


def test_two_nodes_command(stage, monkeypatch):
    assert call("bash", TWO_NODES, RECIPE).returncode == 2  # without NODE0
    monkeypatch.setenv("NODE0", "10.0.0.1")
    assert call("bash", TWO_NODES, RECIPE, "data.root=/a path", "--output", "/b c").returncode == 0
    options, flags = check_command(stage)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "gpu", "10.0.0.1:29500")
    assert options.rdzv_id == "lip_resnet50_step90"
    assert flags["--output"] == "/b c"
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240" in words(stage / "env")


# ---- Slurm's way with a job: signal, save, back into the queue ----


def start_job(*arguments: object, script: Path = SLURM) -> subprocess.Popen:
    """A batch script as Slurm starts it; signals go to this shell alone."""
    command = ["bash", *map(str, (script, *arguments))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, job: subprocess.Popen) -> None:
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize("script", [SLURM, TWO_NODES], ids=lambda path: path.name)
def test_a_wrong_recipe_is_not_restarted(stage, monkeypatch, script):
    """The scripts try it first: torchrun would start a wrong one as often as --max_restarts says."""
    monkeypatch.setenv("NODE0", "10.0.0.1")
    monkeypatch.setenv("DRY_RUN", "2")
    assert call("bash", script, RECIPE, "--output", stage / "run", "data.rot=/data").returncode == 2
    words_of_it = words(stage / "dry_run")
    assert words_of_it[words_of_it.index("train.py") :] == [
        *("train.py", "--dry-run", "--config", RECIPE, "--output", str(stage / "run"), "data.rot=/data")
    ]
    assert not (stage / "torchrun").exists()


def test_one_node_by_default():
    """The recipes' protocol is of 8 processes."""
    assert directives(SLURM.read_text())["--nodes"] == "1"
    assert yaml.safe_load(PYTORCHJOB.read_text())["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 1


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)], ids=["time limit", "cancelled"]
)
def test_slurm_requeues_what_was_saved(stage, tmp_path, monkeypatch, number, requeued):
    folder = tmp_path / "a run"
    folder.mkdir()
    monkeypatch.setenv("FOLDER", str(folder))
    executable(tmp_path / "tools" / "torchrun", RUN)
    job = start_job(RECIPE, "data.root=/data", f"--output={folder}")
    wait_for((stage / "started").exists, job)
    job.send_signal(number)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 1, printed
    assert (folder / "requeue").exists()  # it waited for the save
    assert (stage / "scontrol").exists() == requeued
    if requeued:
        assert words(stage / "scontrol") == ["requeue 123456"]


@pytest.fixture
def task(stage, monkeypatch):
    """The third task of an array of four."""
    names = {"JOB_ID": "77", "TASK_ID": "2", "TASK_COUNT": "4", "TASK_MIN": "0"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    executable(stage.parent / "tools" / "python", 'printf "%s\\n" "$@" > "$RECORD/study"')
    return stage


def test_array_directives():
    given = directives(ARRAY.read_text())
    assert given["--array"] == "0-3"
    assert given["--requeue"] == ""
    assert given["--open-mode"] == "append"
    assert given["--signal"].startswith("B:USR1@")
    assert {"%A", "%a"} <= set(re.findall("%.", given["--output"]))  # a log for each task


def test_array_task_runs_its_share(task, monkeypatch):
    monkeypatch.setenv("JOBS", "4")
    assert call("bash", ARRAY, "configs/studies/digits.yaml", "--output", "runs/x", "data.workers=1").returncode == 0
    arguments = ["configs/studies/digits.yaml", "--output", "runs/x", "data.workers=1", "--jobs", "4"]
    assert words(task / "study") == ["scripts/study.py", "run", *arguments, "--shard", "2/4"]
    assert not (task / "scontrol").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")  # --array=1-4 would leave a share out
    refused = call("bash", ARRAY, "configs/studies/digits.yaml")
    assert refused.returncode == 2
    assert "--array begins at 1; it must be 0 to n - 1, or SHARDS=n be set" in refused.stderr
    monkeypatch.setenv("SHARDS", "5")
    assert call("bash", ARRAY, "configs/studies/digits.yaml").returncode == 0
    assert words(task / "study")[-1] == "2/5"


@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [(signal.SIGUSR1, 75, True), (signal.SIGUSR1, 1, False), (signal.SIGTERM, 75, False)],
    ids=["time limit", "failed cells", "cancelled"],
)
def test_array_task_is_requeued_when_it_was_stopped(task, tmp_path, number, code, requeued):
    """A stand-in for study.py: stopped by SIGTERM alone, ends with its exit code."""
    body = f'trap "sleep 0.2; touch $RECORD/saved; exit {code}" TERM; touch "$RECORD/started"\n'
    executable(tmp_path / "tools" / "python", body + "for _ in $(seq 1000); do sleep 0.01; done")
    job = start_job("configs/studies/digits.yaml", script=ARRAY)
    wait_for((task / "started").exists, job)
    job.send_signal(number)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == code, printed
    assert (task / "saved").exists()
    assert (words(task / "scontrol") if (task / "scontrol").exists() else []) == ["requeue 77_2"] * requeued


@pytest.mark.parametrize("requested", [False, True])
def test_slurm_does_not_requeue_a_failure(stage, tmp_path, requested):
    """Nor one that was stopped and requeued, and now fails before train.py has opened the run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    if requested:
        (folder / "requeue").touch()
    executable(tmp_path / "tools" / "torchrun", "exit 5")
    assert start_job(RECIPE, "data.root=/data", "--output", folder).wait(timeout=60) == 5
    assert not (stage / "scontrol").exists()


def real_run(monkeypatch, tmp_path: Path, **environment: object) -> Path:
    """Put the real torchrun on PATH and these names into the environment; a recipe of 69 steps."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", **environment}.items():
        monkeypatch.setenv(name, str(value))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(small_config(train__epochs=3).dump())
    return recipe


@pytest.mark.slow
def test_slurm_run_ends_as_if_never_stopped(stage, tmp_path, monkeypatch):
    """The real torchrun and train.py: signalled, saved, requeued, started again by "Slurm"; equal weights."""
    (tmp_path / "tools" / "torchrun").unlink()
    recipe = real_run(monkeypatch, tmp_path, SLURM_JOB_NUM_NODES=1, PROCESSES=2)
    executable(tmp_path / "tools" / "scontrol", FAKES["scontrol"].replace("echo node7; echo node8", "echo localhost"))
    assert shutil.which("torchrun")
    states = []
    for stopped in (False, True):
        folder = tmp_path / f"stopped {stopped}"
        job = start_job(recipe, "--output", folder)
        if stopped:
            metrics = folder / "metrics.jsonl"
            wait_for(lambda metrics=metrics: metrics.exists() and metrics.stat().st_size, job)
            job.send_signal(signal.SIGUSR1)
        printed, _ = job.communicate(timeout=240)
        assert (folder / "requeue").exists() == (stage / "scontrol").exists() == stopped, printed
        assert job.returncode == (1 if stopped else 0), printed
        assert (folder / "eval.json").exists() != stopped, printed
        if stopped:
            assert "stopped: SIGUSR1 at step" in printed
            job = start_job(recipe, "--output", folder)  # what a requeue does
            printed, _ = job.communicate(timeout=240)
            assert job.returncode == 0, printed
            assert words(stage / "scontrol") == ["requeue 123456"]
            assert not (folder / "requeue").exists()
            assert (folder / "eval.json").exists()
        states.append(torch.load(folder / "checkpoints" / "last.pt", weights_only=True))
    assert states[0]["step"] == states[1]["step"] == 69
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


@pytest.mark.slow
def test_two_machines_for_real(tmp_path, monkeypatch):
    """two_nodes.sh twice on this machine: the two find each other, save when both are signalled, and go on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = real_run(monkeypatch, tmp_path, NODE0="127.0.0.1", PORT=port, PROCESSES=1)
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    for stopped in (True, False):
        nodes = [start_job(recipe, "--output", folder, script=TWO_NODES) for _ in range(2)]
        if stopped:
            wait_for(lambda: metrics.exists() and metrics.stat().st_size, nodes[0])
            for node in nodes:
                node.send_signal(signal.SIGUSR1)
        printed = [node.communicate(timeout=240)[0] for node in nodes]
        assert [node.returncode for node in nodes] == ([1, 1] if stopped else [0, 0]), printed
        assert (folder / "requeue").exists() == stopped
        assert (folder / "eval.json").exists() != stopped
        state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
        assert state["processes"] == [2]
    assert state["step"] == 69
