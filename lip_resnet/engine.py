"""The loops: one epoch of training, one evaluation. They know tensors and callables, no files and no LIP."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from lip_resnet import distributed, seeding
from lip_resnet.config import Config, InputError, TrainConfig
from lip_resnet.data import EvalLoader, TrainLoader, normalize, prefetch
from lip_resnet.metrics import Counts, cross_entropy
from lip_resnet.optim import build_optimizer, lr_at

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COMPRESSION = {"bfloat16": default_hooks.bf16_compress_hook, "float16": default_hooks.fp16_compress_hook}


@dataclass
class TrainState:
    """All that changes while a network trains, and so all that a checkpoint must hold."""

    model: nn.Module
    """The plain module, whose keys checkpoints use."""
    wrapped: nn.Module
    """The same module as the step calls it: under DDP with several processes."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    window: Counts
    """This process's counts since the last log step."""
    step: int = 0
    """Completed optimizer steps."""
    best: float = -math.inf
    """Highest validation top-1 so far, percent, of the weights that ``train.rules`` names."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers for a checkpoint; every process must call it.

        Raises:
            FloatingPointError: a loss since the last log step, or a weight, is not finite.
        """
        window = distributed.gather_rows(self.window.sums)
        weights = nn.utils.get_total_norm(self.model.parameters())
        if not window.isfinite().all() or not weights.isfinite():
            raise FloatingPointError(f"loss or weights are not finite at step {self.step}; no checkpoint holds them")
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window": window,
            "step": self.step,
            "best": self.best,
        }

    def load_state_dict(self, payload: dict[str, Any], source: str) -> None:
        """Take over what ``state_dict`` gave; ``source`` names the file in errors."""
        try:
            self.model.load_state_dict(payload["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(payload["ema"])
            self.optimizer.load_state_dict(payload["optimizer"])
            self.scaler.load_state_dict(payload["scaler"])
            self.step, self.best = payload["step"], payload["best"]
            rows = payload["window"]
            if len(rows) != distributed.world_size():  # continued on another number of processes
                rows = torch.zeros(distributed.world_size(), rows.shape[1], dtype=rows.dtype)
                rows[0] = payload["window"].sum(dim=0)
            self.window.sums.copy_(rows[distributed.rank()])
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: not a training checkpoint of this recipe: {error}") from None


def build_state(model: nn.Module, config: Config, device: torch.device) -> TrainState:
    """Put a network on its device and dress it for training.

    Raises:
        InputError: sync_bn without GPUs.
    """
    train = config.train
    if train.sync_bn:
        if device.type != "cuda":
            raise InputError("train.sync_bn needs GPUs; this process trains on the CPU")
        model = convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last if train.channels_last else torch.contiguous_format)
    ema = None if train.ema_decay is None else ModelEmaV3(model, train.ema_decay)
    optimizer = build_optimizer(model, config.optim)
    if train.compile:
        model.compile(mode=train.compile_mode)
    wrapped = model
    if distributed.world_size() > 1:
        # Every forward takes rank 0's BN buffers, so a checkpoint needs only those.
        wrapped = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        if train.gradient_compression != "none":
            wrapped.register_comm_hook(None, _COMPRESSION[train.gradient_compression])
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "float16")
    return TrainState(model, wrapped, optimizer, scaler, ema, Counts(device))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The forward's context: autocast to ``precision``, or nothing at float32."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "float32")


def _place(images: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True).contiguous(memory_format=layout)


def _build_mixing(config: TrainConfig) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """mixup and cutmix on the device: torchvision's, which pair every image with its neighbour in the batch."""
    choices = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    return v2.RandomChoice(choices) if choices else None


