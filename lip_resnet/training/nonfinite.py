"""Steps whose loss or gradients are not finite: undone on the device, reported by the host, diagnosed by a rerun."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lip_resnet import checkpoint, distributed
from lip_resnet.compat import copy_tensors_, move_towards_, tree_map_only
from lip_resnet.config import InputError, LoopConfig
from lip_resnet.evaluation.nonfinite import FirstNonFinite

CHECK_DELAY_STEPS = 2
"""On a GPU, the host reads a step's flags this many steps later, when the copy has arrived without waiting."""
MAX_SAVED_BATCHES = 8
"""Each rank saves at most this many non-finite batches in a run folder."""


class Rollback(Exception):
    """The run must go back to its newest checkpoint and exclude step ``step`` (from 1) when it comes to it again."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class _PendingStep(NamedTuple):
    """A step whose flags the host has not read yet."""

    step: int
    rate: float
    parts: list[tuple[Tensor, Any]]
    losses: Callable[[], Iterator[Tensor]]
    """Runs the step's forwards again: the loss of each part."""
    flags: Tensor
    """(3,) on the host: 1 if the step was undone; how many in a row were; 1 if this rank's own loss was not finite."""
    copied: torch.cuda.Event | None


class NonFiniteGuard:
    """Undoes steps that are not finite, on the device: nothing waits for it.

    A step whose loss or gradient norm is not finite, on any rank, leaves parameters, optimizer, average, buffers and
    counts as they were.

    A non-finite loss makes its gradients NaN, and the all-reduce carries them to every rank, so every rank reaches the
    same decision. Under float16 only the loss is checked: overflowing gradients are normal there, and the scaler skips
    those steps.

    ``train.on_nonfinite`` says what happens next: ``skip`` warns and goes on; ``stop`` and ``rollback`` undo all later
    steps too, until the host has read the flags, and then raise.

    A step calls ``start_step``, ``scale_loss`` for each part, ``is_bad``, ``undo_if`` and ``enqueue``, in this order.
    """

    def __init__(self, model: nn.Module, config: LoopConfig) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.folder: Path | None = None
        """Where batches are saved for inspection; None: nowhere."""
        self.warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
        self.counters = torch.zeros(2, dtype=torch.int64, device=self.device)
        """Steps undone: in all, and the last ones in a row."""
        self.check_delay = CHECK_DELAY_STEPS if self.device.type == "cuda" else 0
        self._float16 = config.precision == "float16"
        self._pending: deque[_PendingStep] = deque()
        self._stopped = torch.zeros((), dtype=torch.bool, device=self.device)
        self._nan = torch.tensor(math.nan, device=self.device)
        self.buffers = [
            [buffer for buffer in model.buffers() if buffer.dtype == dtype]
            for dtype in {buffer.dtype for buffer in model.buffers()}
        ]
        """The model's buffers, those of one dtype together."""

    def start_step(self, sums: Tensor) -> None:
        """Remember buffers and ``sums``, the counts (n,) that the step will add to."""
        self._sums = sums
        self._before = sums.clone(), [_flat(group) for group in self.buffers]
        self._loss = self._stopped.clone()

    def scale_loss(self, loss: Tensor, weight: float) -> Tensor:
        """``loss`` x ``weight``, whose gradients are NaN if the loss is not finite."""
        bad = ~loss.detach().isfinite()
        self._loss |= bad
        return loss * torch.where(bad | self._stopped, self._nan, weight)

    def is_bad(self, norm: Tensor | None) -> Tensor:
        """float32 () on the device: 1 if the step must be undone, else 0.

        ``norm`` () is that of the whole gradient; not used under float16.
        """
        if self._float16:
            bad = self._loss.float()
            if distributed.world_size() > 1:
                torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        else:
            assert norm is not None
            bad = (~norm.isfinite()).float()
        if self.config.on_nonfinite != "skip":
            self._stopped |= bad.bool()
        return bad

    @torch.no_grad()
    def undo_if(self, bad: Tensor) -> None:
        """Restore buffers and counts to what they were when the step began, where ``bad`` () is 1."""
        undone = bad.bool()
        sums, buffers = self._before
        self._sums.copy_(torch.where(undone, sums, self._sums))
        for group, before in zip(self.buffers, buffers, strict=True):
            flats = torch.where(undone, before, _flat(group)).split([buffer.numel() for buffer in group])
            copy_tensors_(group, [flat.view_as(buffer) for flat, buffer in zip(flats, group, strict=True)])
        self.counters += undone
        self.counters[1] *= undone

    def enqueue(
        self,
        step: int,
        rate: float,
        bad: Tensor,
        parts: list[tuple[Tensor, Any]],
        losses: Callable[[], Iterator[Tensor]],
    ) -> None:
        """Queue the flags of optimizer step ``step`` (from 1), to be read once the device has computed them.

        ``rate`` is the learning rate, ``parts`` the (images, targets) of the batch and ``losses`` runs the step's
        forwards again: they serve the report of a non-finite step.

        Raises:
            FloatingPointError, Rollback: as ``check_pending``.
        """
        flags, copied = torch.stack([bad, self.counters[1].float(), self._loss.float()]), None
        if self.device.type == "cuda":
            flags = torch.empty(3, pin_memory=True).copy_(flags, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_PendingStep(step, rate, parts, losses, flags, copied))
        self.check_pending(self.check_delay)

    def check_pending(self, keep: int = 0) -> None:
        """Read the flags of all pending steps but the last ``keep``. A collective: every process calls it after a step.

        Raises:
            FloatingPointError: a step was not finite, and ``on_nonfinite`` is stop, or too many in a row were skipped.
            Rollback: a step was not finite, and ``on_nonfinite`` is rollback.
        """
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            if pending.copied is not None:
                pending.copied.synchronize()
            undone, in_a_row, own_loss = pending.flags.tolist()
            if undone:
                self._report(pending, int(in_a_row), bool(own_loss))

    def forget_pending(self) -> None:
        """Discard the flags that have not been read: the run has gone back to a checkpoint."""
        self._pending.clear()
        self._stopped.zero_()

    def _report(self, pending: _PendingStep, in_a_row: int, own_loss: bool) -> None:
        train = self.config
        where = diagnose(self.model, pending.losses)
        if where is None and own_loss:
            where = "a loss that was finite when the batch was run again"
        causes = {rank: cause for rank, cause in enumerate(distributed.gather_objects(where)) if cause is not None}
        if not causes:
            causes = dict.fromkeys(range(distributed.world_size()), "the gradients summed over processes")
        name = f"step-{pending.step:08d}-rank{{}}.pt"
        if distributed.rank() in causes:
            self._save(pending, name.format(distributed.rank()))
        text = "; ".join(f"rank {rank}: {cause}" for rank, cause in list(causes.items())[:4])
        message = f"loss or gradients are not finite at step {pending.step}, learning rate {pending.rate:g}; {text}"
        if len(causes) > 4:
            message += f"; and {len(causes) - 4} more ranks"
        if self.folder is not None:
            message += f"; batch: {self.folder / name.format(next(iter(causes)))}"
        if train.on_nonfinite == "rollback":
            raise Rollback(pending.step, message)
        if train.on_nonfinite == "stop":
            raise FloatingPointError(f"{message}; no checkpoint holds it (train.on_nonfinite: stop, skip, rollback)")
        if in_a_row > train.nonfinite_limit:
            raise FloatingPointError(f"{message}; {in_a_row} steps in a row (train.nonfinite_limit)")
        self.warn(f"warning: {message}; the step is skipped")

    def _save(self, pending: _PendingStep, name: str) -> None:
        if self.folder is None or len(list(self.folder.glob(f"*-rank{distributed.rank()}.pt"))) >= MAX_SAVED_BATCHES:
            return
        payload = {
            "step": pending.step,
            "lr": pending.rate,
            "seed": self.config.seed,
            "skipped": True,
            "images": [images.cpu() for images, _ in pending.parts],
            "labels": [tree_map_only(Tensor, Tensor.cpu, targets) for _, targets in pending.parts],
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
    """average += (1 - decay) (weights - average), timm's rule; unchanged where ``bad`` () is 1. On the device."""
    pairs = list(zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True))
    weights = [pair for pair in pairs if pair[0].is_floating_point()]
    counters = [pair for pair in pairs if not pair[0].is_floating_point()]
    move_towards_([mean for mean, _ in weights], [value for _, value in weights], (1 - bad) * (1 - ema.decay))
    copy_tensors_([mean for mean, _ in counters], [value for _, value in counters])


