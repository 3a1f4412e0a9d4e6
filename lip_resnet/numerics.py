"""Steps whose loss or gradients are not finite: undone on the device, found on the host, explained by a second run."""

import contextlib
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lip_resnet import checkpoint, distributed
from lip_resnet.config import InputError, TrainConfig

LAG = 2
"""On a GPU, the host looks at a step's flag this many steps later, when it is there without waiting."""
MOST_SAVED = 8
"""Batches that a rank saves in a run folder, at most."""


class Rollback(Exception):
    """The run must go back to its newest checkpoint and leave out the step that ``step`` names."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class _Look(NamedTuple):
    """A step whose flag the host has not seen yet."""

    step: int
    rate: float
    parts: list[tuple[Tensor, Tensor]]
    losses: Callable[[], Iterator[Tensor]]
    """Runs the step's forwards again: the loss of each part."""
    flags: Tensor
    """(3,) on the host: the step was undone, how many in a row, this rank's own loss was not finite."""
    copied: torch.cuda.Event | None


class Sentinel:
    """Guards a network's steps. Decided on the device: a step whose loss or gradient norm is not finite, on any rank,
    leaves parameters, optimizer, average, buffers and counts as they were. Nothing waits for the device.

    A loss that is not finite makes its gradients NaN, and the all-reduce carries them to every rank, so every rank
    decides alike. Under float16, whose scaler skips overflowing steps as a matter of course, only the loss counts.

    What happens next is ``train.on_nonfinite``'s: ``skip`` tells and goes on; ``stop`` and ``rollback`` undo all later
    steps too, until the host has seen the flag, and then raise.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.folder: Path | None = None
        """Where batches are saved for inspection; None: nowhere."""
        self.tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
        self.counters = torch.zeros(2, dtype=torch.int64, device=self.device)
        """Steps undone: in all, and the last ones in a row."""
        self.lag = LAG if self.device.type == "cuda" else 0
        self._half = config.precision == "float16"
        self._looks: deque[_Look] = deque()
        self._latched = torch.zeros((), dtype=torch.bool, device=self.device)
        self._nan = torch.tensor(math.nan, device=self.device)
        self._groups = [
            [buffer for buffer in model.buffers() if buffer.dtype == dtype]
            for dtype in {buffer.dtype for buffer in model.buffers()}
        ]

    def begin(self, sums: Tensor) -> None:
        """A step begins; ``sums`` are counts that it will add to."""
        self._sums = sums
        self._before = sums.clone(), [_flat(group) for group in self._groups]
        self._loss = self._latched.clone()

    def weigh(self, loss: Tensor, weight: float) -> Tensor:
        """``loss`` x ``weight``, whose gradients are NaN if the loss is not finite."""
        bad = ~loss.detach().isfinite()
        self._loss |= bad
        return loss * torch.where(bad | self._latched, self._nan, weight)

    def judge(self, norm: Tensor | None) -> Tensor:
        """1.0 () if the step must not count, else 0.0; ``norm`` is the whole gradient's, None under float16."""
        if self._half:
            bad = self._loss.float()
            if distributed.world_size() > 1:
                torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        else:
            bad = (~norm.isfinite()).float()
        if self.config.on_nonfinite != "skip":
            self._latched |= bad.bool()
        return bad

    @torch.no_grad()
    def undo(self, bad: Tensor) -> None:
        """Buffers and counts as they were when the step began, where ``bad`` is 1."""
        undone = bad.bool()
        sums, flats = self._before
        self._sums.copy_(torch.where(undone, sums, self._sums))
        for group, before in zip(self._groups, flats, strict=True):
            kept = torch.where(undone, before, _flat(group)).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(group, [flat.view_as(buffer) for flat, buffer in zip(kept, group, strict=True)])
        self.counters += undone
        self.counters[1] *= undone

    def watch(
        self,
        step: int,
        rate: float,
        bad: Tensor,
        parts: list[tuple[Tensor, Tensor]],
        losses: Callable[[], Iterator[Tensor]],
    ) -> None:
        """Look at the flag of optimizer step ``step`` (from 1) when the device has come to it."""
        flags, copied = torch.stack([bad, self.counters[1].float(), self._loss.float()]), None
        if self.device.type == "cuda":
            flags = torch.empty(3, pin_memory=True).copy_(flags, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._looks.append(_Look(step, rate, parts, losses, flags, copied))
        self.settle(self.lag)

    def settle(self, behind: int = 0) -> None:
        """Look at all flags but the last ``behind``; every process must call it after the same step.

        Raises:
            FloatingPointError: a step was not finite, and ``on_nonfinite`` is stop, or too many in a row were skipped.
            Rollback: a step was not finite, and ``on_nonfinite`` is rollback.
        """
        while len(self._looks) > behind:
            look = self._looks.popleft()
            if look.copied is not None:
                look.copied.synchronize()
            undone, row, own = look.flags.tolist()
            if undone:
                self._found(look, int(row), bool(own))

    def restart(self) -> None:
        """Forget all flags: the run has gone back to a checkpoint."""
        self._looks.clear()
        self._latched.zero_()

    def _found(self, look: _Look, row: int, own: bool) -> None:
        train = self.config
        where = diagnose(self.model, look.losses)
        if where is None and own:
            where = "a loss that was finite when the batch was run again"
        found = {rank: text for rank, text in enumerate(distributed.gather_objects(where)) if text is not None}
        if not found:
            found = dict.fromkeys(range(distributed.world_size()), "the gradients summed over processes")
        name = f"step-{look.step:08d}-rank{{}}.pt"
        if distributed.rank() in found:
            self._save(look, name.format(distributed.rank()))
        places = "; ".join(f"rank {rank}: {text}" for rank, text in list(found.items())[:4])
        message = f"loss or gradients are not finite at step {look.step}, learning rate {look.rate:g}; {places}"
        if len(found) > 4:
            message += f"; and {len(found) - 4} more ranks"
        if self.folder is not None:
            message += f"; batch: {self.folder / name.format(next(iter(found)))}"
        if train.on_nonfinite == "rollback":
            raise Rollback(look.step, message)
        if train.on_nonfinite == "stop":
            raise FloatingPointError(f"{message}; no checkpoint holds it (train.on_nonfinite: stop, skip, rollback)")
        if row > train.nonfinite_limit:
            raise FloatingPointError(f"{message}; {row} steps in a row (train.nonfinite_limit)")
        self.tell(f"warning: {message}; the step is skipped")

    def _save(self, look: _Look, name: str) -> None:
        if self.folder is None or len(list(self.folder.glob(f"*-rank{distributed.rank()}.pt"))) >= MOST_SAVED:
            return
        payload = {
            "step": look.step,
            "lr": look.rate,
            "seed": self.config.seed,
            "skipped": True,
            "images": [images.cpu() for images, _ in look.parts],
            "labels": [labels.cpu() for _, labels in look.parts],
        }
        try:
            self.folder.mkdir(exist_ok=True)
            checkpoint.save(self.folder / name, payload)
        except (InputError, OSError) as error:
            print(f"warning: the batch is not saved: {error}", file=sys.stderr)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def update_average(ema: ModelEmaV3, model: nn.Module, bad: Tensor) -> None:
    """average += (1 - decay) (weights - average), timm's rule, and nothing where ``bad`` is 1; on the device."""
    averages, values = [], []
    for average, value in zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True):
        if average.is_floating_point():
            averages.append(average)
            values.append(value)
        else:
            average.copy_(value)
    change = torch._foreach_sub(values, averages)
    torch._foreach_mul_(change, (1 - bad) * (1 - ema.decay))
    torch._foreach_add_(averages, change)


