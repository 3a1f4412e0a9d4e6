"""Robustness probes against counts by hand, on networks whose answers are known."""

import functools
import json
import os

import numpy as np
import probe
import pytest
import torch
from helpers.commands import RECIPE, call, refuse
from PIL import Image
from torch import nn

import eval as eval_command
from lip_resnet import distributed, seeding
from lip_resnet.config import EvalDataConfig, InputError, ModelConfig
from lip_resnet.evaluation.attribution import measure_deletion, measure_localisation
from lip_resnet.evaluation.protocol import EvalConfig
from lip_resnet.evaluation.robustness import (
    ShiftedCrops,
    figures,
    measure_objects,
    measure_shift,
    read_boxes,
    read_probe,
    shift_of,
    wilson,
)
from lip_resnet.evaluation.testsets import open_set
from lip_resnet.layers import replace_downsampling
from lip_resnet.models.registry import create_model

CLASSES = ("ant", "bee", "cat")
SIZE, SHIFT = 28, 4  # 4 of 28 pixels are 32 of 224


class Answers(nn.Module):
    """A network without weights: ``answer`` gives its logits."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.device = answer, nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return self.answer(images)

    def __call__(self, images):
        if isinstance(images, torch.Tensor):
            return super().__call__(images)
        self.sizes = images
        return self


def strongest_channel(images):
    return images.amax(dim=(2, 3))


def row_of_the_dot(images):
    """Class 0 or 1: whether the brightest pixel is in an even or odd row."""
    row = images.sum(1).flatten(1).argmax(1) // images.shape[-1]
    return nn.functional.one_hot(row % 2, 3).float()


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    """40 images of 32 pixels, each black with one dot of a random colour in its middle, which every crop holds."""
    root, random = tmp_path_factory.mktemp("dots"), np.random.default_rng(0)
    for index in range(40):
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        row, column = random.integers(8, 24, 2)
        pixels[row, column, index % 3] = 200
        folder = root / "val" / CLASSES[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return root


def config_of(root, **changes):
    data = {"root": str(root), "eval_size": SIZE, "eval_resize": SIZE, "eval_batch_size": 7, "workers": 0}
    return EvalConfig(model=ModelConfig(name="resnet18", num_classes=3), data=EvalDataConfig(**data | changes))


def measure(probe, network, config, option=0):
    def images(data):
        return open_set(None, data, "val", 3)

    return probe(images, network, config, option)


def test_a_shift_invariant_network_is_consistent(dots):
    network = Answers(strongest_channel)
    measured = measure(measure_shift, network, config_of(dots))
    assert (measured.result["agreeing"], measured.result["consistency"], measured.result["images"]) == (40, 100.0, 40)
    assert measured.result["top1_of_crops"] == 100.0
    assert network.sizes == [SIZE]
    assert measured.config.data.eval_resize == SIZE + SHIFT


@pytest.mark.parametrize("seed", [0, 5])
def test_consistency_of_a_network_that_sees_positions(dots, seed):
    """The dot's row in a crop is its row in the image less the offset: crops agree if both are even or odd."""
    agree = 0
    for index in range(40):
        (top, _), (other, _) = np.random.default_rng(seeding.derive("shift", seed, index)).integers(0, SHIFT, (2, 2))
        agree += top % 2 == other % 2
    assert 0 < agree < 40
    for batch in (7, 64):
        measured = measure(measure_shift, Answers(row_of_the_dot), config_of(dots, eval_batch_size=batch), seed)
        assert measured.result["agreeing"] == agree
    assert measured.settings == {"name": "shift", "shift": SHIFT, "seed": seed}
    drawn = [measured.data.source, config_of(dots, eval_size=32, eval_resize=32).data, SHIFT, seed]
    offsets = np.array([ShiftedCrops(*drawn).offsets(index) for index in range(40)])
    assert [offsets.min(), offsets.max()] == [0, SHIFT - 1]


def test_shift_is_32_pixels_of_224():
    assert [shift_of(size) for size in (224, 288, 160, 64, 32, 8)] == [32, 41, 23, 9, 5, 2]


def test_not_finite_logits_are_no_agreement(dots):
    with pytest.raises(FloatingPointError, match="80 of 80 images"):
        measure(measure_shift, Answers(lambda images: strongest_channel(images) * torch.nan), config_of(dots))


def write_boxes(path, boxes):
    path.write_text("file\tx0\ty0\tx1\ty1\n" + "".join("\t".join(map(str, row)) + "\n" for row in boxes))


