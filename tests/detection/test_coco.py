"""COCO's layout: what is read, what is left out of training, and a line for everything that is wrong."""

import copy
import json
import re
from pathlib import Path

import check_dataset
import numpy as np
import pytest
from helpers.commands import call, refuse
from PIL import Image

from lip_resnet.config import InputError
from lip_resnet.config.detection import EvalDetectionDataConfig
from lip_resnet.data.decode import BadImage
from lip_resnet.detection.annotations import clipped
from lip_resnet.detection.coco import CocoSource
from lip_resnet.detection.sources import build_sources
from lip_resnet.training.run import check_same_data

SIZES = {"a.jpg": (64, 48), "deep/b.png": (40, 60), "c.jpg": (32, 32), "d.jpg": (50, 50)}
"""(width, height)."""


def content() -> dict:
    """Two categories with a gap, four images of which one has no box, and one of each special object."""
    annotations = [
        {"id": 0, "image_id": 70, "category_id": 9, "bbox": [10, 10.5, 20, 30], "area": 77.5, "iscrowd": 0},
        {"id": 11, "image_id": 5, "category_id": 2, "bbox": [-4, 5, 50.5, 10], "iscrowd": 0, "segmentation": [[1, 2]]},
        {"id": 12, "image_id": 70, "category_id": 2, "bbox": [0, 0, 64, 48], "area": 3000, "iscrowd": 1},
        {"id": 13, "image_id": 70, "category_id": 2, "bbox": [5, 5, 0, 9], "area": 0},
        {"id": 14, "image_id": 8, "category_id": 9, "bbox": [1, 1, 9, 9], "area": 60, "iscrowd": 1},
    ]
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, (name, (width, height)) in zip((70, 5, 8, 3), SIZES.items(), strict=True)
    ]
    categories = [{"id": 9, "name": "zebra"}, {"id": 2, "name": "bee"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        for name, size in SIZES.items():
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (9, 99, 199)).save(path)
        write(tmp_path, content(), split)
    return tmp_path


def write(root: Path, value: object, split: str = "val2017") -> None:
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(value))


def config(root: Path, **keys: object) -> EvalDetectionDataConfig:
    return EvalDetectionDataConfig(root=str(root), workers=0, **keys)


def test_every_object_has_its_rule(root, capsys):
    train, val = build_sources(config(root), 2)
    assert (train.classes, train.category_ids) == (["bee", "zebra"], [2, 9])
    # Training: no crowd, no box of zero size, no image without a box; what reaches beyond the image is clipped.
    assert train.image_ids == [70, 5]
    assert [Path(train.path(index)).name for index in range(2)] == ["a.jpg", "b.png"]
    first, second = train.annotations(0), train.annotations(1)
    np.testing.assert_array_equal(first.boxes, np.array([[10, 10.5, 30, 40.5]], np.float32))
    np.testing.assert_array_equal(second.boxes, np.array([[0, 5, 40, 15]], np.float32))
    assert (first.labels.tolist(), second.labels.tolist()) == ([1], [0])
    assert train[1].size == (40, 60)
    # Evaluation: everything, as COCO's own; ids from 1 and areas of boxes where the file has none.
    assert val.image_ids == [70, 5, 8, 3]
    truth = val.ground_truth()
    assert [each["id"] for each in truth["annotations"]] == [1, 2, 3, 4, 5]
    assert [each["bbox"] for each in truth["annotations"]][3] == [-4, 5, 50.5, 10]
    assert [each["area"] for each in truth["annotations"]] == [77.5, 3000, 0, 505, 60]
    assert [each["iscrowd"] for each in truth["annotations"]] == [0, 1, 0, 0, 1]
    assert [each["category_id"] for each in truth["annotations"]] == [9, 2, 2, 2, 9]
    assert len(truth["images"]) == 4
    assert val.describe() | {"names": 0, "annotations": 0} == {
        "images": 4, "classes": 2, "names": 0, "content": None, "boxes": 5, "annotations": 0,
    }  # fmt: skip
    printed = capsys.readouterr().err
    assert "1 boxes reach more than a pixel beyond their image: clipped in training" in printed
    assert "1 boxes of zero size left out of training" in printed
    assert "2 images without a box left out of training" in printed
    assert "instances_val2017.json" not in printed  # nothing is left out of an evaluation
    assert val.sizes.tolist() == [[48, 64], [60, 40], [32, 32], [50, 50]]


def test_a_box_is_clipped_at_each_side():
    """Of an image of 100x50 pixels."""
    boxes = np.array([[-5.0, 10, 20, 20], [90, 10, 20, 20], [10, -5, 20, 20], [10, 40, 20, 20]])
    expected = [[0, 10, 15, 30], [90, 10, 100, 30], [10, 0, 30, 15], [10, 40, 30, 50]]
    assert clipped(boxes, (100, 50)).tolist() == expected


