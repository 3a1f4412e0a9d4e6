"""Writes a run's numbers to TensorBoard, metrics.jsonl and the terminal, its recipe and its environment; on rank 0."""

import contextlib
import datetime
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lip_resnet import distributed
from lip_resnet.compat import is_tensorboard_thread
from lip_resnet.config import Recipe
from lip_resnet.errors import InputError
from lip_resnet.files import to_json, write_text
from lip_resnet.training.hyperparameters import summarize
from lip_resnet.training.messages import describe_epoch
from lip_resnet.training.task import Task

Observed = tuple[dict[str, float], dict[str, np.ndarray]]
"""TensorBoard tag -> number, and tag -> picture (H, W, 3) uint8."""

MAX_EARLIER_ENVIRONMENTS = 50
"""env.json keeps the environments of this many earlier starts of the run."""


class RunLog:
    """Writes a run's numbers; every method does nothing on ranks other than 0.

    Args:
        folder: the run folder, which ``run_folder.open_run`` has prepared.
        config: the resolved recipe; written as config.yaml and as TensorBoard text.
        environment: written as env.json.
        step: where the run starts or continues: lines and events of later steps are dropped.
        evaluated: the last step that was evaluated; the evaluation of ``step`` itself may still be due.
        total_steps: of the whole run, for the progress bar and the remaining time.
        task: names the metrics.

    Raises:
        InputError: the files cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config: Recipe,
        environment: dict[str, Any],
        step: int,
        evaluated: int,
        total_steps: int,
        task: Task,
    ) -> None:
        self.active = distributed.is_main()
        self.folder, self.total_steps, self.task = folder, total_steps, task
        self.first_step = self.logged = step
        self.evaluated, self.sums = evaluated, dict[str, float]()
        self.started = time.monotonic()
        self.config, self.environment, self.has_failed = config, environment, False
        self.unwritten = b""
        self.earlier: list[dict[str, Any]] | None = None
        distributed.on_main(lambda: self._open(config, environment))

    def _open(self, config: Recipe, environment: dict[str, Any]) -> None:
        step = self.first_step
        try:
            write_text(self.folder / "config.yaml", config.dump())
            path = self.folder / "env.json"
            if self.earlier is None:  # first call: ``rewind`` opens the files again
                last = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                self.earlier = [*last.pop("earlier", []), *([last] if last else [])][-MAX_EARLIER_ENVIRONMENTS:]
            entry = {"earlier": self.earlier} if self.earlier else {}
            write_text(self.folder / "env.json", to_json({**environment, **entry}, indent=2) + "\n")
            kept = [line for line in _read_lines(self.folder / "metrics.jsonl") if self._is_before_start(line)]
            write_text(self.folder / "metrics.jsonl", "".join(to_json(line) + "\n" for line in kept))
            self.metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
            threading.excepthook = _excepthook_without_tensorboard
            # purge_step drops the events that an earlier start wrote after its last checkpoint.
            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1 if step else 0)
            self.writer.add_text("config", f"```yaml\n{config.dump()}```", step)
            prefix = "val_ema" if config.train.rules == "ema" else "val"
            metrics = [f"{prefix}/best_{self.task.best}", f"{prefix}/{self.task.best}"]
            *start, self.session_end = summarize(config, self.folder, metrics)
            events: Any = self.writer.file_writer
            self.add_summary = events.add_summary
            for summary in start:
                self.add_summary(summary)
            self.writer.flush()
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder}: cannot write the run's files: {error}") from error
        self.quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, disable=self.quiet)

    def _is_before_start(self, line: dict[str, Any]) -> bool:
        """Whether a line of metrics.jsonl belongs to the steps before the checkpoint that the run continues from."""
        evaluation = any(name.startswith("val") for name in line)
        return line["step"] <= (self.evaluated if evaluation else self.first_step)

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.active:
            self.bar.update()

    def log(self, step: int, epoch: int, values: dict[str, float], best: dict[str, float] | None = None) -> None:
        """Write numbers under their TensorBoard tags. A collective: every process must call it.

        Args:
            step: completed optimizer steps.
            epoch: from 0.
            values: tag -> number; NaN and infinity are null in metrics.jsonl.
            best: the best value so far by its tag, for TensorBoard alone.

        Raises:
            InputError: they cannot be written (full disk, no permission), and ``train.on_write_error`` is stop.
        """

        def write() -> None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self.unwritten += to_json({"step": step, "epoch": epoch, **finite}).encode() + b"\n"
            self._append()
            for name, value in (values | (best or {})).items():
                self.writer.add_scalar(name, value, step)

        self._try(write)
        if any(name.startswith("val") for name in values):
            self.end_epoch(epoch, values)
            return
        for name, value in {**values, "steps": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * (step - self.logged)
        self.logged = step
        if not self.active:
            return
        if "train/loss" in values:
            peak = values.get("train/peak_memory_gib")
            top1 = f"top-1 {values['train/top1']:.1f}%, " if "train/top1" in values else ""
            self.bar.set_postfix_str(
                f"loss {values['train/loss']:.3f}, {top1}"
                f"{values['train/images_per_second']:.0f} images/s, wait {values['train/data_wait']:.0%}"
                + (f", {peak:.1f} GiB" if peak else "")
            )
        if self.quiet:
            self.say(f"epoch {epoch + 1} step {step}/{self.total_steps}: {_brief(values)}{self._time_left(step)}")

    def end_epoch(self, epoch: int, evaluation: dict[str, float] | None = None) -> None:
        """An epoch has ended: show its line, and write its losses and metrics to TensorBoard by epoch. A collective.

        Those of training are means over the steps that this start has taken of it.

        Args:
            epoch: from 0; TensorBoard counts completed epochs, from 1.
            evaluation: the values of ``log``; None where the recipe does not evaluate after this epoch.
        """
        steps = self.sums.pop("steps", 0.0)
        parts: dict[str, dict[str, float]] = {"train": {}, "val": {}, "val_ema": {}}
        means = {name: value / steps for name, value in self.sums.items()} if steps else {}
        for tag, value in {**means, **(evaluation or {})}.items():
            split, _, name = tag.partition("/")
            if name == "loss" or name in self.task.metrics:
                parts[split][name] = value
        self.sums = {}

        def write() -> None:
            for split, values in parts.items():
                for name, value in values.items():
                    tag = f"epoch_loss/{split}" if name == "loss" else f"epoch/{name}_{split}"
                    self.writer.add_scalar(tag, value, epoch + 1)

        self._try(write)
        self.say(describe_epoch(epoch, self.config.train.epochs, parts))

    def show(self, step: int, observe: Callable[[], Observed]) -> None:
        """Call ``observe`` on rank 0 and write what it returns to TensorBoard. A collective.

        Raises:
            InputError: as ``log``.
        """

        def write() -> None:
            numbers, pictures = observe()
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
            for name, picture in pictures.items():
                self.writer.add_image(name, picture, step, dataformats="HWC")

        self._try(write)

    def _append(self) -> None:
        """Append all unwritten lines to metrics.jsonl; on an error none of them, so that the next call tries again."""
        rest, end = memoryview(self.unwritten), os.fstat(self.metrics.fileno()).st_size
        try:
            while rest:
                rest = rest[self.metrics.write(rest) :]
        except OSError:
            os.ftruncate(self.metrics.fileno(), end)
            raise
        self.unwritten = b""

    def _try(self, write: Callable[[], None]) -> None:
        """Call ``write`` on rank 0. A failure ends the run, or is reported once, as ``train.on_write_error`` says."""

        def attempt() -> None:
            try:
                write()
                self.writer.flush()  # raises what the writer's thread has caught
            except OSError as error:
                message = f"{self.folder}: cannot write the run's numbers: {error.strerror or error}"
                if self.config.train.on_write_error == "stop":
                    raise InputError(message) from error
                if not self.has_failed:
                    self.say(f"warning: {message}; the run goes on, TensorBoard's file ends here")
                self.has_failed = True

        distributed.on_main(attempt)

    def sync(self) -> None:
        """fsync metrics.jsonl: called before a checkpoint is written, so that no checkpoint is ahead of it."""
        self._try(lambda: os.fsync(self.metrics.fileno()))

    def _time_left(self, step: int) -> str:
        done = step - self.first_step
        if not done or step >= self.total_steps:
            return ""
        seconds = (time.monotonic() - self.started) / done * (self.total_steps - step)
        return f", {datetime.timedelta(seconds=round(seconds))} left"

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar; in a log file with the time."""
        if self.active:
            time_stamp = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} " if self.quiet else ""
            self.bar.write(f"{time_stamp}{text}", file=sys.stderr)

    def finish(self) -> None:
        """Mark the run as finished in TensorBoard's HParams tab."""
        self._try(lambda: self.add_summary(self.session_end))

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop the numbers of steps after ``step``: the run has gone back to its checkpoint."""
        if self.active:
            self.close()
        self.first_step = self.logged = step
        self.evaluated, self.sums = evaluated, {}
        distributed.on_main(lambda: self._open(self.config, self.environment))

    def close(self) -> None:
        """Flush and close all files; safe to call after a failed write."""
        if self.active:
            self.bar.close()
            with contextlib.suppress(OSError):  # reported when it was first tried
                self._append()
            self.metrics.close()
            with contextlib.suppress(OSError):
                self.writer.close()


def _excepthook_without_tensorboard(args: threading.ExceptHookArgs) -> None:
    """No traceback for an OSError in TensorBoard's thread: the writer raises it again in the main thread."""
    if not (issubclass(args.exc_type, OSError) and is_tensorboard_thread(args.thread)):
        threading.__excepthook__(args)


def _brief(values: dict[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in values.items())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, whose last one may be truncated by a kill; NaN and infinity are None."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text, parse_constant=lambda name: None))
        except json.JSONDecodeError:
            break
    return lines
