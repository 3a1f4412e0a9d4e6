"""Asynchronous copies of batches to the device."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lip_resnet.compat import tree_leaves, tree_map_only
from lip_resnet.data.steps import Batch


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on ``device``: on a GPU, the next batch is copied from pinned memory on a side stream while the
    current step computes; on the CPU they pass through.

    GPU work of ``batches`` itself (``decode: gpu``) is on the side stream too.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)

    def upload(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_cuda else tensor.pin_memory().to(device, non_blocking=True)

    def pull() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(side):
            batch = next(source, None)
            if batch is None:
                return None
            parts = tree_map_only(Tensor, upload, batch.parts)
            copied = torch.cuda.Event()
            copied.record(side)
        return dataclasses.replace(batch, parts=parts), copied

    def release(batch: Batch, copied: torch.cuda.Event) -> Batch:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copied)
        for leaf in tree_leaves(batch.parts):
            if isinstance(leaf, Tensor):
                leaf.record_stream(stream)  # or the allocator could reuse the memory before this stream has read it
        return batch

    source = iter(batches)
    while (ready := pull()) is not None:
        yield release(*ready)  # the caller only enqueues its step: the next copy overlaps with it
