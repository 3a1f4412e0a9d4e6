"""A run: epochs, evaluations, checkpoints and logs in their order, and what to do when one of them cannot go on."""

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lip_resnet import checkpoint, distributed
from lip_resnet.config import Config, Effect, InputError, TrainConfig
from lip_resnet.data import EvalLoader, TrainLoader
from lip_resnet.errors import Stopped
from lip_resnet.evaluation.evaluate import evaluate
from lip_resnet.recipe import parse_config
from lip_resnet.training import run_folder, runlog
from lip_resnet.training.checkpoints import Checkpoints
from lip_resnet.training.engine import TrainState, train_one_epoch, warm_up_ddp
from lip_resnet.training.interrupts import SAVE, SETTLE, STOP, Interrupts
from lip_resnet.training.nonfinite import Rollback
from lip_resnet.training.watchdog import Watchdog

Datasets = dict[str, dict[str, Any]]
"""What ``describe_source`` says of "train" and "val"."""


@dataclass
class Provenance:
    """How weights came to be, beside the recipe; stands in every checkpoint and in env.json."""

    processes: list[int]
    """The numbers of processes that have trained them so far, in order."""
    datasets: Datasets = field(default_factory=dict)
    initial_weights: dict[str, Any] | None = None
    """What ``model.weights`` was, if the run started from weights: ``sha256`` of the file; ``weights``, model or ema,
    that were taken from it; ``training``, their own ``describe_training`` with the ``step``, or None if unknown."""


def restore(state: TrainState, config: Config, source: Path, provenance: Provenance) -> None:
    """Continue from a training checkpoint, and from its provenance.

    Rank 0 reads the file, so that all ranks go on from the same one whatever their file systems show them. Where the
    recipe now evaluates differently, ``best`` is chosen afresh: the old figure and the new ones cannot be compared.

    Raises:
        InputError: it is none, or of another recipe, or other data.
    """
    payload = distributed.on_main(lambda: checkpoint.load(source))
    earlier = parse_config(payload["config"], str(source)) if "config" in payload else config
    run_folder.check_same_recipe(config, earlier, str(source))
    state.load_state_dict(payload, str(source))
    if config.values(Effect.EVALUATION) != earlier.values(Effect.EVALUATION):
        state.best = -math.inf
    check_same_data(payload.get("datasets", {}), provenance.datasets, str(source))
    before, now = payload["processes"], distributed.world_size()
    provenance.processes = before if before[-1] == now else [*before, now]
    provenance.initial_weights = payload.get("initial_weights")


def check_same_data(theirs: Datasets, ours: Datasets, where: str) -> None:
    """Refuse to continue on other images: the order of every epoch is drawn over their number.

    Raises:
        InputError: with the first thing that differs.
    """
    for split, found in ours.items():
        for what in ("images", "classes", "names"):
            before, now = theirs.get(split, {}).get(what), found.get(what)
            if before is not None and now is not None and before != now:
                raise InputError(f"{where} was trained with other data: {what} of {split}: {before}, here {now}")


