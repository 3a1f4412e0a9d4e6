"""Predictions of a set by class: the accuracy of every class, which classes are confused, the confusion matrix."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lip_resnet.config import InputError
from lip_resnet.evaluation.predictions import Predictions, read_predictions
from lip_resnet.evaluation.rows import is_detection, read_rows

PREDICTIONS = "predictions.csv"
"""The name of a row's predictions beside it, such as in the cells of a study."""


@dataclass(frozen=True)
class Confusions:
    """Right and wrong predictions of n classes."""

    classes: list[int]
    """The n indices of the classes that have images or are predicted, in increasing order."""
    matrix: NDArray[np.int64]
    """(n, n): the images of a class (row) that are predicted as each class (column)."""

    @property
    def images(self) -> NDArray[np.int64]:
        """(n,): images of every class."""
        return self.matrix.sum(axis=1)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """(n,): top-1 of every class, percent; NaN of a class without images."""
        return 100 * self.matrix.diagonal() / np.where(self.images > 0, self.images, np.nan)

    def pairs(self, count: int) -> list[tuple[int, int, int]]:
        """The most frequent errors, at most ``count``: positions of the right and the predicted class, images."""
        wrong = self.matrix - np.diag(self.matrix.diagonal())
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = [tuple(map(int, divmod(int(cell), len(self.classes)))) for cell in order]
        return [(right, given, int(wrong[right, given])) for right, given in pairs if wrong[right, given]]


def count_confusions(predictions: Predictions) -> Confusions:
    """Count the pairs of right and predicted class."""
    classes, positions = np.unique([predictions.label, predictions.top1], return_inverse=True)
    right, given = positions.reshape(2, -1)
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(matrix, (right, given), 1)
    return Confusions(classes.tolist(), matrix)


def read_result(path: Path, predictions: Path | None = None) -> tuple[Predictions, dict[str, Any] | None]:
    """Read predictions, and the row that they belong to.

    Args:
        path: a predictions file, a row, or a run folder with one row.
        predictions: the file of a row's predictions; None for the one that the row names, or predictions.csv beside it.

    Returns:
        The predictions; and the row, None where a predictions file is given.

    Raises:
        InputError: there is no such file, or the predictions are not those of the row.
    """
    if not (path.is_dir() or path.suffix == ".json"):
        if predictions is not None:
            raise InputError(f"--predictions {predictions} is for a row; {path} is taken as a predictions file")
        return read_predictions(path), None
    if path.is_dir() and not (path / "eval.json").is_file():
        command = f"python eval.py --checkpoint {path} --predictions {path / PREDICTIONS}"
        raise InputError(f"{path} holds no eval.json; make it, and the predictions, with: {command}")
    if path.is_dir():
        path = path / "eval.json"
    (row,) = read_rows([str(path)])
    if is_detection(row):
        raise InputError(f"{path} is a row of a detector; accuracies by class are of classifiers")
    named = Path(row.get("predictions") or "")
    file = predictions or (named if named.is_file() else path.parent / PREDICTIONS)
    if not file.is_file():
        command = f"python eval.py --checkpoint {row['checkpoint']} --output NEW.json --predictions {file}"
        raise InputError(f"{file}: no such file; a row holds no predictions, write them with: {command}")
    result = read_predictions(file)
    among_five = (result.top5 == result.label[:, None]).any(axis=1)
    counted = {"images": len(result.images), "correct1": int(result.right.sum()), "correct5": int(among_five.sum())}
    for key, here in counted.items():
        if row.get(key, here) != here:
            raise InputError(f"{file} holds predictions of another run: {key} {here:,}, in {path} {row[key]:,}")
    return result, row


def name_classes(classes: Iterable[int], predictions: Predictions, recorded: Sequence[str] | None) -> list[str]:
    """The names of classes: ``recorded``, in the order of the logits; else the images' folders; else their indices."""
    names = dict(enumerate(recorded or ()))
    if recorded is None:
        folders: dict[int, set[str]] = {}
        for image, label in zip(predictions.images, predictions.label.tolist(), strict=True):
            folders.setdefault(label, set()).add(image.rpartition("/")[0])
        if all(len(each) == 1 for each in folders.values()) and len(set().union(*folders.values())) == len(folders):
            names = {label: folder.rpartition("/")[2] for label, (folder,) in folders.items() if folder}
    return [names.get(index, str(index)) for index in classes]
