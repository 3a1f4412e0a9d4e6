"""Predictions of every image of a set, as a CSV file: written by eval.py --predictions, read by studies."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lip_resnet import distributed
from lip_resnet.config import InputError
from lip_resnet.data.fingerprint import names_of
from lip_resnet.data.sources.base import Arrays, Encoded, readable
from lip_resnet.files import write_text

COLUMNS = ("image", "label", "top1", "top5", "margin", "loss")


def check_new_file(path: Path, several: bool, flag: str = "--predictions", suffix: str = ".csv") -> None:
    """Refuse a file that exists, cannot be written or is named as of another format, and one for several sets.

    A collective.

    Args:
        flag: the option that names the file.
        suffix: of the format that is written.

    Raises:
        InputError: one of these.
    """
    if several:
        raise InputError(f"{flag} {path} is for one set; give one --dataset")
    if path.suffix.lower() != suffix:
        raise InputError(f"{flag} {path}: the file is written as {suffix}; give a name that ends so")
    if distributed.on_main(path.exists):
        raise InputError(f"{path} exists; choose another {flag} or remove it")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{flag} {path}: {path.parent} is not a directory")


@dataclass(frozen=True)
class Gathered:
    """The predictions of all processes, n images in the order of the set."""

    index: NDArray[np.int64]
    """(n,)"""
    labels: NDArray[np.int64]
    """(n, K): classes any of which is correct, padded with -1."""
    top: NDArray[np.int64]
    """(n, 5), or as many columns as there are classes if fewer; best first."""
    margin: NDArray[np.float32]
    """(n,): the best logit of a correct class less the best of the others."""
    loss: NDArray[np.float32]
    """(n,)"""

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n,): whether top-1 is correct."""
        return (self.top[:, :1] == self.labels).any(axis=1)


class PredictionLog:
    """Collects the predictions of an evaluation on this process; ``gather`` joins those of all processes."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def add(self, images: range, logits: Tensor, labels: Tensor) -> None:
        """Add a batch, without a synchronisation.

        Args:
            images: indices of the batch's images in the set.
            logits: (B, classes), float32.
            labels: (B,) int64; or (B, K) int64, any of which is correct, padded with -1.
        """
        labels = labels.reshape(len(labels), -1)
        correct = torch.zeros_like(logits, dtype=torch.bool)
        correct.scatter_(1, labels.where(labels >= 0, labels[:, :1]), True)
        margin = logits.masked_fill(~correct, -torch.inf).amax(1) - logits.masked_fill(correct, -torch.inf).amax(1)
        loss = logits.logsumexp(1) - logits.masked_fill(~correct, -torch.inf).logsumexp(1)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        self._batches.append((torch.tensor(list(images)), labels, top, margin, loss))

    def gather(self) -> Gathered:
        """The predictions of every image, on every process. A collective."""
        columns = [torch.cat([part.cpu() for part in parts]) for parts in zip(*self._batches, strict=True)]
        gathered = [part for part in distributed.gather_objects(columns) if part]
        joined = [torch.cat(parts).numpy() for parts in zip(*gathered, strict=True)]
        order = np.argsort(joined[0], kind="stable")
        return Gathered(*(column[order] for column in joined))

    def write(self, path: Path, source: Encoded | Arrays) -> None:
        """Write the predictions of the whole set, in its order, on rank 0. A collective.

        Bytes of a name that are not UTF-8 are written as ``\\xe9``, and line feeds as ``\\n``.

        Args:
            source: the set, which names its images.

        Raises:
            InputError: the file cannot be written.
        """
        rows = self.gather()
        if not distributed.is_main():
            return
        encoded = names_of(source) if isinstance(source, Encoded) else []
        names = [name.decode("utf-8", "backslashreplace") for name in encoded]
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(COLUMNS)
        for index, labels, top, margin, loss in zip(
            rows.index, rows.labels, rows.top, rows.margin, rows.loss, strict=True
        ):
            image = names[index] if names else source.path(int(index))
            right = " ".join(str(label) for label in labels if label >= 0)
            lines.writerow([readable(image), right, top[0], " ".join(map(str, top)), f"{margin:.6g}", f"{loss:.6g}"])
        write_text(path, text.getvalue())


@dataclass(frozen=True)
class Predictions:
    """A predictions file of a set with one right label an image; n images in the order of the set."""

    images: list[str]
    label: NDArray[np.int64]
    """(n,)"""
    top1: NDArray[np.int64]
    """(n,)"""
    top5: NDArray[np.int64]
    """(n, 5), or as many columns as there are classes if fewer; best first."""

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n,): whether top-1 is the label."""
        return self.top1 == self.label


def read_predictions(path: Path) -> Predictions:
    """Read a file that ``PredictionLog`` has written.

    Raises:
        InputError: it cannot be read, is not such a file, or an image has several right labels (ImageNet-ReaL).
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        if tuple(header) != COLUMNS or not rows:
            raise InputError(f"{path}: not predictions of eval.py; its columns must be {','.join(COLUMNS)}")
        images, labels, top1, top5 = (list(column) for column in zip(*(row[:4] for row in rows), strict=True))
        if several := next((image for image, label in zip(images, labels, strict=True) if " " in label), None):
            raise InputError(f"{path}: {several} has several right labels; a file with one for each image is needed")
        return Predictions(
            images,
            np.array(labels, dtype=np.int64),
            np.array(top1, dtype=np.int64),
            np.array([row.split() for row in top5], dtype=np.int64),
        )
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not predictions of eval.py: {error}") from error