SMALLEST_SCALE = 2.0**-14


def check_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Under float16 the scaler leaves out steps whose gradients overflow and halves its scale: it may not go on so.

    Waits for the device.

    Raises:
        FloatingPointError: the scale has sunk below ``SMALLEST_SCALE``: the gradients overflow at any scale.
    """
    if scaler.is_enabled() and (scale := scaler.get_scale()) < SMALLEST_SCALE:
        raise FloatingPointError(
            f"gradients overflow at step {step} whatever their scale, which is down to {scale:.3g}: float16's steps no "
            "longer count; train.precision: bfloat16 has the range of float32"
        )


def step_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, bad: Tensor) -> None:
    """One update, unless ``bad`` is 1: then parameters and optimizer stay as they are.

    Fused optimizers read the flag on the device. The others (lamb, lars) make the host wait for it.
    """
    if scaler.is_enabled():  # its own flag covers ours: a loss that is not finite has made the gradients NaN
        one = torch.ones((), device=bad.device)
        before = scaler.scale(one)
        scaler.step(optimizer)
        scaler.update()
        scaler.update(torch.where(bad.bool(), before, scaler.scale(one)))  # such a loss is not the scale's fault
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = bad
        optimizer.step()
        del optimizer.found_inf
    elif not bad.item():
        optimizer.step()


def diagnose(model: nn.Module, losses: Callable[[], Iterator[Tensor]]) -> str | None:
    """Run a step's forwards and backwards again and name the first thing that is not finite; None if all is finite.

    In this order: the images, a module's output, the loss, a parameter's gradient (the last parameter's first, as the
    backward goes). The network stays as it is.
    """
    found: list[str] = []

    def check(tensors: Any, name: str) -> None:
        if not found and not all(
            tensor.isfinite().all() for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)
        ):
            found.append(name)

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: check(output, f"the output of {name or 'the network'}")

    eager = contextlib.nullcontext()
    if model._compiled_call_impl is not None:
        eager = torch.compiler.set_stance("force_eager")
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    hooks.append(model.register_forward_pre_hook(lambda module, inputs: check(inputs, "the images")))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        with eager:
            for loss in losses():
                check(loss, "the loss")
                gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
                for (name, _), gradient in reversed(list(zip(named, gradients, strict=True))):
                    check([gradient], f"the gradient of {name}")
    finally:
        for handle in hooks:
            handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return found[0] if found else None
