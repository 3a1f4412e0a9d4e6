"""Detections to matches with annotated objects, by COCO's rule: the data from which average precision is computed.

The rule of pycocotools: in each image and category the detections, best score first, each take the free object of the
largest intersection over union (IoU) that reaches the threshold; crowd regions and objects of another size are ignored,
and what matches them counts neither way.
"""

import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lip_resnet.config import InputError
from lip_resnet.files import write_atomically

THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
"""(T,): of IoU."""
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
"""The A ranges of an object's area, pixels of the original image, both ends included."""
MOST_DETECTIONS = 100
"""Best detections of an image and category that count."""


class Detections(NamedTuple):
    """n detections, in COCO's terms; those of an image in any order, equal scores in the order given."""

    image_ids: NDArray[np.int64]
    """(n,)"""
    category_ids: NDArray[np.int64]
    """(n,)"""
    boxes: NDArray[np.float64]
    """(n, 4): x, y, width, height in pixels of the original image."""
    scores: NDArray[np.float64]
    """(n,)"""


@dataclass(frozen=True)
class Matches:
    """Matches of I images and K categories: n detections, by category and then by falling score, and g objects."""

    image_ids: NDArray[np.int64]
    """(I,), ascending."""
    category_ids: NDArray[np.int64]
    """(K,), ascending."""
    detection_image: NDArray[np.int32]
    """(n,): index of the image."""
    detection_label: NDArray[np.int32]
    """(n,): index of the category."""
    hit: NDArray[np.bool_]
    """(n, A, T): whether it has taken an object."""
    ignored: NDArray[np.bool_]
    """(n, A, T): whether it counts neither way."""
    object_image: NDArray[np.int32]
    """(g,)"""
    object_label: NDArray[np.int32]
    """(g,)"""
    counted: NDArray[np.bool_]
    """(g, A): whether the object is one to find: no crowd, and of the size."""

    def write(self, path: Path) -> None:
        """Write a .npz file.

        Raises:
            InputError: it cannot be written.
        """
        write_matches(path, {"": self})


