"""ImageNet's test sets, as small sets of the same layout: class subsets, several correct labels, corruptions."""

import importlib.resources
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.commands import call, done, refuse
from helpers.sets import add_shards
from PIL import Image
from torch.nn import functional
from torchvision import datasets
from torchvision.transforms import v2

import eval as eval_command
from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import EvalLoader, describe_source
from lip_resnet.data.sources.base import Encoded
from lip_resnet.evaluation import metrics, testsets
from lip_resnet.evaluation.classes import note_on_names
from lip_resnet.evaluation.rows import row_path

# The network's top classes for every image, in this order.
RANKING = [10, 2, 795, 6, 1, 11, 13, 15, 17, 809]
# From thousand_k_to_200 of hendrycks/natural-adv-examples and imagenet_r_indices of hendrycks/imagenet-r (eval.py).
FIRST_OF_A, FIRST_OF_R = [6, 11, 13, 15, 17, 22, 23, 27, 30, 37], [1, 2, 4, 6, 8, 9, 11, 13, 22, 23]
SMALL = ("--model", "test_resnet", "--size", 32, "--resize", 32, "--workers", 1, "--batch-size", 64)


def text_of(name: str) -> str:
    return importlib.resources.files("timm.data").joinpath(f"_info/{name}").read_text(encoding="utf-8")


