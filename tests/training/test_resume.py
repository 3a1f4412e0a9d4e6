"""Runs in this process that are stopped, killed or refused a write at a chosen moment, and what the next start does."""

import errno
import fcntl
import json
import operator
import os
import signal
import stat
import subprocess
import threading

import pytest
import run_contents
import torch

from lip_resnet import distributed, environment, errors
from lip_resnet.commands import classification, train
from lip_resnet.config import InputError
from lip_resnet.training import classification as task
from lip_resnet.training import run, runlog
from lip_resnet.training.checkpoints import Checkpoints


@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("where", ["build_state", "Checkpoints.newest_whole", "runlog.RunLog"])
def test_a_signal_before_the_first_step(start, monkeypatch, where, swallowed):
    """Before the run folder is open and after: nothing is trained, `requeue` is there, and the same command goes on."""
    path, _, name = where.rpartition(".")
    owner = operator.attrgetter(path)(train) if path else train
    original = getattr(owner, name)

    def signalled(*arguments: object) -> object:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except errors.Stopped:  # as a library may, which tries something and goes on without it
            if not swallowed:
                raise
        return original(*arguments)

    monkeypatch.setattr(owner, name, signalled)
    with pytest.raises(errors.Stopped, match="SIGTERM before the first step"):
        start("--resume", "auto")
    assert (start.folder / "requeue").exists()
    assert run_contents.logged_step(start.folder) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(owner, name, original)
    start("--resume", "auto")
    assert not (start.folder / "requeue").exists()
    assert run_contents.take_inventory(start.folder).steps["last.pt"] == 8


def test_requeue_is_not_left_in_a_folder_of_others(start, monkeypatch):
    """Stopped early by a signal, with an --output that is no run, or that another process writes."""
    monkeypatch.setattr(train, "build_state", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    start.folder.mkdir()
    (start.folder / "thesis.tex").touch()
    with pytest.raises(errors.Stopped):
        start()
    (start.folder / "thesis.tex").rename(start.folder / "config.yaml")
    with open(start.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(errors.Stopped):
            start()
    assert sorted(path.name for path in start.folder.iterdir()) == [".lock", "config.yaml"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_checkpoint_that_cannot_be_written(start, patient, monkeypatch, capsys, policy, number):
    """Disk full, quota, read-only: reported at the next save. The older checkpoint stays; the run stops or goes on."""
    fsync, refused = os.fsync, []
    last = start.folder / "checkpoints" / "last.pt"

    def refuse(file: int) -> None:
        writes = threading.current_thread() is not threading.main_thread() and stat.S_ISREG(os.fstat(file).st_mode)
        if writes and not refused and last.exists():
            refused.append(file)
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse)
    message = f"step-00000004.pt: cannot write: {os.strerror(number)}"
    overrides = [f"train.on_write_error={policy}", "train.checkpoint_steps=3", "train.log_every=1"]
    if policy == "stop":
        with pytest.raises(InputError, match=message):
            start(*overrides)
        now = run_contents.take_inventory(start.folder)
        assert (now.newest, now.logged, now.damaged) == (3, 4, [])
    else:
        start(*overrides)
        assert capsys.readouterr().err.count(f"{message}; the run goes on") == 1
        assert run_contents.take_inventory(start.folder).steps["last.pt"] == 8
    assert run_contents.count_temporary_files(start.folder) == 0


class DelayedByOneCall:
    """``distributed.DelayedMaximum`` as with several processes: a call returns the number of the previous call."""

    def __init__(self) -> None:
        self.pending = 0

    def __call__(self, number: int) -> int:
        previous, self.pending = self.pending, number
        return previous

    def flush(self) -> int:
        return self(0)


@pytest.mark.parametrize("maximum", [distributed.DelayedMaximum, DelayedByOneCall])
def test_a_signal_at_an_epoch_s_end_does_not_wait_for_the_evaluation(start, patient, monkeypatch, maximum):
    """It saves and leaves; the evaluation is made up for. One that comes meanwhile takes no further step."""
    monkeypatch.setattr(distributed, "DelayedMaximum", maximum)
    validate, saved = run.Run.validate, []
    log = runlog.RunLog.log

    def signalled(self: runlog.RunLog, step: int, *arguments: object) -> None:
        log(self, step, *arguments)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(runlog.RunLog, "log", signalled)
        with pytest.raises(errors.Stopped, match="SIGTERM at step 4"):
            start()
    assert run_contents.take_inventory(start.folder).newest == 4
    assert run_contents.logged_step(start.folder, "val/loss") == 0

    def interrupted(self: run.Run) -> dict[str, float]:
        saved.append(run_contents.take_inventory(start.folder).newest)
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "validate", interrupted)
        with pytest.raises(errors.Stopped, match="SIGTERM at step 4"):
            start("--resume", "auto")
    start("--resume", "auto")
    lines = run_contents.read_metrics(start.folder)[0]
    assert [(line["step"], "val/loss" in line) for line in lines] == [
        (4, False),
        (4, True),
        (5, False),
        (8, False),
        (8, True),
    ]
    assert saved == [4]


def test_an_evaluation_that_was_killed_is_made_up_for(start, patient, monkeypatch):
    """Killed while it evaluates, after a step at which a checkpoint is due: no step is lost, its numbers come later."""

    def killed(*_: object, **__: object) -> None:
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(task, "evaluate", killed)
        with pytest.raises(KeyError):
            start("train.checkpoint_steps=2")
    assert run_contents.take_inventory(start.folder).newest == 4
    start("--resume", "auto")
    lines = run_contents.read_metrics(start.folder)[0]
    assert [line["step"] for line in lines if "val/loss" in line] == [4, 8]
    assert run_contents.take_inventory(start.folder).steps["last.pt"] == 8


def test_killed_between_an_evaluation_and_its_checkpoint(start, patient, monkeypatch):
    """The line is in metrics.jsonl already; the evaluation is done again, and the line is there once."""

    def killed(self: run.Run, best: bool = False) -> None:
        if self.state.evaluated:
            raise KeyError("killed")
        save(self, best)

    save = run.Run.save
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "save", killed)
        with pytest.raises(KeyError):
            start("train.checkpoint_steps=4")
    assert run_contents.take_inventory(start.folder).newest == 4
    start("--resume", "auto")
    lines = run_contents.read_metrics(start.folder)[0]
    assert [line["step"] for line in lines if "val/loss" in line] == [4, 8]
    assert run_contents.take_inventory(start.folder).steps["best.pt"] in (4, 8)


