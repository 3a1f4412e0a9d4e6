"""Tables: rows of eval.py grouped over seeds, with deltas to baselines; any table as Markdown, CSV or LaTeX."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lip_resnet.config import InputError
from lip_resnet.evaluation.protocol import ADDED_KEYS, difference
from lip_resnet.evaluation.testsets import IMAGES

STYLES = ("md", "csv", "latex")

PUBLISHED = {"bottleneck_width": 128, "init": "reference"}
"""Keywords of the published networks: a recipe with these values is the network without keywords."""


@dataclass(frozen=True)
class Entry:
    """One line of a table: a model under one protocol, over its seeds."""

    label: str
    model: str
    rows: list[dict[str, Any]]

    @property
    def network(self) -> str:
        """The model, with keywords that are not the published ones; without the kind of weights."""
        return label(self.model, unpublished(keywords_of(self.rows[0])))

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
        """The model that a delta is computed against: the same without LIP, or with its own downsampling."""
        if self.rows[0].get("downsampling"):
            return self.model
        return self.model.removeprefix("lip_") if self.model.startswith("lip_") else None

    def mean(self, key: str) -> float:
        """Mean over the seeds."""
        return statistics.fmean(row[key] for row in self.rows)

    def deviation(self, key: str) -> float | None:
        """Sample standard deviation over the seeds; None for one."""
        return statistics.stdev(row[key] for row in self.rows) if len(self.rows) > 1 else None


def keywords_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row's keywords of the network: its ``model.args`` and ``model.downsampling``."""
    return {**(row.get("args") or {}), **(row.get("downsampling") or {})}


def unpublished(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords that are not the published network's."""
    return {key: value for key, value in keywords.items() if PUBLISHED.get(key) != value}


def label(model: str, keywords: dict[str, Any]) -> str:
    """A network's name in tables: the model, with its keywords in brackets."""
    options = ", ".join(f"{key}={value}" for key, value in keywords.items())
    return model + (f" ({options})" if options else "")


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
            row.get("weights"),
            row.get("selected_on_val"),
            row["images"],
            [_digest(row, key) for key in ("names", "content")],
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
        text = label(first["model"], keywords_of(first))
        text += ", EMA" if first.get("weights") == "ema" else ""
        text += ", best epoch (selected on val)" if first.get("selected_on_val") else ""
        entries.append(Entry(text, first["model"], members))
    return entries


def _digest(row: dict[str, Any], key: str) -> str | None:
    return (row.get("dataset") or {}).get(key)


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
    """An entry's delta to its baseline on the same test set, or a note why there is none.

    (None, None) where the network or the test set has no baseline row.
    """
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

    A network's delta is to its baseline (``Entry.baseline``) on the same test set under the same protocol. Where the
    baseline has rows of other protocols only, there is no delta and a note says what differs.

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
        line += [_format_mean(entry, "top1"), _format_mean(entry, "top5"), delta or "-"]
        if with_mce:
            line.append(_format_mean(entry, "mce") if "mce" in entry.rows[0] else "-")
        line += [str(len(entry.rows)), str(entry.rows[0]["images"])]
        if with_paper:
            published = paper.get(entry.network, {}) if _is_imagenet(entry) else {}
            line += [f"{published[key]:.2f}" if key in published else "-" for key in ("top1", "top5")]
        lines.append(line)
    return header, lines, notes


def build_wide(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]], list[str]]:
    """Rows -> (header, lines, notes): one line for each network, one column for each test set.

    Cells are top-1 (the mCE for ImageNet-C), with the delta to the baseline on the same set in brackets.

    Raises:
        InputError: a network has two figures for one set.
    """
    entries, notes = group(rows), []
    order = [*IMAGES, *(entry.test_set for entry in entries)]
    sets = sorted({entry.test_set for entry in entries}, key=order.index)
    networks: dict[str, dict[str, Entry]] = {}
    keys_of_set = {"data", "classes", "test_set", "scoring", "lacks", "eval_size", "eval_resize", "crop_mode"}
    for entry in entries:
        protocol = {key: value for key, value in entry.protocol.items() if key not in keys_of_set}
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
            key = "mce" if name == "imagenet-c" else "top1"
            if name not in by_set or key not in by_set[name].rows[0]:
                cells.append("-")
                continue
            entry = by_set[name]
            delta, note = _delta(entry, [other for other in entries if key in other.rows[0]], key)
            cells.append(_format_mean(entry, key) + (f" ({delta})" if delta else ""))
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


def _format_mean(entry: Entry, key: str) -> str:
    deviation = entry.deviation(key)
    return f"{entry.mean(key):.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def render(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = (), style: str = "md") -> str:
    """A table as text that ends in a newline.

    Args:
        header: names of the columns; the first column is aligned left, all others right.
        rows: each with one cell for each column.
        notes: lines below the table: plain in ``md``, comments in ``latex``, omitted in ``csv``.
        style: one of ``STYLES``.
    """
    lines = [header, *rows]
    if style == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(lines)
        return buffer.getvalue()
    if style == "latex":
        escape = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$"})
        body = [" & ".join(cell.translate(escape) for cell in line) + r" \\" for line in lines]
        body = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\hline", body[0], r"\hline", *body[1:]]
        return "\n".join([*body, r"\hline", r"\end{tabular}", *(f"% {note}" for note in notes)]) + "\n"
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * (widths[0])] + ["-" * (width - 1) + ":" for width in widths[1:]]
    table = []
    for line in [header, rule, *rows]:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        table.append("| " + " | ".join([line[0].ljust(widths[0]), *numbers]) + " |")
    return "\n".join([*table, "", *notes]).rstrip() + "\n"