@dataclass
class Run:
    """The parts of a run, and the order in which they work."""

    config: Config
    state: TrainState
    loader: TrainLoader
    val_loader: EvalLoader
    checkpoints: Checkpoints
    log: runlog.RunLog
    total: int
    """Optimizer steps of the whole run."""
    provenance: Provenance
    norm_excludes: list[nn.Parameter]
    """As for ``train_one_epoch``."""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state.step >= self.total and not self._unevaluated()

    def _unevaluated(self) -> bool:
        """Whether an epoch has ended whose evaluation is due and still to come."""
        step, length = self.state.step, len(self.loader)
        over = step >= self.total
        due = over or (step % length == 0 and step // length % self.config.train.eval_every == 0)
        return due and self.state.evaluated < step

    def fit(self, interrupts: Interrupts) -> None:
        """Epoch by epoch: train, evaluate, log, save. Asked to stop, save and leave after the step under way.

        Raises:
            Stopped: by a signal; everything is saved.
            InputError: a checkpoint cannot be written, and the recipe says to stop then.
        """
        interrupts.begin()
        train, state = self.config.train, self.state
        self.folder = self.checkpoints.folder.parent
        state.guard.folder, state.guard.warn = self.folder / "nonfinite", self.log.say
        with (
            profiler(train, self.folder) as self.trace,
            Watchdog(self.folder, train.hang_minutes) as self.watchdog,
        ):
            warm_up_ddp(state, self.config)
            bare = distributed.on_main(lambda: not (self.checkpoints.folder / "last.pt").exists())
            if bare and (state.step or train.on_nonfinite == "rollback"):
                self.save()  # continued from another folder's file, or the first steps need something to go back to
            while not self.finished:
                try:
                    stop = self._evaluate(interrupts) if self._unevaluated() else self._epoch(interrupts)
                except Rollback as found:
                    self._roll_back(found)
                    continue
                if stop and not self.finished:
                    self._leave(interrupts.received or "a signal to another process")
            distributed.on_main(self.checkpoints.wait)  # still deaf to signals: the end must be on the disk

    def _epoch(self, interrupts: Interrupts) -> bool:
        """The rest of an epoch; True if it was cut short by a signal."""
        train, state = self.config.train, self.state
        epoch, action = state.step // len(self.loader), 0

        def ended() -> bool:
            return state.step % len(self.loader) == 0 or state.step >= self.total

        def on_step() -> bool:
            nonlocal action
            self.log.advance()
            if self.trace is not None:
                self.trace.step()
            action = interrupts.after_step(state.step, self.checkpoints.failed)
            if action == SETTLE:
                self.watchdog.rest()
                distributed.on_main(self._settle_write)
            if action == SAVE and not ended():
                self.save()
            self.watchdog.step(state.step + 1)
            return action == STOP

        if not train.compile:  # an epoch's first step may compile, for its images' size
            self.watchdog.step(state.step + 1)
        train_one_epoch(
            state,
            self.loader,
            self.config,
            norm_excludes=self.norm_excludes,
            on_step=on_step,
            on_log=lambda values: self.log.log(state.step, epoch, values),
            on_phase=self.watchdog.note,
        )
        self.watchdog.rest()
        if ended():
            action = max(action, interrupts.now())  # before the evaluation, which can take minutes
        # The save after an evaluation will do, unless one is due now.
        if action in (SAVE, STOP) or (ended() and not self._unevaluated()):
            self.save()
        return action == STOP

    def _evaluate(self, interrupts: Interrupts) -> bool:
        """The evaluation after an epoch; True if a signal has come meanwhile."""
        state = self.state
        values = self.validate()
        self.log.log(state.step, (state.step - 1) // len(self.loader), values)
        prefix = "val_ema" if self.config.train.rules == "ema" else "val"
        top1 = values[f"{prefix}/top1"]
        improved, state.best = top1 > state.best, max(state.best, top1)
        state.evaluated = state.step
        if state.step >= self.total:
            self.log.finish(self.config, {name: values[f"{prefix}/{name}"] for name in ("top1", "top5")})
        self.save(best=improved)
        return interrupts.now() == STOP

    def _leave(self, reason: str) -> None:
        """End for now, with the last checkpoint on the disk."""
        distributed.on_main(self._settle_write)
        raise Stopped(f"{reason} at step {self.state.step}; continue with --resume auto")

    def _roll_back(self, found: Rollback) -> None:
        """Load the newest whole checkpoint, and leave the step out when the run comes to it again."""
        state, limit = self.state, self.config.train.nonfinite_limit
        self.watchdog.rest()
        state.guard.forget_pending()
        left_out, rollbacks = {*state.left_out, found.step}, state.rollbacks + 1
        if rollbacks > limit:
            raise FloatingPointError(f"{found}; rolled back {limit} times already (train.nonfinite_limit)")
        distributed.on_main(self._settle_write)
        source, _ = distributed.on_main(self.checkpoints.newest_whole)
        if source is None:
            raise FloatingPointError(f"{found}; there is no checkpoint to go back to")
        restore(state, self.config, source, self.provenance)
        state.left_out, state.rollbacks = left_out, rollbacks
        self.log.rewind(state.step, state.evaluated)
        self.log.say(f"warning: {found}; back to step {state.step}, without the batch of step {found.step}")

    def _settle_write(self) -> None:
        """Wait for the write under way, if any; rank 0 alone."""
        try:
            self.checkpoints.wait()
        except InputError as error:
            if self.config.train.on_write_error == "stop":
                raise
            self.log.say(f"warning: {error}; the run goes on, the older checkpoints stay")

    def save(self, best: bool = False) -> None:
        """Start to write a checkpoint, from rank 0; a failed write is told after the next step."""
        self.watchdog.rest()
        payload = {
            **self.state.state_dict(),
            "config": self.config.model_dump(mode="json"),
            **vars(self.provenance),
        }
        self.log.sync()

        def write() -> None:
            self._settle_write()
            self.checkpoints.save(payload, best)

        distributed.on_main(write)

    def validate(self) -> dict[str, float]:
        """The val/ numbers, and the val_ema/ numbers where there is an average."""
        networks = {"val": self.state.model}
        if self.state.ema is not None:
            networks["val_ema"] = self.state.ema.module
        data, train, values = self.config.data, self.config.train, {}
        how = {"precision": train.precision, "channels_last": train.channels_last, "mean": data.mean, "std": data.std}
        for prefix, network in networks.items():
            result = evaluate(network, self.val_loader, **how)
            values |= {f"{prefix}/{name}": result[name] for name in ("loss", "top1", "top5")}
        return values


def profiler(train: TrainConfig, folder: Path) -> contextlib.AbstractContextManager:
    """torch.profiler over a few steps of rank 0, for TensorBoard; nothing where the recipe asks for none."""
    if not train.profile or not distributed.is_main():
        return contextlib.nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=4, warmup=1, active=train.profile, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder / "tensorboard")),
    )
