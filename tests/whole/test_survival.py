"""What a cluster does to a run, done to real processes: NaNs on one rank, hangs, kills, restarts, nodes that leave."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.commands import RECIPE, prepare
from helpers.forks import fork
from run_contents import hash_value

from lip_resnet.training import watchdog

SHORT = ["train.max_steps=16", "train.checkpoint_steps=4", "train.log_every=4"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(RECIPE)
    return path


def command(recipe: Path, folder: Path, *overrides: str, fault: str | None = None, processes: int = 2, extra=()):
    script = "train.py" if fault is None else "tests/faults/faulty_train.py"
    arguments, environment = prepare(
        script, "--config", recipe, "--output", folder, *SHORT, *overrides, processes=processes
    )
    where = arguments.index("torch.distributed.run") + 1 if processes > 1 else 1
    environment |= {"FAULT": fault or "", "PYTHONPATH": str(ROOT)}
    return [*arguments[:where], *extra, *arguments[where:]], environment


def finish(*arguments, **keywords) -> subprocess.CompletedProcess:
    line, environment = command(*arguments, **keywords)
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)


def digest(folder: Path) -> str:
    """sha256 of all that decides how a run goes on: weights, average, optimizer, step."""
    payload = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    return hash_value([payload[key] for key in ("step", "model", "ema", "optimizer")])


def tree(pid: int) -> set[int]:
    """The living descendants of a process."""
    printed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in printed.splitlines()]
    children, descendants, todo = {}, set(), [pid]
    for child, parent, state in rows:
        if not state.startswith("Z"):
            children.setdefault(int(parent), []).append(int(child))
    while todo:
        new = set(children.get(todo.pop(), [])) - descendants
        descendants |= new
        todo += new
    return descendants


def alive(pids: set[int]) -> set[int]:
    printed = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in printed.splitlines()]
    return {int(pid) for pid, state in rows if not state.startswith("Z")} & pids


def wait_until(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.mark.slow
def test_one_rank_s_nan(recipe, tmp_path):
    """The step is skipped, or its samples after a rollback: the same end, bit for bit; the message names the rank."""
    digests = []
    for policy in ("skip", "rollback"):
        folder = tmp_path / policy
        result = finish(recipe, folder, f"train.on_nonfinite={policy}", fault="nan:1:11")
        assert result.returncode == 0, result.stderr
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("warning: loss or gradients")]
        assert "not finite at step 11, learning rate" in line
        assert "; rank 1: the images; " in line
        assert [path.name for path in (folder / "nonfinite").iterdir()] == ["step-00000011-rank1.pt"]
        steps = [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == [4, 8, 12, 16, 16]
        digests.append(digest(folder))
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_one_rank_s_nan_stops_all(recipe, tmp_path):
    result = finish(recipe, tmp_path / "run", fault="nan:1:11")
    assert result.returncode == 1
    assert result.stderr.count("train.py: error: loss or gradients are not finite at step 11") == 1
    assert result.stderr.count("exitcode  : 1") == 2
    payload = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert payload["step"] < 11
    assert all(value.isfinite().all() for value in payload["model"].values())


@pytest.mark.slow
def test_a_hanging_rank_is_named(recipe, tmp_path):
    folder = tmp_path / "run"
    result = finish(recipe, folder, "train.hang_minutes=0.05", fault="sleep:1:11")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: no step has ended for 3 s")]
    assert "; rank 1 hangs; rank 1 (" in line
    assert "is at step 11, forward, in faulty (" in line
    assert "faulty_train.py:" in line
    assert "exitcode  : 124" in result.stderr
    for rank in (0, 1):
        text = (folder / f"hang-rank{rank}.txt").read_text()
        assert json.loads(text.splitlines()[0])["step"] == 11
        assert "in main" in text  # the main thread's stack, down to train.py
    assert "in faulty" in (folder / "hang-rank1.txt").read_text()


def hang(folder: Path) -> None:
    watchdog.FAULTHANDLER_SECONDS = 0.5
    with watchdog.Watchdog(folder, 1 / 60) as dog:
        dog.step(1)
        time.sleep(0.3)
        re.match("(a*)*b", "a" * 60)


def test_native_code_that_never_returns(tmp_path):
    """The interpreter's lock is never free: no Python thread can run, and the process still reports and ends."""
    ended = fork(partial(hang, tmp_path))
    assert ended.codes == [1]
    assert "Timeout" in ended.stderr
    assert "in match" in ended.stderr


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_nothing_outlives_the_parent(recipe, tmp_path, processes):
    """kill -9 of the training process, or of torchrun itself: ranks and loader processes end, the folder is free."""
    folder = tmp_path / "run"
    line, environment = command(
        recipe, folder, "train.max_steps=100000", "train.epochs=10000", "data.workers=2", processes=processes
    )
    run = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.stat().st_size, 200, "the run has not begun")
        members = tree(run.pid)
        assert len(members) >= processes * 4  # two loaders of two processes each, and the ranks
    finally:
        run.kill()
        run.wait()
    wait_until(lambda: not alive(members), 30, f"still alive: {alive(members)}")
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 10])
def test_a_killed_worker_under_torchrun(recipe, tmp_path, step):
    """SIGKILL before and after the first checkpoint: torchrun starts again, and the end is the same, bit for bit."""
    whole = finish(recipe, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed" / "run"
    folder.parent.mkdir()
    result = finish(recipe, folder, "--resume", "auto", fault=f"kill:1:{step}", extra=["--max-restarts=2"])
    assert result.returncode == 0, result.stderr
    assert (folder.parent / "fault-was-here").exists()
    assert digest(folder) == digest(tmp_path / "whole")
    assert not (folder / "requeue").exists()


class Hosts:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2, which see nothing else."""

    def __init__(self) -> None:
        self.names = [f"lip{os.getpid()}n{index}" for index in (1, 2)]

    def __enter__(self) -> "Hosts":
        ends = [f"lip{os.getpid() % 10000}e{index}" for index in (1, 2)]
        try:
            for name in self.names:
                self._ip("netns", "add", name)
            self._ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for index, (name, end) in enumerate(zip(self.names, ends, strict=True), start=1):
                self._ip("link", "set", end, "netns", name)
                self._ip("-n", name, "link", "set", end, "name", "cable")
                self._ip("-n", name, "addr", "add", f"10.77.0.{index}/24", "dev", "cable")
                self._ip("-n", name, "link", "set", "cable", "up")
                self._ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            reason = getattr(error, "stderr", None) or error
            pytest.skip(f"no network namespaces here: {str(reason).strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)

    def start(self, index: int, nodes: str, line: list[str], environment: dict[str, str], log: Path):
        """Start torchrun on a host (0 or 1)."""
        rendezvous = [
            *(f"--nnodes={nodes}", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=7"),
            *("--rdzv_endpoint=10.77.0.1:29511", f"--local_addr=10.77.0.{index + 1}"),
            f"--rdzv_conf=is_host={not index},join_timeout=240,keep_alive_interval=1,keep_alive_max_attempt=3",
        ]
        where = line.index("torch.distributed.run") + 1
        line = [item for item in line if item != "--standalone" and not item.startswith("--nproc_per_node")]
        line = ["ip", "netns", "exec", self.names[index], *line[:where], *rendezvous, *line[where:]]
        with open(log, "a") as file:
            return subprocess.Popen(
                line,
                cwd=ROOT,
                env={**environment, "GLOO_SOCKET_IFNAME": "cable", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                stderr=file,
                stdout=file,
            )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("ip") is None, reason="no network namespaces here: there is no `ip` command")
def test_a_node_leaves_and_comes_back(recipe, tmp_path):
    """Two hosts; the second is killed outright and started again: the same end as without, bit for bit."""
    whole = finish(recipe, tmp_path / "whole", "train.max_steps=200", "train.epochs=10")
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "run"
    line, environment = command(recipe, folder, "train.max_steps=200", "train.epochs=10", "--resume", "auto")
    logs = [tmp_path / f"{index}.log" for index in (0, 1)]
    with Hosts() as hosts:
        runs = [hosts.start(index, "2", line, environment, logs[index]) for index in (0, 1)]
        try:
            last = folder / "checkpoints" / "last.pt"
            wait_until(last.exists, 240, "no checkpoint: " + logs[0].read_text()[-2000:])
            pids = {runs[1].pid, *tree(runs[1].pid)}
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            runs[1].wait()
            time.sleep(2)
            runs[1] = hosts.start(1, "2", line, environment, logs[1])
            codes = [run.wait(timeout=300) for run in runs]
        finally:
            for run in runs:
                for pid in tree(run.pid):
                    os.kill(pid, signal.SIGKILL)
                run.kill()
                run.wait()
    assert codes == [0, 0], logs[0].read_text()[-3000:] + logs[1].read_text()[-3000:]
    assert digest(folder) == digest(tmp_path / "whole")
