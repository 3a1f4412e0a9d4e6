"""Matches, average precision and its bootstrap, with pycocotools as the referee."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lip_resnet.config import InputError
from lip_resnet.evaluation.average_precision import METRICS, average_precision, bootstrap, interval
from lip_resnet.evaluation.matching import Detections, Matches, match, read_matches


def referee(ground_truth: dict, detections: Detections) -> list[float]:
    """pycocotools's six figures, in percent."""
    boxes = np.column_stack([detections.image_ids, detections.boxes, detections.scores, detections.category_ids])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(boxes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value if value >= 0 else np.nan for value in evaluation.stats[:6]]


def made(seed: int, images: int = 12, decimals: int = 2) -> tuple[dict, Detections]:
    """Random objects of every size, some crowds, near and far detections, equal scores with ``decimals`` 0 or 1."""
    random = np.random.default_rng(seed)
    ids, categories = random.choice(10**6, images, replace=False), [3, 4, 9, 200]
    annotations, rows = [], []
    for image in ids.tolist():
        for _ in range(random.integers(0, 9)):
            box = np.concatenate([random.uniform(0, 300, 2), np.exp(random.uniform(2, 5.5, 2))]).round(1)
            category = int(random.choice(categories[:3]))
            area = float(box[2] * box[3] * random.uniform(0.5, 1)) if random.random() < 0.8 else 32.0**2
            common = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box.tolist()}
            annotations.append({**common, "area": area, "iscrowd": int(random.random() < 0.15)})
            for _ in range(random.integers(0, 4)):
                near = np.abs(box * (1 + random.normal(0, 0.07, 4))).round(decimals)
                rows.append((image, category, *near, round(random.random(), decimals)))
        for _ in range(random.integers(0, 5)):
            far = np.concatenate([random.uniform(0, 300, 2), np.exp(random.uniform(2, 5, 2))])
            rows.append((image, random.choice(categories), *far, round(random.random(), decimals)))
    table = np.array(rows)
    truth = {"images": [{"id": int(each)} for each in ids], "categories": [{"id": each} for each in categories[::-1]]}
    detections = Detections(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2:6], table[:, 6])
    return {**truth, "annotations": annotations}, detections


def repeated(ground_truth: dict, detections: Detections, counts: np.ndarray) -> tuple[dict, Detections]:
    """The set with each image ``counts`` times, copies with ids of their own."""
    images, annotations, rows = [], [], []
    for image, count in zip(np.unique([each["id"] for each in ground_truth["images"]]).tolist(), counts, strict=True):
        own = np.flatnonzero(detections.image_ids == image)
        for copy in range(count):
            new = 100 * image + copy
            images.append({"id": new})
            annotations += [
                {**each, "image_id": new} for each in ground_truth["annotations"] if each["image_id"] == image
            ]
            rows += [(new, index) for index in own]
    annotations = [{**each, "id": number} for number, each in enumerate(annotations, 1)]
    new, index = np.array(rows).T
    others = (column[index] for column in detections[1:])
    truth = {"images": images, "annotations": annotations, "categories": ground_truth["categories"]}
    return truth, Detections(new, *others)


@pytest.mark.parametrize("decimals", [6, 1])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_referee(seed, decimals):
    truth, detections = made(seed, decimals=decimals)
    ours = average_precision(match(truth, detections))
    assert tuple(ours) == METRICS
    np.testing.assert_allclose(list(ours.values()), referee(truth, detections), rtol=0, atol=1e-9)


def one_image(objects: list[tuple], detections: list[tuple]) -> tuple[dict, Detections]:
    """Objects (x, y, width, height, crowd) and detections (x, y, width, height, score) of one category."""
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": list(box), "area": box[2] * box[3], "iscrowd": crowd}
        for number, (*box, crowd) in enumerate(objects, 1)
    ]
    truth = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": annotations}
    table, ones = np.array(detections, dtype=np.float64), np.ones(len(detections), dtype=np.int64)
    return truth, Detections(ones, ones, table[:, :4], table[:, 4])