def test_objects_by_hand(dots, tmp_path):
    """Image k has a box of k pixels: 14 up to the first tercile, 13 up to the second; ant and bee are always right."""
    names = sorted(f"val/{CLASSES[index % 3]}/{index:02}.png" for index in range(40))
    write_boxes(tmp_path / "boxes.tsv", [(name, 0, 0, int(name[-6:-4]), 1) for name in names])
    network = Answers(lambda images: strongest_channel(images) - torch.tensor([0.0, 0.0, 99.0]))
    measured = measure(measure_objects, network, config_of(dots, eval_resize=32), tmp_path / "boxes.tsv")
    assert measured.settings["terciles"] == [13.0, 26.0]
    expected = {}
    for name, group in (("small", range(14)), ("medium", range(14, 27)), ("large", range(27, 40))):
        expected[name] = (len(group), sum(index % 3 < 2 for index in group))
    assert {name: (each["images"], each["correct1"]) for name, each in measured.result["objects"].items()} == expected
    assert figures(measured.result)["top-1 of small objects"] == pytest.approx(100 * expected["small"][1] / 14)
    write_boxes(tmp_path / "boxes.tsv", [(name.removeprefix("val/"), 3, 3, 9, 9) for name in names])
    equal = measure(measure_objects, network, config_of(dots), tmp_path / "boxes.tsv").result
    assert [each["images"] for each in equal["objects"].values()] == [40, 0, 0]
    assert list(figures(equal)) == ["top-1 of small objects"]


def test_figures_of_corruptions():
    """Of eval.py's row of ImageNet-C; without all of its folders there is no mCE."""
    assert figures({"top1": 40.0, "mean_error": 60.0, "mce": 76.7}) == {"ImageNet-C mean error": 60.0, "mCE": 76.7}
    assert figures({"top1": 40.0, "mean_error": 60.0}) == {"ImageNet-C mean error": 60.0}
    assert not figures({"top1": 40.0})


def test_wilson():
    stats = pytest.importorskip("scipy.stats")
    for count, images in ((0, 9), (9, 9), (3, 10), (4000, 5000)):
        theirs = stats.binomtest(count, images).proportion_ci(method="wilson")
        assert wilson(count, images) == pytest.approx((100 * theirs.low, 100 * theirs.high), rel=1e-12, abs=1e-12)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(recipe, weights) of a network of random weights on the digits."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "recipe.yaml").write_text(RECIPE.replace("eval_resize: 32", "eval_resize: 36"))
    torch.manual_seed(0)
    torch.save(create_model("test_resnet", num_classes=10).state_dict(), folder / "w.pt")
    return folder / "recipe.yaml", folder / "w.pt"


def test_sizes_are_the_counts_of_eval(weights, tmp_path, capsys, monkeypatch):
    recipe, file = weights
    shared = ("--config", recipe, "--workers", 0)
    row = tmp_path / "probe-sizes.json"
    code, out, _ = call(capsys, monkeypatch, probe, "sizes", file, *shared, "--output", row, "--sizes", 48, 24)
    assert code == 0
    measured = read_probe(row)
    assert measured["protocol"]["probe"] == {"name": "sizes", "sizes": [24, 48]}
    for each in measured["sizes"]:
        theirs = tmp_path / f"{each['size']}.json"
        call(
            capsys,
            monkeypatch,
            eval_command,
            *("--checkpoint", file, *shared, "--size", each["size"], "--output", theirs),
        )
        theirs = json.loads(theirs.read_text())
        assert each["resize"] == theirs["protocol"]["eval_resize"] == each["size"] * 36 // 32
        assert [each[key] for key in ("correct1", "correct5", "images", "loss")] == [
            theirs[key] for key in ("correct1", "correct5", "images", "loss")
        ]
        assert f"top-1 at {each['size']} pixels {each['top1']:.3f}%" in out
    assert "exists; choose another --output" in refuse(
        capsys, monkeypatch, probe, "sizes", file, *shared, "--output", row
    )


def test_bad_input(weights, dots, tmp_path, capsys, monkeypatch):
    recipe, file = weights
    known = ("--config", recipe, "--workers", 0)
    empty = tmp_path / "run"
    empty.mkdir()
    for arguments, line in (
        (("objects", file, *known), "boxes belong to image files; digits has none"),
        (("shift", file, *known, "--boxes", "x.tsv"), "--boxes belongs to the probe objects, not to shift"),
        (("sizes", file, *known, "--seed", 1), "--seed belongs to the probe shift, not to sizes"),
        (("sizes", file, *known, "--sizes", 0), "eval_size"),
        (("sizes", file, "other.pt", *known, "--output", tmp_path / "x.json"), "is for one network; 2 are given"),
        (("shift", file, "--config", "digits/resnet50"), "w.pt: not the weights of this ResNet"),
        (("shift", empty), f"{empty}"),
        (("shift", file, "--config", "cifar10/resnet18", f"--data={tmp_path}"), "does not hold cifar10's val"),
        (("shift", file, "--config", "imagenet/resnet50_step90"), "data/imagenet"),
    ):
        assert line in refuse(capsys, monkeypatch, probe, *arguments), arguments
    (tmp_path / "vit.yaml").write_text(RECIPE.replace("test_resnet", "test_vit"))  # takes images of its own size alone
    torch.save(create_model("test_vit", num_classes=10).state_dict(), tmp_path / "vit.pt")
    vit = (tmp_path / "vit.pt", "--config", tmp_path / "vit.yaml", "--workers", 0)
    assert "images of 24x24 do not fit this VisionTransformer" in refuse(
        capsys, monkeypatch, probe, "sizes", *vit, "--sizes", 24
    )


