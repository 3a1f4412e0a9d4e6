"""Loader workers: how they start and end, and the memory that they share with the training process.

Workers start when their loader is built, not when it is first read: a process that is forked after autograd,
TensorBoard and progress bars have started threads can inherit a lock that is never released.
"""

import atexit
import os
import re
import signal
import warnings
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lip_resnet import compat, lifeline
from lip_resnet.config import InputError
from lip_resnet.data.sources.base import Samples, name_sample

PREFETCH_FACTOR = 2
"""Batches requested in advance from each worker."""


class BufferPool:
    """Reusable batch buffers in shared memory: the page faults of new shared memory would cost more than the batch.

    A buffer is in use from ``acquire`` until the tensor that ``lend`` returns is no longer referenced in this process;
    a caller may keep batches as long as it likes. When no buffer is free, the worker allocates a tensor for its batch.

    Args:
        buffers: how many.
        size: bytes of each.
    """

    def __init__(self, buffers: int, size: int) -> None:
        self.memory = torch.empty((buffers, size), dtype=torch.uint8).share_memory_()
        self.free = list(range(buffers))
        self.lent: set[int] = set()

    def reset(self) -> None:
        """Free the buffers of batches that were requested and never delivered; only while the workers are idle."""
        self.free = [slot for slot in range(len(self.memory)) if slot not in self.lent]

    def acquire(self) -> int | None:
        """A free buffer's number, or None."""
        return self.free.pop() if self.free else None

    def lend(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """A buffer as a uint8 tensor of ``shape``; it is free again when that tensor and all its views are gone."""
        array = self.memory[slot, : int(np.prod(shape))].view(shape).numpy()
        self.lent.add(slot)
        weakref.finalize(array, self._release, slot).atexit = False
        return torch.from_numpy(array)  # its storage, which views share, owns `array`

    def _release(self, slot: int) -> None:
        self.lent.discard(slot)
        self.free.append(slot)


class InFlightSamples:
    """The sample that each worker is reading, in shared memory, so that the image can be named if the worker dies.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        self.table = torch.full((max(workers, 1), 2), -1, dtype=torch.int64).share_memory_()
        """(workers, 2) int64: process id and sample index, -1 for none."""

    def begin(self, index: int) -> None:
        """This worker begins to read a sample."""
        info = get_worker_info()
        if info is not None:
            self.table.numpy()[info.id] = (os.getpid(), index)

    def end(self) -> None:
        """This worker has read its batch."""
        self.begin(-1)

    def pids(self) -> set[int]:
        """The workers that have begun to read a sample."""
        return {pid for pid, _ in self.table.tolist() if pid > 0}

    def explain(self, error: RuntimeError, source: Samples) -> InputError | None:
        """torch's message about a dead worker, with the names of the images; None for any other error."""
        match = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(.*)", " ".join(str(error).split()))
        if match is None:
            return None
        pids = {int(pid) for pid in match[1].split(",")}
        names = [name_sample(source, index) for pid, index in self.table.tolist() if pid in pids and index >= 0]
        when = f"while it read {', '.join(names)}" if names else "before it read an image"
        return InputError(f"data.workers: a loader process (pid {match[1]}){match[2]} {when}")


class DeferredBatchSampler:
    """A batch sampler that yields nothing until ``started`` is set, so that workers can start without any work.

    Args:
        batches: for each batch, the keys of its samples.
        pool: the buffers for batches; None for tensors that the workers allocate.
    """

    def __init__(self, batches: Iterable[Any], pool: BufferPool | None = None) -> None:
        self.batches, self.pool, self.started = batches, pool, False

    def __iter__(self) -> Iterator[tuple[int | None, Any]]:
        """(number of the batch's buffer or None, batch)."""
        if self.pool is not None:
            self.pool.reset()
        for batch in self.batches if self.started else ():
            yield (None if self.pool is None else self.pool.acquire()), batch


def start_loader(dataset: Dataset, sampler: DeferredBatchSampler, workers: int, pin: bool) -> DataLoader:
    """A DataLoader whose workers run already; ``dataset.__getitems__`` turns an item of ``sampler`` into a batch."""
    with warnings.catch_warnings():
        # data.workers is the user's: more than the cores are right where reading waits for a disk or server.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]  # the stub demands lists; the loader passes on any item
            num_workers=workers,
            collate_fn=_identity,
            prefetch_factor=PREFETCH_FACTOR if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin,
            worker_init_fn=_init_worker,
        )
        if workers:
            iterator = iter(loader)
            arguments = os.getpid(), weakref.ref(iterator), compat.loader_workers(iterator)
            atexit.register(_kill_workers, *arguments)
            # A process of multiprocessing, as of torch.multiprocessing.spawn, can end without atexit's functions.
            Finalize(None, _kill_workers, arguments, exitpriority=0)
    sampler.started = True
    return loader


def _init_worker(_: int) -> None:
    """Ignore the signals that a terminal or scheduler sends to every process: the training process handles them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    lifeline.exit_with_parent()


def _kill_workers(process: int, reference: weakref.ref, workers: list[BaseProcess]) -> None:
    """End a loader's workers when Python exits: multiprocessing would send SIGTERM, which they ignore, and wait.

    Args:
        process: id of the process that started them; a fork of it inherits this hook, but not the workers.
        reference: to the loader's iterator.
        workers: its processes.
    """
    iterator = reference()
    if os.getpid() != process:
        return
    if iterator is not None:
        # Else torch's SIGCHLD handler reports the workers' end as an error, and its own shutdown waits for them.
        compat.disown_workers(iterator)
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join()


def _identity(batch: Any) -> Any:
    return batch
