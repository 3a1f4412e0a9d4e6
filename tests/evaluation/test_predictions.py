"""The file of predictions against definitions by hand."""

import csv
import math
import os
import types

import numpy as np
import pytest
import torch

from lip_resnet.config import InputError
from lip_resnet.data.sources.base import Arrays, Files
from lip_resnet.evaluation.predictions import PredictionLog, read_predictions


def test_columns_by_hand(tmp_path):
    """Two batches in another order than the set's; margin and loss from the definition, in float64."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 0, 6, 2, 2])
    log = PredictionLog()
    log.add(range(2, 5), logits[2:], labels[2:])
    log.add(range(2), logits[:2], labels[:2])
    source = types.SimpleNamespace(path=lambda index: f"image {index}")
    log.write(tmp_path / "p.csv", source)
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [row["image"] for row in rows] == [f"image {index}" for index in range(5)]
    for row, scores, label in zip(rows, logits.double().tolist(), labels.tolist(), strict=True):
        order = sorted(range(7), key=lambda index: -scores[index])
        assert row["label"] == str(label)
        assert row["top1"] == str(order[0])
        assert row["top5"].split() == list(map(str, order[:5]))
        others = max(score for index, score in enumerate(scores) if index != label)
        assert float(row["margin"]) == pytest.approx(scores[label] - others, rel=1e-4)
        loss = math.log(sum(map(math.exp, scores))) - scores[label]
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-4)
        assert (float(row["margin"]) > 0) == (row["top1"] == row["label"])
    read = read_predictions(tmp_path / "p.csv")
    assert np.array_equal(read.right, logits.argmax(1).numpy() == labels.numpy())
    assert read.top5.shape == (5, 5)


def test_several_right_labels_and_few_classes(tmp_path):
    log = PredictionLog()
    log.add(range(2), torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([[1, 2], [2, -1]]))
    pixels = np.zeros((2, 4, 4), dtype=np.uint8)
    log.write(tmp_path / "p.csv", Arrays("made", pixels, [1, 2], ["a", "b", "c"]))
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [(row["label"], row["top5"], row["margin"]) for row in rows] == [("1 2", "1 2 0", "2"), ("2", "0 1 2", "-2")]
    with pytest.raises(InputError, match=r"p\.csv: made\[0\] has several right labels"):
        read_predictions(tmp_path / "p.csv")
    assert float(rows[0]["loss"]) == pytest.approx(-math.log((math.e**2 + math.e) / (1 + math.e + math.e**2)), rel=1e-5)


NAMES = {
    b"a,b.jpg": "a,b.jpg",
    b'q"uote.jpg': 'q"uote.jpg',
    b"two\nlines.jpg": r"two\nlines.jpg",
    b"Icon\r.jpg": r"Icon\r.jpg",
    b"caf\xe9.jpg": r"caf\xe9.jpg",
    "snow ☃.jpg".encode(): "snow ☃.jpg",
}


def test_any_file_name_is_written_in_one_line_and_read_again(tmp_path):
    folder = tmp_path / "val"
    images = Files(folder, ["a"], [(f"{folder}/a/{os.fsdecode(name)}", 0) for name in NAMES])
    log = PredictionLog()
    log.add(range(len(NAMES)), torch.zeros(len(NAMES), 2), torch.zeros(len(NAMES), dtype=torch.int64))
    log.write(tmp_path / "p.csv", images)
    assert read_predictions(tmp_path / "p.csv").images == [f"a/{name}" for name in NAMES.values()]
    assert len((tmp_path / "p.csv").read_text(encoding="utf-8").split("\n")) == len(NAMES) + 2


@pytest.mark.parametrize("text", ["", "image,label\na,1\n", "image,label,top1,top5,margin,loss\n", "\0"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(InputError, match=r"not predictions of eval\.py"):
        read_predictions(tmp_path / "p.csv")


def test_a_name_that_is_not_utf8(tmp_path):
    """Names of image files are bytes; those of another encoding are shown as in the other lists."""
    log = PredictionLog()
    log.add(range(1), torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
    log.write(tmp_path / "p.csv", Files("set", ["a", "b"], [("set/b/caf\udce9.png", 1)]))
    assert read_predictions(tmp_path / "p.csv").images == ["b/caf\\xe9.png"]
