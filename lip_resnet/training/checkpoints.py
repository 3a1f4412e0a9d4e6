"""A run's checkpoints: written in the background while training goes on, the last few kept."""

import os
import re
import reprlib
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lip_resnet.checkpoint import load, save
from lip_resnet.compat import tree_map_only
from lip_resnet.errors import InputError
from lip_resnet.files import sync_folder


class Checkpoints:
    """A run's ``checkpoints/``: ``last.pt``, ``best.pt`` and the last few by step, written while training goes on.

    ``save`` copies the tensors to the CPU and returns; a thread writes them, one checkpoint at a time. ``last.pt`` and
    ``best.pt`` are hard links to ``step-N.pt``, where the file system has links, else copies.

    Args:
        folder: the directory.
        keep: how many of the newest to keep, beside the best.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, payload: dict[str, Any], best: bool) -> None:
        """Start to write ``payload`` as ``step-N.pt``, N its ``step``, and ``last.pt``; if ``best``, also ``best.pt``.

        Raises:
            InputError: the previous write failed.
        """
        self.wait()
        snapshot = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), payload)
        self._thread = threading.Thread(target=self._write, args=(snapshot, best))
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a write has failed and ``wait`` has not reported it yet."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            InputError: the write failed; raised once for each failure.
        """
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait until nothing is being written, without an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, payload: dict[str, Any], best: bool) -> None:
        try:
            path = self.folder / f"step-{payload['step']:08d}.pt"
            save(path, payload)
            # best.pt first: after a kill between the two, the resumed run repeats the evaluation and writes both.
            for name in ["best.pt", "last.pt"] if best else ["last.pt"]:
                self._link(path, self.folder / name, payload)
            # By age, not by step: a damaged checkpoint of a later step must not displace an intact one.
            others = sorted(set(self._step_files()) - {path}, key=lambda path: path.stat().st_mtime_ns)
            for old in others[: max(0, len(others) + 1 - self.keep)]:
                old.unlink()
            sync_folder(self.folder)
        except OSError as error:
            self._error = InputError(f"{self.folder}: cannot write: {error.strerror}")
        except Exception as error:  # raised by `wait`, in the main thread
            self._error = error

    @staticmethod
    def _link(path: Path, name: Path, payload: dict[str, Any]) -> None:
        temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # the file system has no hard links, or is full
            save(name, payload)
            return
        os.replace(temporary, name)
        temporary.unlink(missing_ok=True)  # rename(2) does nothing if both names are links to the same file

    def _step_files(self) -> list[Path]:
        """Every ``step-N.pt`` that ``save`` wrote; not a user's own files, such as step-best.pt."""
        return [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", path.name)]

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, None if there are no checkpoints; and a line on each damaged one.

        Raises:
            InputError: there are checkpoints, and all are damaged.
        """
        skipped = []
        for path in [self.folder / "last.pt", *sorted(self._step_files(), reverse=True)]:
            if not path.exists():
                continue
            try:
                payload = load(path)
            except InputError as error:
                skipped.append(str(error))
                continue
            if isinstance(payload.get("step"), int):
                return path, skipped
            skipped.append(f"{path}: not a training checkpoint")
        if skipped:
            raise InputError(f"no checkpoint is intact: {'; '.join(skipped)}")
        return None, []

    def newer_than(self, source: Path) -> Path | None:
        """The newest intact checkpoint, if its step is later than that of ``source``; else None.

        Raises:
            InputError: ``source`` cannot be read.
        """
        step = load(source).get("step")
        try:
            newest, _ = self.newest_whole()
        except InputError:
            return None
        newer = newest is not None and isinstance(step, int) and load(newest)["step"] > step
        return newest if newer else None


def check_entries(
    payload: dict[str, Any], networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer, counts: Tensor
) -> None:
    """Check the entries of a training checkpoint that ``load_state_dict`` does not check: it would fail a step later.

    Args:
        payload: the checkpoint.
        networks: the modules whose weights it holds, by entry ("model", "ema").
        optimizer: the optimizer that will load its ``optimizer`` entry.
        counts: (n,), the counts of one process; the ``window`` entry has a row like it for each process.

    Raises:
        KeyError: an entry is missing.
        ValueError: an entry has a wrong type, value or shape.
    """
    step, processes, window = payload["step"], payload["processes"], payload["window"]
    best, skipped, evaluated = payload["best"], payload.get("skipped", 0), payload.get("evaluated", 0)
    datasets, initial_weights = payload.get("datasets", {}), payload.get("initial_weights")
    step_ok = type(step) is int and step >= 0
    processes_ok = isinstance(processes, list) and processes and all(type(n) is int and n > 0 for n in processes)
    datasets_ok = isinstance(datasets, dict) and all(isinstance(each, dict) for each in datasets.values())
    window_ok = isinstance(window, Tensor) and len(window) and window.shape[1:] == counts.shape
    for entry, valid, allowed in (
        ("step", step_ok, "a number of steps"),
        ("best", type(best) in (int, float), "a percentage"),
        ("processes", processes_ok, "a list of numbers of processes"),
        ("evaluated", step_ok and type(evaluated) is int and 0 <= evaluated <= step, "a step, at most `step`"),
        ("skipped", type(skipped) is int, "a number of images"),
        ("datasets", datasets_ok, "a mapping of descriptions"),
        ("initial_weights", initial_weights is None or isinstance(initial_weights, dict), "a description"),
        ("window", window_ok, f"counts of shape (processes, {len(counts)})"),
    ):
        if not valid:
            given = payload[entry]
            shown = tuple(given.shape) if isinstance(given, Tensor) else reprlib.repr(given)  # bounded, unlike repr
            raise ValueError(f"{entry} is {shown} ({type(given).__name__}); it must be {allowed}")
    for entry, network in networks.items():
        for name, ours in network.state_dict().items():
            given = payload[entry].get(name)
            if isinstance(given, Tensor) and given.dtype != ours.dtype:
                raise ValueError(f"{entry}: {name} is {given.dtype}; it must be {ours.dtype}")
    states = payload["optimizer"]["state"]
    keys = [key for group in payload["optimizer"]["param_groups"] for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    elementwise = type(optimizer).__name__ in ("SGD", "AdamW", "Lamb", "Lars")  # others may keep factored averages
    if len(keys) != len(parameters) or not states.keys() <= set(keys):
        raise ValueError(f"optimizer: holds the state of {len(keys)} parameters; it must be of {len(parameters)}")
    for key, parameter in zip(keys, parameters, strict=True):
        for name, value in states.get(key, {}).items():
            fits = isinstance(value, Tensor) and (value.shape in ((), parameter.shape) or not elementwise)
            if not fits and type(value) not in (int, float, bool, type(None)):
                raise ValueError(f"optimizer: {name} does not fit its parameter of shape {tuple(parameter.shape)}")
