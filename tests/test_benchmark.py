"""benchmark.py: every subcommand on tiny settings, what it refuses, and the README's section made from kept rows."""

import json
import shlex
import sys

import pytest
import timm
import torch
from conftest import ROOT
from test_refusals import refuse

sys.path.insert(0, str(ROOT / "scripts"))
import bench_step
import benchmark
import contestants
import performance

TINY = {
    "op": ["--sites", "1024x14", "--batch", "1", "--contestants", "textbook", "lip2d", "plain form", "avg_pool2d"],
    "model": ["--size", "64", "--batch", "1", "2", "--contestants", "resnet50", "lip_resnet50"],
    "train": ["--size", "64", "--batch", "2", "--contestants", "lip_resnet50", contestants.FLOOR],
    "step": ["--size", "64", "--batch", "2", "--contestants", bench_step.AS_TRAINED, "contiguous", bench_step.PARALLEL],
    "memory": ["--size", "64", "--batch", "2", "--contestants", "resnet50", "lip_resnet50", contestants.REFERENCE],
}
TIMES = {"ms", "ms_q1", "ms_q3"}
NETWORK = TIMES | {"model", "layout", "compile", "images_per_second", "time / resnet50", "time / floor"}
COLUMNS = {
    "op": TIMES | {"layout", "site", "form", "direction", "speedup", "share_of_copy_bound", "relative_error"},
    "model": NETWORK | {"ms_p90", "ms_p99"},
    "train": NETWORK,
    "step": TIMES | {"step", "network", "images_per_second", "time / as train.py"},
    "memory": {"model", "layout", "kept_mib", "kept / resnet50"},
}


def run(monkeypatch, tmp_path, *arguments: str) -> list[dict]:
    output = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--device", "cpu", "--output", str(output)])
    benchmark.main()
    kept = json.loads(output.read_text())
    assert kept["environment"]["torch"] == torch.__version__
    assert kept["environment"]["fused_kernel"] in (True, False)
    return kept["rows"]


@pytest.mark.parametrize("what", TINY)
def test_rows(monkeypatch, tmp_path, capsys, what):
    rounds = [] if what == "memory" else ["--rounds", "2"]
    rows = run(monkeypatch, tmp_path, what, *TINY[what], *rounds)
    count = {"op": 2 * 4, "model": 2 * 2, "train": 2, "step": 3, "memory": 3}[what]
    assert len(rows) == count
    for row in rows:
        assert set(row) == COLUMNS[what] | {"precision", "batch"} | (set() if what == "op" else {"size"})
        assert all(value > 0 for key, value in row.items() if key.startswith(("ms", "kept", "images")))
    assert capsys.readouterr().out.count("\n| ") == count + 1
    if what == "memory":  # whatever is measured: the fused network keeps less than the textbook's
        assert rows[1]["kept_mib"] < rows[2]["kept_mib"]


def test_wrong_results_and_errors_are_rows(monkeypatch, tmp_path):
    def broken(x, logits):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(contestants.FORMS, "lip2d", lambda x, logits: 1.001 * contestants.textbook(x, logits))
    monkeypatch.setitem(contestants.FORMS, "plain form", broken)
    rows = run(monkeypatch, tmp_path, "op", *TINY["op"], "--rounds", "2")
    failed = {row["form"]: row["failed"] for row in rows if "failed" in row}
    assert failed == {"lip2d": "wrong: relative error 1.0e-03", "plain form": "RuntimeError: out of memory"}
    assert {row["form"] for row in rows if "ms" in row} == {"textbook", "avg_pool2d"}


def test_a_step_that_trains_otherwise_is_found(monkeypatch, tmp_path):
    """A variant whose update differs: its second loss tells."""
    make_step = bench_step.make_step

    def forgetful(model, images, labels, variant, options):
        if variant.layout == "contiguous":
            labels = labels.roll(1)
        return make_step(model, images, labels, variant, options)

    monkeypatch.setattr(bench_step, "make_step", forgetful)
    rows = run(monkeypatch, tmp_path, "step", *TINY["step"], "--rounds", "2")
    assert [row["step"] for row in rows if "failed" in row] == ["contiguous"]


def test_wrong_networks_are_found(monkeypatch):
    """Other numbers than the textbook network's, or other operations."""

    def coarse():
        model = contestants.floor_network("lip_resnet50")
        model.conv1.stride = (4, 4)
        return model

    monkeypatch.setitem(contestants.NETWORKS, contestants.FLOOR, coarse)
    gate = timm.create_model("lip_resnet50", gate_coefficient=11.9)
    monkeypatch.setitem(contestants.NETWORKS, "lip_resnet50", lambda: gate)
    found = contestants.build_networks(["lip_resnet50", contestants.FLOOR], "cpu", torch.channels_last)
    assert all(wrong.startswith("relative error") for _, wrong in found.values())


def test_refusals(monkeypatch, capsys, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text("mine")

    def line(*arguments: object) -> str:
        return refuse(capsys, monkeypatch, benchmark, *arguments)

    assert "op|model|train|step|memory|data" in line()
    assert "invalid choice: 'speed'" in line("speed")
    assert "invalid choice: '3x3'" in line("op", "--sites", "3x3")
    assert "--rounds 1; it must be at least 2" in line("op", "--rounds", 1)
    assert "--batch 0; it must be at least 1" in line("train", "--batch", 0)
    assert "--size 32; it must be at least 33" in line("model", "--size", 32)
    assert "--images 8; it must be at least the batch, 64" in line("data", "--images", 8)
    assert "--workers 0; it must be at least 1" in line("data", "--workers", 0)
    assert f"no images below {tmp_path / 'none'}" in line("data", "--data", tmp_path / "none")
    assert "end in .json or .md" in line("memory", "--output", tmp_path / "rows.txt")
    assert "no folder" in line("memory", "--output", tmp_path / "none" / "rows.md")
    assert "mine.json exists" in line("op", "--output", mine)
    assert mine.read_text() == "mine"
    if not torch.cuda.is_available():
        assert "PyTorch sees no GPU" in line("op", "--device", "cuda")


def test_readme_section(tmp_path):
    """Every part is there: measured, with its command, or not yet, with its command; failed rows say so."""
    empty = performance.section(tmp_path)
    assert empty.count("not measured yet: `") == len(performance.PARTS)
    environment = dict.fromkeys(("torch", "threads", "load", "hardware"), "x") | {"date": "2020-01-02T03:04:05"}
    environment |= {"lip_kernels": "plain", "command": ["python", "a b"]}
    common = {"layout": "channels_last", "precision": "float32", "batch": 8}
    rows = [
        common | {"site": "64x112", "form": "lip2d", "failed": "RuntimeError: no"},
        common | {"site": "64x112", "direction": "forward + backward", "form": "textbook", "ms": 35.04999},
    ]
    (tmp_path / "op_cpu.json").write_text(performance.to_json(rows, environment))
    section = performance.section(tmp_path)
    assert section.count("not measured yet: `") == len(performance.PARTS) - 1
    assert "| 64x112 | channels_last | 35 | failed | failed | - |" in section
    assert "batch 8, precision float32, layout channels_last, x, torch x" in section
    assert "`LIP_KERNELS=plain python 'a b'`" in section


@pytest.mark.parametrize("part", performance.PARTS, ids=lambda part: part.name)
def test_readme_commands_are_understood(monkeypatch, part):
    arguments = shlex.split(performance.command_line(part))
    monkeypatch.setattr(sys, "argv", arguments[arguments.index("scripts/benchmark.py") :])
    options = benchmark.parse()
    assert [path.name for path in options.output] == [f"{part.name}.json"]