def test_boxes_of_names_that_are_not_utf8(tmp_path):
    (tmp_path / "boxes.tsv").write_bytes(b"\xef\xbb\xbffile\tx0\ty0\tx1\ty1\ncaf\xe9.jpg\t1\t1\t3\t4\n")
    assert read_boxes(tmp_path / "boxes.tsv") == {os.fsdecode(b"caf\xe9.jpg"): 6.0}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "cannot read the boxes: No such file or directory; --boxes names a table of file, x0, y0, x1, y1"),
        ("image,box\n", "its columns are image,box; they must be file, x0, y0, x1, y1"),
        ("", "not a tab-separated table of file"),
        ("file\tx0\ty0\tx1\ty1\na.png\t1\t2\t3\n", "line 2 is not a file's name and four numbers"),
        ("file\tx0\ty0\tx1\ty1\na.png\t1\t2\tx\t4\n", "line 2 is not a file's name and four numbers"),
        ("file\tx0\ty0\tx1\ty1\na.png\t5\t2\t3\t4\n", "line 2: a.png has no box"),
        ("file\tx0\ty0\tx1\ty1\na.png\t1\t2\tnan\t4\n", "line 2: a.png has no box"),
        ("file\tx0\ty0\tx1\ty1\na.png\t1\t2\t3\t4\na.png\t1\t2\t3\t4\n", "line 3: a second box of a.png"),
        ("file\tx0\ty0\tx1\ty1\nval/ant/00.png\t1\t2\t3\t4\n", "no box of 39 of 40 images, the first is ant/03.png"),
    ],
)
def test_bad_boxes(dots, tmp_path, text, line):
    if text is not None:
        (tmp_path / "boxes.tsv").write_text(text)
    with pytest.raises(InputError) as refused:
        measure(measure_objects, Answers(strongest_channel), config_of(dots), tmp_path / "boxes.tsv")
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"consistency": "x", "protocol": {}}', '{"consistency": 1.0}'])
def test_bad_rows(tmp_path, text):
    (tmp_path / "probe-shift.json").write_text(text)
    with pytest.raises(InputError, match=r"probe-shift\.json: not a row of probe\.py"):
        read_probe(tmp_path / "probe-shift.json")


def map_scores(network, images, labels, about, mean, std):
    """Of a batch: the brightest pixel as a map, and the area of its mask."""
    if about.ndim == 1:
        drop = 1 / (1 + about[:, None].astype(float))
        return {"importance": drop * [1.0, 0.5, 0.0], "random": np.tile([1.0, 0.5, 0.0], (len(about), 1))}
    brightest = images.sum(1).flatten(1).argmax(1).numpy()
    hit = about.reshape(len(about), -1)[np.arange(len(about)), brightest]
    area = about.mean((1, 2))
    return {"importance": np.stack([hit, 2 * area], 1), "chance": np.stack([area, area], 1)}


def test_deletion_by_hand(dots, monkeypatch):
    score = {"score": map_scores}
    for every, batch in ((None, 7), (3, 5)):
        config = config_of(dots, eval_batch_size=batch)
        measured = measure(functools.partial(measure_deletion, **score), Answers(strongest_channel), config, every)
        areas = 100 * 0.5 / (1 + np.arange(0, 40, every or 1))
        deletion = measured.result["deletion"]["importance"]
        assert measured.result["images"] == len(areas)
        assert deletion["auc"] == pytest.approx(areas.mean())
        assert deletion["curve"] == pytest.approx([2 * areas.mean(), areas.mean(), 0])
        half = 1.959964 * areas.std(ddof=1) / len(areas) ** 0.5
        assert deletion["interval"] == pytest.approx([areas.mean() - half, areas.mean() + half])
        assert measured.result["importance_less"]["random"]["auc"] == pytest.approx(areas.mean() - 50)
        assert figures(measured.result) == {
            "deletion AUC, importance": deletion["auc"],
            "deletion AUC, random": pytest.approx(50.0),
        }
        assert measured.settings == {"name": "deletion", "every": every or 1, "methods": ["importance", "random"]}
    one = measure(functools.partial(measure_deletion, **score), Answers(strongest_channel), config, None).result
    monkeypatch.setattr(distributed, "gather_objects", lambda parts: [parts[1::2], parts[::2]])  # of two processes
    assert measure(functools.partial(measure_deletion, **score), Answers(strongest_channel), config, None).result == one
    with pytest.raises(InputError, match="--every is 0; it must be at least 1"):
        measure(functools.partial(measure_deletion, **score), Answers(strongest_channel), config, 0)


