"""prepare_imagenet.py on archives of the official layout, check_dataset.py, and the fingerprint of a set."""

import errno
import hashlib
import io
import json
import multiprocessing
import re
import shutil
import sys
import tarfile
import time
from pathlib import Path

import bad_images
import check_dataset
import numpy as np
import prepare_imagenet
import prepare_tiny_imagenet
import pytest
from helpers import small_config
from helpers.commands import call, refuse
from helpers.sets import add
from PIL import Image
from prepare import archives as archive_files
from prepare import writing
from scipy.io import savemat
from torchvision.datasets.imagenet import ARCHIVE_META

from lip_resnet import cli
from lip_resnet.config import DataConfig
from lip_resnet.data import build_sources, describe_source
from lip_resnet.evaluation.robustness import read_boxes

CLASSES = ("n01440764", "n02105855", "n15075141")
TRUTH = [3, 1, 2, 1, 3]  # ILSVRC2012_IDs of the validation images


def image_bytes(number: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return bad_images.encode(Image.fromarray(pixels).resize((side + number, side), 3), quality=95)


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The three archives, three classes of four images, and the files expected: path -> bytes."""
    folder, expected = tmp_path_factory.mktemp("archives"), {}
    with tarfile.open(folder / ARCHIVE_META["train"][0], "w") as outer:
        for label, name in enumerate(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in range(4):
                    data = image_bytes(10 * label + number)
                    expected[f"train/{name}/{name}_{number}.JPEG"] = data
                    add(archive, f"{name}_{number}.JPEG", data)
            add(outer, f"{name}.tar", inner.getvalue())
    with tarfile.open(folder / ARCHIVE_META["val"][0], "w") as archive:
        for number, truth in enumerate(TRUTH, 1):
            data, file = image_bytes(100 + number), f"ILSVRC2012_val_{number:08}.JPEG"
            expected[f"val/{CLASSES[truth - 1]}/{file}"] = data
            add(archive, file, data)
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    synsets = [(number, name, "words", "gloss", 0) for number, name in enumerate(CLASSES, 1)]
    synsets.append((1001, "n00001740", "entity", "what there is", 3))  # not a class
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(synsets, dtype=fields)})
    with tarfile.open(folder / ARCHIVE_META["devkit"][0], "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/readme.txt", b"read me")
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{number}\n" for number in TRUTH)
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return folder, expected


def run(monkeypatch, module, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.launch(module.main)
    return exit_.value.code


@pytest.fixture
def prepare(monkeypatch, archives, tmp_path):
    """``prepare(*flags, output=..., archives=...)`` runs prepare_imagenet.py and returns its exit code."""

    def call(*flags: object, output: Path = tmp_path, archives: Path = archives[0]) -> int:
        return run(monkeypatch, prepare_imagenet, "--archives", archives, "--output", output, *flags)

    return call


def written(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("*/*/*")}


def test_archives_to_folders(prepare, archives, tmp_path):
    folder, expected = archives
    assert prepare("--any-archive") == 0
    assert written(tmp_path) == expected
    record = json.loads((tmp_path / "prepared.json").read_text())
    checksum = hashlib.md5((folder / ARCHIVE_META["train"][0]).read_bytes()).hexdigest()
    assert record["train"] == {"images": 12, "classes": 3, "md5": checksum}
    train, val = build_sources(DataConfig(root=str(tmp_path), batch_size=1), 3)
    assert train.classes == list(CLASSES)
    by_file = sorted((Path(path).name, label) for path, label in val.samples)
    assert [label + 1 for _, label in by_file] == TRUTH


def test_a_killed_run_is_continued(monkeypatch, prepare, archives, tmp_path):
    write, expected = writing._write_image, archives[1]

    def slow(*arguments):
        time.sleep(0.1)
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write_image", slow)
        process = multiprocessing.get_context("fork").Process(target=prepare, args=("--any-archive",))
        process.start()
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*/*/*.JPEG"))) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.join()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*.JPEG")}
    assert 7 <= len(before) < len(expected)
    assert prepare("--any-archive") == 0
    assert {name: data for name, data in written(tmp_path).items() if not name.endswith(".part")} == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was whole was not written again
    assert prepare("--any-archive") == 0  # nothing left to do


def test_re_encoding(prepare, archives, tmp_path):
    expected = archives[1]
    assert prepare("--any-archive", "--longest", 30) == 0
    small = written(tmp_path)
    assert set(small) == set(expected)
    for name, data in small.items():
        image, original = (Image.open(io.BytesIO(each)) for each in (data, expected[name]))
        assert len(data) < len(expected[name])
        assert max(image.size) == 30
        assert data == bad_images.encode(original.resize(image.size, Image.Resampling.BICUBIC), quality=90)
    assert prepare("--any-archive") == 2


def test_archives_to_shards(monkeypatch, prepare, archives, tmp_path):
    expected = archives[1]
    monkeypatch.setattr(writing, "_PER_SHARD", 5)
    assert prepare("--any-archive", "--format", "shards") == 0
    shards = sorted(tmp_path.glob("*/*.tar"))
    names = ["train/000000.tar", "train/000001.tar", "train/000002.tar", "val/000000.tar"]
    assert [str(path.relative_to(tmp_path)) for path in shards] == names
    config = DataConfig(name="shards", root=str(tmp_path), batch_size=1)
    for split, source in zip(("train", "val"), build_sources(config, 3), strict=True):
        assert source.classes == list(CLASSES)
        contents = {}
        for index, label in enumerate(source.targets):
            name = source.path(index).split(":")[-1]
            contents[f"{split}/{CLASSES[label]}/{name}.JPEG"] = source.read(index)
        assert contents == {name: data for name, data in expected.items() if name.startswith(split)}
    # A killed run: one shard and the record are missing. The other shards are not written again.
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    shards[1].unlink()
    (tmp_path / "prepared.json").unlink()
    assert prepare("--any-archive", "--format", "shards") == 0
    assert shards[1].read_bytes() == before[shards[1]][0]
    assert shards[0].stat().st_mtime_ns == before[shards[0]][1]


def test_wrong_archives_are_refused(prepare, archives, tmp_path, capsys):
    folder, out = tmp_path / "copies", tmp_path / "out"
    shutil.copytree(archives[0], folder)
    val = folder / ARCHIVE_META["val"][0]
    whole = val.read_bytes()
    for content, words in ((whole[: len(whole) // 2], "not a whole tar archive"), (b"no tar" * 200, "not a whole tar")):
        val.write_bytes(content)
        assert prepare("--any-archive", output=out, archives=folder) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    with tarfile.open(val, "w") as archive:
        add(archive, "../../evil.JPEG", b"")
    assert prepare("--any-archive", output=out, archives=folder) == 2
    assert "it holds '../../evil.JPEG'" in capsys.readouterr().err
    val.unlink()
    assert prepare(output=out, archives=folder) == 2
    assert "there is no" in capsys.readouterr().err


def test_wrong_sizes_and_checksums_are_refused(monkeypatch, prepare, archives, tmp_path, capsys):
    """The archives' sizes are checked first: hours of reading a truncated download would be lost."""
    paths = {key: archives[0] / name for key, (name, _) in ARCHIVE_META.items()}
    assert prepare(output=tmp_path / "out") == 2
    assert "the official archive 147,897,477,120: is its download complete?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(archive_files, "_BYTES", {key: paths[key].stat().st_size for key in ("train", "val")})
    assert prepare(output=tmp_path / "out") == 2
    assert "the official archive's fa75699e90414af021442c21a62c3abf" in capsys.readouterr().err
    assert prepare(archives=tmp_path / "none") == 2
    assert capsys.readouterr().err.count("ILSVRC2012_") == 3  # all that is missing, not the first


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_a_full_disk(monkeypatch, prepare, archives, tmp_path, capsys, layout):
    """The line names the file that could not be written, what is written stays, and the same command continues."""
    flags = ("--any-archive", "--format", layout)
    monkeypatch.setattr(writing, "_PER_SHARD", 5)
    replace, room = writing.os.replace, [3 if layout == "folder" else 1]

    def full(source, target):
        if Path(source).suffix == ".part":
            room[0] -= 1
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "replace", full)
        assert prepare(*flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--output: cannot write {tmp_path}/" in line
    assert "No space left on device; what is written stays" in line
    assert not list(tmp_path.rglob("*.part"))
    assert prepare(*flags) == 0
    assert layout == "shards" or written(tmp_path) == archives[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--longest", -5), "--longest is -5; it must be at least 1"),
        (("--quality", 900), "--quality is 900; it must be 1 to 95"),
        (("--effect", "somewhere"), "or --effect FOLDER"),
        (("--kaggle", "somewhere"), "give --archives DIR or --kaggle DIR"),
    ],
)
def test_wrong_flags(prepare, capsys, flags, words):
    assert prepare(*flags) == 2
    assert words in capsys.readouterr().err


