"""Tar shards in WebDataset layout give the samples of the folders they were made from."""

import tarfile
from pathlib import Path

import index_shards
import pytest
import torch
from helpers import small_config
from helpers.sets import add, add_shards, folder_config

from lip_resnet.config import InputError
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, describe_source
from lip_resnet.data.sources import index


@pytest.fixture(scope="module")
def shard_folder(image_folder, tmp_path_factory) -> Path:
    """The shared folder in shards."""
    root = tmp_path_factory.mktemp("shards")
    add_shards(image_folder, root)
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_batches_of_their_folders(image_folder, shard_folder, workers):
    folder = folder_config(image_folder, decode="fast")
    shards = folder_config(shard_folder, name="shards", decode="fast", workers=workers)
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


def test_an_image_s_name_is_shard_and_key(shard_folder):
    source = build_sources(folder_config(shard_folder, name="shards"), 3)[0]
    assert source.path(7) == f"{shard_folder}/train/0005.tar:./000007"
    described = describe_source(source)
    assert (described["images"], described["classes"]) == (23, 3)
    assert described["names"].startswith("sha256:")


def test_a_truncated_shard_names_the_image(shard_folder, tmp_path):
    (tmp_path / "train").mkdir()
    copy = tmp_path / "train" / "0000.tar"
    data = (shard_folder / "train" / "0000.tar").read_bytes()
    copy.write_bytes(data)
    settings = folder_config(tmp_path, name="shards")
    source = build_sources(settings, 1, ("train",))[0]  # shard 0 holds the first class alone
    copy.write_bytes(data[: len(data) // 2])  # truncated after it was indexed
    with pytest.raises(InputError, match=r"0000\.tar:\./00000\d: cannot read this image: \d+ bytes, the shard says"):
        list(TrainLoader(source, folder_config(tmp_path, name="shards", batch_size=5), 1, 0).epoch(0))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", b"x")], "'a' has no label a.cls"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], r"0\.tar: the label a\.cls holds 'cat'; it must be the class's number"),
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
        build_sources(folder_config(tmp_path, name="shards"), 2, ("train",))


@pytest.fixture
def scans(monkeypatch, tmp_path) -> list[str]:
    """The shards whose headers have been read, and a cache of this test's own."""
    seen, scan = [], index._scan
    monkeypatch.setattr(index, "_scan", lambda path: (seen.append(Path(path).name), scan(path))[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return seen


def test_shards_are_indexed_once(image_folder, tmp_path, scans):
    root = tmp_path / "set"
    root.mkdir()
    add_shards(image_folder, root)
    settings = folder_config(root, name="shards")
    first = build_sources(settings, 3)
    assert len(scans) == 5 + 3
    again = build_sources(settings, 3)
    assert len(scans) == 5 + 3
    for mine, other in zip(first, again, strict=True):
        assert mine.samples == other.samples
        assert torch.equal(mine._places, other._places)
    assert not (tmp_path / "cache").exists()
    (root / "train" / "0000.tar").touch()  # another modification time
    build_sources(settings, 3)
    assert len(scans) == 5 + 3 + 5
    (root / "train" / "0000.tar").unlink()
    assert len(build_sources(settings, 3)[0]) == 18
    for content in (b"", b"PK no index", first[1].root.joinpath("0000.tar").read_bytes()):
        (root / "val" / index.FILE).write_bytes(content)
        assert build_sources(settings, 3)[1].samples == first[1].samples


def test_an_index_that_cannot_be_written_beside_its_shards(image_folder, tmp_path, scans, monkeypatch):
    """A read-only disk: the index goes to the cache; without a cache either, the shards are read each time."""
    root = tmp_path / "set"
    root.mkdir()
    add_shards(image_folder, root)
    write = index.write_atomically

    def refuse(path: Path, content: object) -> None:
        if path.is_relative_to(root):
            raise InputError(f"{path}: cannot write: Read-only file system")
        write(path, content)

    monkeypatch.setattr(index, "write_atomically", refuse)
    for _ in range(2):
        source = build_sources(folder_config(root, name="shards"), 3)[0]
        assert len(scans) == 8
    assert len(list((tmp_path / "cache" / "lip_resnet").iterdir())) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert build_sources(folder_config(root, name="shards"), 3)[0].samples == source.samples
    assert len(scans) > 8


def test_indexing_by_hand(image_folder, tmp_path, monkeypatch, capsys):
    add_shards(image_folder, tmp_path)
    monkeypatch.setattr("sys.argv", ["index_shards.py", str(tmp_path / "train")])
    index_shards.main()
    assert capsys.readouterr().out == f"{tmp_path}/train/index.npz: 23 images\n"


def test_keys_that_exclude_each_other():
    for changes, words in (
        ({"name": "shards"}, "root is missing"),
        ({"classes": "x"}, "classes needs data.name: folder"),
        ({"name": "cifar10"}, "root is missing; data.name: cifar10 needs the directory of the set"),
        ({"download": True}, "download needs one of torchvision's sets; data.name is digits"),
        ({"label_column": "x"}, "label_column needs data.name: huggingface"),
        ({"name": "cifar11"}, "did you mean cifar10?"),
    ):
        with pytest.raises(InputError, match=words):
            small_config(**{f"data__{key}": value for key, value in changes.items()})
