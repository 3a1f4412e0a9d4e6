"""The compact record of a study, small enough to be committed: ``report`` reads it as it reads the run folders.

``study.yaml`` as it was run; ``cells.jsonl``, one line a cell, with its row, learning curve and probes;
``predictions.csv.gz``, top-1 of every image by every cell, or of detectors ``matches.npz``; ``costs.json``. Folders of
the machine are left out.
"""

import csv
import gzip
import io
import math
import re
from pathlib import Path
from typing import Any

import yaml

from lip_resnet.errors import InputError
from lip_resnet.evaluation.matching import write_matches
from lip_resnet.files import to_json, write_atomically, write_text
from lip_resnet.study import detection
from lip_resnet.study.costs import COSTS, read_costs
from lip_resnet.study.design import EXPORTED_CELLS, Design, check_same, load_record, parse_record
from lip_resnet.study.results import EXPORTED_PREDICTIONS, Result, load_failed, load_results

_FILES = {"study.yaml", EXPORTED_CELLS, EXPORTED_PREDICTIONS, detection.EXPORTED_MATCHES, COSTS}
_REPORT = {"report.md", "report.html", "report.csv", "figures"}
_FOLDERS = re.compile(r"(?<![\w.:~/-])/(?:[^/\s'\"]+/)+")
"""The folders of an absolute path; no URL and no relative path."""


def export(design: Design, folder: Path) -> str:
    """Write the finished and failed cells of a study into ``folder``; returns a line for the terminal.

    The folder may hold an earlier export of the same study. Its costs.json stays if the study has none.

    Raises:
        InputError: no cell is finished, cells are not comparable, ``folder`` holds anything else, or a cell that the
            study lacks, or it cannot be written.
    """
    finished = _load(design)
    failed = load_failed(design)
    record = without_folders(design.dump())
    _check_target(design, parse_record(dict(record), f"{design.folder}/study.yaml", folder), set(finished))
    lines = []
    for cell in design.cells():
        about: dict[str, Any] = {"variant": cell.variant, "seed": cell.seed}
        if result := finished.get(str(cell)):
            lines.append(about | {"status": "done"} | _describe(result))
        elif str(cell) in failed:
            lines.append(about | {"status": "failed", "message": without_folders(failed[str(cell)])})
    costs = read_costs(design)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--to {folder}: cannot write there: {error.strerror}") from error
    # Cells last: the files of an export that was killed still belong together.
    write_text(folder / "study.yaml", yaml.safe_dump(record, sort_keys=False))
    if design.detection:
        matches = {f"{name}/": result.matches for name, result in finished.items()}
        write_matches(folder / detection.EXPORTED_MATCHES, matches)
    else:
        write_atomically(folder / EXPORTED_PREDICTIONS, lambda file: file.write(_predictions(finished)))
    if costs is not None:
        write_text(folder / COSTS, to_json(without_folders(costs), indent=2) + "\n")
    write_text(folder / EXPORTED_CELLS, "".join(to_json(line) + "\n" for line in lines))
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name in _FILES)
    return f"{folder}: {len(finished)} of {len(design.cells())} cells, {size / 1000:.0f} kB"


def _check_target(design: Design, exported: Design, finished: set[str]) -> None:
    """Refuse to replace anything but an earlier export of this study."""
    folder = exported.folder
    if folder.resolve() == design.folder.resolve():
        raise InputError(f"--to {folder} is the study's own folder; choose another")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--to {folder} is a file; choose another")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    if other := names - _FILES - _REPORT:
        raise InputError(f"--to {folder} exists and is not an exported study: it holds {min(other)}; choose another")
    if not names:
        return
    earlier = load_record(folder)
    check_same(exported, earlier, f"--to {folder}")
    if earlier.exported and (lacking := sorted(_load(earlier).keys() - finished)):
        raise InputError(f"--to {folder} has {lacking[0]}, which {design.folder} does not have; choose another")


def _load(design: Design) -> dict[str, Any]:
    """Cell -> its ``Result``, or that of a detector."""
    results: dict[str, dict[int, Any]] = (detection.load_results if design.detection else load_results)(design)
    return {str(result.cell): result for of_seeds in results.values() for result in of_seeds.values()}


def _describe(result: Result | detection.Result) -> dict[str, Any]:
    if isinstance(result, detection.Result):
        return {"seconds": result.seconds, "row": without_folders(result.row)}
    return {
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "curve": [[epoch, None if math.isnan(top1) else top1, minutes] for epoch, top1, minutes in result.curve],
        "row": without_folders(result.row),
        "probes": without_folders(result.probes),
    }


def _predictions(finished: dict[str, Result]) -> bytes:
    """The gzip of a CSV file; the same bytes every time."""
    first = next(iter(finished.values()))
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["image", "label", *finished])
    lines.writerows(zip(first.images, first.label, *(result.top1 for result in finished.values()), strict=True))
    return gzip.compress(text.getvalue().encode(), mtime=0)


def without_folders(value: Any) -> Any:
    """JSON without what belongs to one machine: of absolute paths the name remains, of an environment no command."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items() if key != "command"}
    return value
