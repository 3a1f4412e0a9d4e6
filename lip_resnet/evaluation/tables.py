"""Tables: rows of eval.py grouped over seeds, with deltas to baselines."""

import json
import statistics
from dataclasses import dataclass, replace
from typing import Any

from lip_resnet.config import InputError
from lip_resnet.evaluation.average_precision import METRICS
from lip_resnet.evaluation.protocol import ADDED_KEYS, difference
from lip_resnet.evaluation.render import Measured
from lip_resnet.evaluation.rows import is_detection
from lip_resnet.evaluation.testsets import IMAGES

_KEYS_OF_SET = {"images", "data", "classes", "test_set", "scoring", "lacks", "eval_size", "eval_resize", "crop_mode"}
"""Facts of a row (``_facts``) that are of the test set, not of the network."""

_DIGESTS = ("names", "content", "annotations")
"""What a row records of its images; annotations are a detector's."""
_FIGURES = {"top1": "top-1", "top5": "top-5"}
"""Columns of classifiers; those of detectors are ``METRICS``."""

PUBLISHED = {"bottleneck_width": 128, "init": "reference"}
"""Keywords of the published networks: a recipe with these values is the network without keywords."""


@dataclass(frozen=True)
class Entry:
    """One line of a table: a model under one protocol, over its seeds."""

    name: str
    """The network and kind of weights."""
    label: str
    """The name, with the facts in which it differs from other entries of that name on the same test set."""
    model: str
    rows: list[dict[str, Any]]

    @property
    def network(self) -> str:
        """The model, with keywords that are not the published ones, and its detector; without the kind of weights."""
        return label(self.model, unpublished(keywords_of(self.rows[0])), self.rows[0].get("detector"))

    @property
    def test_set(self) -> str:
        """Name of the images in tables."""
        row = self.rows[0]
        return self.protocol.get("test_set") or (row.get("dataset") or {}).get("name") or self.protocol["data"]

    @property
    def protocol(self) -> dict[str, Any]:
        """The protocol, which all rows share."""
        return self.rows[0]["protocol"]

    @property
    def baseline(self) -> str | None:
        """The model that a delta is computed against: the same without LIP, or as it is without changes."""
        if _is_changed(self.rows[0]):
            return self.model
        return self.model.removeprefix("lip_") if self.model.startswith("lip_") else None

    def mean(self, key: str) -> float:
        """Mean over the seeds."""
        return statistics.fmean(row[key] for row in self.rows)

    def measured(self, key: str) -> str:
        """Mean and deviation as a cell; a dash where a set has no such objects."""
        known = all(row.get(key) is not None for row in self.rows)
        return Measured(self.mean(key), self.deviation(key)) if known else "-"

    @property
    def figures(self) -> dict[str, str]:
        """Keys of the row's figures -> their names in tables, the one that is compared first."""
        return {name: name for name in METRICS} if is_detection(self.rows[0]) else _FIGURES

    def deviation(self, key: str) -> float | None:
        """Sample standard deviation over the seeds; None for one."""
        return statistics.stdev(row[key] for row in self.rows) if len(self.rows) > 1 else None


def _is_changed(row: dict[str, Any]) -> bool:
    """Whether a row's network has other downsampling or padding than the model of its name."""
    return bool(row.get("downsampling") or row.get("circular_padding"))


def keywords_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row's keywords of the network: ``model.args``, ``model.downsampling`` with layers and placements, padding."""
    downsampling = row.get("downsampling") or {}
    if isinstance(downsampling, str):
        downsampling = {"downsampling": downsampling}
    layers = {site: _spell(choice) for site, choice in downsampling.items()}
    padding = {"circular_padding": True} if row.get("circular_padding") else {}
    return {**(row.get("args") or {}), **layers, **padding}


def _spell(choice: str | dict[str, Any]) -> str:
    """A layer, or a mapping with its placement and window, in one form whatever the order of the recipe's keys."""
    if isinstance(choice, str):
        return choice
    window = choice.get("kernel_size")
    parts = (choice.get("layer"), choice.get("placement"), window and f"kernel_size {window}")
    return " ".join(part for part in parts if part)


