"""Start and end of every command: process group, one line for errors of the user, exit codes."""

import argparse
import datetime
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from lip_resnet import distributed, memory
from lip_resnet.errors import EXIT_CODES, InputError, OutOfMemory, Stopped


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as InputError, so that they too are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def launch(main: Callable[[], None]) -> None:
    """Join the process group, run a command's ``main``, and exit.

    Exit codes: 0, done; 2, InputError, on every rank, printed by rank 0 alone; 1, FloatingPointError (training has
    diverged, or an evaluation's logits are not finite) or out of memory; 75, Stopped; 130, interrupted. These print one
    line, and with LIP_DEBUG=1 in the environment their traceback after it. Any other exception is a bug: exit code 1,
    with its traceback.
    """
    code = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that the terminal cannot show; stderr does so
    try:
        distributed.init()
        main()
    except tuple(EXIT_CODES) as error:
        code = _fail(error)
    except Exception as error:
        if memory.is_out_of_memory(error):
            short = OutOfMemory(f"out of memory: {str(error)[:300]}")
            short.__cause__ = error
            sys.exit(_fail(short))
        if distributed.world_size() > 1:
            _exit_alone(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code)


def _fail(error: BaseException) -> int:
    """Print one line, on rank 0 alone if all ranks have failed, and return the exit code once all of them have come."""
    code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    all_failed = True
    if distributed.world_size() > 1:
        # torchrun terminates all ranks once one has exited: each must exit with its own code, after rank 0 has printed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        all_failed = distributed.barrier(datetime.timedelta(seconds=10))
    if int(os.environ.get("RANK", 0)) == 0 or not all_failed:
        where = "" if all_failed else f" (rank {distributed.rank()})"
        line = " ".join(str(error).split()) or "interrupted"
        kind = "stopped" if isinstance(error, Stopped) else "error"
        print(f"{os.path.basename(sys.argv[0])}: {kind}: {line}{where}", file=sys.stderr, flush=True)
        if os.environ.get("LIP_DEBUG") == "1":
            traceback.print_exception(error)
    if not all_failed:
        _exit_at_once(code)
    return code


def _exit_alone(error: Exception) -> None:
    """Exit after an unexpected error on this rank, without waiting for the others, which torchrun then terminates."""
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or "closed by peer" in text or "reset by peer" in text:
        where = f"rank {distributed.rank()}"
        print(f"{where}: lost the connection to another process: {text[:200]}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    _exit_at_once(1)


def _exit_at_once(code: int) -> None:
    """Exit without destroying the process group, which would wait for other ranks; first finish writing checkpoints."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    os._exit(code)
