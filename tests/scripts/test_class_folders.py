"""prepare_imagenet.py --kaggle and split_folder.py: class folders by links; nothing is moved or overwritten."""

import os
import shutil
from collections import Counter
from pathlib import Path

import prepare_imagenet
import pytest
import split_folder
from helpers.commands import call, refuse
from helpers.sets import folder_config
from prepare import kaggle, writing

import eval as eval_command
import train
from lip_resnet.config import InputError
from lip_resnet.data import build_sources
from lip_resnet.data.fingerprint import digest

WNIDS = ("n01440764", "n02105855", "n15075141")


def snapshot(root: Path) -> dict[str, object]:
    """Every file below a folder: its bytes, or the target of a link."""
    paths = [path for path in root.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes() for path in paths
    }


@pytest.fixture(scope="module")
def kaggle_folder(image_folder, tmp_path_factory) -> Path:
    """The shared folder as Kaggle has ImageNet: val is flat, and named by a table that is in no order."""
    root = tmp_path_factory.mktemp("kaggle")
    images, rows = root / "ILSVRC" / "Data" / "CLS-LOC", []
    for name, wnid in zip(("ant", "bee", "cat"), WNIDS, strict=True):
        shutil.copytree(image_folder / "train" / name, images / "train" / wnid)
    (images / "val").mkdir()
    for number, path in enumerate(sorted((image_folder / "val").glob("*/*")), 1):
        image = f"ILSVRC2012_val_{number:08}"
        wnid = WNIDS[("ant", "bee", "cat").index(path.parent.name)]
        shutil.copy(path, images / "val" / f"{image}.JPEG")
        rows.append(f"{image},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n")
    table = "".join(["ImageId,PredictionString\n", *rows[::-1]])
    (root / kaggle.KAGGLE_TABLE).write_text(table)
    return root


@pytest.fixture
def prepare(capsys, monkeypatch):
    return lambda *arguments: call(capsys, monkeypatch, prepare_imagenet, *arguments)


def pixels(source) -> list[tuple[str, bytes]]:
    return [(source.classes[label], source.read(index)) for index, label in enumerate(source.targets)]


def test_kaggle_to_class_folders(prepare, kaggle_folder, image_folder, tmp_path, monkeypatch):
    """Links alone, which training reads as it reads the folders; counts and the digest of the labels are checked."""
    before, output = snapshot(kaggle_folder), tmp_path / "new" / "imagenet"
    code, _, err = prepare("--kaggle", kaggle_folder, "--output", output)
    assert code == 2
    assert "train/ has 23 images, ImageNet 1,281,167; val/ has 11 images, ImageNet 50,000; train/ has 3 class" in err
    assert not output.exists()
    monkeypatch.setattr(kaggle, "_IMAGES", {"train": 23, "val": 11})
    monkeypatch.setattr(kaggle, "_CLASSES", 3)
    assert "the labels of" in prepare("--kaggle", kaggle_folder, "--output", output)[2]
    labels = [
        WNIDS[("ant", "bee", "cat").index(path.parent.name)] for path in sorted((image_folder / "val").glob("*/*"))
    ]
    lines = [f"ILSVRC2012_val_{number:08} {wnid}".encode() for number, wnid in enumerate(labels, 1)]
    monkeypatch.setattr(kaggle, "LABELS", digest(lines))
    for root in (kaggle_folder, kaggle_folder / "ILSVRC", kaggle_folder / "ILSVRC" / "Data" / "CLS-LOC"):
        code, out, err = prepare("--kaggle", root, "--output", output)
        assert (code, err) == (0, ""), err
    assert out == "val: 11 images, already done\ntrain: 23 images, already done\n"
    (output / "prepared.json").unlink()
    (output / "val" / WNIDS[0] / "ILSVRC2012_val_00000001.JPEG").unlink()
    assert prepare("--kaggle", kaggle_folder, "--output", output)[:2] == (
        0,
        "val: 11 images of 3 classes\ntrain: 23 images of 3 classes\n",
    )
    assert all(path.is_symlink() for path in output.glob("val/*/*"))
    assert (output / "train").is_symlink()
    for ours, theirs in zip(*(build_sources(folder_config(root), 3) for root in (output, image_folder)), strict=True):
        assert ours.classes == list(WNIDS)
        named = [(WNIDS[theirs.classes.index(name)], data) for name, data in pixels(theirs)]
        assert sorted(pixels(ours)) == sorted(named)
    assert snapshot(kaggle_folder) == before


