"""Make a table of rows or run folders:  python scripts/make_table.py runs/a runs/b row.json --output table.md"""

import sys
from pathlib import Path

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.evaluation.baselines import judge
from lip_resnet.evaluation.paper import load_paper
from lip_resnet.evaluation.render import STYLES, render
from lip_resnet.evaluation.rows import is_detection, read_rows
from lip_resnet.evaluation.tables import build_table, build_wide, group
from lip_resnet.files import write_text


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", help="JSON rows of eval.py, or run folders with eval.json, eval-NAME.json")
    parser.add_argument("--format", choices=STYLES, default="md")
    parser.add_argument(
        "--wide", action="store_true", help="one line per network, one column per test set: top-1, AP, or mCE"
    )
    parser.add_argument(
        "--baseline", metavar="LABEL", help="compare every row with that of this label (default: a network without LIP)"
    )
    parser.add_argument("--output", help="write the table here too; an existing file is replaced only with --force")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    output = Path(options.output) if options.output else None
    if output is not None and output.exists() and not options.force:
        raise InputError(f"{output} exists; choose another --output or add --force")
    rows = read_rows(options.rows)
    if options.wide:
        header, lines, notes = build_wide(rows, options.baseline)
    else:
        header, lines, notes = build_table(rows, load_paper().accuracies(), options.baseline)
    classifiers = [entry for entry in group(rows) if not is_detection(entry.rows[0])]
    verdicts = [judge({**entry.rows[0], "top1": entry.mean("top1")}) for entry in classifiers]
    notes += [verdict for verdict in verdicts if verdict is not None]
    text = render(header, lines, notes, options.format)
    print(text, end="")
    if options.format == "csv":  # a CSV table has no notes
        print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    if output is not None:
        write_text(output, text)


if __name__ == "__main__":
    cli.launch(main)
