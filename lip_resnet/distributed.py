"""Ranks and collectives, which work with one process too; joining torchrun's process group."""

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lip_resnet import lifeline
from lip_resnet.errors import InputError
from lip_resnet.rendezvous import store_of_this_start

T = TypeVar("T")
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = datetime.timedelta(hours=2)
"""Of collectives: longer than ``train.hang_minutes``, so that the watchdog names a hanging rank first."""
_device: torch.device | None = None
_control: Any = None  # a Gloo group: objects and barriers go through the CPU and never wait for a GPU stream


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the process that writes and prints."""
    return rank() == 0


def choose_device(name: str) -> torch.device:
    """Choose what ``device`` returns from now on.

    Args:
        name: cuda, mps or cpu; auto: this process's GPU, or the CPU where CUDA has none.

    Raises:
        InputError: PyTorch cannot use it here, or not with this many processes.
    """
    global _device
    _device = _find_device(name)
    return _device


def device() -> torch.device:
    """This process's device: the one chosen by ``choose_device``, else that of ``auto``.

    Raises:
        InputError: this machine has more processes than GPUs.
    """
    return _device or _find_device("auto")


def _find_device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise InputError("device mps: PyTorch can use no Apple GPU here; choose auto, cuda or cpu")
        if world_size() > 1:
            raise InputError(f"device mps: Apple's GPU takes one process, not {world_size()}; start without torchrun")
        return torch.device("mps")
    if not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch can use no CUDA GPU here; choose auto or cpu")
    processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > count:  # the same on every process of the machine
        raise InputError(f"{processes} processes on this machine but {count} GPUs are visible; lower --nproc_per_node")
    if "RANK" not in os.environ:
        return torch.device("cuda", 0)
    gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(gpu)
    return gpu


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes, in place; any shape and dtype."""
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank. A collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 alone; every rank returns its result. A collective.

    Raises:
        InputError: on every rank, if ``function`` raised one.
    """
    result: Any = None
    error: InputError | None = None
    if is_main():
        try:
            result = function()
        except InputError as caught:
            error = caught
    result, message = broadcast_object((result, None if error is None else str(error)))
    if message is not None:
        raise error or InputError(message)
    return result


def gather_objects(value: T) -> list[T]:
    """Every process's value, in the order of ranks, on every rank. A collective."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=_control)
    return values


def gather_rows(row: torch.Tensor) -> torch.Tensor:
    """Every process's ``row`` (n,), stacked on the CPU: (processes, n), the same on every rank. A collective."""
    row = row.detach().cpu()
    rows = [torch.empty_like(row) for _ in range(world_size())]
    if dist.is_initialized():
        dist.all_gather(rows, row, group=_control)
        return torch.stack(rows)
    return row[None]


def barrier(timeout: datetime.timedelta) -> bool:
    """Wait for all processes; False if they do not all come within ``timeout``."""
    try:
        dist.monitored_barrier(_control, timeout=timeout)
    except RuntimeError:
        return False
    return True


class DelayedMaximum:
    """The maximum of an integer over processes, by a non-blocking all-reduce on the CPU.

    A call starts the reduction of its number and returns the result of the previous call's; with one process, its own
    number. A collective: every process must call it equally often.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self, number: int) -> int:
        if world_size() == 1:
            return number
        previous = self.flush()
        tensor = torch.tensor([number])
        self._pending = tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_control, async_op=True)
        return previous

    def flush(self) -> int:
        """Wait for the last call's result; 0 if it has been returned, or if there was no call."""
        if self._pending is None:
            return 0
        (tensor, work), self._pending = self._pending, None
        work.wait()
        return int(tensor.item())


def init() -> None:
    """Join torchrun's process group, if torchrun (or a launcher that sets the same variables) started this process.

    Raises:
        InputError: some of torchrun's variables are missing, or not all processes come.
    """
    global _control
    present = [name for name in _VARIABLES if name in os.environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return
    if len(present) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in present)
        raise InputError(f"the environment sets {', '.join(present)} but not {missing}; start with torchrun")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        lifeline.exit_with_parent()
    store: dict[str, Any] = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = {"store": store_of_this_start(number, count), "rank": number, "world_size": count}
    # The device is chosen later, by the recipe: a group for both, whose NCCL half starts with its first collective.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, **store)
    _control = dist.new_group(backend="gloo", timeout=TIMEOUT)
