"""torchvision's sets by name, from small imitations of their files."""

import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from helpers.sets import IMAGES, cifar, pixels
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from lip_resnet.config import DataConfig, InputError, TorchvisionSet
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, describe_source
from lip_resnet.data.sources import named


def write(path: Path, data: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def picture(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(20, 24, 3)).save(path)
    return path.stem


def counted(train: str, val: str) -> list[tuple[str, int]]:
    """(a set's own name of our split, how many images it gets)."""
    return [(train, IMAGES["train"]), (val, IMAGES["val"])]


def mnist(root: Path, name: str) -> None:
    for prefix, n in counted("train", "t10k"):
        images = struct.pack(">IIII", 0x803, n, 28, 28) + pixels(n, 28, 28).tobytes()
        labels = struct.pack(">II", 0x801, n) + bytes(index % 3 for index in range(n))
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            write(root / name / "raw" / f"{prefix}-{kind}-ubyte", data)
            write(root / name / "raw" / f"{prefix}-{kind}-ubyte.gz", gzip.compress(data))


def svhn(root: Path) -> None:
    for name, n in counted("train", "test"):
        labels = np.array([10, 1, 2, 10, 1, 2][:n], np.uint8)[:, None]  # 10 stands for 0
        savemat(root / f"{name}_32x32.mat", {"X": pixels(32, 32, 3, n), "y": labels})


def stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    write(folder / "class_names.txt", "ape\nbat\ncow\n")
    for name, n in counted("train", "test"):
        write(folder / f"{name}_X.bin", pixels(n, 3, 96, 96).tobytes())
        write(folder / f"{name}_y.bin", bytes(1 + index % 3 for index in range(n)))


def gtsrb(root: Path) -> None:
    base, lines = root / "gtsrb", ["Filename;ClassId\n"]
    for index in range(IMAGES["train"]):
        picture(base / "GTSRB" / "Training" / f"{index % 3:05}" / f"{index}.ppm")
    for index in range(IMAGES["val"]):
        picture(base / "GTSRB" / "Final_Test" / "Images" / f"{index:05}.ppm")
        lines.append(f"{index:05}.ppm;{index % 3}\n")
    write(base / "GT-final_test.csv", "".join(lines))


def folders(base: Path, splits: dict[str, int], names: list[str], suffix: str) -> None:
    for split, count in splits.items():
        for index in range(count):
            picture(base / split / names[index % 3] / f"{index}{suffix}")


def flowers102(root: Path) -> None:
    base = root / "flowers-102"
    for number in range(1, 11):
        picture(base / "jpg" / f"image_{number:05}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.array([1 + number % 3 for number in range(10)])})
    savemat(base / "setid.mat", {"trnid": np.arange(1, 5), "valid": np.arange(5, 7), "tstid": np.arange(7, 11)})


def food101(root: Path) -> None:
    for name, n in counted("train", "test"):
        listed: dict[str, list[str]] = {"pie": [], "rice": [], "soup": []}
        for index in range(n):
            label = list(listed)[index % 3]
            listed[label].append(f"{label}/{picture(root / 'food-101' / 'images' / label / f'{name}{index}.jpg')}")
        write(root / "food-101" / "meta" / f"{name}.json", json.dumps(listed))


def listed_files(images: Path, name: str, n: int, image: str, line: str) -> str:
    """Write ``n`` images and return the lines of a list of them; the classes are a, b and c.

    Args:
        image, line: templates, with the class as {0}, the image's number as {1} and the class's number as {2}.
    """
    lines = []
    for index in range(n):
        values = "abc"[index % 3], f"{name}{index}", index % 3 + 1
        picture(images / image.format(*values))
        lines.append(line.format(*values) + "\n")
    return "".join(lines)


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for name, n in counted("trainval", "test"):
        lines = listed_files(base / "images", name, n, "{0}_{1}.jpg", "{0}_{1} {2} 1 1")
        write(base / "annotations" / f"{name}.txt", lines)


def dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    for name, n in (("train", 3), ("val", 3), ("test", 4)):
        write(base / "labels" / f"{name}1.txt", listed_files(base / "images", name, n, "{0}/{1}.jpg", "{0}/{1}.jpg"))


def aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    write(base / "variants.txt", "a 1\nb 2\nc 3\n")
    for name, n in counted("trainval", "test"):
        write(base / f"images_variant_{name}.txt", listed_files(base / "images", name, n, "{1}.jpg", "{1} {0} {2}"))


FIVE = [f"data_batch_{number}" for number in range(1, 6)]
LAYOUTS = {
    "cifar10": lambda r: cifar(r, 3, "cifar-10-batches-py", {"train": FIVE, "val": ["test_batch"]}, "labels"),
    "cifar100": lambda r: cifar(r, 3, "cifar-100-python", {"train": ["train"], "val": ["test"]}, "fine_labels"),
    "mnist": lambda r: mnist(r, "MNIST"),
    "fashion_mnist": lambda r: mnist(r, "FashionMNIST"),
    "kmnist": lambda r: mnist(r, "KMNIST"),
    "svhn": svhn,
    "stl10": stl10,
    "gtsrb": gtsrb,
    "imagenette": lambda r: folders(r / "imagenette2", IMAGES, ["n01440764", "n02102040", "n02979186"], ".JPEG"),
    "flowers102": flowers102,
    "food101": food101,
    "pets": pets,
    "dtd": dtd,
    "aircraft": aircraft,
    "country211": lambda r: folders(r / "country211", {"train": 3, "valid": 3, "test": 4}, ["AD", "AE", "AF"], ".jpg"),
}

CLASSES = {"flowers102": 102, "mnist": 10, "fashion_mnist": 10, "kmnist": 10}
"""Of those whose classes torchvision's code names."""


def settings(name: str, root: Path, **changes: object) -> DataConfig:
    values = {"name": name, "root": str(root), "batch_size": 3, "size": 16, "eval_size": 16, "eval_resize": 18}
    return DataConfig(**{**values, "workers": 0, "decode": "fast", **changes})


@pytest.fixture
def tiny(monkeypatch):
    """Accept the imitations' checksums and numbers of images."""
    for kind in (datasets.CIFAR10, datasets.SVHN, datasets.STL10):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: Path(self.root).exists())
    for module in (datasets.cifar, datasets.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, *_: Path(path).exists())
    for name, entry in named.NAMED.items():
        monkeypatch.setitem(named.NAMED, name, replace(entry, images=IMAGES))


def test_every_name_is_known_to_recipes():
    assert set(named.NAMED) == set(get_args(TorchvisionSet)) == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_and_labels_are_torchvision_s(tiny, tmp_path, name):
    """The same images with the same labels as torchvision's own class gives; every one once in training."""
    LAYOUTS[name](tmp_path)
    config = settings(name, tmp_path)
    train, val = build_sources(config, CLASSES.get(name, 3))
    entry = named.NAMED[name]
    for source, split in ((train, "train"), (val, "val")):
        theirs = [item for part in entry.splits[split] for item in entry.build(str(tmp_path), **{entry.split: part})]
        assert len(source) == len(theirs) == IMAGES[split]
        for (mine, label), (image, other) in zip((source[i] for i in range(len(source))), theirs, strict=True):
            assert label == other
            assert mine.tobytes() == image.convert("RGB").tobytes()
        assert describe_source(source)["images"] == len(source)
    labels = [label for batch in TrainLoader(train, config, 1, 0).epoch(0) for label in batch.parts[0][1].tolist()]
    assert sorted(labels) == sorted(label for _, label in (train[i] for i in range(6)))
    assert torch.cat([labels for _, labels in EvalLoader(val, config)]).tolist() == [val[i][1] for i in range(4)]
    assert all(isinstance(name, str) for name in train.classes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_set(tmp_path, name):
    with pytest.raises(InputError, match=rf"does not hold {name}'s train; data\.download: true fetches it") as caught:
        build_sources(settings(name, tmp_path), 10)
    assert "\n" not in str(caught.value)


def test_an_incomplete_set(tiny, tmp_path):
    """A download that was killed while it unpacked: torchvision accepts it."""
    LAYOUTS["imagenette"](tmp_path)
    next((tmp_path / "imagenette2" / "train").rglob("*.JPEG")).unlink()
    with pytest.raises(InputError, match=r"holds 5 images of imagenette's train, the whole set 6"):
        build_sources(settings("imagenette", tmp_path), 3)


def test_download_comes_first(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.Imagenette, "_download", lambda self: None if self._check_exists() else make())
    made = []

    def make() -> None:
        made.append(tmp_path / "new")
        LAYOUTS["imagenette"](tmp_path / "new")

    sources = build_sources(settings("imagenette", tmp_path / "new", download=True), 3)
    assert [len(source) for source in sources] == [6, 4]
    assert len(made) == 1
    monkeypatch.setattr(datasets.Imagenette, "_download", lambda self: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(InputError, match=r"data\.download: cannot download imagenette to .*: no route"):
        build_sources(settings("imagenette", tmp_path / "other", download=True), 3)