def test_a_damaged_record_and_a_folder_that_cannot_be_made(prepare, tmp_path, capsys):
    (tmp_path / "prepared.json").write_text("{")
    assert prepare("--any-archive") == 2
    assert "prepared.json: damaged; remove it" in capsys.readouterr().err
    assert prepare("--any-archive", output=tmp_path / "prepared.json" / "below") == 2
    assert "cannot make" in capsys.readouterr().err


def test_the_effect_of_re_encoding(monkeypatch, tmp_path, capsys):
    """Sizes and pixels by hand; times are only printed."""
    paths, small, apart = [tmp_path / f"{number}.JPEG" for number in range(3)], [], []
    for number, path in enumerate(paths):
        path.write_bytes(image_bytes(number, side=300))
        image = Image.open(path).convert("RGB")
        image = image.resize((280, round(280 * 300 / (300 + number))), Image.Resampling.BICUBIC)
        small.append(bad_images.encode(image, quality=90))
        views = []
        for data in (path.read_bytes(), small[-1]):
            view = Image.open(io.BytesIO(data))
            scale = 256 / min(view.size)
            view = view.resize((int(view.width * scale), int(view.height * scale)), Image.Resampling.BILINEAR)
            top, left = (round((side - 224) / 2) for side in (view.height, view.width))
            views.append(np.asarray(view.crop((left, top, left + 224, top + 224)), dtype=float))
        apart.append(np.abs(views[0] - views[1]).mean())
    assert run(monkeypatch, prepare_imagenet, "--effect", tmp_path, "--longest", 280, "--rounds", 3) == 0
    printed = capsys.readouterr().out
    before = np.mean([path.stat().st_size for path in paths]) / 1000
    after = np.mean([len(data) for data in small]) / 1000
    assert f"| file | {before:.1f} KB | {after:.1f} KB | {after / before:.2f} |" in printed
    assert "| width x height | 301 x 300 | 280 x 279 | |" in printed
    assert f"differ by {np.mean(apart):.2f} of 255 on average, {np.max(apart):.2f} in the worst" in printed
    assert len(re.findall(r"time, .*\d\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", printed)) == 3
    assert run(monkeypatch, prepare_imagenet, "--effect", tmp_path / "none") == 2
    assert "holds no images" in capsys.readouterr().err