def unpublished(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords that are not the published network's."""
    return {key: value for key, value in keywords.items() if PUBLISHED.get(key) != value}


def label(model: str, keywords: dict[str, Any], detector: str | None = None) -> str:
    """A network's name in tables: the model, with its keywords in brackets; and the detector whose backbone it is."""
    options = ", ".join(f"{key}={value}" for key, value in keywords.items())
    return model + (f" ({options})" if options else "") + (f", {detector}" if detector else "")


def group(rows: list[dict[str, Any]]) -> list[Entry]:
    """Group rows that differ only in their seed into entries, in order of first appearance.

    Raises:
        InputError: two rows have the same seed, so that a mean would count one run twice.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        identity = [
            row["model"],
            row.get("args"),
            row.get("downsampling"),
            bool(row.get("circular_padding")),
            row.get("weights"),
            row.get("selected_on_val"),
            row["images"],
            [_digest(row, key) for key in _DIGESTS],
            {**ADDED_KEYS, **row["protocol"]},
        ]
        if row.get("seed") is None:
            identity.append(row.get("checkpoint"))
        groups.setdefault(json.dumps(identity, sort_keys=True), []).append(row)
    entries = []
    for members in groups.values():
        seeds = [row.get("seed") for row in members]
        if None in seeds and len(seeds) > 1:
            raise InputError(f"{members[0]['model']}: two rows of {members[0].get('checkpoint')}; give each once")
        if len(seeds) != len(set(seeds)):
            numbers = ", ".join(map(str, seeds))
            raise InputError(f"{members[0]['model']}: two rows have the same seed ({numbers}); give each run once")
        first = members[0]
        text = label(first["model"], keywords_of(first), first.get("detector"))
        text += ", EMA" if first.get("weights") == "ema" else ""
        text += ", best epoch (selected on val)" if first.get("selected_on_val") else ""
        entries.append(Entry(text, text, first["model"], members))
    return _distinguish(entries)


def _facts(entry: Entry) -> dict[str, str]:
    """What may differ between entries of one name: protocol, training and images."""
    training = entry.protocol.get("training") or {"training": None}
    facts = {"images": entry.rows[0]["images"], **ADDED_KEYS, **entry.protocol, **training}
    facts |= {f"dataset.{key}": _digest(entry.rows[0], key) for key in _DIGESTS}
    return {key: str(value) for key, value in facts.items() if key != "training" or value is None}


def _distinguish(entries: list[Entry], per_set: bool = True) -> list[Entry]:
    """Entries with labels of their own: those of one name (``per_set``: and test set) get what differs in brackets."""
    groups: dict[Any, list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.name, per_set and entry.test_set), []).append(entry)
    labelled = {}
    for twins in groups.values():
        facts = [_facts(twin) for twin in twins]
        keys = [
            key for key in dict.fromkeys(key for fact in facts for key in fact) if per_set or key not in _KEYS_OF_SET
        ]
        keys = [key for key in keys if len({fact.get(key) for fact in facts}) > 1][:3]
        labels = [", ".join(f"{key}={str(fact.get(key))[:40]}" for key in keys) for fact in facts]
        if len(set(labels)) < len(twins):
            labels = [
                ", ".join(filter(None, (text, str(twin.rows[0].get("checkpoint")))))
                for text, twin in zip(labels, twins, strict=True)
            ]
        for twin, text in zip(twins, labels, strict=True):
            labelled[id(twin)] = replace(twin, label=f"{twin.name} [{text}]" if len(twins) > 1 else twin.name)
    return [labelled[id(entry)] for entry in entries]


def _digest(row: dict[str, Any], key: str) -> str | None:
    return (row.get("dataset") or {}).get(key)


def _incomparable(ours: Entry, theirs: Entry) -> str | None:
    """Why two accuracies may not be subtracted, or None where they may."""
    if ours.protocol["training"] is None or theirs.protocol["training"] is None:
        return "unknown training protocol"
    for key in ("images", "weights", "selected_on_val"):
        if ours.rows[0].get(key) != theirs.rows[0].get(key):
            return f"{key}: {ours.rows[0].get(key)} against {theirs.rows[0].get(key)}"
    for key in _DIGESTS:
        digests = {_digest(ours.rows[0], key), _digest(theirs.rows[0], key)} - {None}
        if len(digests) > 1:
            return f"other images (dataset.{key})"
    return difference(ours.protocol, theirs.protocol)


def _delta(entry: Entry, entries: list[Entry], key: str, baseline: str | None) -> tuple[str | None, list[str]]:
    """An entry's delta to its baseline on the same test set, or None; and notes: why there is none, unequal seeds.

    Args:
        baseline: label or name of the entry to compare with; None: ``Entry.baseline``.
    """
    on_set = [other for other in entries if other.protocol.get("test_set") == entry.protocol.get("test_set")]
    wanted = baseline or entry.baseline
    if baseline is not None:
        partners = [other for other in on_set if baseline in (other.label, other.name)]
    else:
        partners = [other for other in on_set if other.model == wanted and not _is_changed(other.rows[0])]
    if wanted is None or entry in partners:
        return None, []
    where = f" on {entry.test_set}" if "test_set" in entry.protocol else ""
    if not partners:
        hint = "" if baseline else "; --baseline LABEL compares with another row"
        return None, [f"no delta for {entry.label}{where}: no row of {wanted}{hint}"]
    differences = [_incomparable(entry, other) for other in partners]
    if None not in differences:
        other = partners[0].label
        return None, [f"no delta for {entry.label}{where}, its protocol is not {other}'s: {differences[0]}"]
    partner = partners[differences.index(None)]
    seeds = [len(each.rows) for each in (entry, partner)]
    notes = [
        f"delta of {entry.label}{where} to {partner.label}: unequal numbers of seeds, {seeds[0]} against {seeds[1]}"
    ]
    return f"{entry.mean(key) - partner.mean(key):+.2f}", notes if seeds[0] != seeds[1] else []


def _check_baseline(baseline: str | None, entries: list[Entry]) -> None:
    names = list(dict.fromkeys(name for entry in entries for name in (entry.name, entry.label)))
    if baseline is not None and baseline not in names:
        raise InputError(f"--baseline {baseline}: no row has this label; the labels are {'; '.join(names)}")


def build_table(
    rows: list[dict[str, Any]], paper: dict[str, Any], baseline: str | None = None
) -> tuple[list[str], list[list[str]], list[str]]:
    """Rows and the paper's figures -> (header, lines, notes).

    A network's delta is to its baseline on the same test set under the same protocol. Where the baseline has no rows,
    or rows of other protocols only, there is no delta and a note says so.

    Args:
        paper: ``label`` of a network -> published figures, shown beside runs on ImageNet's 50,000 images and COCO's
            5,000.
        baseline: the ``Entry`` that all others are compared with, by its label or name; None: ``Entry.baseline``.

    Raises:
        InputError: rows are of classifiers and of detectors, no entry has the label ``baseline``, or as ``group``.
    """
    entries, notes = group(rows), list[str]()
    figures = _common_figures(entries)
    main = next(iter(figures))
    _check_baseline(baseline, entries)
    with_paper = any(_published(entry, paper) for entry in entries)
    with_sets = len({entry.test_set for entry in entries}) > 1
    with_mce = any("mce" in entry.rows[0] for entry in entries)
    header = ["model"] + ["test set"] * with_sets + ["params (M)", "MACs (G)"]
    header += [f"{name} (%)" for name in figures.values()] + [f"delta {figures[main]}"]
    header += ["mCE (%)"] * with_mce + ["seeds", "images"]
    header += [f"paper {name}" for name in figures.values()] * with_paper
    lines = []
    for entry in entries:
        delta, why = _delta(entry, entries, main, baseline)
        notes += why
        line = [entry.label] + [entry.test_set] * with_sets
        line += [f"{entry.mean('params') / 1e6:.2f}", f"{entry.mean('macs') / 1e9:.3f}"]
        line += [*map(entry.measured, figures), delta or "-"] + [entry.measured("mce")] * with_mce
        line += [str(len(entry.rows)), str(entry.rows[0]["images"])]
        if with_paper:
            published = _published(entry, paper) or {}
            line += [f"{published[key]:.2f}" if key in published else "-" for key in figures]
        lines.append(line)
    return header, lines, notes


def build_wide(rows: list[dict[str, Any]], baseline: str | None = None) -> tuple[list[str], list[list[str]], list[str]]:
    """Rows -> (header, lines, notes): one line for each network, one column for each test set.

    Cells are top-1 or AP (the mCE for ImageNet-C), with the delta to the baseline on the same set in brackets.

    Args:
        baseline: as for ``build_table``.

    Raises:
        InputError: a network has two figures for one set; no entry has the label ``baseline``; or as ``group``.
    """
    entries, notes = group(rows), list[str]()
    main, shown = next(iter(_common_figures(entries).items()))
    _check_baseline(baseline, entries)
    order = [*IMAGES, *(entry.test_set for entry in entries)]
    sets = sorted({entry.test_set for entry in entries}, key=order.index)
    networks: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        protocol = {key: value for key, value in entry.protocol.items() if key not in _KEYS_OF_SET}
        by_set = networks.setdefault(json.dumps([entry.name, protocol], sort_keys=True), {})
        if entry.test_set in by_set:
            other = by_set[entry.test_set].protocol
            why = difference(entry.protocol, other) or "they are of other checkpoints or images"
            raise InputError(f"{entry.name} has two figures on {entry.test_set}, give one of them: {why}")
        by_set[entry.test_set] = entry
    lines = []
    firsts = _distinguish([next(iter(by_set.values())) for by_set in networks.values()], per_set=False)
    for first, by_set in zip(firsts, networks.values(), strict=True):
        cells: list[str] = []
        for name in sets:
            key = "mce" if name == "imagenet-c" else main
            if name not in by_set or key not in by_set[name].rows[0]:
                cells.append("-")
                continue
            entry = by_set[name]
            delta, reasons = _delta(entry, [other for other in entries if key in other.rows[0]], key, baseline)
            cells.append(Measured(entry.mean(key), entry.deviation(key), delta, len(entry.rows)))
            notes += reasons
            if (entry.rows[0].get("dataset") or {}).get("whole") is False:
                notes.append(f"{name}: {entry.rows[0]['images']:,} images, which is not all of it")
        seeds = sorted({len(entry.rows) for entry in by_set.values()})
        lines.append([first.label, f"{first.mean('params') / 1e6:.2f}", *cells, " or ".join(map(str, seeds))])
    columns = [f"{name} {'mCE' if name == 'imagenet-c' else shown} (%)" for name in sets]
    return ["model", "params (M)", *columns, "seeds"], lines, list(dict.fromkeys(notes))


def _common_figures(entries: list[Entry]) -> dict[str, str]:
    """``Entry.figures`` of all."""
    figures = [entry.figures for entry in entries]
    other = next((entry for entry in entries if entry.figures != figures[0]), None)
    if other is not None:
        raise InputError(f"{entries[0].label} and {other.label}: a classifier and a detector; make a table of each")
    return figures[0]


def _published(entry: Entry, paper: dict[str, Any]) -> dict[str, float] | None:
    """The published figures of an entry: of its network, and of a detector's schedule too."""
    epochs = (entry.protocol.get("training") or {}).get("train.epochs")
    key = entry.network + (f", {epochs} epochs" if is_detection(entry.rows[0]) else "")
    return paper.get(key) if _is_the_papers_set(entry) else None


def _is_the_papers_set(entry: Entry) -> bool:
    """Whether a row is of ImageNet's whole validation set, or of a detector on COCO's."""
    protocol = entry.protocol
    if is_detection(entry.rows[0]):
        coco = (protocol["data"], protocol.get("split"), protocol["classes"]) == ("coco", "val2017", 80)
        return coco and entry.rows[0]["images"] == 5000
    imagenet = (entry.rows[0].get("dataset") or {"name": "imagenet"})["name"] == "imagenet"
    return imagenet and protocol["classes"] == 1000 and entry.rows[0]["images"] == 50000 and "test_set" not in protocol