def test_boxes_go_the_way_of_their_images(dots, tmp_path):
    """The box of a dot is its pixel: after a crop, after a resize; boxes outside the crop are left out."""
    names = sorted(f"val/{CLASSES[index % 3]}/{index:02}.png" for index in range(40))
    boxes = []
    for name in names:
        pixels = np.asarray(Image.open(dots / name)).max(2)
        row, column = np.unravel_index(pixels.argmax(), pixels.shape)
        boxes.append((name, column, row, column + 1, row + 1))
    write_boxes(tmp_path / "boxes.tsv", boxes)
    probing = functools.partial(measure_localisation, score=map_scores)
    for size, resize, area in ((32, 32, 1 / 32**2), (28, 32, 1 / 28**2), (64, 64, 4 / 64**2)):
        config = config_of(dots, eval_size=size, eval_resize=resize)
        result = measure(probing, Answers(strongest_channel), config, tmp_path / "boxes.tsv").result
        assert (result["images"], result["outside"]) == (40, 0)
        if size <= 32:  # an enlarged pixel is blurred
            assert result["localisation"]["chance"]["energy"] == pytest.approx(100 * area)
        assert result["localisation"]["importance"]["pointing"] == 100
        assert result["importance_less"]["chance"]["energy"] == result["localisation"]["chance"]["energy"]
        assert figures(result)["pointing game, importance"] == 100
    write_boxes(tmp_path / "boxes.tsv", [(row[0], 0, 0, 2, 2) if "bee" in row[0] else row for row in boxes])
    config = config_of(dots, eval_resize=32)
    assert measure(probing, Answers(strongest_channel), config, tmp_path / "boxes.tsv").result["outside"] == 13
    write_boxes(tmp_path / "boxes.tsv", [(name, 0, 0, 2, 2) for name in names])
    with pytest.raises(InputError, match=r"all boxes of .* lie outside the crop of 28 pixels"):
        measure(probing, Answers(strongest_channel), config, tmp_path / "boxes.tsv")


@pytest.mark.parametrize("name", ["deletion", "localisation"])
def test_maps_by_command(dots, tmp_path, capsys, monkeypatch, name):
    """A network with LIP gets a row that a report reads; one without layers of weights is refused by name."""
    boxes = [(f"{CLASSES[index % 3]}/{index:02}.png", 4, 4, 20, 20) for index in range(40)]
    write_boxes(tmp_path / "boxes.tsv", boxes)
    option = ("--every", 8) if name == "deletion" else ("--boxes", tmp_path / "boxes.tsv")
    for layer in ("lip_projection", "strided"):
        recipe, file = tmp_path / "recipe.yaml", tmp_path / f"{layer}.pt"
        recipe.write_text(
            f"model: {{name: test_resnet, num_classes: 3, downsampling: {{stem: {layer}}}}}\n"
            f"data: {{name: folder, root: {dots}, batch_size: 8, size: 32, eval_size: 32, eval_resize: 32}}\n"
            "optim: {lr: 0.1}\ntrain: {epochs: 1}\n"
        )
        network = create_model("test_resnet", num_classes=3)
        replace_downsampling(network, {"stem": layer})
        torch.save(network.state_dict(), file)
        arguments = (name, file, "--config", recipe, "--workers", 0, *option, "--output", tmp_path / f"{layer}.json")
        if layer == "strided":
            assert "has no layer that weighs by content" in refuse(capsys, monkeypatch, probe, *arguments)
            continue
        code, out, error = call(capsys, monkeypatch, probe, *arguments)
        assert code == 0, error
        row = read_probe(tmp_path / f"{layer}.json")
        assert row["images"] == (5 if name == "deletion" else 40)
        if name == "localisation":
            chance = row["localisation"]["chance"]["energy"]
            assert chance == pytest.approx(100 * 16**2 / 32**2)
            assert row["localisation"]["importance"]["energy"] == pytest.approx(chance, rel=1e-3)  # equal logits
            assert f"energy in the box, chance {chance:.3f}%" in out
        else:
            assert row["deletion"]["importance"]["auc"] == row["deletion"]["random"]["auc"]
    assert "--every belongs to the probe deletion, not to sizes" in refuse(
        capsys, monkeypatch, probe, "sizes", tmp_path / "x.pt", "--every", 2
    )
