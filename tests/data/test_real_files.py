"""What real folders and tables hold beside images, and how classes are named: read, counted, or refused in one line."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import check_dataset
import datasets
import pytest
from helpers.commands import call
from helpers.sets import as_rank, encoded, folder_config, refusal, shards, table
from PIL import Image

from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import TrainLoader, build_sources, describe_source
from lip_resnet.data.decode import readable_suffixes
from lip_resnet.data.sources.folder import Folder

LONG = (60000, 1)


LATIN = os.fsdecode(b"caf\xe9.JPEG")


def test_what_can_be_decoded_is_read_and_the_rest_is_counted(root, capsys):
    """In folders and shards alike; a plugin of PIL's adds its format."""
    unread = {
        "notes.txt": b"x",
        "photo.heic": b"x",
        "cat.JPEG.bak": encoded("JPEG"),
        "features.h5": b"x",
        "a.eps": b"x",
    }
    read = {"a.jfif": encoded("JPEG"), "b.GIF": encoded("GIF"), "c.jp2": encoded("JPEG2000"), "d.tga": encoded("TGA")}
    if ".avif" in readable_suffixes():
        read["e.avif"] = encoded("AVIF")
    for name, data in (unread | read).items():
        (root / "train" / "ant" / name).write_bytes(data)
    (root / "train" / "loose.JPEG").write_bytes(encoded("JPEG"))
    before = len(list((root / "train").glob("*/*_*.JPEG")))
    source = build_sources(folder_config(root), 3)[0]
    assert len(source) == before + len(read)
    added = [source[i][0] for i, (path, _) in enumerate(source.samples) if Path(path).name in read]
    assert [image.size for image in added] == [(40, 40)] * len(read)
    names = sorted([*(f"ant/{name}" for name in unread), "loose.JPEG"])
    assert describe_source(source)["left_out"] == {"files": 6, "first": names[:3]}
    line = f"{root}/train: 6 files left out (not an image that PIL decodes): {', '.join(names[:3])}, ...\n"
    assert capsys.readouterr().err == f"note: {line}"
    assert "left_out" not in describe_source(build_sources(folder_config(root), 3, ("val",))[0])

    packed = [(f"{number}/{name}", data) for number, (name, data) in enumerate((unread | read).items())]
    labels = [(name.partition(".")[0] + ".cls", b"1") for name, data in packed if name.partition("/")[2] in read]
    config = shards(root / "packed", *packed, *labels, ("alone.cls", b"2"))
    for _ in range(2):  # the second from the stored index
        source = build_sources(config, 2, ("train",))[0]
        assert len(source) == 1 + len(read)
        assert describe_source(source)["left_out"] == {
            "files": 6,
            "first": ["0.tar:0/notes.txt", "0.tar:1/photo.heic", "0.tar:2/cat.JPEG.bak"],
        }
    assert "packed/train: 6 files left out" in capsys.readouterr().err


def test_plugins_of_pil_count(monkeypatch):
    assert not readable_suffixes() & {".heic", ".h5", ".eps", ".pdf", ".mpg"}
    assert readable_suffixes() >= {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".mpo"}
    monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")
    assert ".heic" in readable_suffixes()


@pytest.mark.parametrize("split", ["train", "val"])
def test_hidden_files_and_folders_are_ignored(root, split):
    plain = [describe_source(source) for source in build_sources(folder_config(root), 3)]
    for name in (".ipynb_checkpoints/ant_0.JPEG", "ant/.ipynb_checkpoints/ant_0.JPEG", "ant/._ant_0.JPEG", ".x.txt"):
        (root / split / name).parent.mkdir(exist_ok=True)
        (root / split / name).write_bytes(encoded("JPEG"))
    assert [describe_source(source) for source in build_sources(folder_config(root), 3)] == plain
    hidden = [("./.x/1.jpg", b"x"), ("._good.jpg", b"x"), (".x/1.cls", b"x"), ("a/._1.cls", b"")]
    source = build_sources(shards(root / "packed", *hidden), 1, ("train",))[0]
    assert (len(source), source.left_out.files) == (1, 0)


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../..", "/", "up"])
def test_a_link_that_loops(root, target):
    """Also to a folder far above, which would be walked whole first."""
    (root / "train" / "ant" / "up").symlink_to(target)
    assert f"{root}/train/ant/up" in (line := refusal(folder_config(root)))
    assert "a loop; remove it" in line


