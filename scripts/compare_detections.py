"""AP of detectors on the same images, with intervals:  python scripts/compare_detections.py A.npz B.npz [C.npz ...]

Each file is of eval.py --matches, or a JSON file of detections in COCO's form of any program (with --annotations). The
differences are to the first. Intervals are 95% bootstrap intervals over images, the same images for all: they say what
other images would change, not what another training would.
"""

import json
from pathlib import Path

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.detection.evaluate import read_results
from lip_resnet.evaluation.average_precision import METRICS, average_precision, bootstrap, interval
from lip_resnet.evaluation.matching import Matches, match, read_matches
from lip_resnet.evaluation.render import STYLES, render


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--annotations", type=Path, help="for .json files: COCO's annotations, instances_*.json")
    parser.add_argument("--samples", type=int, default=1000, help="bootstrap samples (default 1000)")
    parser.add_argument("--format", choices=STYLES, default="md")
    options = parser.parse_args()
    if options.samples < 2:
        raise InputError(f"--samples is {options.samples}; it must be at least 2")
    runs = [read(path, options.annotations) for path in options.files]
    for path, run in zip(options.files, runs, strict=True):
        if run.image_ids.tolist() != runs[0].image_ids.tolist():
            raise InputError(f"{path} and {options.files[0]} are of other images; they must be of the same set")
    figures = [average_precision(run) for run in runs]
    values = bootstrap(runs, samples=options.samples)
    rows = []
    for number, (path, each) in enumerate(zip(options.files, figures, strict=True)):
        row = [str(path), *(f"{each[name]:.2f}" for name in METRICS)]
        for name, samples in values.items():
            row.append(shown(interval(samples[number], each[name]), ".2f"))
            difference = each[name] - figures[0][name]
            between = interval(samples[number] - samples[0], difference) if number else None
            row.append(f"{difference:+.2f} ({shown(between, '+.2f')})" if number else "-")
        rows.append(row)
    columns = [column for name in values for column in (f"{name}: 95% interval", f"{name}: difference (95% interval)")]
    print(render(["detections", *METRICS, *columns], rows, style=options.format), end="")


def read(path: Path, annotations: Path | None) -> Matches:
    """The matches of a file."""
    if path.suffix != ".json":
        return read_matches(path)
    if annotations is None:
        raise InputError(f"{path}: detections need --annotations FILE, the objects that they are compared with")
    try:
        truth = json.loads(annotations.read_text(encoding="utf-8"))
        truth["annotations"] = [
            {"iscrowd": 0, "area": each["bbox"][2] * each["bbox"][3], **each} for each in truth["annotations"]
        ]
        return match(truth, read_results(path))
    except OSError as error:
        raise InputError(f"{annotations}: cannot read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{annotations}: not annotations in COCO's form: {error!r}") from error


def shown(bounds: tuple[float, float] | None, style: str) -> str:
    return "-" if bounds is None else f"{bounds[0]:{style}} to {bounds[1]:{style}}"


if __name__ == "__main__":
    cli.launch(main)
