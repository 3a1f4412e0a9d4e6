"""Files to batches: which images, in which order, with which pixels, and which input is refused."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import small_config
from helpers.sets import as_rank, folder_config
from PIL import Image
from torchvision.datasets import ImageFolder

from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, normalize
from lip_resnet.data.sources.embedded import Digits


def test_digits_split_is_fixed_stratified_and_complete():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1442, 355)
    for label in range(10):
        share = val.targets.count(label) / (val.targets.count(label) + train.targets.count(label))
        assert share == pytest.approx(0.2, abs=0.005)
    image, label = val[0]
    assert (image.mode, image.size, label) == ("RGB", (8, 8), 5)
    assert train.pixels.max() == 255
    seen = {pixels.tobytes() for pixels in train.pixels} & {pixels.tobytes() for pixels in val.pixels}
    assert not seen  # no image is in both


def test_evaluation_is_the_reference_s_protocol(image_folder):
    """Resize the shorter side with PIL, crop the centre: by hand, pixel for pixel."""
    config = folder_config(image_folder)
    source = build_sources(config, 3, ("val",))[0]
    images = torch.cat([images for images, _ in EvalLoader(source, config)])
    for index, (path, _) in enumerate(source.samples):
        image = Image.open(path).convert("RGB")
        width, height = image.size
        scale = 36 / min(width, height)
        image = image.resize((max(36, int(width * scale)), max(36, int(height * scale))), Image.Resampling.BILINEAR)
        left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
        crop = image.crop((left, top, left + 32, top + 32))
        assert bytes(images[index].permute(1, 2, 0).flatten().tolist()) == crop.tobytes()


def test_labels_are_imagefolder_s(image_folder):
    ours = build_sources(folder_config(image_folder), 3)
    for source, split in zip(ours, ("train", "val"), strict=True):
        theirs = ImageFolder(str(image_folder / split))
        assert list(source.classes) == theirs.classes
        assert source.samples == theirs.samples


def epoch_of(config: DataConfig, epoch: int, first_step: int = 0, accumulate: int = 1, seed: int = 0) -> list:
    source = build_sources(config, 3)[0]
    loader = TrainLoader(source, config, accumulate, seed)
    return list(loader.epoch(epoch, first_step))


def pixels_of(batches: list) -> torch.Tensor:
    return torch.cat([images for batch in batches for images, _ in batch.parts])


def test_pixels_are_a_function_of_seed_and_epoch(image_folder):
    config = folder_config(image_folder)
    first = pixels_of(epoch_of(config, 0))
    assert first.dtype == torch.uint8
    assert first.shape == (23, 3, 32, 32)
    assert torch.equal(first, pixels_of(epoch_of(config, 0)))
    assert not torch.equal(first, pixels_of(epoch_of(config, 1)))
    assert not torch.equal(first, pixels_of(epoch_of(config, 0, seed=1)))


def test_workers_do_not_change_pixels(image_folder):
    alone = pixels_of(epoch_of(folder_config(image_folder), 3))
    loader = TrainLoader(
        build_sources(folder_config(image_folder), 3)[0], folder_config(image_folder, workers=2), accumulate=1, seed=0
    )
    list(loader.epoch(0))  # the workers persist from one epoch to the next
    assert torch.equal(alone, pixels_of(list(loader.epoch(3))))


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_do_not_depend_on_processes(image_folder, monkeypatch, world):
    config = folder_config(image_folder, batch_size=12)  # 23 images: the last batch has 11
    whole = epoch_of(config, 1)
    assert [batch.size for batch in whole] == [12, 11]
    shares = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        shares.append(epoch_of(config, 1))
    for step, batch in enumerate(whole):
        joined = torch.cat([share[step].parts[0][0] for share in shares])
        assert torch.equal(joined, batch.parts[0][0])
        assert {share[step].size for share in shares} == {batch.size}


def test_accumulated_parts_join_to_the_batch(image_folder):
    config = folder_config(image_folder, batch_size=6, last_batch="drop")
    whole, parts = epoch_of(config, 0), epoch_of(config, 0, accumulate=3)
    assert [len(batch.parts) for batch in parts] == [3, 3, 3]
    assert torch.equal(pixels_of(whole), pixels_of(parts))


def test_an_epoch_can_start_in_the_middle(image_folder):
    config = folder_config(image_folder)
    assert torch.equal(pixels_of(epoch_of(config, 2)[3:]), pixels_of(epoch_of(config, 2, first_step=3)))


def test_every_training_image_once_an_epoch(image_folder):
    source = build_sources(folder_config(image_folder), 3)[0]
    loader = TrainLoader(source, folder_config(image_folder), 1, 0)
    for epoch in range(2):
        loader.sampler.epoch = epoch
        keys = [key for part in loader.sampler for key in part]
        assert sorted(keys) == [(epoch, index, 0) for index in range(23)]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_reads_every_image_once(image_folder, monkeypatch, world):
    config = folder_config(image_folder, eval_batch_size=2)
    source = build_sources(config, 3, ("val",))[0]
    labels = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        labels += [label for _, batch in EvalLoader(source, config) for label in batch.tolist()]
    assert sorted(labels) == sorted(source.targets)


def test_normalize_by_hand():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert normalize(images, mean, std).flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_selection_of_classes(image_folder, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("cat\nant\n")
    train, val = build_sources(folder_config(image_folder, classes=str(names)), 2)
    assert train.classes == ["ant", "cat"]
    names.write_bytes(b"\xef\xbb\xbfcat\r\n\r\nant\r\n")  # an editor's byte order mark; order and blank lines are free
    assert build_sources(folder_config(image_folder, classes=str(names)), 2)[0].classes == ["ant", "cat"]
    assert {Path(path).parent.name for path, _ in train.samples + val.samples} == {"ant", "cat"}


def test_selection_of_images(image_folder, tmp_path):
    names = tmp_path / "tenth.txt"
    names.write_text("ant/ant_0.JPEG\nbee_4.JPEG\n")
    train, val = build_sources(folder_config(image_folder, classes=str(names)), 2)
    assert [Path(path).name for path, _ in train.samples] == ["ant_0.JPEG", "bee_4.JPEG"]
    assert len(val) == 8  # all of ant and bee


def refusal(config: DataConfig, classes: int = 3) -> str:
    with pytest.raises(InputError) as caught:
        build_sources(config, classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_folders(image_folder, tmp_path):
    assert "is not a directory" in refusal(folder_config(tmp_path / "none"))
    (tmp_path / "train" / "ant").mkdir(parents=True)
    assert "has no val/" in refusal(folder_config(tmp_path))
    (tmp_path / "val").mkdir()
    assert "val holds no class folders" in refusal(folder_config(tmp_path))
    (tmp_path / "val" / "bee").mkdir()
    line = "train/ and val/ differ: 1 only in train/, the first is 'ant'; 1 only in val/, the first is 'bee'"
    assert line in refusal(folder_config(tmp_path))
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "ant")
    assert "1 of 1 class folders of" in refusal(folder_config(tmp_path), 1)  # no image in it
    shutil.rmtree(tmp_path / "train" / "ant")
    assert "holds no class folders" in refusal(folder_config(tmp_path))
    assert "model.num_classes is 5, but the data has 3" in refusal(folder_config(image_folder), 5)


def test_bad_selections(image_folder, tmp_path):
    names = tmp_path / "classes.txt"
    for text, words in (("", "names no class"), ("dog\n", "'dog'"), ("ant_99.JPEG\nant_0.JPEG\n", "lists 2 images, 1")):
        names.write_text(text)
        assert words in refusal(folder_config(image_folder, classes=str(names)), 1)
    assert "cannot read" in refusal(folder_config(image_folder, classes=str(tmp_path / "none")))
    names.write_bytes(b"ant\n\xff\n")
    assert "byte 4 is not UTF-8" in refusal(folder_config(image_folder, classes=str(names)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_named(image_folder, tmp_path, workers):
    root = tmp_path / "copy"
    shutil.copytree(image_folder, root)
    (root / "train" / "bee" / "bee_1.JPEG").write_bytes(b"no image")
    config = folder_config(root, workers=workers)
    loader = TrainLoader(build_sources(config, 3)[0], config, 1, 0)
    with pytest.raises(InputError, match=r"bee_1\.JPEG: cannot decode") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_bad_batches(image_folder, monkeypatch):
    source = build_sources(folder_config(image_folder), 3)[0]
    with pytest.raises(InputError, match=r"does not divide by 1 processes x optim.accumulate 3"):
        TrainLoader(source, folder_config(image_folder), 3, 0)
    with pytest.raises(InputError, match="larger than the 23 training images"):
        TrainLoader(source, folder_config(image_folder, batch_size=32, last_batch="drop"), 1, 0)
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(InputError, match="last batch has 1 images for 2 parts"):
        TrainLoader(source, folder_config(image_folder, batch_size=2), 1, 0)


def test_bad_rand_augment():
    config = small_config(data__rand_augment="nonsense").data
    with pytest.raises(InputError, match="rand_augment"):
        TrainLoader(Digits(train=True), config, 1, 0)


def test_selection_goes_by_class_and_name(tmp_path):
    """Files of the same name in two classes are two images, and a file that is not there is not replaced by another."""
    for name in ("train/ant/1.png", "train/bee/1.png", "val/ant/1.png", "val/bee/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    names = tmp_path / "names.txt"
    config = folder_config(tmp_path, classes=str(names))
    names.write_text("ant/1.png\nbee/1.png\n")
    assert len(build_sources(config, 2)[0]) == 2
    names.write_text("ant/1.png\nbee/7.png\n")
    assert "lists 2 images, 1 are in" in refusal(config, 2)


def test_more_workers_than_cores_are_the_users_choice(image_folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    config = folder_config(image_folder, workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = EvalLoader(build_sources(config, 3)[1], config)
        assert sum(len(labels) for _, labels in loader) == 11
