"""Functions in forks of this process: other processes without the seconds that PyTorch's import takes."""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Ended(NamedTuple):
    """Exit codes of the forks, in the order of their functions, and what they printed together."""

    codes: list[int]
    stdout: str
    stderr: str


def fork(*functions: Callable[[], object]) -> Ended:
    """Call each function in a fork of its own. Once one has failed, the others get SIGTERM, as torchrun's ranks do.

    Where there are GPUs, autograd works in no fork of a process that has used it: there a fresh process is forked, and
    the functions must be picklable.
    """
    context = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
    context.set_forkserver_preload(["lip_resnet.commands.train", "lip_resnet.commands.eval"])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
        forks = [context.Process(target=_call, args=(function, Path(folder))) for function in functions]
        for process in forks:
            process.start()
        try:
            while running := [process for process in forks if process.exitcode is None]:
                multiprocessing.connection.wait([process.sentinel for process in running])
                if any(process.exitcode for process in forks):
                    for process in running:
                        process.terminate()
        finally:
            for process in forks:
                process.kill()
        printed = (path.read_text() if path.exists() else "" for path in (Path(folder) / "out", Path(folder) / "err"))
        return Ended([process.exitcode for process in forks], *printed)


def _call(function: Callable[[], object], folder: Path) -> None:
    atexit._clear()  # what the tests' own process does at its end
    sys.stdout, sys.stderr = open(folder / "out", "a"), open(folder / "err", "a")  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    try:
        function()
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
