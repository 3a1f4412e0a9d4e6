"""A run's numbers to TensorBoard, metrics.jsonl and the terminal (rank 0 only), and what they depend on."""

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

from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lip_resnet import distributed
from lip_resnet.config import Config, InputError
from lip_resnet.files import write_atomically

EARLIER = 50
"""Environments of earlier starts that env.json keeps."""


class RunLog:
    """Writes a run's numbers; every method does nothing on ranks other than 0.

    Args:
        folder: the run folder, which ``run_folder.open_run`` has prepared.
        config: the resolved recipe; written as config.yaml and as TensorBoard text.
        step: where the run starts or continues: lines and events beyond it are dropped.
        evaluated: the last step whose evaluation is done: that of ``step`` itself may be still to come.
        total_steps: of the whole run, for the progress bar and the time left.
    """

    def __init__(
        self, folder: Path, config: Config, environment: dict[str, Any], step: int, evaluated: int, total_steps: int
    ) -> None:
        self.active = distributed.is_main()
        self.folder, self.total_steps = folder, total_steps
        self.first_step, self.evaluated = step, evaluated
        self.started = time.monotonic()
        self.config, self.environment, self.refused = config, environment, False
        self.unwritten, self.earlier = b"", None
        distributed.on_main(lambda: self._open(config, environment))

    def _open(self, config: Config, environment: dict[str, Any]) -> None:
        step = self.first_step
        try:
            self._write("config.yaml", config.dump())
            path = self.folder / "env.json"
            if self.earlier is None:  # not after a rollback
                last = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                self.earlier = [*last.pop("earlier", []), *([last] if last else [])][-EARLIER:]
            earlier = {"earlier": self.earlier} if self.earlier else {}
            self._write("env.json", json.dumps({**environment, **earlier}, indent=2) + "\n")
            kept = [line for line in _read_lines(self.folder / "metrics.jsonl") if self._counts(line)]
            self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
            self.metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
            # What an earlier start wrote beyond its checkpoint is dropped here too.
            threading.excepthook = self._quietly(threading.__excepthook__)
            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1 if step else 0)
            self.writer.add_text("config", f"```yaml\n{config.dump()}```", step)
            self.writer.flush()
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder}: cannot write the run's files: {error}") from error
        self.quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True, disable=self.quiet)

    def _counts(self, line: dict[str, Any]) -> bool:
        """Whether a line of metrics.jsonl is of what the run continues from."""
        evaluation = any(name.startswith("val") for name in line)
        return line["step"] <= (self.evaluated if evaluation else self.first_step)

    @staticmethod
    def _quietly(hook: Callable[[Any], None]) -> Callable[[Any], None]:
        """TensorBoard's thread both keeps its error for the next call and dies of it with a traceback."""

        def told(args: Any) -> None:
            if not (issubclass(args.exc_type, OSError) and isinstance(args.thread, _AsyncWriterThread)):
                hook(args)

        return told

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, lambda file: file.write(text.encode()))

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.active:
            self.bar.update()

    def log(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write numbers under their TensorBoard names; ``step`` counts completed optimizer steps.

        Every process must call it.

        Raises:
            InputError: they cannot be written (full disk, no permission), and ``train.on_write_error`` is stop.
        """

        def write() -> None:
            # Infinity and NaN are not JSON.
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self.unwritten += json.dumps({"step": step, "epoch": epoch, **finite}).encode() + b"\n"
            self._append()
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

        self._try(write)
        if not self.active:
            return
        if "train/loss" in values:
            self.bar.set_postfix_str(
                f"loss {values['train/loss']:.3f}, top-1 {values['train/top1']:.1f}%, "
                f"{values['train/images_per_second']:.0f} images/s, wait {values['train/data_wait']:.0%}"
            )
        if self.quiet:
            self.say(f"epoch {epoch} step {step}/{self.total_steps}: {_brief(values)}{self._time_left(step)}")
        elif "val/top1" in values:
            self.say(f"epoch {epoch}: {_brief(values)}")

    def _append(self) -> None:
        """To metrics.jsonl: all that is not written yet, or nothing of it, to be tried again with the next line."""
        rest, end = memoryview(self.unwritten), os.fstat(self.metrics.fileno()).st_size
        try:
            while rest:
                rest = rest[self.metrics.write(rest) :]
        except OSError:
            os.ftruncate(self.metrics.fileno(), end)
            raise
        self.unwritten = b""

    def _try(self, write: Callable[[], None]) -> None:
        """Let rank 0 write; what a disk refuses ends the run, or is said once and waits for room: the recipe says."""

        def attempt() -> None:
            try:
                write()
                self.writer.flush()  # the writer's thread tells its errors only now
            except OSError as error:
                message = f"{self.folder}: cannot write the run's numbers: {error.strerror or error}"
                if self.config.train.on_write_error == "stop":
                    raise InputError(message) from error
                if not self.refused:
                    self.say(f"warning: {message}; the run goes on, TensorBoard's file ends here")
                self.refused = True

        distributed.on_main(attempt)

    def sync(self) -> None:
        """Put the numbers so far on the disk itself: a checkpoint is about to say that they are done."""
        self._try(lambda: os.fsync(self.metrics.fileno()))

    def _time_left(self, step: int) -> str:
        done = step - self.first_step
        if not done or step >= self.total_steps:
            return ""
        left = (time.monotonic() - self.started) / done * (self.total_steps - step)
        return f", {datetime.timedelta(seconds=round(left))} left"

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self.active:
            self.bar.write(text, file=sys.stderr)

    def finish(self, config: Config, final: dict[str, float]) -> None:
        """Write the hyper-parameters with the final metrics, for TensorBoard's comparison of runs."""
        flat = {
            f"{section}.{key}": value if isinstance(value, (bool, int, float, str)) else str(value)
            for section, values in config.model_dump(mode="json").items()
            for key, value in values.items()
        }
        results = {f"final/{name}": value for name, value in final.items()}
        self._try(lambda: self.writer.add_hparams(flat, results, run_name="."))

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop the numbers beyond ``step``: the run has gone back to it."""
        if self.active:
            self.close()
        self.first_step, self.evaluated = step, evaluated
        distributed.on_main(lambda: self._open(self.config, self.environment))

    def close(self) -> None:
        """Flush and close everything; safe after a failure too."""
        if self.active:
            self.bar.close()
            with contextlib.suppress(OSError):  # said already, when it was written
                self._append()
            self.metrics.close()
            with contextlib.suppress(OSError):
                self.writer.close()


def _brief(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a kill can have cut the last one short."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
