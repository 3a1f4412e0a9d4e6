"""What DistributedDataParallel costs, computed: a network's gradient buckets, the links, and a step's time on them."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

MIB = 2**20


# ---- what a network sends ----


@dataclass(frozen=True)
class Bucket:
    """Gradients that DDP sums in one call."""

    bytes: int
    ready: float
    """When the last of them exists, as a share of the backward pass's multiply-adds: 0 at its begin, 1 at its end."""


@dataclass(frozen=True)
class Traffic:
    """What each step of a network sends."""

    buckets: tuple[Bucket, ...]
    """In the order of the backward pass."""
    buffers: int
    """Bytes of running statistics, which DDP broadcasts from rank 0 before a step's first forward."""

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return sum(bucket.bytes for bucket in self.buckets)


def traffic(model: nn.Module, size: int = 224, bucket_bytes: int = 25 * MIB) -> Traffic:
    """Count a network's gradients, grouped by DDP's own rule, and when each group is ready.

    Args:
        model: any network without parameters outside its modules; on the meta device nothing is computed.
        size: side of the images, which shares out the multiply-adds.
        bucket_bytes: DDP's ``bucket_cap_mb``.
    """
    order: list[tuple[nn.Module, int]] = []
    counter = FlopCounterMode(display=False)
    hooks = [
        module.register_forward_pre_hook(lambda module, _: order.append((module, counter.get_total_flops())))
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    device = next(model.parameters()).device
    with counter, torch.no_grad():
        model(torch.empty(2, 3, size, size, device=device))
    for hook in hooks:
        hook.remove()
    total, parameters, ready = counter.get_total_flops(), [], []
    seen: set[int] = set()
    # Backward runs the other way round: a gradient exists when all work behind the module's begin is undone.
    # A module that is used twice is done when its first use is.
    first = {id(module): begin for module, begin in reversed(order)}
    for module, _ in reversed(order):
        for parameter in reversed(list(module.parameters(recurse=False))):  # a bias before its weight
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters.append(parameter)
                ready.append(1 - first[id(module)] / total)
    wanted = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(parameters) == wanted, f"{wanted - len(parameters)} parameters belong to no module that ran"
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, bucket_bytes]
    groups, _ = dist._compute_bucket_assignment_by_size(parameters, limits)
    buckets = tuple(Bucket(sum(parameters[i].nbytes for i in group), max(ready[i] for i in group)) for group in groups)
    return Traffic(buckets, sum(buffer.nbytes for buffer in model.buffers()))


# ---- what the links make of it ----


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs; bandwidths in bytes/s and each way, latencies in s a hop."""

    node: int
    """GPUs in a node."""
    inside: float
    """Of one GPU to the others of its node."""
    between: float
    """Of one node to the others."""
    latency_inside: float = 5e-6
    latency_between: float = 20e-6

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds to sum ``size`` bytes over ``gpus``: rings, inside the nodes first where there are several.

        Reduce-scatter inside, ring over the nodes with each GPU's share, all-gather inside.
        """
        inner, outer = min(gpus, self.node), math.ceil(gpus / self.node)
        return (
            2 * (inner - 1) / inner * size / self.inside
            + 2 * (inner - 1) * self.latency_inside
            + 2 * (outer - 1) / outer * size / self.between
            + 2 * (outer - 1) * self.latency_between
        )

    def broadcast(self, size: float, gpus: int) -> float:
        """Seconds to hand ``size`` bytes from one GPU to all, along a chain."""
        inner, outer = min(gpus, self.node), math.ceil(gpus / self.node)
        seconds = (inner - 1) * self.latency_inside + (outer - 1) * self.latency_between
        seconds += size / self.inside if inner > 1 else 0
        return seconds + (size / self.between if outer > 1 else 0)


@dataclass(frozen=True)
class Step:
    """One optimizer step, in seconds."""

    compute: float
    """Of one GPU alone."""
    sent: float
    """Time in which the links are busy."""
    exposed: float
    """The part of it for which the GPUs wait."""

    @property
    def total(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Images per second and GPU, against one GPU alone."""
        return self.compute / self.total


def step(
    load: Traffic,
    part: float,
    cluster: Cluster,
    gpus: int,
    *,
    accumulate: int = 1,
    shrink: float = 1.0,
    backward: float = 2 / 3,
) -> Step:
    """A step on ``gpus``: buckets are sent one after the other, each when it is ready, beside the backward pass.

    Args:
        part: seconds that one GPU computes for its share of one accumulated part.
        accumulate: parts a step; only the last one's gradients are sent.
        shrink: bytes sent for a byte of gradient (0.5: ``train.gradient_compression``).
        backward: its share of a part's time.
    """
    buffers = cluster.broadcast(load.buffers, gpus)
    if gpus == 1:
        return Step(accumulate * part, 0.0, 0.0)
    free = sent = 0.0  # clock from the last backward pass's begin
    for bucket in load.buckets:
        seconds = cluster.all_reduce(bucket.bytes * shrink, gpus)
        free = max(free, bucket.ready * backward * part) + seconds
        sent += seconds
    return Step(accumulate * part, sent + buffers, max(0.0, free - backward * part) + buffers)


def smallest_batch(
    load: Traffic, seconds_per_image: float, cluster: Cluster, gpus: int, efficiency: float, **how: float
) -> int:
    """The fewest images a GPU and part with which ``gpus`` keep that efficiency; time is taken as proportional."""
    batch = 1
    while step(load, batch * seconds_per_image, cluster, gpus, **how).efficiency < efficiency:
        batch += 1
    return batch
