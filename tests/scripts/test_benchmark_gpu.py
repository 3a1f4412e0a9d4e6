"""benchmark_gpu.py: its parts are valid commands, rows survive failures and time-outs, and its tables."""

import argparse
import json
import sys
import textwrap
import time
from pathlib import Path

import benchmark
import benchmark_gpu
import pytest
import torch
from bench import quantities, stages
from bench.stages import Part
from helpers.commands import call, refuse

import lip_commands
from lip_resnet import cli
from lip_resnet.recipe import load_config


@pytest.fixture
def images(tmp_path) -> Path:
    root = tmp_path / "set"
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("stage", stages.STAGES)
def test_every_part_is_a_valid_command(monkeypatch, tmp_path, images, stage, quick):
    """Options, recipes and files exist; the time-outs of a stage add up to at most 8 minutes; names are unique."""
    device = "cpu" if quick else "cuda"
    monkeypatch.setattr(stages.shutil, "which", lambda name: f"/bin/{name}")
    options = argparse.Namespace(stage=stage, device=device, quick=quick, data=images, seeds=2, epochs=3, size=48)
    parts = stages.STAGES[stage](options, tmp_path)
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.seconds for part in parts) <= 480
    for part in parts:
        if part.command is None:
            assert part.missing
            continue
        words = part.command[part.command.index(sys.executable) + 1 :]
        assert part.read() == []
        monkeypatch.setattr(sys, "argv", words)
        if words[0] == "scripts/benchmark.py":
            assert benchmark.parse().output.parent == tmp_path
        elif words[0] == "train.py":
            given = lip_commands.train_parser(cli.ArgumentParser).parse_intermixed_args()
            config = load_config(Path(given.config), tuple(given.overrides))
            assert config.train.precision == "bfloat16"
            if stage == "real":
                assert (config.model.num_classes, config.data.name, config.data.size) == (3, "folder", 48)
        elif words[0] == "eval.py":
            assert lip_commands.eval_parser(cli.ArgumentParser).parse_args().output
        else:
            assert words[:2] == ["-m", "pytest"]
            assert (stages.ROOT / words[2]).exists()


