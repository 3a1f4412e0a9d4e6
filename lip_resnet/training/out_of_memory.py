"""Advice for a training step that runs out of memory: settings that fit, each tried before it is suggested."""

import contextlib
import math

import torch
from torch import nn

from lip_resnet import distributed, memory
from lip_resnet.compat import is_compiled
from lip_resnet.config import Recipe
from lip_resnet.errors import InputError
from lip_resnet.training.engine import TrainState


def suggest(state: TrainState, config: Recipe, samples: int) -> str:
    """One line: what did not fit, and which values of ``optim.accumulate``, ``data.batch_size`` and
    ``train.grad_checkpointing`` do.

    Forward and backward of blank images of the largest training size are tried with half of the images, a quarter, and
    so on, without compilation, and with gradient checkpointing. The run must end: its module is changed.

    Args:
        samples: training images, of which the last batch may hold too few for more parts.
    """
    device, world, least = state.guard.device, distributed.world_size(), state.task.least_images
    batch_size, parts = config.data.batch_size, config.optim.accumulate
    share, used = batch_size // world, memory.describe_peak(device)
    images = share // parts
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    # Momentum, and what adamw allocates in its first step.
    copies = 0 if state.optimizer.state else 2

    def accepted(size: int, accumulate: int) -> bool:
        keeps_last = config.data.last_batch == "keep"
        return not (keeps_last and 0 < samples % size < least * world * accumulate) and size <= samples

    def attempt(count: int) -> None:
        reserved = [torch.empty_like(parameter) for parameter in parameters for _ in range(copies)]
        loss, _ = state.task.forward(state.model, *state.task.blank(count, largest=True), state.step, 0)
        torch.autograd.grad(loss, parameters, allow_unused=True)
        del reserved

    advice = []
    eager: contextlib.AbstractContextManager = contextlib.nullcontext()
    if is_compiled(state.model):
        eager = torch.compiler.set_stance("force_eager")
    state.optimizer.zero_grad()
    for module in state.model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # the other processes may not be here
    with eager:
        count = memory.largest_that_fits(images // 2, attempt, least)
        if count:
            part = next(size for size in range(count, 0, -1) if share % size == 0)
            if part >= least and accepted(batch_size, share // part):
                advice.append(
                    f"optim.accumulate={share // part} keeps data.batch_size={batch_size} and takes {part} images at a "
                    "time, which batch norm then sees"
                )
            unit = math.lcm(world * parts, config.data.repeats)
            sizes = range(count * world * parts // unit * unit, least * world * parts - 1, -unit)
            smaller = next((size for size in sizes if accepted(size, parts)), None)
            if smaller is not None:
                advice.append(f"data.batch_size={smaller}")
        if not config.train.grad_checkpointing:
            with contextlib.suppress(InputError):
                memory.enable_grad_checkpointing(state.model)
                if memory.fits(lambda: attempt(images)):
                    advice.append("train.grad_checkpointing=true, also with --resume auto")
    smallest = f"not even {least} {'image fits' if least == 1 else 'images fit'}: a smaller data.size might"
    fits = f"what fits: {'; or '.join(advice)}" if advice else smallest
    return f"out of memory on {device.type} with {images} images at a time, {batch_size} in a step, {used}; {fits}"
