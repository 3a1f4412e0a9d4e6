"""A run's checkpoints: written in the background while training goes on, the last few kept."""

import os
import re
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lip_resnet.checkpoint import load, save
from lip_resnet.config import InputError
from lip_resnet.files import sync_folder


class Checkpoints:
    """A run's ``checkpoints/``: ``last.pt``, ``best.pt`` and the last few by step, written while training goes on.

    ``save`` copies the tensors and returns; a thread writes. One write is under way at most. The names are links to one
    file, ``step-N.pt``, which is written once.

    Args:
        folder: the directory.
        keep: how many of the last to keep, beside the best.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, payload: dict[str, Any], best: bool) -> None:
        """Start to write ``payload``, whose ``step`` names it; ``best`` makes it ``best.pt`` too.

        Raises:
            InputError: the previous write failed.
        """
        self.wait()
        snapshot = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), payload)
        self._thread = threading.Thread(target=self._write, args=(snapshot, best))
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a write has failed that ``wait`` has not reported yet."""
        return self._error is not None

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            InputError: the write failed; it is reported once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, payload: dict[str, Any], best: bool) -> None:
        try:
            path = self.folder / f"step-{payload['step']:08d}.pt"
            save(path, payload)
            # best first: a kill between the two is then repaired by the evaluation that is done again.
            for name in ["best.pt", "last.pt"] if best else ["last.pt"]:
                self._link(path, self.folder / name, payload)
            # By age, not by step: a damaged one that the run had to go back behind must not push out a whole one.
            others = sorted(set(self._by_step()) - {path}, key=lambda path: path.stat().st_mtime_ns)
            for old in others[: max(0, len(others) + 1 - self.keep)]:
                old.unlink()
            sync_folder(self.folder)
        except OSError as error:
            self._error = InputError(f"{self.folder}: cannot write: {error.strerror}")
        except Exception as error:  # whatever it is, `wait` raises it where the run can see it
            self._error = error

    @staticmethod
    def _link(path: Path, name: Path, payload: dict[str, Any]) -> None:
        temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links, or a full one
            save(name, payload)
            return
        os.replace(temporary, name)
        temporary.unlink(missing_ok=True)  # a rename onto a link of the same file leaves both

    def _by_step(self) -> list[Path]:
        """The files that ``save`` names by their step; a user's own, such as step-best.pt, are not among them."""
        return [path for path in self.folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", path.name)]

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that can be read, and a line on each that was skipped.

        Raises:
            InputError: there are checkpoints, and none is whole.
        """
        found = [self.folder / "last.pt", *sorted(self._by_step(), reverse=True)]
        found = [path for path in found if path.exists()]
        skipped = []
        for path in found:
            try:
                payload = load(path)
            except InputError as error:
                skipped.append(str(error))
                continue
            if isinstance(payload.get("step"), int):
                return path, skipped
            skipped.append(f"{path}: not a training checkpoint")
        if skipped:
            raise InputError(f"no checkpoint is whole: {'; '.join(skipped)}")
        return None, []

    def newer_than(self, source: Path) -> Path | None:
        """A whole checkpoint of a later step than ``source``'s, if there is one.

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
    """Refuse of a training checkpoint what ``load_state_dict`` would take without a look, and fail on in the next step.

    Args:
        networks: by the entry that holds their weights.
        counts: one process's; ``window`` has a row like it for each.

    Raises:
        KeyError: an entry is missing.
        ValueError: an entry cannot be right.
    """
    window, processes = payload["window"], payload["processes"]
    numbers = isinstance(processes, list) and processes and all(type(n) is int and n > 0 for n in processes)
    sets, done = payload.get("datasets", {}), payload.get("evaluated", 0)
    evaluated = type(done) is int and type(payload["step"]) is int and 0 <= done <= payload["step"]
    start = payload.get("initial_weights")
    rows = isinstance(window, Tensor) and len(window) and window.shape[1:] == counts.shape
    for entry, right, wanted in (
        ("step", type(payload["step"]) is int and payload["step"] >= 0, "number of steps"),
        ("best", type(payload["best"]) in (int, float), "percentage"),
        ("processes", numbers, "list of numbers of processes"),
        ("evaluated", evaluated, "step up to this one"),
        ("skipped", type(payload.get("skipped", 0)) is int, "number of images"),
        ("datasets", isinstance(sets, dict) and all(isinstance(each, dict) for each in sets.values()), "description"),
        ("initial_weights", start is None or isinstance(start, dict), "description"),
        ("window", rows, "table of counts"),
    ):
        if not right:
            raise ValueError(f"{entry} is no {wanted} but a {type(payload[entry]).__name__}")
    for entry, network in networks.items():
        for name, ours in network.state_dict().items():
            given = payload[entry].get(name)
            if isinstance(given, Tensor) and given.dtype != ours.dtype:
                raise ValueError(f"{entry}: {name} is {given.dtype}; it must be {ours.dtype}")
    states = payload["optimizer"]["state"]
    keys = [key for group in payload["optimizer"]["param_groups"] for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(keys) != len(parameters) or not states.keys() <= set(keys):
        raise ValueError("optimizer: it is of other parameters")
    for key, parameter in zip(keys, parameters, strict=True):
        for name, value in states.get(key, {}).items():
            fits = isinstance(value, Tensor) and value.shape in ((), parameter.shape)
            if not fits and type(value) not in (int, float, bool, type(None)):
                raise ValueError(f"optimizer: {name} does not fit the parameter that it is of")
