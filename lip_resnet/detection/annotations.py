"""Reads and checks an annotation file in COCO's form; every refusal is one line."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lip_resnet.data.decode import one_line
from lip_resnet.errors import InputError

LEAST_SIDE = 0.01
"""Sides of a box that is trained on, pixels: a thinner one may have none in float32, and its loss would be infinite."""


class Tables(NamedTuple):
    """A checked annotation file as arrays: I images in the order of the file, g objects by image."""

    names: list[str]
    """``file_name`` of every image."""
    image_ids: NDArray[np.int64]
    """(I,)"""
    sizes: NDArray[np.int64]
    """(I, 2): height and width."""
    classes: list[str]
    category_ids: list[int]
    """Ascending: label i is ``classes[i]``."""
    starts: NDArray[np.int64]
    """(I + 1,): objects ``starts[i]`` to ``starts[i + 1]`` are of image i, in the order of the file."""
    labels: NDArray[np.int64]
    """(g,)"""
    boxes: NDArray[np.float64]
    """(g, 4): x, y, width, height."""
    areas: NDArray[np.float64]
    """(g,): of the object, or of its box where the file has none."""
    crowds: NDArray[np.bool_]
    """(g,)"""


def read_annotations(root: Path, folder: Path, file: Path) -> Tables:
    """Read and check an annotation file, and that its images are there.

    Raises:
        InputError: a file or image is missing, or the file is damaged or not of COCO's form.
    """
    _check_layout(root, folder, file)
    try:
        with open(file, encoding="utf-8") as opened:
            content = json.load(opened)
    except OSError as error:
        raise InputError(f"{file}: cannot read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        size = file.stat().st_size
        raise InputError(f"{file}: not JSON, damaged or cut short ({size:,} bytes): {error}; copy it again") from error
    images, annotations, categories = _sections(content, file)
    category_ids, classes = _check_categories(categories, file)
    names, image_ids, sizes = _check_images(images, file)
    _check_present(folder, names, file)
    try:
        objects = _check_objects(annotations, image_ids, category_ids, file)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: {_first_bad(annotations)}") from error
    return Tables(names, image_ids, sizes, classes, category_ids, *objects)


def _check_layout(root: Path, folder: Path, file: Path) -> None:
    """One line for a path that is missing, with what is there."""
    expected = f"COCO's layout is {root}/{folder.name}/ with the images, and {file}"
    if not root.is_dir():
        raise InputError(f"data.root {root} is not a directory; {expected}")
    if not file.is_file():
        parent = file.parent if file.parent.is_dir() else root
        present = sorted(each.name + "/" * each.is_dir() for each in parent.iterdir())
        shown = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "") or "nothing"
        what = f"{root} has no annotations/" if parent == root and file.parent != root else f"no file {file}"
        raise InputError(
            f"{what}; {parent} holds {shown}; {expected} (data.train_annotations and data.val_annotations name others)"
        )
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; {expected} (data.train_split and data.val_split name others)")


def _sections(content: Any, file: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """``images``, ``annotations`` and ``categories`` of boxes; one line for files of other tasks."""
    wanted = "instances_*.json, with images, annotations and categories, is needed"
    if not isinstance(content, dict):
        kind = "a list, such as detections are" if isinstance(content, list) else f"a {type(content).__name__}"
        raise InputError(f"{file}: {kind}; {wanted}")
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    if isinstance(first, dict) and "bbox" not in first:
        kinds = {"caption": "captions", "segments_info": "panoptic segments"}
        if task := next((kinds[key] for key in kinds if key in first), None):
            raise InputError(f"{file}: annotations are {task}, not boxes; {wanted}")
    for key in ("images", "annotations", "categories"):
        value = content.get(key)
        if not isinstance(value, list):
            problem = f"no {key}" if value is None else f"{key} is a {type(value).__name__}, not a list"
            raise InputError(f"{file}: {problem}; {wanted}")
        if not value and key != "annotations":
            raise InputError(f"{file}: {key} is empty; {wanted}")
    return content["images"], content["annotations"], content["categories"]


def _check_categories(categories: list[Any], file: Path) -> tuple[list[int], list[str]]:
    """Ids, ascending, and names."""
    for number, each in enumerate(categories):
        if not (isinstance(each, dict) and _is_int(each.get("id")) and isinstance(each.get("name"), str)):
            raise InputError(f"{file}: categories[{number}] is {_short(each)}; it must have an integer id and a name")
    ids = sorted(each["id"] for each in categories)
    _refuse_twice(ids, "category id", file)
    by_id = {each["id"]: each["name"] for each in categories}
    return ids, [by_id[number] for number in ids]


def _check_images(images: list[Any], file: Path) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """File names, ids (I,), and height and width (I, 2)."""
    for number, each in enumerate(images):
        sides: list[Any] = [each.get(key) for key in ("id", "height", "width")] if isinstance(each, dict) else []
        if not (sides and all(map(_is_int, sides)) and min(sides[1:]) > 0 and isinstance(each.get("file_name"), str)):
            needed = "an integer id, a file_name, and height and width in pixels"
            raise InputError(f"{file}: images[{number}] is {_short(each)}; it must have {needed}")
    _refuse_twice([each["id"] for each in images], "image id", file)
    _refuse_twice([each["file_name"] for each in images], "file_name", file)
    sizes = np.array([(each["height"], each["width"]) for each in images], dtype=np.int64)
    return [each["file_name"] for each in images], np.array([each["id"] for each in images], dtype=np.int64), sizes


def _check_present(folder: Path, names: list[str], file: Path) -> None:
    """Refuse a file that lists images which are absent; folders are listed once, which is faster than many stats."""
    present: dict[str, set[str]] = {}
    absent = []
    for name in names:
        parent, base = os.path.split(name)
        if parent not in present:
            where = folder / parent
            present[parent] = set(os.listdir(where)) if where.is_dir() else set()
        if base not in present[parent]:
            absent.append(name)
    if absent:
        share = f"{len(absent):,} of the {len(names):,} images listed in {file}"
        raise InputError(f"{one_line(str(folder / absent[0]))}: no such file; {share} are absent")


def _check_objects(
    annotations: list[Any], image_ids: NDArray[np.int64], category_ids: list[int], file: Path
) -> tuple[NDArray[Any], ...]:
    """``starts``, ``labels``, ``boxes``, ``areas`` and ``crowds`` of ``Tables``."""
    ids, images, labels = (
        numbers([each[key] for each in annotations], "i") for key in ("id", "image_id", "category_id")
    )
    boxes = numbers([each["bbox"] for each in annotations], "if").astype(np.float64).reshape(-1, 4)
    areas = numbers([each.get("area", math.nan) for each in annotations], "if").astype(np.float64)
    crowds = numbers([each.get("iscrowd", 0) for each in annotations], "ib")
    if len(boxes) != len(ids):
        raise ValueError("boxes of other than four numbers")
    _refuse_twice(ids.tolist(), "annotation id", file)
    order = np.argsort(image_ids)
    known = _known(image_ids[order], images), _known(np.array(category_ids), labels)
    bad = (
        ~known[0],
        ~known[1],
        ~np.isfinite(boxes).all(axis=1),
        (boxes[:, 2:] < 0).any(axis=1),
        ~np.isin(crowds, (0, 1)),
    )
    reasons = (
        lambda each: f"image_id {each['image_id']} is none of its {len(image_ids):,} images",
        lambda each: f"category_id {each['category_id']} is none of its {len(category_ids)} categories",
        lambda each: f"bbox {each['bbox']} is not finite",
        lambda each: f"bbox {each['bbox']} has a negative side; it must be [x, y, width, height]",
        lambda each: f"iscrowd is {each.get('iscrowd')}; it must be 0 or 1",
    )
    for wrong, reason in zip(bad, reasons, strict=True):
        if wrong.any():
            number = int(np.argmax(wrong))
            raise InputError(f"{file}: annotations[{number}] (id {ids[number]}): {reason(annotations[number])}")
    areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    images = order[np.searchsorted(image_ids[order], images)]
    by_image = np.argsort(images, kind="stable")
    starts = np.searchsorted(images[by_image], np.arange(len(image_ids) + 1))
    labels = np.searchsorted(category_ids, labels)
    return (starts, *(each[by_image] for each in (labels, boxes, areas, crowds.astype(bool))))


def numbers(values: list[Any], kinds: str) -> NDArray[Any]:
    """An array of the values as they are: no number is read from text.

    Raises:
        ValueError: they are not of numpy's ``kinds``, or not all of one shape.
    """
    array = np.array(values) if values else np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in kinds:
        raise ValueError(f"{array.dtype} is not of the kinds {kinds}")
    return array


def _known(ids: NDArray[np.int64], of: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of ``of`` is one of ``ids``, which are sorted."""
    return ids[np.minimum(np.searchsorted(ids, of), len(ids) - 1)] == of