def _dense(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels (B,) -> target probabilities (B, classes) float32 with label smoothing."""
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)


def train_one_epoch(
    state: TrainState,
    loader: TrainLoader,
    config: Config,
    *,
    watched: Sequence[nn.Parameter] = (),
    on_step: Callable[[], bool | None],
    on_log: Callable[[dict[str, float]], None],
) -> None:
    """Train from ``state.step`` to the end of its epoch, or to ``train.max_steps``.

    Nothing waits for the device between two log steps. All randomness is drawn from (seed, step, rank, part).

    Args:
        watched: parameters whose gradients can dwarf all others; with clipping, the norm without them is logged too.
        on_step: called after every optimizer step; True ends the call there.
        on_log: called every ``train.log_every`` steps, and at the epoch's end, with the ``train/`` numbers since the
            last call.

    Raises:
        FloatingPointError: the loss since the last log step is not finite.
    """
    train, optim = config.train, config.optim
    device = next(state.model.parameters()).device
    mean, std = (torch.tensor(values, device=device) for values in (config.data.mean, config.data.std))
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    without = {id(parameter) for parameter in watched}
    calm = [parameter for parameter in parameters if id(parameter) not in without]
    mixing = _build_mixing(train)
    classes = config.model.num_classes
    dense = mixing is not None or train.loss == "binary_cross_entropy"
    rank, world = distributed.rank(), distributed.world_size()
    epoch, first = divmod(state.step, len(loader))
    end = min((epoch + 1) * len(loader), train.max_steps or math.inf)

    state.wrapped.train()
    state.optimizer.zero_grad()
    counts, extra = state.window, {}
    began = waiting = time.perf_counter()
    waited = 0.0
    for batch in prefetch(loader.epoch(epoch, first), device):
        waited += time.perf_counter() - waiting
        lr = lr_at(state.step, optim, len(loader), train.epochs)
        for group in state.optimizer.param_groups:
            group["lr"] = lr

        for part, (images, labels) in enumerate(batch.parts):
            images = normalize(_place(images, device, train.channels_last), mean, std)
            labels = labels.to(device, non_blocking=True)
            targets = _dense(labels, classes, train.label_smoothing) if dense else labels
            if mixing is not None:
                seeding.reseed(seeding.derive("mix", train.seed, state.step))  # one draw for the whole global batch
                images, targets = mixing(images, targets)
            if train.target_threshold is not None:
                targets = (targets > train.target_threshold).float()
            seeding.reseed_device(device, seeding.derive("device", train.seed, state.step, rank, part))
            last = part == len(batch.parts) - 1
            with contextlib.nullcontext() if last or world == 1 else state.wrapped.no_sync():
                with autocast(device, train.precision):
                    logits = state.wrapped(images)
                logits = logits.float()
                if train.loss == "binary_cross_entropy":
                    loss = F.binary_cross_entropy_with_logits(logits, targets)
                else:
                    loss = F.cross_entropy(logits, targets, label_smoothing=0.0 if dense else train.label_smoothing)
                # DDP averages over processes; this weight makes it the mean over the batch's images, however dealt.
                state.scaler.scale(loss * (len(labels) * world / batch.size)).backward()
            counts.add(logits.detach(), labels, loss.detach())

        if optim.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            extra = {"train/grad_norm": _norm(parameters)}
            if watched:
                extra["train/grad_norm_without_logits"] = _norm(calm)
            nn.utils.clip_grads_with_norm_(parameters, optim.clip_norm, extra["train/grad_norm"])
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update(state.model)
        state.step += 1

        if state.step % train.log_every == 0 or state.step == end:
            sums = counts.reduce()
            if not math.isfinite(sums["loss"]):
                raise FloatingPointError(
                    f"the loss is {sums['loss']} in the {train.log_every} steps up to step {state.step} "
                    f"(epoch {epoch}, learning rate {lr:g}); no checkpoint holds it"
                )
            elapsed = time.perf_counter() - began
            if config.data.on_error == "skip":
                skipped = torch.tensor(sum(loader.skipped.values()), device=device)
                extra["train/skipped"] = distributed.all_reduce_sum(skipped)
            on_log(
                {
                    "train/loss": sums["loss"],
                    "train/top1": sums["top1"],
                    "train/top5": sums["top5"],
                    "train/lr": lr,
                    "train/images_per_second": sums["images"] / elapsed,
                    "train/data_wait": waited / elapsed,
                    **{name: value.item() for name, value in extra.items()},
                }
            )
            counts.reset()
            began, waited = time.perf_counter(), 0.0
        if on_step() or (state.step == end and state.step % len(loader)):
            break  # in the middle of an epoch
        waiting = time.perf_counter()


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, config: Config) -> dict[str, float]:
    """Top-1, top-5 (percent) and mean cross entropy over every image once; the same counts on any number of processes.

    Runs the plain module, on rank 0's BN buffers. Precision and layout are ``config.train``'s.
    """
    if distributed.world_size() > 1:
        distribute_bn(model, distributed.world_size(), reduce=False)
    parameter = next(model.parameters())
    device = parameter.device
    mean, std = (torch.tensor(values, device=device) for values in (config.data.mean, config.data.std))
    was_training = model.training
    model.eval()
    counts = Counts(device)
    for images, labels in loader:
        images = normalize(_place(images, device, config.train.channels_last), mean, std)
        labels = labels.to(device, non_blocking=True)
        with autocast(device, config.train.precision):
            logits = model(images).float()
        counts.add(logits, labels, cross_entropy(logits, labels))
    model.train(was_training)
    result = counts.reduce()
    if result["images"] != loader.samples:
        raise RuntimeError(f"evaluated {result['images']} images of {loader.samples}")
    return result
