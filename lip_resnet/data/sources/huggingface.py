"""Hugging Face datasets: Parquet files in a folder, or a set of the hub, as one table of encoded images."""

from typing import Any

import numpy as np

from lip_resnet import distributed
from lip_resnet.config import EvalDataConfig, InputError
from lip_resnet.data.decode import BadImage, read_file
from lip_resnet.data.sources.encoded import Encoded

_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "dev", "test")}
"""Our splits -> the names that they may have, the first found."""


class Table(Encoded):
    """A split, its images' bytes as they are in the files, read in any order from Arrow's memory map.

    Args:
        root: what an image's name begins with: the set and the split.
        rows: the images alone, each {"bytes": ..., "path": ...}.
        column: the images' column.
        labels: of the rows.
    """

    def __init__(self, root: str, rows: Any, column: str, classes: list[str], labels: list[int]) -> None:
        self.rows, self.column = rows, column
        super().__init__(root, classes, [(f"{root}/{row}", label) for row, label in enumerate(labels)])

    def read(self, index: int) -> bytes:
        """An image's bytes."""
        image = self.rows[index][self.column]
        data = image and (image["bytes"] or (image["path"] and read_file(image["path"])))
        if not data:
            raise BadImage(f"{self.path(index)}: cannot decode this image: the table has no bytes for it")
        return data


def table_sources(config: EvalDataConfig, splits: tuple[str, ...]) -> list[Table]:
    """The splits of the set ``data.root``; rank 0 fetches and converts it first.

    Raises:
        InputError: there is no such set, it lacks a split, or its columns are not one image and one label.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError('data.name: huggingface needs its library: pip install ".[huggingface]"') from error

    def load() -> Any:
        try:
            return datasets.load_dataset(config.root)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"data.root: cannot load {config.root} as a Hugging Face set: {reason}") from error

    distributed.on_main(lambda: load() and None)
    tables = load()
    sources = []
    for split in splits:
        name = next((name for name in _SPLITS.get(split, (split,)) if name in tables), None)
        if name is None:
            allowed = " or ".join(_SPLITS.get(split, (split,)))
            raise InputError(f"data.root: {config.root} has the splits {', '.join(tables)}; it needs {allowed}")
        sources.append(_open(f"{config.root}/{name}", tables[name], config.label_column))
    return sources


def _open(root: str, table: Any, wanted: str | None) -> Table:
    import datasets

    kinds = table.features
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        found = ", ".join(images) or "none"
        raise InputError(f"data.root: {root} needs one column of images; of {', '.join(kinds)}, they are: {found}")
    labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    labels = [wanted] if wanted else labels or [name for name in ("label", "labels") if name in kinds]
    if len(labels) != 1 or labels[0] not in kinds:
        raise InputError(
            f"data.label_column: {root} has the columns {', '.join(kinds)}; name the one with the labels "
            f"(given: {wanted}, candidates: {', '.join(labels) or 'none'})"
        )
    column = labels[0]
    values = np.asarray(table.with_format("numpy")[column][:])
    if values.ndim != 1 or values.dtype.kind not in "iu" or not len(values) or values.min() < 0:
        raise InputError(f"data.label_column: {root}: {column} must hold a class's number, 0 or more, for every image")
    kind = kinds[column]
    names = kind.names if isinstance(kind, datasets.ClassLabel) else [str(label) for label in range(1 + values.max())]
    rows = table.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    return Table(root, rows, images[0], list(names), values.tolist())