SMALLEST_SCALE = 2.0**-14
"""A float16 loss scale below this means that gradients overflow at any scale."""


def check_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Stop a float16 run whose scaler does nothing but skip steps and halve its scale. Waits for the device.

    Raises:
        FloatingPointError: the scale is below ``SMALLEST_SCALE``.
    """
    if scaler.is_enabled() and (scale := scaler.get_scale()) < SMALLEST_SCALE:
        raise FloatingPointError(
            f"gradients overflow at step {step} at any loss scale, even {scale:.3g}: float16 skips every step; use "
            "train.precision: bfloat16, which has the range of float32"
        )


def step_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, bad: Tensor) -> None:
    """One update, unless ``bad`` is 1: then parameters and optimizer stay as they are.

    Fused optimizers read the flag on the device; for the others (lamb, lars) the host waits for it.
    """
    if scaler.is_enabled():  # its own flag includes ours: a non-finite loss has made the gradients NaN
        one = torch.ones((), device=bad.device)
        before = scaler.scale(one)
        scaler.step(optimizer)
        scaler.update()
        scaler.update(torch.where(bad.bool(), before, scaler.scale(one)))  # keep the scale: the loss was at fault
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = bad  # type: ignore[attr-defined]  # read by torch's fused optimizers, as GradScaler sets it
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bad.item():
        optimizer.step()


def diagnose(model: nn.Module, losses: Callable[[], Iterator[Tensor]]) -> str | None:
    """Run a step's forwards and backwards again and name the first thing that is not finite; None if all is finite.

    In this order: the images, a module's output, the loss, a parameter's gradient (in the order of the backward, the
    last parameter first). The network is left unchanged.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        with FirstNonFinite(model) as first:
            for loss in losses():
                first.check(loss, "the loss")
                gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
                for (name, _), gradient in reversed(list(zip(named, gradients, strict=True))):
                    first.check([gradient], f"the gradient of {name}")
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return first.name