def test_a_start_that_was_killed_while_it_wrote_its_first_file(start):
    (start.folder / "checkpoints").mkdir(parents=True)
    (start.folder / ".config.yaml.77.tmp").write_text("mod")
    start()
    assert run_contents.count_temporary_files(start.folder) == 0


def test_going_back_is_refused_in_the_same_folder(start):
    """Else last.pt would be of the steps that were given up until the first save, and the numbers already cut."""
    start("train.checkpoint_steps=3", "train.keep=9")
    source = start.folder / "checkpoints" / "step-00000003.pt"
    with pytest.raises(InputError, match=r"has gone on to .*last.pt; continue with --resume auto, or go back"):
        start("--resume", str(source))
    assert run_contents.logged_step(start.folder) == 8
    for path in (start.folder / "checkpoints").glob("[ls]*.pt"):
        if path != source:
            path.write_bytes(b"damaged")
    start("--resume", str(source))
    assert run_contents.take_inventory(start.folder).newest == 8


def test_a_damaged_checkpoint_pushes_out_no_whole_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "step-00000100.pt").write_bytes(b"damaged")
    os.utime(tmp_path / "step-00000100.pt", (1, 1))
    for step in (90, 95):
        checkpoints.save({"step": step}, best=False)
        checkpoints.wait()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000090.pt", "step-00000095.pt"]


def test_env_json_keeps_a_few_earlier_starts(start, monkeypatch):
    monkeypatch.setattr(runlog, "MAX_EARLIER_ENVIRONMENTS", 2)
    for steps in range(1, 6):
        start("--resume", "auto", f"train.max_steps={steps}")
    environment = json.loads((start.folder / "env.json").read_text())
    assert ["train.max_steps" in word for word in environment["command"]][-1]
    assert [earlier["command"][-1] for earlier in environment["earlier"]] == ["train.max_steps=3", "train.max_steps=4"]
    assert all("earlier" not in earlier for earlier in environment["earlier"])


def test_the_commit_is_that_of_the_package(tmp_path):
    """Not of a repository in whose folder an environment lies, with the package installed in it."""
    installed, own = tmp_path / "venv" / "runlog.py", tmp_path / "source" / "runlog.py"
    for path in (installed, own):
        path.parent.mkdir()
        path.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "source"], ["commit", "-qm", "it"]):
        subprocess.run([*git, *command], check=True)
    assert environment._describe_commit(installed) == {"git_commit": None, "git_dirty": False}
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment._describe_commit(own) == {"git_commit": commit, "git_dirty": False}
    own.write_text("changed")
    assert environment._describe_commit(own)["git_dirty"] is True


def test_a_run_continued_from_another_folder_has_a_checkpoint_at_once(start, patient, monkeypatch):
    """Else, killed before its first own one, `--resume auto` would begin at step 0 and say nothing."""
    other = start.folder.with_name("other")
    start("train.checkpoint_steps=3", "train.keep=9")
    source = start.folder / "checkpoints" / "step-00000003.pt"

    def killed(*_: object, **__: object) -> None:
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_one_epoch", killed)
        with pytest.raises(KeyError):
            start("--output", str(other), "--resume", str(source))
    assert run_contents.take_inventory(other).newest == 3
    start("--output", str(other), "--resume", "auto")
    ends = [run_contents.read_whole(folder / "checkpoints" / "last.pt") for folder in (start.folder, other)]
    assert run_contents.hash_value(ends[0]["model"]) == run_contents.hash_value(ends[1]["model"])


@pytest.mark.parametrize("precision", ["tf32", "float32"])
def test_tf32_is_switched_on_and_off(start, monkeypatch, precision):
    """For products and for convolutions, whatever it was before."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    monkeypatch.setattr(classification, "build_sources", lambda *_: operator.truediv(1, 0))
    try:
        for switch in switches:
            switch.allow_tf32 = precision != "tf32"
        with pytest.raises(ZeroDivisionError):
            start(f"train.precision={precision}")
        assert [switch.allow_tf32 for switch in switches] == [precision == "tf32"] * 2
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def test_checkpoint_steps_are_those_steps(start, patient, monkeypatch):
    """Every process knows how many steps are done: nothing is to be agreed upon, and nothing comes a step late."""
    monkeypatch.setattr(distributed, "DelayedMaximum", DelayedByOneCall)
    start("train.checkpoint_steps=3", "train.keep=9")
    names = sorted(path.name for path in (start.folder / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:08d}.pt" for step in (3, 4, 6, 8)]
