"""Hugging Face datasets: Parquet files in a folder, or a dataset of the hub, as a table of encoded images."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lip_resnet import distributed
from lip_resnet.config import InputError
from lip_resnet.data.decode import BadImage, read_file
from lip_resnet.data.sources.base import Encoded

_HIGHEST_LABEL = (1 << 31) - 1
_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "dev", "test")}
"""Our splits -> the names that a dataset may give them; the first that it has is read."""


class Table(Encoded):
    """A split; the encoded images are read from Arrow's memory map, in any order.

    Args:
        root: dataset/split, with which the images' names begin.
        rows: the ``datasets.Dataset`` with the image column alone, not decoded: each {"bytes": ..., "path": ...}.
        column: the name of that column.
        classes: the names of the labels; empty where the table has none.
        labels: one for each row.
    """

    def __init__(self, root: str, rows: Any, column: str, classes: list[str], labels: list[int]) -> None:
        self.rows, self.column = rows, column
        super().__init__(root, classes, [(f"{root}/{row}", label) for row, label in enumerate(labels)])

    def read(self, index: int) -> bytes:
        """An image's bytes.

        Raises:
            BadImage: the row has none.
        """
        image = self.rows[index][self.column]
        data = image and (image["bytes"] or (image["path"] and read_file(image["path"])))
        if not data:
            raise BadImage(f"{self.path(index)}: cannot decode this image: the table has no bytes for it")
        return data


def table_sources(root: str, label_column: str | None, splits: tuple[str, ...]) -> list[Table]:
    """The splits of a dataset; rank 0 downloads and converts it first.

    Args:
        root: ``data.root``, a folder of Parquet files or a name on the hub.
        label_column: ``data.label_column``; None for the only candidate.

    Raises:
        InputError: ``datasets`` is not installed, there is no such dataset, it lacks a split, or its columns are not
            one image and one label.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f'data.name: huggingface needs the package datasets: pip install "lip-resnet[data]" ({error})'
        ) from error

    def load() -> Any:
        try:
            return datasets.load_dataset(root)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise InputError(f"data.root: cannot load {root} as a Hugging Face dataset: {reason}") from error

    def prepare() -> None:
        load()

    distributed.on_main(prepare)
    tables = load()
    sources = []
    for split in splits:
        name = next((name for name in _SPLITS.get(split, (split,)) if name in tables), None)
        if name is None:
            allowed = " or ".join(_SPLITS.get(split, (split,)))
            raise InputError(f"data.root: {root} has the splits {_first(tables)}; it needs {allowed}")
        sources.append(_open(f"{root}/{name}", tables[name], label_column))
    return sources


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "") or "none"


def _open(root: str, table: Any, label_column: str | None) -> Table:
    import datasets

    kinds = table.features
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        raise InputError(
            f"data.root: {root} needs one column of images; of its columns {_first(kinds)}, these hold images: "
            f"{_first(images)}"
        )
    labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    labels = [label_column] if label_column else labels or [name for name in ("label", "labels") if name in kinds]
    if len(labels) != 1 or labels[0] not in kinds:
        raise InputError(
            f"data.label_column: {root} has the columns {_first(kinds)}; name the one with the labels "
            f"(given: {label_column}, candidates: {_first(labels)})"
        )
    column = labels[0]
    values = np.asarray(table.with_format("numpy")[column][:])
    rule = f"data.label_column: {root}: {column} must hold a class's number, 0 or more, for every image"
    labels = values.tolist() if values.ndim == 1 else []
    for row, label in enumerate(labels):
        if label is None or (isinstance(label, (int, float)) and not 0 <= label <= _HIGHEST_LABEL):  # NaN is none too
            raise InputError(f"{rule}; row {row} has {label}")
    if values.ndim != 1 or values.dtype.kind not in "iu" or not len(values):
        raise InputError(f"{rule}; its {len(values)} rows hold {kinds[column]}")
    names = kinds[column].names if isinstance(kinds[column], datasets.ClassLabel) else []
    rows = table.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    return Table(root, rows, images[0], list(names), labels)
