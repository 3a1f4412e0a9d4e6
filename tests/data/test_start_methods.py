"""Loader workers on every start method: the same pixels, no output at exit, no worker that outlives its parent."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.sets import folder_config

from lip_resnet.data import TrainLoader, build_sources

# A process that exits with a loader read to its end, one half-read, one never read and a child of the user's own; and a
# fork of it that is killed.
SCRIPT = """
import json, multiprocessing, os, signal, sys, time

def main(method, folder):
    import torch
    from lip_resnet.config import DataConfig
    from lip_resnet.data import EvalLoader, TrainLoader, build_sources

    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    del handlers[signal.SIGCHLD]  # torch's DataLoader sets this one
    common = {"root": folder, "batch_size": 4, "size": 32, "eval_size": 32, "eval_resize": 36, "decode": "fast"}
    alone, shared = DataConfig(**common, workers=0), DataConfig(**common, workers=1)
    train, val = build_sources(alone, 3)
    multiprocessing.set_start_method(method)
    multiprocessing.set_forkserver_preload(["lip_resnet.data"])
    killed = os.fork() == 0
    if killed:  # Python's resource tracker warns about a killed process's resources
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    whole = TrainLoader(train, shared, 1, 0)
    if not killed:
        half, unread = iter(EvalLoader(val, shared)), TrainLoader(train, shared, 1, 0)
    workers = [child.pid for child in multiprocessing.active_children()]
    user = multiprocessing.Process(target=time.sleep, args=(600,), daemon=True)
    user.start()
    expected = [batch.parts[0][0] for batch in TrainLoader(train, alone, 1, 0).epoch(1)]
    assert all(map(torch.equal, (batch.parts[0][0] for batch in whole.epoch(1)), expected)) and len(expected) == 6
    if not killed:
        assert torch.equal(next(half)[0], next(iter(EvalLoader(val, alone)))[0])
        globals().update(half=half, unread=unread)  # alive until Python exits, as `whole` is
    globals().update(whole=whole)
    assert user.is_alive()
    assert handlers == {number: signal.getsignal(number) for number in handlers}
    facts = {"killed": killed, "process": os.getpid(), "workers": workers, "user": user.pid}
    os.write(1, json.dumps(facts).encode() + b"\\n")
    sys.stdin.read()

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for_end(pids: list[int], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(map(_alive, pids)):
        assert time.monotonic() < end, [pid for pid in pids if _alive(pid)]
        time.sleep(0.1)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")
@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forkserver", "spawn"))]
)
def test_workers_end_with_their_process(image_folder, tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, method, image_folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [process.stdout.readline() for _ in range(2)]
    assert all(lines), process.communicate()[1]
    leaves, killed = sorted(map(json.loads, lines), key=lambda facts: facts["killed"])
    assert (len(leaves["workers"]), len(killed["workers"])) == (3, 1)
    os.kill(killed["process"], signal.SIGKILL)
    _wait_for_end(killed["workers"], 20)
    os.kill(killed["user"], signal.SIGKILL)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    _wait_for_end([*leaves["workers"], leaves["user"]], 10)


def leave_a_loader(root) -> None:
    train, _ = build_sources(folder_config(root, workers=1), 3)
    globals()["kept"] = loader = TrainLoader(train, folder_config(root, workers=1), 1, 0)
    list(loader.epoch(0))


def test_a_process_of_multiprocessing_ends_with_its_loader(image_folder):
    """A rank of torch.multiprocessing.spawn, say: it ends without the functions that atexit calls."""
    process = multiprocessing.get_context("fork").Process(target=leave_a_loader, args=(image_folder,))
    process.start()
    process.join(60)
    process.kill()
    process.join()
    assert process.exitcode == 0