def test_a_box_without_sides_in_float32_is_left_out_of_training(root):
    """torchvision's loss of such a box is infinite."""
    value = content()
    value["annotations"].append({"id": 15, "image_id": 5, "category_id": 2, "bbox": [30, 5, 1e-6, 9]})
    write(root, value, "train2017")
    (source,) = build_sources(config(root), 2, ("train",))
    np.testing.assert_array_equal(source.annotations(1).boxes, np.array([[0, 5, 40, 15]], np.float32))


def test_a_set_without_objects_is_evaluated(root, capsys):
    write(root, {**content(), "annotations": []})
    (val,) = build_sources(config(root), 2, ("val",))
    truth = val.ground_truth()
    assert (len(truth["images"]), truth["annotations"]) == (4, [])
    assert "instances_val2017.json: no object to find: AP is undefined" in capsys.readouterr().err


def test_names_of_other_splits_and_files(root):
    (root / "val2017").rename(root / "valid")
    (root / "annotations" / "instances_val2017.json").rename(root / "valid" / "_annotations.coco.json")
    keys = {"val_split": "valid", "val_annotations": "valid/_annotations.coco.json"}
    (val,) = build_sources(config(root, **keys), 2, ("val",))
    assert len(val) == 4


def test_annotations_change_the_fingerprint(root):
    before = CocoSource(config(root), "val").describe()
    value = content()
    value["annotations"][0]["bbox"][0] += 0.01
    write(root, value)
    after = CocoSource(config(root), "val").describe()
    assert before["names"] == after["names"]
    assert before["annotations"] != after["annotations"]
    with pytest.raises(InputError, match="it was trained with other data: annotations of val: sha256"):
        check_same_data({"val": before}, {"val": after}, "it")


def test_an_image_of_another_size(root):
    Image.new("RGB", (48, 64)).save(root / "val2017" / "a.jpg")
    source = CocoSource(config(root), "val")
    with pytest.raises(BadImage, match=r"a\.jpg: 48x64 pixels; instances_val2017\.json says 64x48 \(EXIF "):
        source[0]


def change(key: str, number: int, **values: object):
    def apply(value: dict) -> None:
        value[key][number].update(values)

    return apply


def drop(*path: object):
    def apply(value: dict) -> None:
        for part in path[:-1]:
            value = value[part]
        del value[path[-1]]

    return apply