WNIDS = text_of("imagenet_synsets.txt").split()
REAL = json.loads(text_of("imagenet_real_labels.json"))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> list[Path]:
    """Nine small JPEG files; the sets below are hard links to them."""
    folder, random = tmp_path_factory.mktemp("nine"), np.random.default_rng(0)
    for number in range(9):
        Image.fromarray(random.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(folder / f"{number}.jpg", "JPEG")
    return sorted(folder.iterdir())


def fill(folder: Path, classes: list[str], images: list[Path], more: dict[str, int] | None = None) -> None:
    """One image per class; ``more`` gives other numbers, by class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for copy in range((more or {}).get(name, 1)):
            os.link(images[(label + copy) % len(images)], folder / name / f"image_{copy}.jpg")


@pytest.fixture(scope="session")
def sets(tmp_path_factory, images) -> Path:
    """Every test set in a folder of its name; ImageNet-C has two severities of one corruption."""
    root = tmp_path_factory.mktemp("sets")
    fill(root / "imagenet-v2", [str(label) for label in range(1000)], images, {"10": 3, "2": 2})
    fill(root / "imagenet-a", text_of("imagenet_a_synsets.txt").split(), images, {WNIDS[6]: 4})
    fill(root / "imagenet-r", text_of("imagenet_r_synsets.txt").split(), images, {WNIDS[2]: 2})
    fill(root / "imagenet-sketch", WNIDS, images, {WNIDS[10]: 2})
    for severity in "12":
        fill(root / "imagenet-c" / "gaussian_noise" / severity, WNIDS, images, {WNIDS[10]: 2})
    for number in range(1000):
        folder = root / "imagenet" / "val" / WNIDS[number]
        folder.mkdir(parents=True)
        os.link(images[number % len(images)], folder / f"ILSVRC2012_val_{number + 1:08}.JPEG")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Weights of a network whose output for every image ranks the classes as RANKING does."""
    state = timm.create_model("test_resnet", num_classes=1000).state_dict()
    state["fc.weight"].zero_()
    state["fc.bias"] = -torch.arange(1000) / 1000
    state["fc.bias"][RANKING] = 20.0 - torch.arange(len(RANKING))
    path = tmp_path_factory.mktemp("weights") / "ranking.pth"
    torch.save(state, path)
    return path


def opened(
    name: str | None, root: Path, classes: int = 1000, partial: bool = False, **changes: object
) -> testsets.EvalSet:
    """A test set below a folder, read as images of 32x32."""
    settings = {"root": str(root), "batch_size": 1, "eval_size": 32, "eval_resize": 32, "workers": 0}
    return testsets.open_set(name, DataConfig(**{**settings, **changes}), "", classes, partial)


@pytest.mark.slow
def test_every_set_on_any_number_of_processes(sets, weights, tmp_path):
    """Counts by hand, from the ranking and the images of each class; the same from 1 and 2 processes."""
    wanted = [name for name in testsets.IMAGES if name != "imagenet"]
    rows = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        output.mkdir()
        command = ("eval.py", "--checkpoint", weights, *SMALL, "--data", sets, "--output", output, "--partial")
        result = done(*command, "--dataset", *wanted, processes=processes)
        rows[processes] = {name: json.loads((output / f"eval-{name}.json").read_text()) for name in wanted}
    labelled = [labels for labels in REAL[:1000] if labels]
    expected = {
        "imagenet-v2": (3, 8, 1003),
        "imagenet-a": (4, 8, 203),
        "imagenet-r": (2, 6, 201),
        "imagenet-sketch": (2, 6, 1001),
        "imagenet-real": (
            sum(10 in labels for labels in labelled),
            sum(bool({10, 2, 795, 6, 1} & set(labels)) for labels in labelled),
            len(labelled),
        ),
        "imagenet-c": (4, 12, 2002),
    }
    assert expected["imagenet-real"][1] > expected["imagenet-real"][0] > 0
    for processes in (1, 2):
        counts = {name: (row["correct1"], row["correct5"], row["images"]) for name, row in rows[processes].items()}
        assert counts == expected
    for name, row in rows[1].items():
        assert rows[2][name]["loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert row["protocol"]["test_set"] == row["dataset"]["name"] == name
        assert row["dataset"]["whole"] is False
        assert row["dataset"]["names"].startswith("sha256:")
        assert f"* Acc@1 {row['top1']:.3f} Acc@5 {row['top5']:.3f} {name}" in result.stdout
    assert "note: 203 images; the released imagenet-a has 7,500" in result.stderr
    row = rows[1]["imagenet-c"]
    assert "mce" not in row
    assert row["mean_error"] == pytest.approx(100 - 100 * 4 / 2002)
    error = 100 - 200 / 1001
    assert row["corruptions"] == {"gaussian_noise": {"errors": pytest.approx({"1": error, "2": error})}}
    assert len(row["protocol"]["lacks"]) == 73


def test_restricted_logits_are_the_authors(sets, images):
    """ImageNet-A by a plain loop over torchvision's ImageFolder and the authors' indices."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=1000).eval()
    chosen = opened("imagenet-a", sets / "imagenet-a")
    assert chosen.classes[:10] == FIRST_OF_A
    assert opened("imagenet-r", sets / "imagenet-r").classes[:10] == FIRST_OF_R
    loader, counts = EvalLoader(testsets.Joined([chosen]), chosen.config), metrics.AccuracyCounts(torch.device("cpu"))
    network = metrics.ClassLogits(model, chosen.classes)
    with torch.no_grad():
        for pixels, labels in loader:
            logits = network(pixels.float())
            counts.add(logits, labels, metrics.cross_entropy(logits, labels))
    steps = [v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()]
    plain, loss, hits = datasets.ImageFolder(sets / "imagenet-a", v2.Compose(steps)), 0.0, 0
    indices = [WNIDS.index(name) for name in plain.classes]
    with torch.no_grad():
        for pixels, label in plain:
            logits = model(pixels[None].float())[0, indices]
            loss += functional.cross_entropy(logits, torch.tensor(label)).item()
            hits += label in logits.argsort(descending=True)[:5]
    result = counts.reduce()
    assert result["loss"] == pytest.approx(loss / len(plain), rel=1e-5)
    assert result["correct5"] == hits
    assert result["images"] == len(plain) == 203


def test_a_part_of_imagenet_is_evaluated_among_its_classes(capsys, monkeypatch, weights, images, tmp_path):
    """Labels by wnid: of the ranking 10, 2, 795, 6, 1, 11 only 2, 6 and 11 are classes of the set, beside 5."""
    fill(tmp_path / "nette" / "val", [WNIDS[label] for label in (2, 5, 6, 11)], images, {WNIDS[2]: 3, WNIDS[11]: 2})
    for kind, data in (("root", tmp_path / "nette"), ("val", tmp_path / "nette" / "val")):
        output = tmp_path / f"{kind}.json"
        arguments = ("--checkpoint", weights, *SMALL, "--data", data, "--output", output)
        code, _, printed = call(capsys, monkeypatch, eval_command, *arguments)
        assert (code, printed) == (0, "note: 4 of ImageNet's 1,000 classes: accuracy is among these\n")
        row = json.loads(output.read_text())
        assert [row[key] for key in ("images", "correct1", "correct5")] == [7, 3, 7]
        assert (row["dataset"]["name"], row["dataset"]["whole"]) == ("nette", None)
        assert (row["protocol"]["classes"], row["protocol"]["scoring"]) == (4, "among the set's 4 classes")


def test_only_folders_of_wnids_are_imagenet(capsys, monkeypatch, sets, weights, images, tmp_path):
    """A thousand classes of other names have their folder's name, and a line that says that labels are in its order."""
    sources = {
        name: opened(None, sets / folder) for name, folder in (("imagenet", "imagenet/val"), ("v2", "imagenet-v2"))
    }
    assert [data.name for data in sources.values()] == ["imagenet", "folder"]  # not the name of a test set
    names = [str(label) for label in range(1000)]
    known = {"wnids": WNIDS, "numbers as of shards": names}
    assert not any(note_on_names(classes, WNIDS) for classes in known.values())
    line = note_on_names([f"class {label}" for label in names], WNIDS)
    assert "the first is 'class 0': label i is the i-th in order of names" in line
    assert "--dataset" not in line
    line = note_on_names(sorted(names), WNIDS)
    assert line.endswith("--dataset imagenet-v2 reads folders 0 to 999 in order of value")
    monkeypatch.setattr(testsets, "wnids", lambda: ["n1", "n2", "n3"])
    state = torch.load(weights)
    state |= {key: state[key][:3] for key in ("fc.weight", "fc.bias")}
    torch.save(state, tmp_path / "three.pth")
    common = ("--checkpoint", tmp_path / "three.pth", *SMALL, "--data")
    for classes, words in (
        (["n1", "n2", "n3"], None),
        (["1", "2", "3"], "the first is '1'"),
        (["n2"], "1 of ImageNet's"),
    ):
        folder = tmp_path / "-".join(classes) / "val"
        fill(folder, classes, images)
        code, _, printed = call(capsys, monkeypatch, eval_command, *common, folder.parent)
        assert (code, len(printed.splitlines())) == (0, bool(words))
        assert (words or "") in printed
    fill(tmp_path / "others" / "val", ["n1", "x"], images)
    line = refuse(capsys, monkeypatch, eval_command, *common, tmp_path / "others")
    assert "model.num_classes is 3, but the data has 2 classes; some of ImageNet's" in line
    assert "such as n1, which 'x' is not" in line


def test_one_loader_reads_several_sets_in_turn(sets):
    first = opened("imagenet-a", sets / "imagenet-a", workers=1, eval_batch_size=50)
    second = opened("imagenet-r", sets / "imagenet-r", eval_size=24)
    loader = EvalLoader(testsets.Joined([first, second]), first.config)
    sizes = []
    for images in (range(203), range(203, 404), range(3)):
        loader.choose(images)
        seen = list(loader)
        sizes.append([tuple(pixels.shape) for pixels, _ in seen])
        source, start = (first.source, 0) if images.start < 203 else (second.source, 203)
        assert torch.cat([labels for _, labels in seen]).tolist() == [source.label(index - start) for index in images]
    assert sizes[0] == [(50, 3, 32, 32)] * 4 + [(3, 3, 32, 32)]
    assert sizes[1] == [(50, 3, 24, 24)] * 4 + [(1, 3, 24, 24)]
    assert sizes[2] == [(3, 3, 32, 32)]


class Recorder(Encoded):
    """Validation images; records the indices that are announced."""

    def __init__(self, images: int) -> None:
        super().__init__("set", WNIDS, [(f"set/ILSVRC2012_val_{1 + number:08}.JPEG", 0) for number in range(images)])
        self.announced = []

    def prefetch(self, indices: Sequence[int]) -> None:
        self.announced.append(list(indices))

    def read(self, index: int) -> bytes:
        raise NotImplementedError


def test_every_wrapper_forwards_prefetch():
    config = DataConfig(name="digits", batch_size=1)
    plain, real = Recorder(4), Recorder(100)
    wrapped = testsets.RealLabels(real)
    assert wrapped.kept == [index for index in range(100) if REAL[index]] != list(range(100))
    noise = [0] * 5  # a source without prefetch
    sets = [testsets.EvalSet("", source, config, {}) for source in (plain, noise, wrapped)]
    testsets.Joined(sets).prefetch(range(2, 9 + len(wrapped)))
    assert plain.announced == [[2, 3]]
    assert real.announced == [wrapped.kept]


@pytest.fixture
def two_classes(monkeypatch):
    """An ImageNet of two classes, so that all of ImageNet-C is 190 files."""
    monkeypatch.setattr(testsets, "wnids", lambda: ["n01440764", "n01443537"])


def corrupt(root: Path, side: int = 224) -> Path:
    """All of ImageNet-C: 19 corruptions, 5 severities, two classes of one image; half in folders named as archives."""
    alexnet, extra = testsets.corruptions()
    picture = root / "picture.jpg"
    root.mkdir()
    Image.new("RGB", (side, side)).save(picture)
    for number, name in enumerate((*alexnet, *extra)):
        for severity in range(1, 6):
            folder = root / ("archive" if number % 2 else ".") / name / str(severity)
            fill(folder, ["n01440764", "n01443537"], [picture])
    picture.unlink()
    return root


def test_corruptions_are_the_authors(two_classes, tmp_path):
    alexnet, extra = testsets.corruptions()
    # Table 1 of the paper: AlexNet's errors, rounded; their mean is its "mean corruption error" before normalising.
    published = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7]
    assert [round(100 * error, 1) for error in alexnet.values()] == pytest.approx(published, abs=0.11)
    data = opened("imagenet-c", corrupt(tmp_path / "c"), 2, eval_resize=224)
    assert list(data.parts) == [f"{name}/{severity}" for name in (*alexnet, *extra) for severity in range(1, 6)]
    for part, images in data.parts.items():
        assert [data.source.label(index) for index in images] == [0, 1]
        assert all(f"/{part}/" in data.source.path(index) for index in images)
    assert data.protocol == {"test_set": "imagenet-c", "scoring": "mean over corruptions and severities"}
    assert describe_source(data.source)["images"] == 190


def test_missing_corruptions(two_classes, tmp_path):
    root, released = corrupt(tmp_path / "c"), {"classes": 2, "eval_resize": 224}
    (root / "gaussian_noise" / "3").rename(root / "away")
    with pytest.raises(InputError, match=r"1 folders .* are missing in .* gaussian_noise/3; --partial"):
        opened("imagenet-c", root, **released)
    partial = opened("imagenet-c", root, partial=True, **released)
    assert len(partial.parts) == 94
    assert partial.protocol["lacks"] == ["gaussian_noise/3"]
    (root / "away").rename(root / "gaussian_noise" / "3")
    images = root / "gaussian_noise" / "3" / "n01443537"
    (images / "image_1.jpg").hardlink_to(images / "image_0.jpg")
    with pytest.raises(InputError, match=r"has 2 images and gaussian_noise/3 3"):
        opened("imagenet-c", root, **released)
    with pytest.raises(InputError, match=r"is 299x299; the released images are 224x224"):
        opened("imagenet-c", corrupt(tmp_path / "larger", 299), **released)
    with pytest.raises(InputError, match="has none of the corruptions gaussian_noise"):
        opened("imagenet-c", root / "fog", **released)


def test_mce_by_hand():
    alexnet = {"fog": 0.8, "snow": 0.5}
    tops = {"fog": [90, 80, 70, 60, 50], "snow": [60, 50, 40, 30, 20], "spatter": [1, 2, 3, 4, 5]}
    common = {"top5": 100.0, "correct5": 100, "images": 100}
    parts = {
        f"{name}/{severity}": {**common, "top1": top, "loss": severity, "correct1": top}
        for name, each in tops.items()
        for severity, top in enumerate(each, 1)
    }
    errors = metrics.corruption_errors(parts, alexnet)
    assert errors["corruptions"]["fog"]["ce"] == pytest.approx(30 / 0.8)  # mean error 30%
    assert errors["corruptions"]["snow"]["error"] == pytest.approx(60)
    assert errors["mce"] == pytest.approx((37.5 + 120) / 2)
    assert (errors["mean_error"], errors["top1"]) == (pytest.approx(45), pytest.approx(55))
    assert (errors["images"], errors["correct1"], errors["loss"]) == (1000, 550, 3)
    assert "ce" not in errors["corruptions"]["spatter"]
    assert errors["corruptions"]["spatter"]["error"] == pytest.approx(97)
    del parts["fog/3"]
    incomplete = metrics.corruption_errors(parts, alexnet)
    assert "mce" not in incomplete
    assert "error" not in incomplete["corruptions"]["fog"]


def test_refusals(capsys, monkeypatch, sets, weights, tmp_path, images):
    ten = tmp_path / "ten.pth"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), ten)

    def line(*arguments: object, checkpoint: Path = weights) -> str:
        return refuse(capsys, monkeypatch, eval_command, "--checkpoint", checkpoint, *SMALL, *arguments)

    a = ("--dataset", "imagenet-a", "--data")
    assert "this one has 10" in line(*a, sets, checkpoint=ten)
    assert "invalid choice: 'imagenet-b'" in line("--dataset", "imagenet-b", "--data", sets)
    assert "--data is missing: the directory that holds imagenet-a" in line(*a[:2])
    assert "is not a directory; it must be imagenet-a, or hold it" in line(*a, tmp_path / "none")
    assert "800 are of other names" in line(*a, sets / "imagenet-sketch")
    assert "such as 0; 1000 are missing, the first is '0'; 1000 are of other" in line(
        "--dataset", "imagenet-v2", "--data", sets / "imagenet-sketch"
    )
    some = tmp_path / "some" / "imagenet-a"
    fill(some, text_of("imagenet_a_synsets.txt").split()[1:], images)
    assert f"1 are missing, the first is '{WNIDS[6]}'" in line(*a, some)
    assert "has no imagenet-r/; for several sets" in line(
        "--dataset", "imagenet-a", "imagenet-r", "--data", some.parent, "--output", tmp_path
    )
    assert "for several sets it must be one" in line(
        "--dataset", "all", "--data", sets, "--output", tmp_path / "row.json"
    )
    assert "--partial belongs to" in line(*a, sets, "--partial")
    assert "73 folders (corruption/severity) are missing in" in line("--dataset", "imagenet-c", "--data", sets)
    assert "is not named ILSVRC2012_val_00000001" in line(
        "--dataset", "imagenet-real", "--data", sets / "imagenet-sketch"
    )
    (tmp_path / "eval-imagenet-a.json").write_text("{}")
    assert "exists" in line("--dataset", "imagenet-a", "imagenet-r", "--data", sets, "--output", tmp_path)
    loose = tmp_path / "loose"
    loose.mkdir()
    os.link(images[0], loose / "image.JPEG")
    assert "must be in class folders: scripts/prepare_imagenet.py" in line("--data", loose)
    # An image that does not decode stops the evaluation with its path.
    (some / WNIDS[6]).mkdir()
    (some / WNIDS[6] / "bad.JPEG").write_bytes(b"no image")
    assert f"{some}/{WNIDS[6]}/bad.JPEG: cannot decode" in line(*a, some)