def test_links_that_do_not_loop(root):
    """A class that is a link, and a link to nothing, which is refused where it is read."""
    (root / "train" / "bee").rename(root / "elsewhere")
    (root / "train" / "bee").symlink_to("../elsewhere")
    (root / "train" / "cat" / "z.JPEG").symlink_to("nothing")
    os.mkfifo(root / "train" / "cat" / "pipe.JPEG")
    source = build_sources(folder_config(root), 3)[0]
    assert (len(source), source.left_out.first) == (24, ("cat/pipe.JPEG",))
    with pytest.raises(InputError, match=r"z\.JPEG: cannot read this image: No such file"):
        source[23]


def test_order_is_imagefolder_s_below_class_folders(root):
    from torchvision.datasets import ImageFolder

    for name in ("a/c/1.png", "a-b/1.png", "a/1.png", "a/B.png"):
        (root / "train" / "ant" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / "ant" / name).write_bytes(encoded("PNG"))
    assert build_sources(folder_config(root), 3)[0].samples == ImageFolder(str(root / "train")).samples


def test_classes_of_folders(root, capsys):
    """A class may lack validation images; one that training does not have is refused."""
    shutil.rmtree(root / "val" / "bee")
    train, val = build_sources(folder_config(root), 3)
    assert "warning: val has no images of 1 of 3 classes, the first is 'bee'" in capsys.readouterr().err
    assert val.classes == train.classes == ["ant", "bee", "cat"]
    assert sorted({label for _, label in val.samples}) == [0, 2]
    assert "num_classes is 3, but the data has 2" in refusal(folder_config(root), 3, ("val",))
    (named,) = build_sources(folder_config(root), 3, ("val",), names=["ant", "bee", "cat"])  # a run's own names
    assert named.samples == val.samples
    (other,) = build_sources(folder_config(root), 2, ("val",), names=["ant", "bug"])  # no names of these folders
    assert other.classes == ["ant", "cat"]
    (root / "val" / "koala").mkdir()
    assert "differ: 1 only in train/, the first is 'bee'; 1 only in val/, the first is 'koala'" in refusal(
        folder_config(root), 3, ("train", "val")
    )
    for number in range(600):
        (root / "train" / f"n{number:08}").mkdir()
    line = refusal(folder_config(root), 603, ("train",))
    assert "600 of 603 class folders of" in line
    assert "hold no image, the first is 'n00000000'" in line


def test_classes_of_shards(tmp_path, capsys):
    """The rule of folders: without names the labels are numbers, of training, or of the network in an evaluation."""
    config = shards(tmp_path, ("b.jpg", b"x"), ("b.cls", b"2"))
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    both = ("train", "val")
    assert [source.classes for source in build_sources(config, 3, both)] == [["0", "1", "2"]] * 2
    assert "warning: train has no images of 1 of 3 classes, the first is '1'" in capsys.readouterr().err
    assert build_sources(config, 5, ("val",))[0].classes == list("01234")  # the top class has no validation image
    assert "model.num_classes is 5, but the data has 3 classes" in refusal(config, 5, both)
    assert "train/0.tar:b: its label is 2; 2 classes have the labels 0 to 1" in refusal(config, 2, both)
    (tmp_path / "train" / "classes.txt").write_text("x\ny\nz\n")
    assert [source.classes for source in build_sources(config, 3, both)] == [["x", "y", "z"]] * 2
    (tmp_path / "val" / "classes.txt").write_text("x\nz\ny\n")
    assert "class 1 is 'y' in train and 'z' in val" in refusal(config, 3, both)
    (tmp_path / "val" / "classes.txt").write_text("x\ny\n")
    assert "val/classes.txt: 2 names, but the shards hold label 2, the first in" in refusal(config, 3, both)


