"""What the training process and its loader processes share: batch buffers, and who holds which sample.

Loader processes start when their loader is built, not when it is first read: a process that is forked after autograd,
TensorBoard and progress bars have started threads can inherit a lock that nobody will ever release.
"""

import multiprocessing.util
import os
import re
import signal
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lip_resnet import lifeline
from lip_resnet.config import InputError

PREFETCH = 2  # orders that each worker has in hand


class Ring:
    """Batch buffers in shared memory, used again and again: fresh shared memory is mostly page faults.

    A buffer is out from ``take`` until nothing in this process refers to the tensor that ``lend`` gave; a caller may
    keep batches as long as it likes. When no buffer is free, the worker makes one of its own.

    Args:
        buffers: how many.
        size: bytes of each.
    """

    def __init__(self, buffers: int, size: int) -> None:
        self.memory = torch.empty((buffers, size), dtype=torch.uint8).share_memory_()
        self.free, self.lent = list(range(buffers)), set()

    def reset(self) -> None:
        """Take back what was ordered and never delivered; only when no worker is at work."""
        self.free = [slot for slot in range(len(self.memory)) if slot not in self.lent]

    def take(self) -> int | None:
        """A free buffer's number, or None."""
        return self.free.pop() if self.free else None

    def lend(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """A buffer as a tensor (uint8); it is free again when that tensor and all its views are gone."""
        array = self.memory[slot, : int(np.prod(shape))].view(shape).numpy()
        self.lent.add(slot)
        weakref.finalize(array, self._release, slot).atexit = False
        return torch.from_numpy(array)  # its storage, which views share, owns `array`

    def _release(self, slot: int) -> None:
        self.lent.discard(slot)
        self.free.append(slot)


class Held:
    """Which sample each worker has in its hands, readable after its death."""

    def __init__(self, workers: int) -> None:
        self.table = torch.full((max(workers, 1), 2), -1, dtype=torch.int64).share_memory_()

    def note(self, index: int) -> None:
        """This worker begins on a sample."""
        info = get_worker_info()
        if info is not None:
            self.table.numpy()[info.id] = (os.getpid(), index)

    def pids(self) -> set[int]:
        """The workers that have begun on a sample."""
        return {pid for pid, _ in self.table.tolist() if pid > 0}

    def explain(self, error: RuntimeError, source: Any) -> InputError | None:
        """What torch's message about a dead worker says, with the file; None for any other error."""
        text = " ".join(str(error).split())
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(.*)", text)
        if found is None:
            return None
        pids = {int(pid) for pid in found[1].split(",")}
        names = [_name(source, index) for pid, index in self.table.tolist() if pid in pids and index >= 0]
        holding = f"while it held {', '.join(names)}" if names else "before it held a file"
        return InputError(f"data.workers: a loader process (pid {found[1]}){found[2]} {holding}")


def _name(source: Any, index: int) -> str:
    return source.path(index) if hasattr(source, "path") else f"sample {index}"


class Orders:
    """The batch sampler of a loader: nothing until ``open`` is set, so that workers can start with empty hands."""

    def __init__(self, batches: Iterable[Any], ring: Ring | None = None) -> None:
        self.batches, self.ring, self.open = batches, ring, False

    def __iter__(self) -> Iterator[tuple[int | None, Any]]:
        if self.ring is not None:
            self.ring.reset()
        for batch in self.batches if self.open else ():
            yield (None if self.ring is None else self.ring.take()), batch


def start_loader(dataset: Dataset, orders: Orders, workers: int, pin: bool) -> DataLoader:
    """A DataLoader whose workers run already; ``dataset.__getitems__(order)`` makes a batch."""
    loader = DataLoader(
        dataset,
        batch_sampler=orders,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin,
        worker_init_fn=_follow_the_parent,
    )
    if workers:
        iter(loader)
    orders.open = True
    return loader


def _follow_the_parent(_: int) -> None:
    """A terminal or scheduler signals every process; only the training process must act, its workers follow it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    lifeline.end_with(multiprocessing.parent_process().pid)


def _end_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# When Python leaves, multiprocessing sends SIGTERM to the workers of loaders that still live, and waits for them; they
# ignore it.
multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)


def _as_it_is(batch: Any) -> Any:
    return batch