def test_kaggle_to_shards(prepare, kaggle_folder, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_PER_SHARD", 5)
    code, _, err = prepare(
        *("--kaggle", kaggle_folder, "--output", tmp_path / "shards", "--format", "shards", "--any-archive")
    )
    assert code == 0, err
    for split, source in zip(
        ("train", "val"), build_sources(folder_config(tmp_path / "shards", name="shards"), 3), strict=True
    ):
        ours = sorted((source.classes[label], source.read(index)) for index, label in enumerate(source.targets))
        paths = (image_folder / split).glob("*/*")
        theirs = sorted((WNIDS[("ant", "bee", "cat").index(p.parent.name)], p.read_bytes()) for p in paths)
        assert ours == theirs


def test_wrong_kaggle_folders(capsys, monkeypatch, kaggle_folder, tmp_path):
    root, output = tmp_path / "kaggle", tmp_path / "out"
    shutil.copytree(kaggle_folder, root)
    table = root / kaggle.KAGGLE_TABLE
    whole = table.read_text()
    lines = whole.splitlines(keepends=True)

    def line(*arguments: object) -> str:
        arguments = arguments or ("--kaggle", root, "--output", output, "--any-archive")
        return refuse(capsys, monkeypatch, prepare_imagenet, *arguments)

    for content, words in (
        (whole.replace("ImageId", "image"), "its columns are image,PredictionString; they must be ImageId,"),
        (lines[0], "11 images of"),
        ("".join(lines[:-1]), "1 images of"),
        (whole + "ILSVRC2012_val_00000099,n01440764 1 1 1 1\n", "are not in"),
        (whole + "ILSVRC2012_val_00000012\n", "line 13: not an image and its one class"),
        (whole + f"{lines[1]}", "line 13: not an image and its one class"),
        (whole.replace(f"{WNIDS[0]} 1 2", "n00000001 1 2", 1), "line"),
        (whole.replace(WNIDS[2], "n00000001"), "names classes without a folder in"),
        (whole.replace("ILSVRC2012_val_00000003", "../../evil"), "not an image and its one class: '../../evil"),
    ):
        table.write_text(content)
        assert words in line(), words
    table.write_bytes(b"\xff\xfe" + whole.encode())
    assert "cannot read" in line()
    table.unlink()
    assert f"there is no {kaggle.KAGGLE_TABLE}, which names the class of every validation image" in line()
    table.write_text(whole)
    assert "is not a folder" in line("--kaggle", root / "none", "--output", output)
    assert "unpack" in line("--kaggle", tmp_path / "imagenet.zip", "--output", output)
    assert "has no ILSVRC/Data/CLS-LOC/val" in line("--kaggle", tmp_path, "--output", output)
    assert "is in" in line("--kaggle", root, "--output", root / "ILSVRC/Data/CLS-LOC/val/sorted", "--any-archive")
    assert "give --archives DIR or --kaggle DIR" in line("--kaggle", root, "--archives", root, "--output", output)
    assert "give --archives DIR or --kaggle DIR" in line("--kaggle", root)
    assert not output.exists()
    (output / "val" / WNIDS[0]).mkdir(parents=True)
    mine = output / "val" / WNIDS[0] / "ILSVRC2012_val_00000001.JPEG"
    mine.write_text("mine")
    assert f"{mine} exists, and is not a link" in line()
    assert mine.read_text() == "mine"


def test_train_and_eval_name_the_command(capsys, monkeypatch, kaggle_folder, tmp_path):
    """Kaggle's folder itself, its CLS-LOC with the flat val/, and val/ alone."""
    recipe, images = tmp_path / "recipe.yaml", kaggle_folder / "ILSVRC" / "Data" / "CLS-LOC"
    recipe.write_text(
        "model: {name: test_resnet, num_classes: 3}\ndata: {batch_size: 4}\noptim: {lr: 0.1}\ntrain: {epochs: 1}\n"
    )
    command = f"python scripts/prepare_imagenet.py --kaggle {kaggle_folder} --output DIR"
    for root in (kaggle_folder, images):
        arguments = ("--config", recipe, "--output", tmp_path / "run", f"data.root={root}")
        assert command in refuse(capsys, monkeypatch, train, *arguments)
    for data in (kaggle_folder, images, images / "val"):
        arguments = ("--pretrained", "--model", "resnet18", "--data", data)
        assert command in refuse(capsys, monkeypatch, eval_command, *arguments)


def test_a_folder_of_photographs_is_split(capsys, monkeypatch, image_folder, tmp_path):
    """Every image once, by links; shares by hand; another seed, another choice; a new class changes no other."""
    photos = tmp_path / "photos"
    shutil.copytree(image_folder / "train", photos)
    (photos / "cat" / "more").mkdir()
    shutil.copy(photos / "ant" / "ant_0.JPEG", photos / "cat" / "more" / "ant_0.JPEG")
    (photos / "cat" / "notes.txt").write_text("left out")
    before = snapshot(photos)

    def split(name: str, *flags: object) -> dict[str, set[str]]:
        code, _, err = call(capsys, monkeypatch, split_folder, photos, "--output", tmp_path / name, *flags)
        assert (code, "1 file left out" in err) == (0, True), err
        names = {each: set(snapshot(tmp_path / name / each)) for each in ("train", "val")}
        assert sorted([*names["train"], *names["val"]]) == sorted(before.keys() - {"cat/notes.txt"})
        return names

    first = split("first", "--val", 0.25)
    # 8, 8 and 7 + 1 images: a quarter of each is 2.
    assert Counter(name.split("/")[0] for name in first["val"]) == {"ant": 2, "bee": 2, "cat": 2}
    train_source, val_source = build_sources(folder_config(tmp_path / "first"), 3)
    assert (len(train_source), len(val_source), train_source.classes) == (18, 6, ["ant", "bee", "cat"])
    for path, _ in train_source.samples + val_source.samples:
        assert Path(path).is_symlink()
        assert Path(path).read_bytes() == before[path.split("/first/")[1].partition("/")[2]]
    assert split("again", "--val", 0.25) == first
    assert split("other", "--val", 0.25, "--seed", 1) != first
    assert snapshot(photos) == before
    (photos / "ape").mkdir()
    shutil.copy(photos / "ant" / "ant_0.JPEG", photos / "ape" / "only.JPEG")
    before = snapshot(photos)
    more = split("more", "--val", 0.25)
    assert more == {"train": first["train"] | {"ape/only.JPEG"}, "val": first["val"]}
    # The nearest whole number, but one image at least and not all of them.
    assert Counter(name.split("/")[0] for name in split("few", "--val", 0.01)["val"]) == dict.fromkeys(
        ("ant", "bee", "cat"), 1
    )
    assert Counter(name.split("/")[0] for name in split("many", "--val", 0.99)["train"])["cat"] == 1


def test_what_cannot_be_split(capsys, monkeypatch, image_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "single" / "ant").mkdir(parents=True)
    shutil.copy(image_folder / "val" / "ant" / "ant_0.JPEG", tmp_path / "single" / "ant")
    photos, new = image_folder / "val", ("--output", tmp_path / "new")
    for arguments, words in (
        ((photos, "--output", tmp_path / "full"), "full exists; choose another"),
        ((photos, *new, "--val", 1), "--val is 1; it must be a share between 0 and 1"),
        ((photos, *new, "--seed", -1), "--seed is -1; it must be 0 or more"),
        ((tmp_path / "none", *new), "is not a folder"),
        ((tmp_path / "empty", *new), "holds no class folders"),
        ((image_folder, *new), "is split already: it holds train/, val/"),
        ((tmp_path / "single", *new), "no class has two images"),
        ((photos, "--output", photos / "new"), "where it would be a class"),
        ((photos,), "--output"),
    ):
        assert words in refuse(capsys, monkeypatch, split_folder, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "single"]
    with pytest.raises(InputError, match="cannot write"):
        split_folder.write_links(
            split_folder.open_photographs(photos), photos, set(), tmp_path / "full" / "mine" / "x", {}
        )
