"""Whole runs of train.py and eval.py, alone and on several ranks: under torchrun, or in forks of this process."""

import gzip
import json
from pathlib import Path

import make_table
import pytest
import torch
import yaml
from helpers.commands import RECIPE, call, done, fork_ranks, start, stop_when_logged
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as eval_command
import train

TAGS = {f"train/{name}" for name in ("loss", "top1", "top5", "lr", "images_per_second", "data_wait")}
TAGS |= {f"{split}/{name}" for split in ("val", "val_ema") for name in ("loss", "top1", "top5")}
TAGS |= {"train/grad_norm"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory) -> Path:
    """Trained by two processes under torchrun, without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    done("train.py", "--config", recipe, "--output", folder, processes=2)
    return folder


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_run_folder_holds_what_is_promised(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "ema_decay: 0.9" in text
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("final/")]
    assert [event.step for event in events.Scalars("epoch/top1_val")] == [1, 2]
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["clip_norm"] == 5.0
    environment = json.loads((run / "env.json").read_text())
    assert environment["processes"] == 2
    assert environment["torch"] == torch.__version__
    lines = lines_of(run)
    assert [line["step"] for line in lines if "val/top1" in line] == [23, 46]
    assert [line["step"] for line in lines if "train/loss" in line] == [10, 20, 23, 30, 40, 46]
    assert set().union(*lines) == TAGS | {"step", "epoch"}
    assert lines[-1]["val/top1"] > 30
    checkpoint = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert checkpoint["step"] == 46
    assert (run / "checkpoints" / "best.pt").is_file()


def test_evaluation_counts_the_same_on_any_number_of_processes(run, tmp_path):
    rows = []
    for processes in (1, 3):  # 355 images in batches of 50: neither divides. Two counted while they trained.
        output = tmp_path / f"{processes}.json"
        files = ("--output", output, "--predictions", tmp_path / f"{processes}.csv")
        ended = fork_ranks(eval_command, "--checkpoint", run, "--weights", "model", *files, processes=processes)
        assert set(ended.codes) == {0}, ended.stderr
        rows.append(json.loads(output.read_text()))
        assert ended.stdout == f"* Acc@1 {rows[0]['top1']:.3f} Acc@5 {rows[0]['top5']:.3f}\n"
    assert (tmp_path / "1.csv").read_text() == (tmp_path / "3.csv").read_text()
    assert {row["images"] for row in rows} == {355}
    assert len({(row["correct1"], row["correct5"]) for row in rows}) == 1
    last = [line for line in lines_of(run) if "val/top1" in line][-1]
    assert rows[0]["top1"] == last["val/top1"]
    assert rows[0]["loss"] == pytest.approx(last["val/loss"], rel=1e-5)
    assert rows[0]["protocol"]["training"]["images_per_batch_norm"] == "32"


@pytest.mark.parametrize("processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_resumed_is_uninterrupted(run, recipe, tmp_path, processes):
    """Stopped by SIGTERM under torchrun between two log steps and continued: the same numbers and weights, bit for bit.

    Three processes: DDP sorts gradients into other buckets after its first backward, which changes how sums of three
    round; without the warm-up step for DDP this fails. Of one process test_resume.py has quick checks.
    """
    whole, overrides = run, ["data.batch_size=66"] if processes == 3 else []
    if processes != 2:
        whole = tmp_path / "whole"
        ended = fork_ranks(train, "--config", recipe, "--output", whole, *overrides, processes=processes)
        assert set(ended.codes) == {0}, ended.stderr
    folder = tmp_path / "resumed"
    stop_when_logged(recipe, folder, processes, *overrides)
    assert (folder / "requeue").exists()
    stopped = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["step"]
    last = 44 if processes == 3 else 46
    assert 10 <= stopped < last
    # As a killed run leaves them, beyond its checkpoint.
    stray = {"step": stopped + 1, "epoch": 1, "train/loss": 9.0}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(stray) + '\n{"step": 99, "ep')
    resumed = ("--config", recipe, "--output", folder, "--resume", "auto", *overrides)
    ended = fork_ranks(train, *resumed, processes=processes)
    assert set(ended.codes) == {0}, ended.stderr

    states = [torch.load(path / "checkpoints" / "last.pt", weights_only=True) for path in (whole, folder)]
    for name in ("model", "ema"):
        for key, value in states[0][name].items():
            assert torch.equal(value, states[1][name][key]), key
    assert states[0]["best"] == states[1]["best"]
    timeless = [
        [{k: v for k, v in line.items() if k not in ("train/images_per_second", "train/data_wait")} for line in lines]
        for lines in (lines_of(folder), lines_of(whole))
    ]
    assert timeless[0] == timeless[1]
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [last // 2, last]
    assert not (folder / "requeue").exists()
    assert "already trained" in fork_ranks(train, *resumed).stderr


def test_refusals_on_two_ranks(run, recipe):
    """Every rank exits with 2, one line is printed, nothing changes."""
    before = (run / "checkpoints" / "last.pt").read_bytes()
    ended = fork_ranks(train, "--config", recipe, "--output", run, processes=2)
    assert ended.codes == [2, 2]
    (line,) = ended.stderr.splitlines()
    assert line.startswith("train.py: error:")
    assert "already holds a run; continue it with --resume auto" in line
    assert (run / "checkpoints" / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_refusals_under_torchrun(run, recipe):
    """The same, and torchrun itself exits 1."""
    before = (run / "checkpoints" / "last.pt").read_bytes()
    result = start("train.py", "--config", recipe, "--output", run, processes=2)
    assert result.returncode == 1
    assert result.stderr.count("train.py: error:") == 1
    assert "already holds a run; continue it with --resume auto" in result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed")[0]
    assert result.stderr.count("exitcode  : 2") == 2
    assert (run / "checkpoints" / "last.pt").read_bytes() == before


def test_fine_tuning_and_profile(run, recipe, tmp_path):
    folder = tmp_path / "tuned"
    overrides = [f"model.weights={run}", "model.new_head=true", "data.name=synthetic", "model.num_classes=4"]
    overrides += ["train.max_steps=8", "train.profile=2", "train.gradient_compression=bfloat16"]
    ended = fork_ranks(train, "--config", recipe, "--output", folder, *overrides, processes=2)
    assert set(ended.codes) == {0}, ended.stderr
    (trace,) = (folder / "tensorboard").glob("*.pt.trace.json.gz")
    assert b'"aten::convolution"' in gzip.decompress(trace.read_bytes())


def test_lip_and_baseline_to_a_table(tmp_path, capsys, monkeypatch):
    """The README's way, on the shipped recipes cut short, with smaller networks: train, evaluate, compare."""
    runs, cut = [], ("data.batch_size=16", "train.max_steps=1")
    for name in ("lip_resnet50", "resnet50"):
        runs.append(tmp_path / name)
        recipe = ("--config", f"configs/digits/{name}.yaml", "--output", runs[-1])
        smaller = f"model.name={name.replace('50', '18')}"
        assert call(capsys, monkeypatch, train, *recipe, *cut, smaller)[0] == 0
        assert call(capsys, monkeypatch, eval_command, "--checkpoint", runs[-1])[0] == 0
    table = tmp_path / "table.md"
    code, printed, _ = call(capsys, monkeypatch, make_table, *runs, "--output", table)
    rows = [json.loads((path / "eval.json").read_text()) for path in runs]
    assert (code, printed) == (0, table.read_text())
    assert f"{rows[0]['top1'] - rows[1]['top1']:+.2f}" in printed
    assert call(capsys, monkeypatch, make_table, *runs, "--output", table)[0] == 2


@pytest.mark.slow
def test_any_number_of_processes_takes_the_same_steps(tmp_path):
    """Without batch statistics: the same weights from 1 and 3 processes, over a short last batch dealt unevenly."""
    recipe = tmp_path / "layer_norm.yaml"
    recipe.write_text(RECIPE.replace("test_resnet", "test_efficientnet_ln"))
    states, losses = [], []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        # 1442 images in batches of 474: three whole ones and one of 20.
        overrides = ["data.batch_size=474", "train.epochs=1", "train.drop_path=0", "optim.warmup_epochs=0"]
        overrides.append("train.log_every=1")
        ended = fork_ranks(train, "--config", recipe, "--output", folder, *overrides, processes=processes)
        assert set(ended.codes) == {0}, ended.stderr
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
        states.append(torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"])
    for name, one in states[0].items():
        torch.testing.assert_close(states[1][name], one, rtol=1e-3, atol=1e-5, msg=name)
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
