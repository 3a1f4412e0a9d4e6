"""What DistributedDataParallel does for a step, and what stands in for it where it cannot be used."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from lip_resnet import distributed

_COMPRESSION = {"bfloat16": default_hooks.bf16_compress_hook, "float16": default_hooks.fp16_compress_hook}


def wrap(model: nn.Module, device: torch.device, compression: str) -> DistributedDataParallel:
    """DDP around a network on its device; ``compression`` is ``train.gradient_compression``.

    DDP broadcasts rank 0's BN buffers before every forward: a checkpoint needs only those.
    """
    wrapped = DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    if compression != "none":
        wrapped.register_comm_hook(None, _COMPRESSION[compression])
    return wrapped


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over processes without DDP, which needs those of all its parameters. A collective."""
    for parameter in parameters:
        if parameter.grad is not None:
            distributed.all_reduce_sum(parameter.grad).div_(distributed.world_size())