def test_shards_are_checked_too(monkeypatch, prepare, tmp_path, capsys):
    assert prepare("--any-archive", "--format", "shards") == 0
    assert run(monkeypatch, check_dataset, tmp_path, "--workers", 1) == 0
    assert "train: 12 images, 3 classes" in capsys.readouterr().out
    source = build_sources(DataConfig(name="shards", root=str(tmp_path), batch_size=1), 3)[1]
    assert describe_source(source)["content"].startswith("sha256:")
    shard = tmp_path / "val" / "000000.tar"
    data = bytearray(shard.read_bytes())
    data[512:1024] = bytes(512)  # the first image's first block
    shard.write_bytes(data)
    assert run(monkeypatch, check_dataset, tmp_path, "--workers", 1) == 2
    assert f"bad: {shard}:ILSVRC2012_val_00000001: cannot decode" in capsys.readouterr().out


def test_wrong_arguments_of_check_dataset(monkeypatch, image_folder, tmp_path, capsys):
    for arguments, words in (
        ((image_folder, "--workers", 0), "--workers is 0"),
        ((image_folder / "val",), "give the directory above it"),
        ((image_folder, "--output", tmp_path / "none" / "x.json"), "is not a directory"),
    ):
        assert run(monkeypatch, check_dataset, *arguments) == 2
        assert words in capsys.readouterr().err


