"""The training loop: one epoch. It knows tensors and callables, no files and no LIP."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lip_resnet import distributed, memory
from lip_resnet.compat import copy_tensors_, raise_recompile_limit
from lip_resnet.config import InputError, Recipe
from lip_resnet.data import Batch, prefetch
from lip_resnet.training import ddp
from lip_resnet.training.checkpoints import check_entries
from lip_resnet.training.freeze import classifier_of, freeze_trunk
from lip_resnet.training.nonfinite import NonFiniteGuard, check_scale, step_optimizer, update_average
from lip_resnet.training.optim import build_optimizer, lr_at
from lip_resnet.training.task import Counts, Loader, Task


@dataclass
class TrainState:
    """All that changes while a network trains, and so all that a checkpoint must hold."""

    task: Task
    """What the network is trained to do."""
    model: nn.Module
    """The plain module, whose keys checkpoints use."""
    wrapped: nn.Module
    """The same module as the step calls it: under DDP with several processes."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    window: Counts
    """This process's counts since the last log step."""
    guard: NonFiniteGuard
    step: int = 0
    """Completed optimizer steps."""
    evaluated: int = 0
    """The step after which the network was last evaluated."""
    skipped: int = 0
    """Images of this process's batches that did not decode and were left out."""
    best: float = -math.inf
    """Highest validation metric ``task.best`` so far, percent, of the weights that ``train.rules`` names."""
    excluded_steps: set[int] = field(default_factory=set)
    """Steps (from 1) whose batches are not trained on: they were not finite before a rollback."""
    rollbacks: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers for a checkpoint. A collective: every process must call it.

        Raises:
            FloatingPointError: a loss since the last log step, or a weight, is not finite.
            Rollback: as ``NonFiniteGuard.check_pending``.
        """
        self.guard.check_pending()
        window = distributed.gather_rows(self.window.sums.cpu().double())
        weights = nn.utils.get_total_norm(self.model.parameters())
        if not window.isfinite().all() or not weights.isfinite():
            raise FloatingPointError(f"loss or weights are not finite at step {self.step}; they are not saved")
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window": window,
            "step": self.step,
            "evaluated": self.evaluated,
            "skipped": sum(distributed.gather_objects(self.skipped)),
            "best": self.best,
            "nonfinite": {
                "counters": self.guard.counters,
                "left_out": sorted(self.excluded_steps),
                "rollbacks": self.rollbacks,
            },
        }

    def load_state_dict(self, payload: dict[str, Any], source: str) -> None:
        """Restore what ``state_dict`` returned; ``source`` names the file in errors.

        Raises:
            InputError: an entry is missing, or does not fit this recipe.
        """
        try:
            networks = {"model": self.model} | ({} if self.ema is None else {"ema": self.ema.module})
            check_entries(payload, networks, self.optimizer, self.window.sums)
            self.model.load_state_dict(payload["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(payload["ema"])
            self.optimizer.load_state_dict(payload["optimizer"])
            self.scaler.load_state_dict(payload["scaler"])
            self.step, self.best = payload["step"], payload["best"]
            # Older checkpoints lack these.
            self.evaluated = payload.get("evaluated", self.step)
            self.skipped = payload.get("skipped", 0) if distributed.is_main() else 0
            if "nonfinite" in payload:
                self.guard.counters.copy_(payload["nonfinite"]["counters"])
                self.excluded_steps = set(payload["nonfinite"]["left_out"])
                self.rollbacks = payload["nonfinite"]["rollbacks"]
            rows = payload["window"]
            if len(rows) != distributed.world_size():  # continued on another number of processes
                rows = torch.zeros(distributed.world_size(), rows.shape[1], dtype=rows.dtype)
                rows[0] = payload["window"].sum(dim=0)
            self.window.sums.copy_(rows[distributed.rank()])
        except KeyError as error:
            raise InputError(f"{source}: not a training checkpoint: it has no {error}") from error
        # Raised by check_entries, and by torch's load_state_dict for entries of a wrong type.
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:400]
            raise InputError(f"{source}: not a training checkpoint of this recipe: {reason}") from error


def build_state(model: nn.Module, config: Recipe, device: torch.device, task: Task) -> TrainState:
    """Move a network to its device and build what trains it: optimizer, average, DDP, loss scaler, counts, guard.

    Raises:
        InputError: sync_bn without GPUs, or grad_checkpointing of a model without it.
    """
    train = config.train
    if train.sync_bn:
        if device.type != "cuda":
            raise InputError(f"train.sync_bn needs GPUs (CUDA); this process trains on {device.type}")
        model = convert_sync_batchnorm(model)
    model.to(device).to(memory_format=memory.layout(train.channels_last, device))
    ema = None if train.ema_decay is None else ModelEmaV3(model, train.ema_decay)
    if train.grad_checkpointing:
        memory.enable_grad_checkpointing(model)
    optimizer = build_optimizer(model, config.optim)
    if task.freeze_epochs:
        classifier_of(model)  # raises
    if train.compile:
        # One graph for each shape: at every size of the schedule and of evaluation, a whole batch and the parts of a
        # smaller last one, of two sizes at most; and once more for a frozen trunk.
        raise_recompile_limit(3 * (len(config.data.sizes) + 1) * (2 if task.freeze_epochs else 1))
        model.compile(mode=train.compile_mode, dynamic=False)
    wrapped = model
    if distributed.world_size() > 1:
        wrapped = ddp.wrap(model, device, train.gradient_compression)
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "float16")
    guard = NonFiniteGuard(model, train)
    return TrainState(task, model, wrapped, optimizer, scaler, ema, task.new_counts(device), guard)


def warm_up_ddp(state: TrainState, config: Recipe) -> None:
    """Warm-up step for DDP: a forward and backward of blank images that change no state.

    After its first backward DDP sorts the gradients into new buckets, and with three processes or more the buckets
    decide in which order their sums are rounded. Warmed up, a resumed run has the buckets of an uninterrupted one.
    """
    world = distributed.world_size()
    if world == 1:
        return
    device = next(state.model.parameters()).device
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    size = config.data.batch_size // (world * config.optim.accumulate)
    state.wrapped.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        state.task.forward(state.wrapped, *state.task.blank(size, largest=False), state.step, 0)[0].backward()
    state.optimizer.zero_grad()
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def train_one_epoch(
    state: TrainState,
    loader: Loader,
    config: Recipe,
    *,
    norm_excludes: Sequence[nn.Parameter] = (),
    on_step: Callable[[], bool | None],
    on_log: Callable[[dict[str, float]], None],
    on_phase: Callable[[str], None] = lambda phase: None,
) -> None:
    """Train from ``state.step`` to the end of its epoch, or to ``train.max_steps``.

    The host never waits for the device between two log steps. Randomness is a function of (seed, step, rank, part).

    Args:
        norm_excludes: parameters whose gradients can be far larger than all others; with clipping, the norm without
            them is logged too.
        on_step: called after every optimizer step; if it returns True, training ends there.
        on_log: called every ``train.log_every`` steps, and at the epoch's end, with the ``train/`` numbers since the
            last call.
        on_phase: called with "forward", "backward", "update" and "log" when the phase begins.

    Raises:
        FloatingPointError, Rollback: as ``NonFiniteGuard.check_pending`` and ``check_scale``.
    """
    train, optim = config.train, config.optim
    device = next(state.model.parameters()).device
    epoch, first = divmod(state.step, len(loader))
    end = min((epoch + 1) * len(loader), train.max_steps or math.inf)

    state.wrapped.train()
    state.optimizer.zero_grad()
    frozen = epoch < state.task.freeze_epochs
    if state.task.freeze_epochs:
        freeze_trunk(state.model, state.optimizer, frozen)
    step = TrainStep(state, config, norm_excludes, on_phase, frozen)
    counts, extra = state.window, dict[str, Tensor]()
    log_start = wait_start = time.perf_counter()
    waited = 0.0
    for batch in prefetch(loader.epoch(epoch, first), device):
        waited += time.perf_counter() - wait_start
        lr = lr_at(state.step, optim, len(loader), train.epochs)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

        if state.step + 1 not in state.excluded_steps:
            extra = step(batch, lr)
        state.step += 1
        state.skipped += batch.skipped

        if state.step % train.log_every == 0 or state.step == end:
            on_phase("log")
            state.guard.check_pending()
            sums = counts.reduce()
            elapsed = time.perf_counter() - log_start
            check_scale(state.scaler, state.step)
            if config.data.on_error == "skip":
                extra["train/skipped"] = distributed.all_reduce_sum(torch.tensor(state.skipped, device=device))
            if train.on_nonfinite == "skip":
                extra["train/nonfinite"] = state.guard.counters[0]
            if not sums["images"]:
                sums["loss"] = math.nan
            on_log(
                {
                    **{f"train/{name}": sums[name] for name in state.task.logged},
                    "train/lr": lr,
                    "train/images_per_second": sums["images"] / elapsed,
                    "train/data_wait": waited / elapsed,
                    **{name: value.item() for name, value in extra.items()},
                }
            )
            counts.reset()
            log_start, waited = time.perf_counter(), 0.0
        if on_step() or (state.step == end and state.step % len(loader)):
            break  # before the epoch's end
        wait_start = time.perf_counter()


class TrainStep:
    """One optimizer step on one ``Batch``: forward, backward and update; a non-finite step changes nothing.

    Args:
        state: from ``build_state``, its modules in training mode; ``state.step`` is read, not advanced.
        norm_excludes, on_phase: as for ``train_one_epoch``.
        frozen: whether ``freeze_trunk`` has left the classifier's gradients alone, too few for DDP.
    """

    def __init__(
        self,
        state: TrainState,
        config: Recipe,
        norm_excludes: Sequence[nn.Parameter] = (),
        on_phase: Callable[[str], None] = lambda phase: None,
        frozen: bool = False,
    ) -> None:
        self.state, self.config, self.on_phase = state, config, on_phase
        self.network, self.frozen = state.model if frozen else state.wrapped, frozen
        ddp_or_none = self.network if isinstance(self.network, DistributedDataParallel) else None
        self.no_sync = ddp_or_none.no_sync if ddp_or_none else contextlib.nullcontext
        self.parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        without = {id(parameter) for parameter in norm_excludes}
        self.norm_parameters = (
            [parameter for parameter in self.parameters if id(parameter) not in without] if without else []
        )
        buffers = state.guard.buffers if config.train.grad_checkpointing else []
        self.buffers = [(group, [torch.empty_like(buffer) for buffer in group]) for group in buffers]

    def __call__(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        """Train on a batch; ``lr``, which is already set in the optimizer, is for error messages.

        Returns:
            With clipping, the gradient norms before it by their TensorBoard names, float32 () on the device.

        Raises:
            FloatingPointError, Rollback: as ``NonFiniteGuard.check_pending``.
        """
        state, clip, scaler = self.state, self.config.optim.clip_norm, self.state.scaler
        guard, world, extra = state.guard, distributed.world_size(), dict[str, Tensor]()
        guard.start_step(state.window.sums)
        for part, (images, targets) in enumerate(batch.parts):
            self.on_phase("forward")
            last = part == len(batch.parts) - 1
            with contextlib.nullcontext() if last else self.no_sync():
                loss, counted = state.task.forward(self.network, images, targets, state.step, part)
                self.on_phase("backward")
                for group, saved in self.buffers:
                    copy_tensors_(saved, group)
                # DDP averages over processes; this weight makes that the mean over all images of the batch.
                scaler.scale(guard.scale_loss(loss, len(images) * world / batch.size)).backward()
            for group, saved in self.buffers:  # batch norm's statistics count the forward once, not its recomputation
                copy_tensors_(group, saved)
            state.window.add(*counted)
        if self.frozen:
            ddp.average_gradients(self.parameters)

        self.on_phase("update")
        norm = None
        if clip is not None or not scaler.is_enabled():
            scaler.unscale_(state.optimizer)
            norm = _norm(self.parameters)
        if clip is not None and norm is not None:
            extra["train/grad_norm"] = norm
            if self.norm_parameters:
                extra["train/grad_norm_without_logits"] = _norm(self.norm_parameters)
            nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        bad = guard.is_bad(norm)
        step_optimizer(state.optimizer, scaler, bad)
        state.optimizer.zero_grad()
        guard.undo_if(bad)
        if state.ema is not None:
            update_average(state.ema, state.model, bad)
        guard.enqueue(state.step + 1, lr, bad, batch.parts, self._rerun(batch, state.step))
        return extra

    def _rerun(self, batch: Batch, step: int) -> Callable[[], Iterator[Tensor]]:
        """Computes the batch's losses again, by the plain module and with the randomness of step ``step`` (from 0)."""
        return lambda: (
            self.state.task.forward(self.state.model, images, targets, step, part)[0]
            for part, (images, targets) in enumerate(batch.parts)
        )


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