BAD = {
    "no categories": (drop("categories"), r"no categories; instances_\*\.json, .* is needed"),
    "empty categories": (lambda value: value["categories"].clear(), "categories is empty"),
    "no annotations": (drop("annotations"), "no annotations; instances"),
    "no images": (drop("images"), "no images; instances"),
    "images no list": (lambda value: value.update(images={}), "images is a dict, not a list"),
    "captions": (lambda value: value.update(annotations=[{"caption": "a cat"}]), "annotations are captions, not boxes"),
    "panoptic": (lambda value: value.update(annotations=[{"segments_info": []}]), "are panoptic segments, not boxes"),
    "no box": (drop("annotations", 1, "bbox"), r"annotations\[1\] is \{'id': 11.* it must have integers id, image_id"),
    "three numbers": (change("annotations", 1, bbox=[1, 2, 3]), r"annotations\[1\] is .*bbox: \[x, y, width, height\]"),
    "text in a box": (change("annotations", 1, bbox=[1, 2, 3, "4px"]), r"annotations\[1\] is"),
    "text of an id": (change("annotations", 1, image_id="5"), r"annotations\[1\] is"),
    "NaN": (change("annotations", 1, bbox=[1, 2, float("nan"), 4]), r"\[1\] \(id 11\): bbox .* is not finite"),
    "corners": (change("annotations", 1, bbox=[30, 20, -10, 10]), r"id 11\): bbox .* has a negative side; it must be"),
    "text of a number": (change("annotations", 1, bbox=[1, 2, 3, "4"]), r"annotations\[1\] is"),
    "an object": (lambda value: value["annotations"].insert(2, [1]), r"annotations\[2\] is \[1\]"),
    "unknown image": (change("annotations", 1, image_id=6), r"image_id 6 is none of its 4 images"),
    "unknown category": (change("annotations", 1, category_id=3), r"category_id 3 is none of its 2 categories"),
    "crowd of 2": (change("annotations", 1, iscrowd=2), "iscrowd is 2; it must be 0 or 1"),
    "outside": (change("annotations", 1, bbox=[41, 1, 5, 5]),
                r"1 boxes outside .* in deep/b\.png, 40x60 pixels: bbox \[41\.0, 1\.0, 5\.0, 5\.0\]"),
    "above": (change("annotations", 1, bbox=[1, -9, 5, 9]), "1 boxes outside their images"),
    "annotation id": (change("annotations", 1, id=12), "annotation id 12 is there twice"),
    "image id": (change("images", 1, id=70), "image id 70 is there twice"),
    "file name": (change("images", 1, file_name="a.jpg"), r"file_name 'a\.jpg' is there twice"),
    "category id": (change("categories", 1, id=9), "category id 9 is there twice"),
    "no height": (drop("images", 2, "height"), r"images\[2\] is .*it must have an integer id, a file_name, and height"),
    "zero height": (change("images", 2, height=0), r"images\[2\] is"),
    "no name": (drop("categories", 1, "name"), r"categories\[1\] is .* it must have an integer id and a name"),
    "absent": (change("images", 2, file_name="x\ny.jpg"), r"x\\ny\.jpg: no such file; 1 of the 4 images listed in"),
    "huge": (change("annotations", 1, id=10**30), r"annotations\[1\] is"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations_are_one_line(root, name):
    alter, line = BAD[name]
    value = copy.deepcopy(content())
    alter(value)
    write(root, value)
    with pytest.raises(InputError, match=line) as caught:
        CocoSource(config(root), "val")
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


def test_bad_files_are_one_line(root):
    file = root / "annotations" / "instances_val2017.json"
    text = file.read_text()
    for damaged in (
        text[: len(text) // 2],
        "",
        "[" * 100_000,
        "\udcff".encode("utf-8", "surrogateescape").decode("latin"),
    ):
        file.write_text(damaged)
        with pytest.raises(InputError, match="not JSON, damaged or cut short"):
            CocoSource(config(root), "val")
    write(root, [{"image_id": 70, "bbox": [1, 2, 3, 4], "score": 0.5}])
    with pytest.raises(InputError, match=r"a list, such as detections are; instances_\*\.json"):
        CocoSource(config(root), "val")
    file.unlink()
    with pytest.raises(InputError, match=r"no file .*instances_val2017\.json; .* holds instances_train2017\.json;"):
        CocoSource(config(root), "val")
    (root / "annotations" / "instances_train2017.json").unlink()
    (root / "annotations").rmdir()
    with pytest.raises(InputError, match=r"has no annotations/; .* holds train2017/, val2017/; COCO's layout is"):
        CocoSource(config(root), "val")
    with pytest.raises(InputError, match=r"data\.root .*elsewhere is not a directory"):
        CocoSource(config(root / "elsewhere"), "val")
    write_root = root / "again"
    (write_root / "annotations").mkdir(parents=True)
    write(write_root, content())
    with pytest.raises(InputError, match=r"no folder .*val2017; COCO's layout"):
        CocoSource(config(write_root), "val")


def test_categories_fit_the_head_and_the_other_split(root):
    with pytest.raises(InputError, match=r"model\.num_classes is 3; the train images have 2 classes: bee, zebra"):
        build_sources(config(root), 3)
    value = content()
    value["categories"][0]["name"] = "wasp"
    write(root, value)
    with pytest.raises(InputError, match="the val images have other categories than the train images"):
        build_sources(config(root), 2)
    value = content()
    value["annotations"] = [each for each in value["annotations"] if each.get("iscrowd")]
    write(root, value, "train2017")
    with pytest.raises(InputError, match="no image has a box to train on"):
        build_sources(config(root), 2, ("train",))


def test_a_line_for_each_process(root, monkeypatch):
    """The file is read on rank 0 alone; its error is every rank's."""
    from lip_resnet import distributed

    source = CocoSource(config(root), "val")
    calls = []
    monkeypatch.setattr(distributed, "on_main", lambda function: calls.append(function) or function())
    assert CocoSource(config(root), "val").ground_truth() == source.ground_truth()
    assert len(calls) == 1
    assert re.search("read_annotations", str(calls[0].__code__.co_names))


def test_check_dataset(root, capsys, monkeypatch):
    code, out, _ = call(capsys, monkeypatch, check_dataset, root, "--workers", 1)
    assert code == 0
    assert "train2017: 2 images, 2 classes" in out
    assert "val2017: 4 images, 2 classes" in out
    assert CocoSource(config(root), "val").describe()["content"].startswith("sha256:")
    assert json.loads((root / "fingerprint.json").read_text())["val2017"]["boxes"] == 5
    Image.new("RGB", (9, 9)).save(root / "val2017" / "d.jpg")
    (root / "train2017" / "a.jpg").write_bytes(b"no image")
    code, out, err = call(capsys, monkeypatch, check_dataset, root, "--workers", 1)
    assert (code, out.count("bad: ")) == (2, 2)
    assert "d.jpg: 9x9 pixels; instances_val2017.json says 50x50" in out
    assert "2 bad files" in err
    write(root, [], "train2017")
    assert "detections are" in refuse(capsys, monkeypatch, check_dataset, root)
    for file in (root / "annotations").iterdir():
        file.unlink()
    assert "holds no instances_*.json" in refuse(capsys, monkeypatch, check_dataset, root)
