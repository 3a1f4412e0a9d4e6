"""Ranks: the same code for one process and for many, and the one way in and out of every command."""

import argparse
import datetime
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lip_resnet import lifeline
from lip_resnet.config import InputError

T = TypeVar("T")
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = datetime.timedelta(hours=2)
"""How long a process waits for the others; longer than ``train.hang_minutes``, whose watchdog says who hangs."""
_control: Any = None  # Gloo group for objects and barriers, so that they never touch a GPU stream


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none.

    Raises:
        InputError: more processes on this machine than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > count:  # every process of the machine finds the same
        raise InputError(f"{processes} processes on this machine but {count} GPUs are visible; lower --nproc_per_node")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if "RANK" in os.environ else 0)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, in place; any shape and dtype."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Run on rank 0 alone; every rank gets what it returned, or its InputError."""
    value = error = None
    if is_main():
        try:
            value = function()
        except InputError as caught:
            error = str(caught)
    value, error = broadcast_object((value, error))
    if error is not None:
        raise InputError(error)
    return value


def gather_objects(value: T) -> list[T]:
    """Every process's value, in the order of ranks, on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=_control)
    return values


def gather_rows(row: torch.Tensor) -> torch.Tensor:
    """Every process's ``row`` (n,), on the CPU: (processes, n), the same everywhere."""
    row = row.detach().cpu()
    rows = [torch.empty_like(row) for _ in range(world_size())]
    if dist.is_initialized():
        dist.all_gather(rows, row, group=_control)
        return torch.stack(rows)
    return row[None]


class Agreement:
    """The largest of the processes' numbers, a call late with several processes: nobody waits for the others.

    Every process must call it equally often.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self, number: int) -> int:
        if world_size() == 1:
            return number
        answer = self.close()
        mine = torch.tensor([number])
        self._pending = mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=_control, async_op=True)
        return answer

    def close(self) -> int:
        """Wait for the last call's answer; 0 where there was none."""
        if self._pending is None:
            return 0
        (number, work), self._pending = self._pending, None
        work.wait()
        return number.tolist()[0]


class Stopped(Exception):
    """The run was asked to stop, and what it had done is saved; the command leaves with exit code 75 (try again)."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are an InputError: one line, like every other wrong input."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")


def launch(main: Callable[[], None]) -> None:
    """Run a command's ``main`` inside its process group and leave the process with the right exit code.

    0: done. 2: an InputError; every rank exits with 2 and only rank 0 prints the line. 1: the numbers went wrong
    (FloatingPointError), one line too. 75: Stopped, to be continued. Anything else is a defect of ours and keeps its
    traceback.
    """
    code = 0
    try:
        _init()
        main()
    except InputError as error:
        code = _fail(str(error), 2)
    except Stopped as stop:
        code = _fail(str(stop), 75)
    except FloatingPointError as error:
        code = _fail(str(error), 1)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except Exception as error:
        if world_size() > 1:
            _leave_alone(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would call the end of loader processes an accident
    sys.exit(code)


def _init() -> None:
    global _control
    present = [name for name in _VARIABLES if name in os.environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return
    if len(present) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in present)
        raise InputError(f"the environment sets {', '.join(present)} but not {missing}; start with torchrun")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        lifeline.exit_with_parent()
    here = device()
    store: dict[str, Any] = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = {"store": _fresh_store(number, count), "rank": number, "world_size": count}
    if here.type == "cuda":
        torch.cuda.set_device(here)
        dist.init_process_group("nccl", device_id=here, timeout=PATIENCE, **store)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE, **store)
    _control = dist.new_group(backend="gloo", timeout=PATIENCE)


def _fresh_store(number: int, count: int) -> dist.Store:
    """torchrun's store, under a prefix of this start's own.

    torchrun keeps one store for all its restarts, and a restarted process could read where the killed ones listened.
    Nothing in the environment tells starts apart (the restart count is each node's own), so all processes agree on a
    name: rank 0 lists everybody's token, everybody confirms the list that holds its own, and rank 0 confirms that.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, count, is_master=False)
    token, end = uuid.uuid4().hex, time.monotonic() + 600
    names = [f"lip_resnet/hello/{each}" for each in range(count)]
    acks = [f"lip_resnet/agreed/{each}" for each in range(count)]
    store.set(names[number], token)
    while time.monotonic() < end:
        if number == 0 and store.check(names):
            store.set("lip_resnet/list", b" ".join(store.multi_get(names)))
        listed = store.get("lip_resnet/list") if store.check(["lip_resnet/list"]) else b""
        if token.encode() in listed.split():
            store.set(acks[number], listed)
            if number == 0 and store.check(acks) and set(store.multi_get(acks)) == {listed}:
                store.set("lip_resnet/go", listed)
            if store.check(["lip_resnet/go"]) and store.get("lip_resnet/go") == listed:
                return dist.PrefixStore(hashlib.sha256(listed).hexdigest(), store)
        time.sleep(0.05)
    raise InputError(f"not all of {count} processes have come within 10 minutes")


def _leave_alone(error: Exception) -> None:
    """End a process whose error the others do not share, without waiting for them: torchrun then ends them."""
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or "closed by peer" in text or "reset by peer" in text:
        print(f"rank {rank()}: another process is gone, or out of reach: {text[:200]}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    _exit_at_once(1)


def _exit_at_once(code: int) -> None:
    """Without a goodbye to the process group, which waits for what the others are in; with the last checkpoint."""
    for thread in threading.enumerate():  # it may be on its way to the disk
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    os._exit(code)


def _fail(message: str, code: int) -> int:
    """Print one line, from rank 0 where it has come here too, and let all ranks leave together."""
    together = True
    if world_size() > 1:
        # torchrun ends the other ranks once one has exited: each must leave with its own code, after rank 0 spoke.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            dist.monitored_barrier(_control, timeout=datetime.timedelta(seconds=10))
        except RuntimeError:  # the others are elsewhere: only this rank met the error
            together = False
    main = int(os.environ.get("RANK", 0)) == 0
    if main or not together:
        where = "" if together else f" (rank {rank()})"
        command, line = os.path.basename(sys.argv[0]), " ".join(message.split())
        kind = "stopped" if code == 75 else "error"
        print(f"{command}: {kind}: {line}{where}", file=sys.stderr, flush=True)
    if not together:
        _exit_at_once(code)
    return code