def test_shards_are_recognised_by_the_folder_s_content(image_folder, tmp_path, monkeypatch, capsys):
    """The same images as class folders and as shards, recognised by --data: the same counts."""
    shards = tmp_path / "shards" / "val"
    shards.parent.mkdir()
    add_shards(image_folder, shards.parent)
    checkpoint, rows = tmp_path / "three.pth", []
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), checkpoint)
    for number, data in enumerate((image_folder, shards.parent, shards)):
        output = tmp_path / f"{number}.json"
        arguments = ("--checkpoint", checkpoint, *SMALL, "--data", data, "--output", output)
        code, _, printed = call(capsys, monkeypatch, eval_command, *arguments)
        assert code == 0, printed
        rows.append(json.loads(output.read_text()))
    assert {row["images"] for row in rows} == {11}
    assert len({(row["correct1"], row["correct5"]) for row in rows}) == 1
    assert [row["loss"] for row in rows[1:]] == pytest.approx([rows[0]["loss"]] * 2, rel=1e-6)
    assert [row["protocol"]["data"] for row in rows] == ["folder", "shards", "shards"]


def test_where_rows_go(tmp_path):
    """A run folder has one row file per set; rows of a bare weight file go to --output only."""
    names = {name: row_path(str(tmp_path), None, name, several=True).name for name in (None, "imagenet", "imagenet-c")}
    assert names == {None: "eval.json", "imagenet": "eval.json", "imagenet-c": "eval-imagenet-c.json"}
    bare = str(tmp_path / "bare.pth")
    assert row_path(bare, None, "imagenet-c", several=False) is None
    assert row_path(bare, str(tmp_path), "imagenet-a", several=True) == tmp_path / "eval-imagenet-a.json"
    assert row_path(bare, str(tmp_path / "row.json"), "imagenet-a", several=False) == tmp_path / "row.json"
