"""Small sets of images in every layout, and ranks simulated in one process."""

import io
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from lip_resnet import distributed
from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import build_sources


def folder_config(root: Path, **changes: object) -> DataConfig:
    settings = {"root": str(root), "batch_size": 4, "size": 32, "eval_size": 32, "eval_resize": 36, "workers": 0}
    return DataConfig(**{**settings, **changes})


def as_rank(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def add_shards(image_folder: Path, root: Path) -> None:
    """The shared folder in shards of five, labels before or after their image."""
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / split / "classes.txt").write_text("ant\nbee\ncat\n")
        paths = sorted((image_folder / split).glob("*/*"))
        for start in range(0, len(paths), 5):
            with tarfile.open(root / split / f"{start:04}.tar", "w") as archive:
                for number, path in enumerate(paths[start : start + 5], start):
                    label = str(("ant", "bee", "cat").index(path.parent.name)).encode()
                    members = [(f"./{number:06}.jpg", path.read_bytes()), (f"./{number:06}.cls", label)]
                    for name, data in members if number % 2 else members[::-1]:
                        add(archive, name, data)
                    add(archive, f"./{number:06}.json", b"{}")


def table(paths: list[Path], labels: str = "label", kind: object = None, **more: list) -> datasets.Dataset:
    names = ["ant", "bee", "cat"]
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        labels: [names.index(path.parent.name) for path in paths],
        **more,
    }
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return rows.cast_column(labels, kind or datasets.ClassLabel(names=names))


IMAGES = {"train": 6, "val": 4}
"""Of each of torchvision's sets that the tests write."""
RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def cifar(root: Path, classes: int, folder: str, files: dict[str, list[str]], key: str) -> None:
    (root / folder).mkdir(parents=True)
    for split, names in files.items():
        count = IMAGES[split] // len(names) if len(names) < 5 else None
        for number, name in enumerate(names):
            images = count or (2 if number == 0 else 1)  # five batches of six images
            labels = [(number + image) % classes for image in range(images)]
            content = {"data": pixels(images, 3072), key: labels}
            (root / folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": list("abc"), "fine_label_names": list("abc")}
    for name in ("batches.meta", "meta"):
        (root / folder / name).write_bytes(pickle.dumps(meta))


def encoded(kind: str, size: tuple[int, int] = (40, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(buffer, kind)
    return buffer.getvalue()


def shards(folder: Path, *members: tuple[str, bytes] | tarfile.TarInfo, names: bytes | None = None) -> DataConfig:
    """One shard with an image ``good`` of label 0, and other members."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    if names is not None:
        (folder / "train" / "classes.txt").write_bytes(names)
    with tarfile.open(folder / "train" / "0.tar", "w") as archive:
        for member in (("good.jpg", encoded("JPEG")), ("good.cls", b"0"), *members):
            archive.addfile(member) if isinstance(member, tarfile.TarInfo) else add(archive, *member)
    return folder_config(folder, name="shards")


def refusal(config: DataConfig, classes: int | None = 3, splits: tuple[str, ...] = ("train",)) -> str:
    with pytest.raises(InputError) as caught:
        build_sources(config, classes, splits)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)
