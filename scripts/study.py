"""Compare variants of a recipe over seeds, in one command:

    python scripts/study.py plan   STUDY.yaml [section.key=value ...]    cells, hours, and what differences it can show
    python scripts/study.py run    STUDY.yaml [section.key=value ...]    train and evaluate every (variant, seed)
    python scripts/study.py measure STUDY.yaml --candidates resnet34     time of every network on this machine
    python scripts/study.py report STUDY.yaml                            tables, intervals, figures and a verdict
    python scripts/study.py export STUDY.yaml                            a compact record that report reads too

``run`` can be stopped or killed at any time: the same command goes on, and never repeats a finished cell. When all are
finished it writes the report. ``probe.py robustness FOLDER`` measures the robustness of every finished cell.
"""

import sys
from pathlib import Path

from bench import costs
from bench.timing import CLOCKS

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.files import to_json, write_text

OPTIONS: dict[str, tuple[str, ...]] = {
    "to": ("export",),
    "jobs": ("plan", "run"),
    "shard": ("run",),
    "no_measure": ("plan",),
    **dict.fromkeys(("candidates", "rounds", "batch", "clock"), ("measure",)),
}
"""Option -> the actions that take it; the others take no options but --output."""


def main() -> None:
    from lip_resnet.study import cells, design, export, plan, report  # here: without SciPy it is one line

    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("action", choices=("plan", "run", "measure", "report", "export"))
    parser.add_argument("study", help="the study file (configs/studies/), a shipped study by name, or a study's folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of every recipe; study.seeds=[0,1]")
    parser.add_argument("--output", type=Path, help="the study's folder (default: runs/studies/<name of the file>)")
    parser.add_argument("--to", type=Path, help="export: the folder (default: results/studies/<name of the study>)")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at the same time (default 1)")
    parser.add_argument(
        "--shard", default="0/1", metavar="i/n", help="run every n-th cell from the i-th, counted from 0"
    )
    parser.add_argument("--no-measure", action="store_true", help="plan: do not measure a training step")
    parser.add_argument("--candidates", nargs="+", default=[], metavar="MODEL", help="measure: networks to time beside")
    parser.add_argument("--rounds", type=int, default=7, help="measure: rounds (default 7)")
    parser.add_argument("--batch", type=int, help="measure: images of a step (default: a process's, of the recipe)")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="measure: cpu counts one thread's time on a busy machine"
    )
    options = parser.parse_intermixed_args()
    for name, least in (("jobs", 1), ("rounds", 2), ("batch", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            raise InputError(f"--{name} is {value}; it must be at least {least}")
    index, shards = cells.parse_shard(options.shard)
    for name, actions in OPTIONS.items():
        if getattr(options, name) != parser.get_default(name) and options.action not in actions:
            raise InputError(f"--{name.replace('_', '-')} is of {' and '.join(actions)}, not of {options.action}")
    if options.action in ("report", "export"):
        if options.overrides:
            line = f"{options.action} takes no overrides ({options.overrides[0]}): it shows the study that was run"
            raise InputError(line)
        record = design.load_record(options.output or design.default_folder(options.study))
        if options.action == "export":
            print(export.export(record, options.to or Path("results/studies") / record.folder.resolve().name))
        else:
            print("\n".join(report.write_report(record)))
        return
    if design.find_study(options.study).is_dir():
        if options.overrides or options.output:
            raise InputError(f"{options.study} is a study's folder: it takes no overrides and no --output")
        study = design.load_record(Path(options.study))
    else:
        study = design.load_design(options.study, options.overrides, options.output)
    if options.action == "plan":
        print(plan.describe(study, options.jobs, measure=not options.no_measure))
        return
    if study.detection and options.action == "measure":
        raise InputError("measure is for studies of classifiers; of detectors the report has the minutes of every cell")
    if options.action == "measure":
        row = costs.measure(study, options.candidates, options.rounds, options.batch, options.clock)
        if (study.folder / "study.yaml").is_file():
            write_text(study.folder / "costs.json", to_json(row, indent=2) + "\n")
        else:
            print(f"note: not kept, for {study.folder} holds no study yet: measure again after run", file=sys.stderr)
        print("\n".join(costs.summarize(study, row)))
        return
    design.write_design(study)
    chosen = study.cells()[index::shards]
    failed = cells.run_cells(study, chosen, options.jobs)
    done = sum(cell.finished for cell in study.cells())
    print(f"{study.folder}: {done} of {len(study.cells())} cells are finished", file=sys.stderr)
    if failed:
        line = f"{len(failed)} cells failed: {', '.join(failed)}; the same command tries them again"
        print(f"study.py: error: {line}", file=sys.stderr)
        sys.exit(1)
    if done == len(study.cells()):
        print("\n".join(report.write_report(study)))


if __name__ == "__main__":
    cli.launch(main)