def test_cifar_as_torchvision_stores_it(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    options = argparse.Namespace(device="cuda", quick=False, data=tmp_path, seeds=3, epochs=12, size=64)
    words = stages.real(options, tmp_path)[0].command[2:]
    config = load_config(Path(words[1]), tuple(words[4:]))
    assert (config.data.name, config.data.root, config.model.num_classes) == ("cifar10", str(tmp_path), 10)
    assert (config.data.size, config.train.epochs) == (32, 12)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", textwrap.dedent(code)]


def test_rows_survive_failures_and_time_outs(tmp_path):
    """Rows come as they are written; a part that fails or hangs is a failed row, and its children are gone."""
    rows, path, alive = [], tmp_path / "rows.jsonl", tmp_path / "alive"

    def read() -> list[dict]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    failing = f"""
        open({str(path)!r}, "w").write('{{"ms": 1}}\\n')
        raise MemoryError("out of memory")
    """
    hanging = f"""
        import subprocess, sys, time
        child = "import time; time.sleep(1.5); open({str(alive)!r}, 'w')"
        subprocess.Popen([sys.executable, "-S", "-c", child])
        time.sleep(60)
    """
    for part in (
        Part("op", python(failing), 30, read),
        Part("train", python(hanging), 0.5),
        Part("memcheck", None, 0, missing="not available: compute-sanitizer"),
    ):
        benchmark_gpu.run_part(part, tmp_path, rows.append)
    first, failed, hung, missing = rows
    assert first == {"part": "op", "ms": 1}
    assert failed["failed"] == "exit code 1: MemoryError: out of memory"
    assert hung["failed"] == "not done after 0 seconds"
    assert missing == {"part": "memcheck", "failed": "not available: compute-sanitizer"}
    time.sleep(1.3)
    assert not alive.exists()


def test_a_stage_from_end_to_end(capsys, monkeypatch, tmp_path):
    """Environment first, then the rows, in one file; the table is printed."""
    path = tmp_path / "fast.jsonl"
    row = {"model": "lip_resnet50", "time / resnet50": 1.251}
    parts = [Part("train", python("print()"), 30, lambda: [row]), Part("op", python("1 / 0"), 30)]
    monkeypatch.setitem(benchmark_gpu.STAGES, "fast", lambda options, folder: parts)
    code, out, _ = call(capsys, monkeypatch, benchmark_gpu, "fast", "--output", path, "--device", "cpu", "--quick")
    assert code == 0
    head, *rows = map(json.loads, path.read_text().splitlines())
    assert (head["environment"]["stage"], head["environment"]["torch"]) == ("fast", torch.__version__)
    assert str(tmp_path) not in path.read_text()
    assert rows[0] == {"part": "train", **row}
    assert [row["part"] for row in rows] == ["train", "train", "op"]
    assert "ZeroDivisionError: division by zero" in out
    (line,) = (line for line in out.splitlines() if "eager: lip_resnet50 / resnet50" in line)
    assert [cell.strip() for cell in line.split("|")][2:5] == ["1.32", "at most 1.28", "1.25"]


def test_quantities():
    """Each is read from the rows of its own part."""
    rows = [
        {"part": "op", "form": form, "site": site, "direction": "forward + backward", "share_of_copy_bound": share}
        for form, share in (("lip2d", 0.9), ("previous kernels", 0.6))
        for site in quantities.LARGEST_SITES
    ]
    rows[1]["share_of_copy_bound"] = 0.8
    rows += [{"part": "train", "model": "lip_resnet50", "images_per_second": 1000.0, "ms": 3.0}]
    rows += [{"part": "train.py lip_resnet50", "train/loss": 1.0, "train/images_per_second": n} for n in (1.0, 980.0)]
    rows += [{"part": "inference", "model": name, "ms": ms} for name, ms in (("resnet50", 2.0), ("lip_resnet50", 2.5))]
    values = [quantity.measure(rows) for quantity in quantities.QUANTITIES]
    assert values == pytest.approx([0.8, 0.6, *[None] * 2, 3.0, *[None] * 9, 0.98, 1.25, None, None])
    assert all(quantity.measure([]) is None for quantity in quantities.QUANTITIES)
    names = {quantity.name for quantity in quantities.QUANTITIES}
    assert {name for _, name in quantities.predictions()[1]} == names


def test_accuracies():
    rows = [
        {"part": f"eval {model}-{seed}", "model": model, "seed": seed, "top1": top1}
        for model, values in (("lip_resnet18", (61.0, 63.0)), ("resnet18", (60.0,)))
        for seed, top1 in enumerate(values)
    ]
    lines = benchmark_gpu.accuracies(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")][1:4] for line in lines[2:]]
    assert cells == [
        ["lip_resnet18", "61.00 63.00", "62.00"],
        ["resnet18", "60.00", "60.00"],
        ["lead", "+1.00", "+1.00"],
    ]


def test_rows_of_the_tests(tmp_path):
    report = tmp_path / "tests.xml"
    assert stages._tests(report) == []
    report.write_text('<testsuites><testsuite><testcase name="a" ti')  # pytest is writing it
    assert stages._tests(report) == []
    report.write_text(
        '<testsuites><testsuite><testcase name="a" time="1.5"/><testcase name="b" time="2">'
        '<failure message="AssertionError: dx&#10;more">x</failure></testcase></testsuite></testsuites>'
    )
    assert stages._tests(report) == [
        {"test": "b", "outcome": "failure", "message": "AssertionError: dx"},
        {"tests": 2, "passed": 1, "test_seconds": 3.5},
    ]


def test_refusals(capsys, monkeypatch, tmp_path):
    def line(*arguments: object) -> str:
        return refuse(capsys, monkeypatch, benchmark_gpu, *arguments)

    output = ("--output", tmp_path / "a.jsonl")
    if not torch.cuda.is_available():
        assert "PyTorch sees no GPU; --device cpu --quick" in line("fast", *output)
    cpu = ("--device", "cpu", "--quick")
    assert "add --quick" in line("fast", *output, "--device", "cpu")
    assert "invalid choice: 'all'" in line("all", *output)
    assert "--data None; real needs a folder" in line("real", *output, *cpu)
    assert "real needs a folder" in line("real", *output, *cpu, "--data", tmp_path)
    assert "--seeds 0" in line("right", *output, *cpu, "--seeds", 0)
    assert "must be a new file" in line("right", "--output", tmp_path / "none" / "a.jsonl", *cpu)
