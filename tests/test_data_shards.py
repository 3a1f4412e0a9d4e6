"""Tar shards in WebDataset layout are the folders they were made from, sample for sample."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import small_config

from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, describe_source


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def shard_folder(image_folder, tmp_path_factory) -> Path:
    """The shared folder in shards of five, labels before or after their image."""
    root = tmp_path_factory.mktemp("shards")
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
    return root


def config(root: Path, **changes: object) -> DataConfig:
    settings = {"root": str(root), "batch_size": 4, "size": 32, "eval_size": 32, "eval_resize": 36, "workers": 0}
    return DataConfig(**{**settings, **changes})


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_their_folders(image_folder, shard_folder, workers):
    folder, shards = (
        config(image_folder, decode="fast"),
        config(shard_folder, name="shards", decode="fast", workers=workers),
    )
    ours, theirs = build_sources(shards, 3), build_sources(folder, 3)
    assert [source.classes for source in ours] == [source.classes for source in theirs]
    assert [source.targets for source in ours] == [source.targets for source in theirs]
    epochs = [
        list(TrainLoader(source[0], config, 1, 0).epoch(2)) for source, config in ((ours, shards), (theirs, folder))
    ]
    for mine, other in zip(*epochs, strict=True):
        assert torch.equal(mine.parts[0][0], other.parts[0][0])
        assert torch.equal(mine.parts[0][1], other.parts[0][1])
    for mine, other in zip(EvalLoader(ours[1], shards), EvalLoader(theirs[1], folder), strict=True):
        assert torch.equal(mine[0], other[0])


def test_an_image_s_name_is_its_place(shard_folder):
    source = build_sources(config(shard_folder, name="shards"), 3)[0]
    assert source.path(7) == f"{shard_folder}/train/0005.tar:./000007"
    described = describe_source(source)
    assert (described["images"], described["classes"]) == (23, 3)
    assert described["names"].startswith("sha256:")


def test_a_cut_shard_names_the_image(shard_folder, tmp_path):
    (tmp_path / "train").mkdir()
    copy = tmp_path / "train" / "0000.tar"
    data = (shard_folder / "train" / "0000.tar").read_bytes()
    copy.write_bytes(data)
    settings = config(tmp_path, name="shards")
    source = build_sources(settings, 1, ("train",))[0]  # shard 0 holds the first class alone
    copy.write_bytes(data[: len(data) // 2])  # cut after it was indexed
    with pytest.raises(InputError, match=r"0000\.tar:\./00000\d: cannot read this image: \d+ bytes, the shard says"):
        list(TrainLoader(source, config(tmp_path, name="shards", batch_size=5), 1, 0).epoch(0))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", b"x")], "'a' has no label a.cls"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "'a' has no label a.cls"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"0")], "two images have the key 'a'"),
        ([("a.txt", b"x")], "holds no image"),
        ([("a.jpg", b"x"), ("a.cls", b"3")], "2 names, but the shards hold label 3"),
        (None, "not a whole tar archive"),
        ([], "holds no"),
    ],
)
def test_bad_shards(tmp_path, members, words):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "classes.txt").write_text("a\nb\n")
    if members is None:
        (tmp_path / "train" / "0.tar").write_bytes(b"no tar" * 500)
    elif members:
        with tarfile.open(tmp_path / "train" / "0.tar", "w") as archive:
            for name, data in members:
                add(archive, name, data)
    with pytest.raises(InputError, match=words):
        build_sources(config(tmp_path, name="shards"), 2, ("train",))


def test_keys_that_do_not_go_together():
    for changes, words in (
        ({"name": "shards"}, "root is missing"),
        ({"classes": "x"}, "classes needs data.name: folder"),
    ):
        with pytest.raises(InputError, match=words):
            small_config(**{f"data__{key}": value for key, value in changes.items()})