def test_classes_of_tables(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = sorted((image_folder / "train").glob("*/*"))[::4]  # of all three classes
    number, both = datasets.Value("int64"), ("train", "val")

    def tables(name: str, train: list[int], val: list[int]) -> DataConfig:
        (tmp_path / name).mkdir()
        for split, labels in (("train", train), ("validation", val)):
            rows = table(paths[: len(labels)], kind=number).remove_columns("label").add_column("label", labels)
            rows.to_parquet(tmp_path / name / f"{split}.parquet")
        return folder_config(tmp_path / name, name="huggingface")

    top = tables("top", [0, 1, 2], [0, 1])
    assert [source.classes for source in build_sources(top, 3)] == [["0", "1", "2"]] * 2
    assert "warning: val has no images of 1 of 3 classes, the first is '2'" in capsys.readouterr().err
    assert build_sources(top, 3, ("val",))[0].classes == ["0", "1", "2"]
    more = tables("more", [0, 1, 2], [0, 7])
    assert "more/validation/1: its label is 7; 3 classes have the labels 0 to 2" in refusal(more, 3, both)
    for name, label in (("huge", 10**9), ("wide", 10**12), ("negative", -1)):
        line = refusal(tables(name, [0, 1, label], [0]), 3, both)
        assert f"{label}" in line
        assert "train/2: its label" in line or "row 2 has" in line
    assert "for every image; row 1 has " in refusal(tables("missing", [0, None, 2], [0]), 3, both)


def test_flat_and_misnamed_splits(root, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(root / "train", flat / "train")
    (flat / "validation").mkdir()
    assert f"{flat} has no val/; it must hold train/ and val/; rename or link validation/" in refusal(
        folder_config(flat), 3, ("train", "val")
    )
    (flat / "validation").rename(flat / "Val")
    assert "has no val/; it must hold train/ and val/; rename or link Val/" in refusal(
        folder_config(flat), 3, ("train", "val")
    )
    (flat / "Val").rename(flat / "val")
    (flat / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encoded("JPEG"))
    words = "val holds no class folders; its images must be in class folders: scripts/prepare_imagenet.py sorts them"
    line = refusal(folder_config(flat), 3, ("train", "val"))
    assert line.endswith(f"{words}, Kaggle's by python scripts/prepare_imagenet.py --kaggle KAGGLE --output DIR")
    (flat / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 1 1 1\n")
    assert f"prepare_imagenet.py --kaggle {flat} --output DIR" in refusal(folder_config(flat), 3, ("train", "val"))


@pytest.mark.parametrize(
    "text",
    ["ant/\ncat", "./ant\n./cat/", "\ufeffant\r\n\ufeffcat", "# two\n ant \n\n//cat".replace("//", ""), "ant//\ncat/."],
)
def test_ways_to_write_a_class(root, tmp_path, text):
    (tmp_path / "names.txt").write_bytes(text.encode())
    train, val = build_sources(folder_config(root, classes=str(tmp_path / "names.txt")), 2)
    assert train.classes == val.classes == ["ant", "cat"]


def test_ways_to_write_an_image(root, tmp_path):
    names = tmp_path / "names.txt"
    (root / "train" / "bee" / LATIN).write_bytes(encoded("JPEG"))
    (root / "train" / "ant" / "x.jfif").write_bytes(encoded("JPEG"))
    listed = [b"\xef\xbb\xbf./ant/ant_0.JPEG", b"ant//x.jfif", b"bee/caf\xe9.JPEG", b"bee_1.JPEG"]
    names.write_bytes(b"\n".join(listed))
    train = build_sources(folder_config(root, classes=str(names)), 2)[0]
    assert [os.path.relpath(path, root / "train") for path, _ in train.samples] == [
        "ant/ant_0.JPEG",
        "ant/x.jfif",
        "bee/bee_1.JPEG",
        f"bee/{LATIN}",
    ]
    names.write_text("ant/ant_0.JPEG\nant/ant_1.JPEG\n")
    assert "lists 2 images, 1 are in" in (line := refusal(folder_config(root, classes=str(names)), 1, ("train", "val")))
    assert line.endswith("the first that is not is 'ant/ant_1.JPEG'")


@pytest.mark.parametrize("workers", [0, 1])
def test_names_that_are_not_utf8(root, tmp_path, capfd, workers):
    """Skipped, listed and refused under their bytes, on any terminal."""
    for old, new in (("cat_2", LATIN), ("cat_5", "two\nlines.JPEG")):
        (root / "train" / "cat" / f"{old}.JPEG").unlink()
        (root / "train" / "cat" / new).write_bytes(b"no image")
    config = folder_config(root, on_error="skip", batch_size=23, workers=workers)
    loader = TrainLoader(build_sources(config, 3)[0], config, 1, 0)
    loader.skipped_to = tmp_path / "skipped.txt"
    assert [batch.skipped for batch in loader.epoch(0)] == [2]
    listed = sorted(loader.skipped_to.read_text(encoding="utf-8").splitlines())
    assert [line.removeprefix(f"{root}/train/cat/").partition(":")[0] for line in listed] == [
        r"caf\udce9.JPEG",
        r"two\nlines.JPEG",
    ]
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_check_dataset_on_a_strict_terminal(root, monkeypatch, capsys):
    (root / "val" / "cat" / LATIN).write_bytes(b"no image")
    (root / "val" / "cat" / os.fsdecode(b"\xe9.txt")).write_bytes(b"")
    (root / "train" / "ant" / "é.JPEG").write_bytes(b"")
    output = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        code, _, err = call(capsys, patch, check_dataset, root, "--workers", 1)
    output.seek(0)
    printed = output.read()
    assert (code, "2 bad files" in err) == (2, True)
    assert r"bad: " in printed
    assert r"val/cat/caf\udce9.JPEG: cannot decode" in printed
    assert r"train/ant/\xe9.JPEG: cannot decode" in printed
    assert r"val: 1 file left out (not an image that PIL decodes): cat/\\xe9.txt".replace("\\\\", "\\") in printed


def test_a_source_of_names_that_are_not_utf8_is_json(root):
    (root / "train" / "ant" / os.fsdecode(b"\xe9.txt")).write_bytes(b"")
    source = build_sources(folder_config(root), 3)[0]
    assert json.loads(json.dumps(describe_source(source)))["left_out"]["first"] == [r"ant/\xe9.txt"]
    source.left_out.first[0].encode()


def test_check_dataset_finds_what_a_run_would_refuse(root, monkeypatch, capsys):
    """Before a run: each in one line, from the same code."""

    def checked() -> tuple[int, str, str]:
        return call(capsys, monkeypatch, check_dataset, root, "--workers", 1)

    (root / "val" / "ant" / "long.png").write_bytes(encoded("PNG", LONG))
    code, out, _ = checked()
    assert (code, "bad: " in out, "long.png: cannot load this image: its 60000x1 pixels" in out) == (2, True, True)
    (root / "val" / "ant" / "long.png").unlink()
    (root / "train" / "ant" / "up").symlink_to("..")
    code, out, line = checked()
    assert (code, out, len(line.splitlines()), "a loop" in line) == (2, "", 1, True)
    (root / "train" / "ant" / "up").unlink()
    (root / "val" / "bee").rename(root / "val" / "koala")
    code, out, line = checked()
    assert (code, out, len(line.splitlines()), "only in val/, the first is 'koala'" in line) == (2, "", 1, True)
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "val")
    shards(root, ("b.jpg", encoded("JPEG")), ("b.cls", b"1000000000"))
    code, out, line = checked()
    assert (code, out, len(line.splitlines()), "0.tar:b: its label is 1000000000" in line) == (2, "", 1, True)


def test_only_rank_0_prints(root, monkeypatch, capsys):
    (root / "train" / "notes.txt").touch()
    as_rank(monkeypatch, 1, 2)
    Folder(root / "train", ["ant", "bee", "cat"])
    monkeypatch.setattr("lip_resnet.distributed.is_main", lambda: False)
    build_sources(folder_config(root), 3)
    assert not capsys.readouterr().err