def test_a_good_set_gets_a_fingerprint(monkeypatch, image_folder, tmp_path, capsys):
    root = tmp_path / "set"
    shutil.copytree(image_folder, root)
    config = DataConfig(root=str(root), batch_size=1)
    before = describe_source(build_sources(config, 3)[0])
    assert before["content"] is None
    assert run(monkeypatch, check_dataset, root, "--workers", 1) == 0
    assert "train: 23 images, 3 classes" in capsys.readouterr().out
    after = describe_source(build_sources(config, 3)[0])
    assert after == {**before, "content": after["content"]}
    assert after["content"].startswith("sha256:")
    # By hand: class/file, bytes and sha256 of each file in ImageFolder's order.
    total = hashlib.sha256()
    for path in sorted((root / "train").glob("*/*")):
        data = path.read_bytes()
        total.update(f"{path.parent.name}/{path.name} {len(data)} {hashlib.sha256(data).hexdigest()}\n".encode())
    assert after["content"] == f"sha256:{total.hexdigest()}"
    next((root / "train").glob("ant/*")).rename(root / "train" / "ant" / "new.JPEG")
    changed = describe_source(build_sources(config, 3)[0])
    assert changed["names"] != after["names"]
    assert changed["content"] is None  # the recorded content is of other files


def test_bad_files_are_listed(monkeypatch, image_folder, tmp_path, capsys):
    root = tmp_path / "set"
    shutil.copytree(image_folder, root)
    (root / "val" / "cat" / "cat_2.JPEG").write_bytes(b"text")
    (root / "val" / "cat" / "notes.txt").write_bytes(b"notes")
    assert run(monkeypatch, check_dataset, root, "--workers", 2) == 2
    printed = capsys.readouterr()
    assert "1 bad files" in printed.err
    assert f"bad: {root}/val/cat/cat_2.JPEG: cannot decode" in printed.out
    assert "val: 1 file left out (not an image that PIL decodes): cat/notes.txt" in printed.out
    assert not (root / "fingerprint.json").exists()
    assert run(monkeypatch, check_dataset, tmp_path / "none") == 2


def test_digits_and_noise_have_fingerprints_too():
    first, second = (describe_source(build_sources(small_config().data, 10)[0]) for _ in range(2))
    assert first == second
    assert first["content"] != describe_source(build_sources(small_config().data, 10)[1])["content"]
    noise = small_config(data__name="synthetic").data
    assert describe_source(build_sources(noise, 10)[0]) == {"images": 12800, "classes": 10}


def test_tiny_imagenet_as_released(tmp_path, capsys, monkeypatch):
    """Two classes, two images each and one for validation, in the released layout; the images are not moved."""
    source, output = tmp_path / "tiny-imagenet-200", tmp_path / "sorted"
    (source / "val" / "images").mkdir(parents=True)
    lines = []
    for number, wnid in enumerate(CLASSES[:2]):
        (source / "train" / wnid / "images").mkdir(parents=True)
        boxes = [f"{wnid}_{index}.JPEG\t{index}\t10\t63\t58\n" for index in range(2)]
        (source / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(boxes))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t1\t2\t{4 + number}\n")
        files = [source / "train" / wnid / "images" / f"{wnid}_{index}.JPEG" for index in range(2)]
        for file in [*files, source / "val" / "images" / f"val_{number}.JPEG"]:
            Image.new("RGB", (64, 64), (number, 0, 0)).save(file)
    (source / "val" / "val_annotations.txt").write_text("".join(lines))
    code, out, _ = call(capsys, monkeypatch, prepare_tiny_imagenet, source, "--output", output)
    assert (code, "6 images" in out) == (0, True)
    train, val = build_sources(DataConfig(root=str(output), batch_size=2, workers=0), 2)
    assert [name.rpartition("/")[2] for name, _ in val.samples] == ["val_0.JPEG", "val_1.JPEG"]
    assert (len(train), val.targets) == (4, [0, 1])
    boxes = read_boxes(output / "boxes.tsv")
    assert boxes[f"val/{CLASSES[1]}/val_1.JPEG"] == 2 * 4
    assert boxes[f"train/{CLASSES[0]}/{CLASSES[0]}_1.JPEG"] == 62 * 48
    assert (source / "val" / "images" / "val_0.JPEG").is_file()
    assert "choose another" in refuse(capsys, monkeypatch, prepare_tiny_imagenet, source, "--output", source / "new")
    line = refuse(capsys, monkeypatch, prepare_tiny_imagenet, output / "val", "--output", tmp_path / "x")
    assert "DIR must be Tiny-ImageNet as released" in line