def write_matches(path: Path, matches: Mapping[str, Matches]) -> None:
    """Write the matches of several evaluations into one .npz file, each under a prefix.

    Raises:
        InputError: it cannot be written.
    """
    arrays: dict[str, Any] = {}
    for prefix, each in matches.items():
        packed = {name: np.packbits(getattr(each, name), axis=-1) for name in ("hit", "ignored")}
        arrays |= {prefix + name: array for name, array in {**vars(each), **packed}.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def read_matches(path: Path, prefix: str = "") -> Matches:
    """Read a file of ``Matches.write``, or the matches under a prefix in one of ``write_matches``.

    Raises:
        InputError: it cannot be read, or is not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {field.name: file[prefix + field.name] for field in fields(Matches)}
        for name in ("hit", "ignored"):
            arrays[name] = np.unpackbits(arrays[name], axis=-1, count=len(THRESHOLDS)).astype(bool)
        detections = {(*arrays[name].shape, len(AREAS), len(THRESHOLDS))[:3] for name in _OF_DETECTIONS[:2]}
        if detections != {arrays[name].shape for name in _OF_DETECTIONS[2:]}:
            raise ValueError("its arrays have different lengths")
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    except (KeyError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not matches of eval.py --matches: {error}") from error
    return Matches(**arrays)


_OF_DETECTIONS = ("detection_image", "detection_label", "hit", "ignored")


def match(ground_truth: Mapping[str, Any], detections: Detections) -> Matches:
    """Match detections with the objects of a set.

    Args:
        ground_truth: COCO's form: ``images`` and ``categories`` with ``id``, and ``annotations`` with ``image_id``,
            ``category_id``, ``bbox``, ``area`` and ``iscrowd``.

    Raises:
        InputError: a detection is of an image or category that the set does not have.
    """
    image_ids = np.unique([image["id"] for image in ground_truth["images"]]).astype(np.int64)
    category_ids = np.unique([category["id"] for category in ground_truth["categories"]]).astype(np.int64)
    annotations = ground_truth["annotations"]
    object_image = _index(image_ids, [each["image_id"] for each in annotations], "image_id")
    object_label = _index(category_ids, [each["category_id"] for each in annotations], "category_id")
    object_box = np.array([each["bbox"] for each in annotations], dtype=np.float64).reshape(-1, 4)
    area = np.array([each["area"] for each in annotations], dtype=np.float64)
    crowd = np.array([each["iscrowd"] for each in annotations], dtype=bool)
    counted = ~(crowd[:, None] | _other_size(area))
    order = np.lexsort((object_image, object_label))
    object_image, object_label, object_box = object_image[order], object_label[order], object_box[order]
    crowd, counted = crowd[order], counted[order]

    image = _index(image_ids, detections.image_ids, "image_id")
    label = _index(category_ids, detections.category_ids, "category_id")
    order = np.lexsort((-detections.scores, image, label))
    pair = (label.astype(np.int64) * len(image_ids) + image)[order]
    rank = np.arange(len(pair)) - np.searchsorted(pair, pair)
    order, pair = order[rank < MOST_DETECTIONS], pair[rank < MOST_DETECTIONS]
    image, label, box, score = image[order], label[order], detections.boxes[order], detections.scores[order]

    hit = np.zeros((len(order), len(AREAS), len(THRESHOLDS)), dtype=bool)
    ignored = np.broadcast_to(_other_size(box[:, 2] * box[:, 3])[:, :, None], hit.shape).copy()
    object_pair = object_label.astype(np.int64) * len(image_ids) + object_image
    for rows, objects in _groups(pair, object_pair):
        ious = _intersection_over_union(box[rows], object_box[objects], crowd[objects])
        ious[(rows < 0)[:, :, None] | (objects < 0)[:, None]] = -1
        group_hit, group_ignored = _assign(ious, counted[objects], crowd[objects])
        real = rows >= 0
        hit[rows[real]] = group_hit[real]
        ignored[rows[real]] = np.where(group_hit, group_ignored, ignored[rows])[real]
    order = np.lexsort((-score, label))
    return Matches(
        image_ids,
        category_ids,
        image[order],
        label[order],
        hit[order],
        ignored[order],
        object_image,
        object_label,
        counted,
    )


def _index(ids: NDArray[np.int64], of: Any, what: str) -> NDArray[np.int32]:
    """The index of each id in ``ids``, which are sorted."""
    of = np.asarray(of, dtype=np.int64)
    index = np.searchsorted(ids, of)
    unknown = np.ones(len(of), dtype=bool) if not len(ids) else ids[np.minimum(index, len(ids) - 1)] != of
    if unknown.any():
        raise InputError(f"{what} {of[unknown][0]} of a detection or annotation is none of the {len(ids)} of the set")
    return index.astype(np.int32)


def _other_size(area: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n, A): whether an area is outside of a range."""
    low, high = np.array(list(AREAS.values())).T
    return (area[:, None] < low) | (area[:, None] > high)


def _groups(
    pair: NDArray[np.int64], object_pair: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The pairs (category, image) that have detections and objects, grouped by their numbers, padded with -1.

    Args:
        pair, object_pair: of each detection and each object, ascending.

    Yields:
        Rows of detections (P, D) and of objects (P, G) of P pairs.
    """
    both = np.intersect1d(pair, object_pair)
    first, last = np.searchsorted(pair, both), np.searchsorted(pair, both, side="right")
    first_object, last_object = np.searchsorted(object_pair, both), np.searchsorted(object_pair, both, side="right")
    counts, objects = last - first, last_object - first_object
    sizes = np.stack([np.ceil(np.log2(counts)), np.ceil(np.log2(objects))], axis=1)
    for size in np.unique(sizes, axis=0):
        chosen = np.flatnonzero((sizes == size).all(axis=1))
        yield (
            _rows(first[chosen], counts[chosen]),
            _rows(first_object[chosen], objects[chosen]),
        )


def _rows(first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P, the largest count): first, first + 1, ..., and -1 behind each count."""
    steps = np.arange(counts.max())
    return np.where(steps < counts[:, None], first[:, None] + steps, -1)


def _intersection_over_union(
    boxes: NDArray[np.float64], objects: NDArray[np.float64], crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """(P, D, 4), (P, G, 4) as x, y, width, height, and (P, G) -> (P, D, G); of a crowd, over the detection's area."""
    boxes, objects = boxes[:, :, None], objects[:, None]
    sides = np.minimum(boxes[..., :2] + boxes[..., 2:], objects[..., :2] + objects[..., 2:])
    sides = np.maximum(sides - np.maximum(boxes[..., :2], objects[..., :2]), 0)
    shared, area = sides[..., 0] * sides[..., 1], boxes[..., 2] * boxes[..., 3]
    union = np.where(crowd[:, None], area, area + objects[..., 2] * objects[..., 3] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def _assign(
    ious: NDArray[np.float64], counted: NDArray[np.bool_], crowd: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The greedy assignment of P pairs at once.

    Args:
        ious: (P, D, G), detections by falling score; -1 where there is no detection or object.
        counted: (P, G, A). crowd: (P, G), which any number of detections may take.

    Returns:
        hit, ignored: (P, D, A, T); of a detection that has taken something, ``ignored`` says that it was not counted.
    """
    pairs, detections, objects = ious.shape
    wanted = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    to_find = counted.transpose(0, 2, 1)[:, :, None]  # (P, A, 1, G)
    shape = (pairs, len(AREAS), len(THRESHOLDS), objects)
    taken, hit = np.zeros(shape, dtype=bool), np.zeros((pairs, detections, *shape[1:3]), dtype=bool)
    ignored = np.zeros_like(hit)
    for number in range(detections):
        iou = ious[:, number, None, None]  # (P, 1, 1, G)
        free = (iou >= wanted) & ~(taken & ~crowd[:, None, None])
        real = np.asarray((free & to_find).any(axis=-1))
        # An object to find goes before any other; of equal IoU the last.
        usable = free & (to_find | ~real[..., None])
        best = objects - 1 - np.argmax(np.where(usable, iou, -1)[..., ::-1], axis=-1)
        hit[:, number] = usable.any(axis=-1)
        ignored[:, number] = hit[:, number] & ~real
        where = np.nonzero(hit[:, number])
        taken[(*where, best[where])] = True
    return hit, ignored
