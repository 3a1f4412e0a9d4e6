"""scripts/per_class.py: counts against scikit-learn's, names, files, and what is refused."""

import csv
import json

import numpy as np
import per_class as command
import pytest
from helpers.commands import call, refuse
from PIL import Image
from sklearn.metrics import confusion_matrix, recall_score

from lip_resnet.evaluation.per_class import count_confusions, name_classes
from lip_resnet.evaluation.predictions import COLUMNS, read_predictions

RANDOM = np.random.default_rng(0)


def write(path, labels, top1, images=None):
    """A predictions file; top-2 is the right class where top-1 is not, of every second image."""
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(COLUMNS)
        for number, (label, given) in enumerate(zip(labels, top1, strict=True)):
            second = label if given != label and number % 2 else (given + 1) % 90
            image = images[number] if images else f"set[{number}]"
            lines.writerow([image, label, given, f"{given} {second}", "0.5", "1.5"])
    return path


def draw(classes: int, images: int = 300) -> tuple[list[int], list[int]]:
    labels = RANDOM.integers(0, classes, images)
    top1 = np.where(RANDOM.random(images) < 0.6, labels, RANDOM.integers(0, classes, images))
    return labels.tolist(), top1.tolist()


def test_counts_are_scikit_learn_s(tmp_path):
    labels, top1 = draw(7)
    predictions = read_predictions(write(tmp_path / "p.csv", labels, top1))
    confusions = count_confusions(predictions)
    matrix = confusion_matrix(labels, top1)
    np.testing.assert_array_equal(confusions.matrix, matrix)
    np.testing.assert_allclose(confusions.accuracy, 100 * recall_score(labels, top1, average=None))
    pairs = confusions.pairs(1000)
    assert [count for *_, count in pairs] == sorted(int(n) for n in (matrix - np.diag(np.diag(matrix))).flat if n)[::-1]
    assert all(matrix[right, given] == count and right != given for right, given, count in pairs)
    assert confusions.pairs(2) == pairs[:2]


def test_a_class_that_is_only_predicted_has_no_accuracy(tmp_path):
    confusions = count_confusions(read_predictions(write(tmp_path / "p.csv", [2, 2, 5], [2, 9, 5])))
    assert confusions.classes == [2, 5, 9]
    np.testing.assert_equal(confusions.accuracy, [50.0, 100.0, np.nan])
    assert confusions.pairs(5) == [(0, 2, 1)]


def test_names_come_from_folders_where_each_class_has_one(tmp_path):
    images = ["val/ant/a.jpg", "val/bee/b.jpg", "val/ant/c.jpg"]
    predictions = read_predictions(write(tmp_path / "p.csv", [0, 1, 0], [0, 1, 2], images))
    assert name_classes([0, 1, 2], predictions, None) == ["ant", "bee", "2"]
    assert name_classes([0, 1, 2], predictions, ["a", "b", "c"]) == ["a", "b", "c"]
    images[2] = "val/bee/c.jpg"
    mixed = read_predictions(write(tmp_path / "p.csv", [0, 1, 0], [0, 1, 2], images))
    assert name_classes([0, 1, 2], mixed, None) == ["0", "1", "2"]


def row_of(path, counted, **changes):
    """A row of eval.py with the counts of a predictions file."""
    read = read_predictions(counted)
    five = (read.top5 == read.label[:, None]).any(axis=1)
    counts = {"correct1": int(read.right.sum()), "correct5": int(five.sum()), "images": len(read.images)}
    row = {"model": "resnet18", "checkpoint": "gone", "top1": 1.0, "top5": 1.0, "loss": 1.0, "params": 1, "macs": 1}
    path.write_text(json.dumps({**row, **counts, "protocol": {}, **changes}))
    return path


def test_the_command_on_predictions_a_row_and_a_run(capsys, monkeypatch, tmp_path):
    labels, top1 = draw(4)
    run = tmp_path / "run"
    run.mkdir()
    predictions = write(run / "predictions.csv", labels, top1)
    row = row_of(run / "eval.json", predictions)
    printed = [call(capsys, monkeypatch, command, path) for path in (predictions, row, run)]
    assert {code for code, *_ in printed} == {0}
    tables = [text.partition("\n")[2] for _, text, _ in printed]
    assert tables[0] == tables[1] == tables[2]
    worst = int(np.argmin(recall_score(labels, top1, average=None)))
    assert tables[0].splitlines()[3].split()[0] == str(worst)
    elsewhere = row_of(tmp_path / "row.json", predictions, predictions=str(predictions))
    assert call(capsys, monkeypatch, command, elsewhere)[0] == 0

    output = tmp_path / "out"
    assert call(capsys, monkeypatch, command, run, "--output", output, "--classes", "2")[0] == 0
    assert sorted(path.name for path in output.iterdir()) == ["classes.csv", "confusion.png", "confusions.csv"]
    with open(output / "classes.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["images"]) for line in lines] == np.bincount(labels).tolist()
    assert sum(int(line["correct"]) for line in lines) == sum(a == b for a, b in zip(labels, top1, strict=True))
    with Image.open(output / "confusion.png") as picture:
        assert min(picture.size) > 300
    assert "exists and is not an empty folder" in refuse(capsys, monkeypatch, command, run, "--output", output)


def test_no_picture_of_more_than_fifty_classes(capsys, monkeypatch, tmp_path):
    predictions = write(tmp_path / "p.csv", *draw(60, 2000))
    code, printed, _ = call(capsys, monkeypatch, command, predictions, "--output", tmp_path / "out")
    assert code == 0
    assert "the worst 20 of 60" in printed
    assert "no picture of the confusion matrix: 60 classes, more than 50" in printed
    assert not (tmp_path / "out" / "confusion.png").exists()


@pytest.mark.parametrize("key", ["images", "correct1", "correct5"])
def test_predictions_of_another_run_are_refused(capsys, monkeypatch, tmp_path, key):
    labels, top1 = draw(4)
    predictions = write(tmp_path / "predictions.csv", labels, top1)
    row = row_of(tmp_path / "eval.json", predictions, **{key: 123})
    line = refuse(capsys, monkeypatch, command, row)
    assert f"predictions.csv holds predictions of another run: {key} " in line
    assert line.rstrip().endswith("123")


def test_wrong_files_are_named(capsys, monkeypatch, tmp_path):
    predictions = write(tmp_path / "p.csv", [0, 1], [0, 1])
    row = row_of(tmp_path / "eval.json", predictions)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty").mkdir()
    for given, words in (
        ([row], "predictions.csv: no such file; a row holds no predictions, write them with: python eval.py"),
        ([tmp_path / "other.csv"], "not predictions of eval.py; its columns must be image,label"),
        ([tmp_path / "none.csv"], "none.csv: cannot read: No such file"),
        ([tmp_path / "empty"], "holds no eval.json; make it, and the predictions, with: python eval.py"),
        ([row, "--predictions", tmp_path / "other.csv"], "not predictions of eval.py"),
        ([predictions, "--predictions", predictions], "is taken as a predictions file"),
        ([predictions, "--pairs", "-1"], "--pairs is -1; it must be 0 or more"),
    ):
        assert words in refuse(capsys, monkeypatch, command, *given)
