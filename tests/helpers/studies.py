"""A small study, and stand-ins for train.py and eval.py that answer at once."""

import json
import runpy
import sys

import pytest
import yaml

STUDY = {
    "base": "digits/resnet50",
    "variants": {
        "plain": {},
        "lip": {"model": {"name": "lip_resnet50"}},
        "average": {"model": {"downsampling": {"main": "average"}}},
    },
    "baseline": "plain",
    "primary": "lip",
    "seeds": [0, 1, 2],
}


TRAIN = """
import json, pathlib, sys, time
if "wait" in sys.argv[0]:
    time.sleep(60)
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("x")
if (folder.parent / "broken").exists() and folder.name == "seed1":
    sys.exit("train.py: error: optim.lr: too high")
lines = [{"step": 1, "epoch": e, "val/top1": 10.0 * e, "train/images_per_second": 50.0} for e in (0, 1)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


EVAL = """
import json, pathlib, random, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--checkpoint") + 1])
seed = int(folder.name.removeprefix("seed"))
draw = random.Random(f"{folder.parent.name}{seed}")
right = {"plain": 0.5, "lip": 0.7, "average": 0.5}[folder.parent.name]
lines, correct = ["image,label,top1,top5,margin,loss"], 0
for index in range(400):
    label = index % 4
    top1 = label if draw.random() < right else (label + 1) % 4
    correct += top1 == label
    lines.append(f"c{label}/{index}.png,{label},{top1},{top1} 0 1 2,0.5,1.0")
pathlib.Path(sys.argv[sys.argv.index("--predictions") + 1]).write_text("\\n".join(lines) + "\\n")
row = {"model": folder.parent.name, "top1": correct / 4, "top5": 100.0, "loss": 1.0, "images": 400, "params": 10**6}
row |= {"macs": 10**9, "correct1": correct, "seed": seed, "step": 10, "protocol": {"data": "digits", "training": None}}
row["environment"] = {"hardware": "a CPU", "torch": "2", "timm": "1", "command": sys.argv}
row["checkpoint"] = str(folder.resolve())
(folder / "eval.json").write_text(json.dumps(row))
"""


def write(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    study = {**STUDY, **changes}
    path.write_text(yaml.safe_dump({**study, "seeds": list(study["seeds"])}, sort_keys=False))
    return path


def make_stand_ins(folder):
    """``folder``/checkout with a train.py and an eval.py."""
    root = folder / "checkout"
    root.mkdir()
    (root / "train.py").write_text(TRAIN)
    (root / "eval.py").write_text(EVAL)
    return root


def write_costs(folder, ratios):
    times = {name: {"ms": 2 * ratio, "ratio": ratio} for name, ratio in ratios.items()}
    (folder / "costs.json").write_text(json.dumps({"training": times, "inference": times}))


def write_probe(cell, value, **changes):
    row = {
        "probe": "shift",
        "consistency": value,
        "seed": cell.seed,
        "step": 10,
        "protocol": {"eval_size": 32, "training": None},
    }
    (cell.folder / "probe-shift.json").write_text(json.dumps(row | changes))


def finish(study, folder):
    """Run every cell of a study by the stand-ins in ``folder``, in this process."""
    for cell in study.cells():
        for script, arguments in (
            ("train.py", ["--output", cell.folder]),
            ("eval.py", ["--checkpoint", cell.folder, "--predictions", cell.predictions]),
        ):
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
                runpy.run_path(str(folder / script))
        cell.record.write_text(json.dumps({"status": "done", "seconds": 1.0, "message": ""}))
