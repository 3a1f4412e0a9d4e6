"""A run: the order of epochs, evaluations, checkpoints and logs, and what happens when one of them fails."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lip_resnet import checkpoint, distributed, memory
from lip_resnet.config import Effect, LoopConfig, Recipe
from lip_resnet.data import describe_source
from lip_resnet.errors import InputError, Stopped
from lip_resnet.evaluation.compatibility import check_class_names, recorded_classes
from lip_resnet.training import run_folder, runlog
from lip_resnet.training.checkpoints import Checkpoints
from lip_resnet.training.engine import TrainState, train_one_epoch, warm_up_ddp
from lip_resnet.training.interrupts import REPORT, SAVE, STOP, Interrupts
from lip_resnet.training.messages import describe_end
from lip_resnet.training.nonfinite import Rollback
from lip_resnet.training.out_of_memory import suggest
from lip_resnet.training.task import Loader, Task
from lip_resnet.training.watchdog import Watchdog

Datasets = dict[str, dict[str, Any]]
"""``describe_source`` of the splits "train" and "val"."""


@dataclass
class Provenance:
    """Where weights come from, beside the recipe; recorded in every checkpoint."""

    processes: list[int]
    """The numbers of processes that the run has had so far, in order."""
    datasets: Datasets = field(default_factory=dict)
    initial_weights: dict[str, Any] | None = None
    """The weights that the run started from (``model.weights``), None if it started from random ones: ``sha256`` of the
    file; ``weights``, which were loaded (model or ema); ``training``, their own ``describe_training`` and ``step``, or
    None if unknown; ``content``, the digest of the tensors."""
    class_names: list[str] | None = None
    """Names of the classes, in the order of the logits; None where the data only number them."""
    selection: str | None = None
    """Content of the file ``data.classes``, which need not exist any more when the run is resumed."""


def describe_datasets(train: Any, val: Any) -> Datasets:
    """``describe_source`` of both sources, by rank 0 alone: it hashes every file name. A collective.

    Raises:
        InputError: this process sees another number of images than rank 0, as with an incomplete copy.
    """
    datasets = distributed.on_main(lambda: {"train": describe_source(train), "val": describe_source(val)})
    for split, source in (("train", train), ("val", val)):
        if len(source) != datasets[split]["images"]:
            raise InputError(
                f"data.root: {len(source)} {split} images here, {datasets[split]['images']} on rank 0; all processes "
                "need the same files"
            )
    return datasets


def restore(state: TrainState, config: Recipe, source: Path, provenance: Provenance) -> None:
    """Load a training checkpoint into ``state`` and its provenance into ``provenance``. A collective.

    Rank 0 reads the file and broadcasts it, so that all ranks continue from the same file even on a file system that
    shows them different ones. If the recipe's evaluation has changed, ``best`` starts again: old and new accuracies
    cannot be compared.

    Raises:
        InputError: not a training checkpoint, or one of another recipe, or of other data.
    """
    payload = distributed.on_main(lambda: checkpoint.load(source))
    earlier = checkpoint.read_recipe(payload, str(source), type(config)) or config
    weights = f"start from its weights with model.weights={source}"
    run_folder.check_same_recipe(config, earlier, str(source), weights)
    state.load_state_dict(payload, str(source))
    if config.values(Effect.EVALUATION) != earlier.values(Effect.EVALUATION):
        state.best = -math.inf
    check_same_data(payload.get("datasets", {}), provenance.datasets, str(source))
    check_class_names(recorded_classes(payload), provenance.class_names, str(source), weights)
    before, now = payload["processes"], distributed.world_size()
    provenance.processes = before if before[-1] == now else [*before, now]
    provenance.initial_weights = payload.get("initial_weights")


def check_same_data(theirs: Datasets, ours: Datasets, where: str) -> None:
    """Refuse to continue with other images: every epoch is a permutation of their indices.

    Args:
        theirs: what the run was trained on; keys that an older version did not record are not compared.
        ours: what this start has.
        where: names the run in errors.

    Raises:
        InputError: number of images, number of classes, file names or boxes differ; names the first.
    """
    for split, dataset in ours.items():
        for key in ("images", "classes", "names", "annotations"):
            before, now = theirs.get(split, {}).get(key), dataset.get(key)
            if before is not None and now is not None and before != now:
                raise InputError(f"{where} was trained with other data: {key} of {split}: {before}, here {now}")


class Built(NamedTuple):
    """What a recipe names, built by the command of its task."""

    task: Task
    model: nn.Module
    loader: Loader
    provenance: Provenance
    weights: str | None
    """The weights that a fresh start begins with."""
    describe_datasets: Callable[[], Datasets]
    """``Provenance.datasets``; a collective, called once a run folder is open."""
    observe: Callable[[nn.Module], runlog.Observed] | None = None
    """What is logged of the evaluated network beside its metrics; called on rank 0 alone."""


@dataclass
class Run:
    """A run, built from its parts; ``fit`` trains it to the end."""

    config: Recipe
    state: TrainState
    loader: Loader
    checkpoints: Checkpoints
    log: runlog.RunLog
    total: int
    """Optimizer steps of the whole run."""
    provenance: Provenance
    norm_excludes: list[nn.Parameter]
    """As for ``train_one_epoch``."""
    observe: Callable[[nn.Module], runlog.Observed] | None = None
    """Called on rank 0 after each evaluation, with the network whose top-1 selects the best; TensorBoard shows the
    result. It must not change the network or the state of random numbers."""
    last: float = math.nan
    """The metric that selects the best, at the last evaluation of this start, percent."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done and the last evaluation too."""
        return self.state.step >= self.total and not self._evaluation_is_due()

    def _evaluation_is_due(self) -> bool:
        """Whether the step is one after which the recipe evaluates, and this has not been done."""
        step, length = self.state.step, len(self.loader)
        due = step >= self.total or (step % length == 0 and step // length % self.config.train.eval_every == 0)
        return due and self.state.evaluated < step

    def fit(self, interrupts: Interrupts) -> None:
        """Epoch by epoch: train, evaluate, log, save. After a signal, finish the current step, save and stop.

        Raises:
            Stopped: after a signal; everything is saved.
            InputError: a file of the run cannot be written, and ``train.on_write_error`` is stop.
            FloatingPointError: a step was not finite, and the recipe does not let the run continue.
            OutOfMemory: a batch does not fit; says what does.
        """
        interrupts.begin()
        train, state = self.config.train, self.state
        self.folder = self.checkpoints.folder.parent
        state.guard.folder, state.guard.warn = self.folder / "nonfinite", self.log.say
        with (
            contextlib.ExitStack() as at_end,
            profiler(train, self.folder) as self.trace,
            Watchdog(self.folder, train.hang_minutes) as self.watchdog,
        ):
            at_end.callback(self.checkpoints.join)  # after an error too, such as a bad validation image
            with self._explained():
                warm_up_ddp(state, self.config)
            without_checkpoint = distributed.on_main(lambda: not (self.checkpoints.folder / "last.pt").exists())
            if without_checkpoint and (state.step or train.on_nonfinite == "rollback"):
                self.save()  # continued from another folder's file, or a rollback needs a checkpoint from the start
            while not self.finished:
                try:
                    stop = self._evaluate(interrupts) if self._evaluation_is_due() else self._train_epoch(interrupts)
                except Rollback as rollback:
                    self._roll_back(rollback)
                    continue
                if stop and not self.finished:
                    distributed.on_main(self._finish_write)
                    reason = interrupts.received or "a signal to another process"
                    raise Stopped(f"{reason} at step {state.step}; continue with --resume auto")
            # Still inside `interrupts`: a signal now must not cost the last checkpoint.
            distributed.on_main(self.checkpoints.wait)
        if used := memory.describe_peak(state.guard.device):
            self.log.say(f"memory    {used}")
        seconds = time.monotonic() - self.log.started
        for line in describe_end(self.folder, state.task.best, self.last, state.best, seconds):
            self.log.say(line)

    def _train_epoch(self, interrupts: Interrupts) -> bool:
        """Train to the end of the epoch; True if a signal asks to stop."""
        train, state = self.config.train, self.state
        epoch, action = state.step // len(self.loader), 0

        def epoch_ended() -> bool:
            return state.step % len(self.loader) == 0 or state.step >= self.total

        def on_step() -> bool:
            nonlocal action
            self.log.advance()
            if self.trace is not None:
                self.trace.step()
            action = interrupts.after_step(state.step, self.checkpoints.failed)
            if action == REPORT:
                self.watchdog.pause()
                distributed.on_main(self._finish_write)
            if action == SAVE and not epoch_ended():
                self.save()
            self.watchdog.step(state.step + 1)
            return action == STOP

        if not train.compile:  # the first step of an epoch may compile, for a new image size: it is not timed
            self.watchdog.step(state.step + 1)
        with self._explained():
            train_one_epoch(
                state,
                self.loader,
                self.config,
                norm_excludes=self.norm_excludes,
                on_step=on_step,
                on_log=lambda values: self.log.log(state.step, epoch, values | memory.peak(state.guard.device)),
                on_phase=self.watchdog.set_phase,
            )
        self.watchdog.pause()
        if epoch_ended() and not self._evaluation_is_due():
            self.log.end_epoch(epoch)
        if epoch_ended():
            action = max(action, interrupts.synchronize())  # before the evaluation, which can take minutes
        # Also before an evaluation, which can fail and saves again when it has not.
        if action in (SAVE, STOP) or epoch_ended():
            self.save()
        return action == STOP

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        """Turns a failed allocation into a line that says what fits."""
        return memory.explained(lambda: suggest(self.state, self.config, len(self.loader.source)))

    def _evaluate(self, interrupts: Interrupts) -> bool:
        """Evaluate, log and save; True if a signal asks to stop."""
        state = self.state
        values = self.validate()
        prefix = "val_ema" if self.config.train.rules == "ema" else "val"
        value = self.last = values[f"{prefix}/{state.task.best}"]
        improved, state.best = value > state.best, max(state.best, value)
        best = {f"{prefix}/best_{state.task.best}": state.best}
        self.log.log(state.step, (state.step - 1) // len(self.loader), values, best)
        if (observe := self.observe) is not None:
            network = state.model if state.ema is None or prefix == "val" else state.ema.module
            self.log.show(state.step, lambda: observe(network))
        state.evaluated = state.step
        if state.step >= self.total:
            self.log.finish()
            if remark := state.task.remark(value):
                self.log.say(remark)
        self.save(best=improved)
        return interrupts.synchronize() == STOP

    def _roll_back(self, rollback: Rollback) -> None:
        """Load the newest intact checkpoint, and exclude the non-finite step from then on."""
        state, limit = self.state, self.config.train.nonfinite_limit
        self.watchdog.pause()
        state.guard.forget_pending()
        excluded_steps, rollbacks = {*state.excluded_steps, rollback.step}, state.rollbacks + 1
        if rollbacks > limit:
            raise FloatingPointError(f"{rollback}; rolled back {limit} times already (train.nonfinite_limit)")
        distributed.on_main(self._finish_write)
        source, _ = distributed.on_main(self.checkpoints.newest_whole)
        if source is None:
            raise FloatingPointError(f"{rollback}; there is no checkpoint to go back to")
        restore(state, self.config, source, self.provenance)
        state.excluded_steps, state.rollbacks = excluded_steps, rollbacks
        self.log.rewind(state.step, state.evaluated)
        self.log.say(f"warning: {rollback}; back to step {state.step}, without the batch of step {rollback.step}")

    def _finish_write(self) -> None:
        """Wait for the checkpoint that is being written, if any; on rank 0 alone.

        Raises:
            InputError: the write failed, and ``train.on_write_error`` is stop.
        """
        try:
            self.checkpoints.wait()
        except InputError as error:
            if self.config.train.on_write_error == "stop":
                raise
            self.log.say(f"warning: {error}; the run goes on, the older checkpoints stay")

    def save(self, best: bool = False) -> None:
        """Start to write a checkpoint on rank 0; a failure is reported after the next step. A collective."""
        self.watchdog.pause()
        payload = {
            **self.state.state_dict(),
            "config": self.config.model_dump(mode="json"),
            **vars(self.provenance),
        }
        self.log.sync()

        def write() -> None:
            self._finish_write()
            self.checkpoints.save(payload, best)

        distributed.on_main(write)

    def validate(self) -> dict[str, float]:
        """The task's metrics under val/, and those of the average, if there is one, under val_ema/.

        NaN, with a warning, where the network's outputs are not finite.
        """
        task, networks = self.state.task, {"val": self.state.model}
        if self.state.ema is not None:
            networks["val_ema"] = self.state.ema.module
        values: dict[str, float] = {}
        for prefix, network in networks.items():
            try:
                result = task.evaluate(network)
            except FloatingPointError as error:  # the training itself is finite: its checkpoint must not be lost
                self.log.say(f"warning: {prefix} at step {self.state.step}: {error}; it is not a candidate for best")
                result = dict.fromkeys(task.metrics, math.nan)
            values |= {f"{prefix}/{name}": result[name] for name in task.metrics}
        return values


def profiler(train: LoopConfig, folder: Path) -> contextlib.AbstractContextManager:
    """torch.profiler over ``train.profile`` steps of rank 0; does nothing where that is 0.

    The trace, a JSON file that ui.perfetto.dev opens, is gzipped, which makes it some 15 times smaller.
    """
    if not train.profile or not distributed.is_main():
        return contextlib.nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=4, warmup=1, active=train.profile, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder / "tensorboard"), use_gzip=True),
    )