RANKED = [(500 + 60 * (n % 20), 60 * (n // 20), 50, 50, 0.9 - n / 1000) for n in range(100)]
BY_HAND: dict[str, tuple[list[tuple], list[tuple], float]] = {
    # objects, detections, AP50
    "of equal overlaps the last": (
        [(0, 0, 100, 40, 0), (20, 0, 100, 40, 0)],
        [(10, 0, 100, 40, 0.9), (0, 0, 90, 40, 0.8)],
        100.0,
    ),
    "an object before a crowd": ([(0, 0, 400, 400, 1), (0, 0, 50, 50, 0)], [(0, 0, 50, 60, 0.9)], 100.0),
    "an object before a crowd of more overlap": ([(0, 0, 50, 48, 1), (0, 0, 50, 60, 0), (500, 0, 50, 50, 0)],
        [(0, 0, 50, 50, 0.9), (0, 10, 50, 90, 0.8), (500, 0, 50, 50, 0.5)], 100 * (51 + 50 * 2 / 3) / 101),
    "any number in a crowd": ([(0, 0, 400, 400, 1), (500, 0, 50, 50, 0)], [(9, 9, 50, 50, 0.9), (0, 0, 50, 50, 0.8),
                              (500, 0, 50, 50, 0.5)], 100.0),
    "a hundred": ([(0, 0, 50, 50, 0)], [*RANKED[:99], (0, 0, 50, 50, 0.1)], 1.0),
    "a hundred and one": ([(0, 0, 50, 50, 0)], [*RANKED, (0, 0, 50, 50, 0.1)], 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_rules_by_hand(name):
    objects, boxes, expected = BY_HAND[name]
    truth, detections = one_image(objects, boxes)
    ours = average_precision(match(truth, detections))
    np.testing.assert_allclose(list(ours.values()), referee(truth, detections), rtol=0, atol=1e-9)
    assert ours["AP50"] == pytest.approx(expected)


def test_more_than_a_hundred_detections_and_none():
    truth, detections = made(1, images=2)
    many = Detections(*(np.concatenate([column] * 40) for column in detections))
    scores = np.random.default_rng(0).random(len(many.scores))
    many = many._replace(scores=scores)
    ours = average_precision(match(truth, many))
    np.testing.assert_allclose(list(ours.values()), referee(truth, many), rtol=0, atol=1e-9)
    none = Detections(*(column[:0] for column in detections))
    assert average_precision(match(truth, none))["AP"] == 0
    no_objects = average_precision(match({**truth, "annotations": []}, detections))
    assert all(np.isnan(value) for value in no_objects.values())


def test_a_bootstrap_sample_is_the_evaluation_of_the_resampled_set():
    """Slowly: the drawn images are copied into a set of their own, which the referee evaluates."""
    truth, detections = made(5)
    runs = [match(truth, detections), match(truth, detections._replace(scores=1 - detections.scores))]
    values = bootstrap(runs, samples=6, seed=3)
    drawn = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=6)
    for sample, counts in enumerate(drawn):
        for run, scores in enumerate((detections.scores, 1 - detections.scores)):
            slow = referee(*repeated(truth, detections._replace(scores=scores), counts))
            fast = [values["AP"][run, sample], values["APs"][run, sample]]
            np.testing.assert_allclose(fast, [slow[0], slow[3]], rtol=0, atol=1e-9)


def test_an_interval_is_of_the_measured_value():
    random = np.random.default_rng(0)
    values = random.normal(51.0, 2.0, 20_000)  # the mean of resampled sets is above the measured 50
    low, high = interval(values, 50.0)
    assert low == pytest.approx(50 - 1.96 * 2, abs=0.1)
    assert high == pytest.approx(50 + 1.96 * 2, abs=0.1)
    assert interval(np.array([np.nan, np.nan]), 50.0) is None
    assert interval(values, float("nan")) is None


def test_runs_of_other_images_are_not_compared():
    with pytest.raises(ValueError, match="different images"):
        bootstrap([match(*made(0)), match(*made(1))], samples=1)


def test_matches_as_a_file(tmp_path):
    matches = match(*made(2))
    matches.write(tmp_path / "a.npz")
    again = read_matches(tmp_path / "a.npz")
    for name, value in vars(matches).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)
    assert average_precision(again) == average_precision(matches)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    np.savez(tmp_path / "c.npz", hit=np.zeros(3))
    np.savez(tmp_path / "d.npz", **{**vars(matches), "hit": np.array([{}])})
    (tmp_path / "e.npz").write_text("not a zip file")
    damaged = Matches(**{**vars(matches), "detection_image": matches.detection_image[1:]})
    damaged.write(tmp_path / "f.npz")
    for name in "bcdef":
        with pytest.raises(InputError, match=rf"{name}\.npz: not matches of eval\.py --matches"):
            read_matches(tmp_path / f"{name}.npz")
    with pytest.raises(InputError, match="cannot read: No such file"):
        read_matches(tmp_path / "none.npz")


def test_detections_of_other_sets():
    truth, detections = made(0)
    for key, name in (("image_ids", "image_id"), ("category_ids", "category_id")):
        other = detections._replace(**{key: getattr(detections, key) + 10**7})
        with pytest.raises(InputError, match=f"{name} .* is none of the"):
            match(truth, other)
