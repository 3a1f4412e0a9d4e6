"""Damaged and unusual files: decoded correctly or refused with the path, skipped only on request, never replaced."""

import json
import os
import shutil
import signal
from pathlib import Path

import bad_images
import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from torch.utils.data import Dataset

from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import EvalLoader, TrainLoader, build_sources
from lip_resnet.data.decode import BadImage, check_scan, decode_exact

REFUSED = {
    "truncated": "truncated",
    "zero bytes": "the file is empty",
    "header only": "cannot decode",
    "scan damaged by zeros": "Corrupt JPEG data",
    "scan damaged by noise": "Corrupt JPEG data",
    "scan damaged by noise, bytes after the image": "Corrupt JPEG data",
    "text file": "PIL knows no such format",
    "decompression bomb (PNG, 30000x30000)": "exceeds limit",
    "decompression bomb (JPEG, 60000x60000)": "exceeds limit",
    "truncated PNG": "truncated",
    "unreadable (a link to nothing)": "cannot read this image: No such file",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("bad") / "class"
    folder.mkdir()
    return bad_images.outcomes(folder)


def whole() -> np.ndarray:
    return np.asarray(bad_images.photograph())


def expected(kind: str) -> tuple[np.ndarray, float]:
    """(pixels by another way than the reader's, mean difference that JPEG's loss may cause)."""
    if kind == "animated GIF":
        return np.broadcast_to(np.uint8([255, 0, 0]), (48, 64, 3)), 0
    if kind == "16-bit gray PNG":
        levels = np.arange(64 * 48).reshape(48, 64, 1) * 21 / 65535 * 255
        return np.repeat(np.floor(levels + 0.5), 3, axis=2).astype(np.uint8), 0
    if kind == "palette PNG":
        palette = bad_images.photograph().quantize(16)
        return np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)].astype(np.uint8), 0
    if kind == "gray JPEG":
        return np.repeat((whole() @ [0.299, 0.587, 0.114])[..., None], 3, axis=2), 1
    return whole(), 0 if "PNG" in kind else 3


def test_the_table_is_complete(outcomes):
    """Every kind is in it, and each is refused or decoded by all three readers alike."""
    for kind, ways in outcomes.items():
        assert set(ways) == {"exact", "fast", "validation"}
        for way, result in ways.items():
            assert isinstance(result, BadImage) == (kind in REFUSED), (kind, way)
    assert set(REFUSED) < set(outcomes)
    text = (ROOT / "results" / "bad_images.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == bad_images.rows(outcomes)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_path(outcomes, kind):
    for error in outcomes[kind].values():
        assert REFUSED[kind] in str(error)
        assert ".JPEG: cannot" in str(error)
        assert "\n" not in str(error)


def test_decoded_correctly(outcomes):
    for kind in outcomes.keys() - REFUSED.keys():
        pixels, loss = expected(kind)
        read = np.asarray(outcomes[kind]["validation"]).astype(float)
        assert read.shape == pixels.shape, kind  # an EXIF orientation turns nothing
        assert np.abs(read - pixels).mean() <= loss, kind
        small = Image.fromarray(pixels.astype(np.uint8)).resize((96, 96), Image.Resampling.BILINEAR)
        for way in ("exact", "fast"):
            difference = np.abs(outcomes[kind][way].numpy().astype(float) - np.asarray(small))
            assert difference.mean() <= loss + 0.5, (kind, way)


def test_extra_bytes_are_no_damage():
    data = bad_images.encode(bad_images.photograph(), quality=95)
    check_scan(data[:-2] + b"\0" * 50 + data[-2:], "x")
    check_scan(data + b"more", "x")
    check_scan(b"no JPEG", "x")  # PIL decodes or refuses it


def test_hiding_truncation_is_refused(monkeypatch):
    """A library may have set PIL's option that pads truncated files with gray."""
    data = bad_images.encode(bad_images.photograph())
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImage, match="LOAD_TRUNCATED_IMAGES"):
        decode_exact(data, "x")


@pytest.fixture
def damaged(image_folder, tmp_path) -> Path:
    """The shared folder with two training images and a validation image broken."""
    root = tmp_path / "damaged"
    shutil.copytree(image_folder, root)
    data = (root / "train" / "bee" / "bee_1.JPEG").read_bytes()
    (root / "train" / "bee" / "bee_1.JPEG").write_bytes(data[: len(data) // 2])
    (root / "train" / "cat" / "cat_2.JPEG").write_bytes(b"")
    (root / "val" / "ant" / "ant_0.JPEG").write_bytes(b"text")
    return root


def settings(root: Path, **changes: object) -> DataConfig:
    base = {"root": str(root), "batch_size": 23, "size": 32, "eval_size": 32, "eval_resize": 36, "workers": 0}
    return DataConfig(**{**base, **changes})


def train_loader(config: DataConfig) -> TrainLoader:
    return TrainLoader(build_sources(config, 3)[0], config, 1, 0)


@pytest.mark.parametrize("decode", ["exact", "fast"])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_make_the_batch_smaller(damaged, image_folder, capfd, tmp_path, workers, decode):
    config = settings(damaged, on_error="skip", workers=workers, decode=decode)
    loader = train_loader(config)
    loader.skipped_to = tmp_path / "skipped.txt"
    for times in (1, 2):
        (batch,) = loader.epoch(0)
        assert sorted(loader.skipped.values()) == [times, times]
    images, labels = batch.parts[0]
    assert (len(images), len(labels), batch.size) == (21, 21, 23)
    whole = train_loader(settings(image_folder, decode=decode))
    (clean,) = whole.epoch(0)
    (keys,) = whole.sampler
    paths = [whole.source.path(index) for _, index, _ in keys]
    kept = [row for row, path in enumerate(paths) if Path(path).name not in ("bee_1.JPEG", "cat_2.JPEG")]
    assert torch.equal(images, clean.parts[0][0][kept])  # the others are what they would have been
    assert torch.equal(labels, clean.parts[0][1][kept])
    listed = loader.skipped_to.read_text().splitlines()
    assert sorted(line.split(":")[0].rsplit("/")[-1] for line in listed) == ["bee_1.JPEG", "cat_2.JPEG"]
    assert capfd.readouterr().err.count("skipped: ") == 2  # each is shown once


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_always_stops(damaged, workers):
    config = settings(damaged, on_error="skip", workers=workers)
    with pytest.raises(InputError, match=r"ant_0\.JPEG: cannot decode"):
        list(EvalLoader(build_sources(config, 3)[1], config))


def test_a_part_without_two_good_images_stops(damaged):
    for path in (damaged / "train").glob("*/*.JPEG"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="0 images decode and 23 do not"):
        list(train_loader(settings(damaged, on_error="skip")).epoch(0))


def test_stopping_is_the_default(damaged):
    with pytest.raises(InputError, match=r"(bee_1|cat_2)\.JPEG: cannot decode"):
        list(train_loader(settings(damaged)).epoch(0))


class Deadly(Dataset):
    """Sample 5 kills the process that reads it."""

    classes = ("a",)

    def __len__(self) -> int:
        return 8

    def path(self, index: int) -> str:
        return f"image_{index}.JPEG"

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("RGB", (40, 40)), 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dead_worker_s_image_is_named(split):
    config = settings(Path("."), batch_size=4, eval_batch_size=4, workers=2)
    batches = TrainLoader(Deadly(), config, 1, 0).epoch(0) if split == "train" else EvalLoader(Deadly(), config)
    with pytest.raises(InputError, match=r"loader process \(pid \d+\).*while it read image_5\.JPEG"):
        list(batches)
