"""Rows of eval.py to tables: seeds grouped, deltas computed, and refused where protocols or test sets differ."""

import json
import statistics
from dataclasses import dataclass
from typing import Any

from lip_resnet.config import EFFECTS, Config, Effect, InputError
from lip_resnet.evaluation.protocol import EvalConfig
from lip_resnet.evaluation.testsets import IMAGES

PUBLISHED = {"bottleneck_width": 128, "init": "reference"}
"""Keywords of the published networks; a recipe may spell them out."""

_ADDED_LATER = {"crop_mode": "center"}
"""Keys of a protocol that old rows lack, and what they were."""


def describe_training(
    config: Config,
    processes: list[int],
    initial_weights: dict[str, Any] | None = None,
    datasets: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """How weights were trained: the keys that change them, but for the model and the seed.

    Args:
        config: the recipe that they were trained with, as the checkpoint holds it.
        processes: the numbers of processes that did, in order; usually one.
        initial_weights: the checkpoint's ``initial_weights``. Of weights that a run started from, their own training
            counts where it is known, else the file's sha256; None (older checkpoints): the path in the recipe.
        datasets: the checkpoint's ``datasets``. Of a selection by ``data.classes``, the digest of the training images'
            names counts; None (older checkpoints): the path in the recipe.
    """
    training = {key: value for key, value in config.values(Effect.WEIGHTS).items() if not key.startswith("model.")}
    del training["train.seed"]
    start: Any = config.model.weights
    if start is not None and isinstance(initial_weights, dict):
        start = initial_weights.get("training") or {"sha256": initial_weights.get("sha256")}
    training |= {"model.weights": start, "model.new_head": config.model.new_head}
    selection: Any = config.data.classes
    train_set = datasets.get("train") if isinstance(datasets, dict) else None
    if selection is not None and isinstance(train_set, dict):
        selection = train_set.get("names") or selection
    training["data.classes"] = selection
    # Batch statistics see this many images: on another number of processes it is another experiment.
    shares = [config.optim.accumulate * (1 if config.train.sync_bn else count) for count in processes]
    training["images_per_batch_norm"] = ", then ".join(str(config.data.batch_size // share) for share in shares)
    return training


def update_training(training: dict[str, Any]) -> dict[str, Any]:
    """``describe_training`` of an earlier version as today's: no keys that change no weights, new ones by default."""
    minimal = {"model": {"name": "-"}, "data": {"name": "digits", "batch_size": 1}, "optim": {"lr": 1.0}}
    defaults = describe_training(Config.model_validate({**minimal, "train": {"epochs": 1}}), [1])
    return defaults | {key: each for key, each in training.items() if key in defaults or key not in EFFECTS}


def describe_protocol(
    config: EvalConfig, training: dict[str, Any] | None, test_set: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All that must be equal before two accuracies may be subtracted: data, evaluation and training.

    Args:
        config: what was evaluated, and how.
        training: ``describe_training`` of the weights; None where it is unknown.
        test_set: ``EvalSet.protocol``: its name and scoring, where it is not a recipe's validation set.
    """
    data = config.data.model_dump(mode="json")
    about = {"data": data["name"], "classes": config.model.num_classes, **(test_set or {})}
    evaluation = {key: data[key] for key in ("eval_size", "eval_resize", "crop_mode", "interpolation", "mean", "std")}
    evaluation |= {"precision": config.precision, "decode": "exact", "views": "one centre crop"}
    return {**about, **evaluation, "training": training}


@dataclass(frozen=True)
class Entry:
    """One line of a table: a model under one protocol, over its seeds."""

    label: str
    model: str
    rows: list[dict[str, Any]]

    @property
    def network(self) -> str:
        """The model and its keywords where they are not the published ones, without what the weights are."""
        return label(self.model, unpublished(keywords_of(self.rows[0])))

    @property
    def test_set(self) -> str:
        """What the images are, in tables."""
        row = self.rows[0]
        return self.protocol.get("test_set") or (row.get("dataset") or {}).get("name") or self.protocol["data"]

    @property
    def protocol(self) -> dict[str, Any]:
        """That of every row."""
        return self.rows[0]["protocol"]

    @property
    def baseline(self) -> str | None:
        """The model that a delta is taken to: the same without LIP, or without another downsampling."""
        if self.rows[0].get("downsampling"):
            return self.model
        return self.model.removeprefix("lip_") if self.model.startswith("lip_") else None

    def mean(self, key: str) -> float:
        """Over the seeds."""
        return statistics.fmean(row[key] for row in self.rows)

    def deviation(self, key: str) -> float | None:
        """Sample standard deviation over the seeds; None for one."""
        return statistics.stdev(row[key] for row in self.rows) if len(self.rows) > 1 else None


def keywords_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row's network has beside its model's name: keywords, and layers put in place of its own."""
    return {**(row.get("args") or {}), **(row.get("downsampling") or {})}


def unpublished(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords that make another network than the published one."""
    return {key: value for key, value in keywords.items() if PUBLISHED.get(key) != value}


def label(model: str, keywords: dict[str, Any]) -> str:
    """A network's name in tables: the model, and its keywords where it has any."""
    options = ", ".join(f"{key}={value}" for key, value in keywords.items())
    return model + (f" ({options})" if options else "")


def group(rows: list[dict[str, Any]]) -> list[Entry]:
    """Rows that differ only in their seed become one entry; the order of first appearance stays.

    Raises:
        InputError: the same seed twice: a mean over it would count one run double.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        identity = [
            row["model"],
            row.get("args"),
            row.get("downsampling"),
            row.get("weights"),
            row.get("selected_on_val"),
            row["images"],
            [_digest(row, key) for key in ("names", "content")],
            {**_ADDED_LATER, **row["protocol"]},
        ]
        if row.get("seed") is None:
            identity.append(row.get("checkpoint"))
        groups.setdefault(json.dumps(identity, sort_keys=True), []).append(row)
    entries = []
    for members in groups.values():
        seeds = [row.get("seed") for row in members]
        if len(seeds) != len(set(seeds)):
            raise InputError(f"{members[0]['model']}: two rows have the same seed {sorted(seeds)}; give each run once")
        first = members[0]
        text = label(first["model"], keywords_of(first))
        text += ", EMA" if first.get("weights") == "ema" else ""
        text += ", best epoch (selected on val)" if first.get("selected_on_val") else ""
        entries.append(Entry(text, first["model"], members))
    return entries


def _digest(row: dict[str, Any], key: str) -> str | None:
    return (row.get("dataset") or {}).get(key)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """The first thing in which two protocols differ, or None."""
    ours, theirs = {**_ADDED_LATER, **ours}, {**_ADDED_LATER, **theirs}
    for part, other in ((ours, theirs), (ours.get("training") or {}, theirs.get("training") or {})):
        for key in sorted(part.keys() | other.keys()):
            if key != "training" and (one := part.get(key)) != (two := other.get(key)):
                return _other_start(one, two) if key == "model.weights" else f"{key}: {one} against {two}"
    return None


def _other_start(ours: Any, theirs: Any) -> str:
    """In words, how two different entries ``model.weights`` of ``describe_training`` differ."""
    kinds = [
        {True: "a file of unknown training", False: "weights of a known training"}["sha256" in start]
        if isinstance(start, dict)
        else str(start or "random weights")
        for start in (ours, theirs)
    ]
    if kinds[0] != kinds[1]:
        return f"model.weights: started from {kinds[0]} against {kinds[1]}"
    if "sha256" in ours:
        return "model.weights: started from two different files whose training is unknown"
    return f"model.weights: the weights started from differ in {difference({'training': ours}, {'training': theirs})}"


def _incomparable(ours: Entry, theirs: Entry) -> str | None:
    """Why two accuracies may not be subtracted, or None where they may."""
    if ours.protocol["training"] is None or theirs.protocol["training"] is None:
        return "unknown training protocol"
    for key in ("images", "weights", "selected_on_val"):
        if ours.rows[0].get(key) != theirs.rows[0].get(key):
            return f"{key}: {ours.rows[0].get(key)} against {theirs.rows[0].get(key)}"
    for key in ("names", "content"):
        digests = {_digest(ours.rows[0], key), _digest(theirs.rows[0], key)} - {None}
        if len(digests) > 1:
            return f"other images (dataset.{key})"
    return difference(ours.protocol, theirs.protocol)


def _delta(entry: Entry, entries: list[Entry], key: str) -> tuple[str | None, str | None]:
    """An entry's distance to its baseline on the same test set, or why there is none; neither where nothing is near."""
    if entry.baseline is None:
        return None, None
    partners = [
        other
        for other in entries
        if other.model == entry.baseline and not other.rows[0].get("downsampling") and other.test_set == entry.test_set
    ]
    differences = [_incomparable(entry, other) for other in partners]
    if None in differences:
        return f"{entry.mean(key) - partners[differences.index(None)].mean(key):+.2f}", None
    if not partners:
        return None, None
    where = f" on {entry.test_set}" if "test_set" in entry.protocol else ""
    return None, f"no delta for {entry.label}{where}, its protocol is not {partners[0].label}'s: {differences[0]}"


def build_table(rows: list[dict[str, Any]], paper: dict[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Rows and the paper's figures -> (header, lines, notes).

    A network's delta is to its baseline (``Entry.baseline``) on the same test set under the same protocol. Where only
    other protocols are at hand there is no delta, and a note says what differs.

    Args:
        paper: ``label`` of a network -> published ``top1`` and ``top5``, shown beside runs on ImageNet's 50,000.
    """
    entries, notes = group(rows), []
    with_paper = any(_is_imagenet(entry) and entry.network in paper for entry in entries)
    with_sets = len({entry.test_set for entry in entries}) > 1
    with_mce = any("mce" in entry.rows[0] for entry in entries)
    header = ["model"] + ["test set"] * with_sets + ["params (M)", "MACs (G)", "top-1 (%)", "top-5 (%)", "delta top-1"]
    header += ["mCE (%)"] * with_mce + ["seeds", "images"] + ["paper top-1", "paper top-5"] * with_paper
    lines = []
    for entry in entries:
        delta, note = _delta(entry, entries, "top1")
        notes += [note] if note else []
        line = [entry.label] + [entry.test_set] * with_sets
        line += [f"{entry.mean('params') / 1e6:.2f}", f"{entry.mean('macs') / 1e9:.3f}"]
        line += [_with_deviation(entry, "top1"), _with_deviation(entry, "top5"), delta or "-"]
        if with_mce:
            line.append(_with_deviation(entry, "mce") if "mce" in entry.rows[0] else "-")
        line += [str(len(entry.rows)), str(entry.rows[0]["images"])]
        if with_paper:
            published = paper.get(entry.network, {}) if _is_imagenet(entry) else {}
            line += [f"{published[key]:.2f}" if key in published else "-" for key in ("top1", "top5")]
        lines.append(line)
    return header, lines, notes


def build_wide(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]], list[str]]:
    """Rows -> (header, lines, notes): a line a network, a column a test set.

    Cells are top-1, ImageNet-C's the mCE, with the delta to the baseline on the same set in brackets.

    Raises:
        InputError: a network has two figures for one set.
    """
    entries, notes = group(rows), []
    order = [*IMAGES, *(entry.test_set for entry in entries)]
    sets = sorted({entry.test_set for entry in entries}, key=order.index)
    networks: dict[str, dict[str, Entry]] = {}
    of_a_set = {"data", "classes", "test_set", "scoring", "lacks", "eval_size", "eval_resize", "crop_mode"}
    for entry in entries:
        protocol = {key: value for key, value in entry.protocol.items() if key not in of_a_set}
        by_set = networks.setdefault(json.dumps([entry.label, protocol], sort_keys=True), {})
        if entry.test_set in by_set:
            other = by_set[entry.test_set].protocol
            why = difference(entry.protocol, other) or "they are of other checkpoints or images"
            raise InputError(f"{entry.label} has two figures on {entry.test_set}, give one of them: {why}")
        by_set[entry.test_set] = entry
    lines = []
    for by_set in networks.values():
        first = next(iter(by_set.values()))
        cells = []
        for name in sets:
            entry = by_set.get(name)
            key = "mce" if name == "imagenet-c" else "top1"
            if entry is None or key not in entry.rows[0]:
                cells.append("-")
                continue
            delta, note = _delta(entry, [other for other in entries if key in other.rows[0]], key)
            cells.append(_with_deviation(entry, key) + (f" ({delta})" if delta else ""))
            notes += [note] if note else []
            if (entry.rows[0].get("dataset") or {}).get("whole") is False:
                notes.append(f"{name}: {entry.rows[0]['images']:,} images, which is not all of it")
        seeds = sorted({len(entry.rows) for entry in by_set.values()})
        lines.append([first.label, f"{first.mean('params') / 1e6:.2f}", *cells, " or ".join(map(str, seeds))])
    columns = [f"{name} {'mCE' if name == 'imagenet-c' else 'top-1'} (%)" for name in sets]
    return ["model", "params (M)", *columns, "seeds"], lines, list(dict.fromkeys(notes))


def _is_imagenet(entry: Entry) -> bool:
    protocol = entry.protocol
    return protocol["classes"] == 1000 and entry.rows[0]["images"] == 50000 and "test_set" not in protocol


def _with_deviation(entry: Entry, key: str) -> str:
    deviation = entry.deviation(key)
    return f"{entry.mean(key):.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