def _first_bad(annotations: list[Any]) -> str:
    """The first annotation that is not of COCO's form, for a message."""
    needed = "it must have integers id, image_id and category_id, and bbox: [x, y, width, height]"
    for number, each in enumerate(annotations):
        keys = ("id", "image_id", "category_id")
        fine = isinstance(each, dict) and all(_is_int(each.get(key)) for key in keys)
        box = each.get("bbox") if fine else None
        values = [*box, each.get("area", 0.0)] if isinstance(box, list) else []
        if len(values) != 5 or not all(type(value) in (int, float) for value in values):
            return f"annotations[{number}] is {_short(each)}; {needed}"
        if not _is_int(each.get("iscrowd", 0)):
            return f"annotations[{number}] (id {each['id']}): iscrowd is {each['iscrowd']!r}; it must be 0 or 1"
    return f"a number in its annotations is too large; {needed}"


def _refuse_twice(values: list[Any], what: str, file: Path) -> None:
    if len(set(values)) < len(values):
        seen: set[Any] = set()
        twice = next(value for value in values if value in seen or seen.add(value))  # type: ignore[func-returns-value]
        raise InputError(f"{file}: {what} {twice!r} is there twice; each must be there once")


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**53  # exact in float64, as evaluations hold ids


def _short(value: Any) -> str:
    text = one_line(repr(value))
    return text if len(text) <= 120 else f"{text[:120]}..."


