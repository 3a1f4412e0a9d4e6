"""How a command starts, fails and ends: one line for what a user can cause, and an exit code that says which kind."""

import argparse
import datetime
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import torch.distributed as dist

from lip_resnet import distributed
from lip_resnet.errors import EXIT_CODES, InputError, Stopped


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are an InputError: one line, like every other wrong input."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")


def launch(main: Callable[[], None]) -> None:
    """Run a command's ``main`` inside its process group and leave the process with the right exit code.

    0: done. 2: an InputError; every rank exits with 2 and only rank 0 prints the line. 1: the numbers went wrong
    (FloatingPointError), one line too. 75: Stopped, to be continued. Anything else is a defect of ours and keeps its
    traceback; with LIP_DEBUG=1 in the environment the others print theirs too, after the line.
    """
    code = 0
    try:
        distributed.init()
        main()
    except tuple(EXIT_CODES) as error:
        code = _fail(error)
    except Exception as error:
        if distributed.world_size() > 1:
            _exit_alone(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would call the end of loader processes an accident
    sys.exit(code)


def _fail(error: BaseException) -> int:
    """Print one line, from rank 0 where all ranks have failed alike, and let them leave together."""
    code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    together = True
    if distributed.world_size() > 1:
        # torchrun ends the other ranks once one has exited: each must leave with its own code, after rank 0 spoke.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        together = distributed.meet(datetime.timedelta(seconds=10))
    if int(os.environ.get("RANK", 0)) == 0 or not together:
        where = "" if together else f" (rank {distributed.rank()})"
        line = " ".join(str(error).split()) or "interrupted"
        kind = "stopped" if isinstance(error, Stopped) else "error"
        print(f"{os.path.basename(sys.argv[0])}: {kind}: {line}{where}", file=sys.stderr, flush=True)
        if os.environ.get("LIP_DEBUG") == "1":
            traceback.print_exception(error)
    if not together:
        _exit_at_once(code)
    return code


def _exit_alone(error: Exception) -> None:
    """End a process whose error the others do not share, without waiting for them: torchrun then ends them."""
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or "closed by peer" in text or "reset by peer" in text:
        where = f"rank {distributed.rank()}"
        print(f"{where}: another process is gone, or out of reach: {text[:200]}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    _exit_at_once(1)


def _exit_at_once(code: int) -> None:
    """Exit without destroying the process group, which would wait for the others; finish writing a checkpoint."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    os._exit(code)