def clipped(boxes: NDArray[np.float64], sides: Any) -> NDArray[np.float64]:
    """(n, 4) x, y, width, height -> x1, y1, x2, y2 within images of ``sides``, width and height: (2,) or (n, 2)."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return np.clip(corners, 0, np.tile(sides, 2))


def usable_objects(tables: Tables, file: Path) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """(g,): whether an object is trained on; and what a note says of the others.

    Raises:
        InputError: a box lies outside its image.
    """
    image = np.repeat(np.arange(len(tables.names)), np.diff(tables.starts))
    sides = tables.sizes[image][:, ::-1]
    low, high = tables.boxes[:, :2], tables.boxes[:, :2] + tables.boxes[:, 2:]
    outside = ((low >= sides) | (high <= 0)).any(axis=1) & (tables.boxes[:, 2:] > 0).all(axis=1)
    outside |= ((low > sides) | (high < 0)).any(axis=1)
    if outside.any():
        first = int(np.argmax(outside))
        box, (width, height) = tables.boxes[first].tolist(), sides[first].tolist()
        raise InputError(
            f"{file}: {int(outside.sum()):,} boxes outside their images, the first in {tables.names[image[first]]}, "
            f"{width}x{height} pixels: bbox {box}; a bbox is [x, y, width, height] in pixels of the image"
        )
    corners = clipped(tables.boxes, sides)
    empty = (corners[:, 2:] - corners[:, :2] < LEAST_SIDE).any(axis=1)
    beyond = ((low < -1) | (high > sides + 1)).any(axis=1)
    notes = {
        "boxes reach more than a pixel beyond their image: clipped in training": int(beyond.sum()),
        "boxes of zero size left out of training": int((empty & ~tables.crowds).sum()),
    }
    return ~tables.crowds & ~empty, notes
