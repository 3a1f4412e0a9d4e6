"""What a run says: its lines at the start, of an epoch and at the end; and what TensorBoard opens on."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import small_config
from helpers.training import how, prepare
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lip_resnet import distributed
from lip_resnet.evaluation.evaluate import evaluate
from lip_resnet.training import messages
from lip_resnet.training.classification import Classification
from lip_resnet.training.runlog import RunLog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write_epoch(log: RunLog, epoch: int, evaluated: bool = True) -> None:
    """Windows of 5 and 3 steps, of 1.0 and 2.0: the mean is 11/8."""
    for step, value in ((5, 1.0), (8, 2.0)):
        speed = {"train/images_per_second": 9.0, "train/data_wait": 0.1, "train/lr": 0.1}
        log.log(8 * epoch + step, epoch, {"train/loss": value, "train/top1": 10 * value, "train/top5": 50.0, **speed})
    values = {"val/loss": 1.5, "val/top1": 40.0, "val/top5": 90.0}
    if evaluated:
        log.log(8 * epoch + 8, epoch, values, {"val/best_top1": 45.0})
    else:
        log.end_epoch(epoch)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """``opened(terminal=...)`` -> a log of a run of 12 epochs and what it prints."""
    logs = []

    def open_log(terminal: bool):
        monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
        config = small_config(train__epochs=12, train__seed=3)
        logs.append(RunLog(tmp_path / "a run", config, {"command": []}, 0, 0, 96, Classification))
        return logs[-1], sys.stderr

    (tmp_path / "a run").mkdir()
    yield open_log
    for log in logs:
        log.close()


LINES = [
    "epoch  1/12 | train loss  1.3750 top-1  13.75% top-5  50.00% | val loss  1.5000 top-1  40.00% top-5  90.00%",
    "epoch  2/12 | train loss  1.3750 top-1  13.75% top-5  50.00%",
]


def test_a_log_file_has_the_time_of_every_line(opened):
    log, printed = opened(terminal=False)
    write_epoch(log, 0)
    write_epoch(log, 1, evaluated=False)
    lines = printed.getvalue().splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert all(re.match(stamp, line) for line in lines)
    assert [re.sub(stamp, "", line) for line in lines if " | " in line] == LINES
    assert any("epoch 2 step 13/96: loss 1, top1 10" in line for line in lines)


def test_epochs_stay_in_the_terminal_without_the_time(opened):
    log, printed = opened(terminal=True)
    write_epoch(log, 0)
    write_epoch(log, 1, evaluated=False)
    kept = [line.rpartition("\r")[2] for line in printed.getvalue().split("\n")]
    assert [line for line in kept if line in LINES] == LINES
    assert "step 13/96" not in printed.getvalue()


def test_tensorboard_opens_on_top1(opened, tmp_path):
    log, _ = opened(terminal=False)
    write_epoch(log, 0)
    write_epoch(log, 1)
    log.finish()
    events = EventAccumulator(str(tmp_path / "a run" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = sorted(events.Tags()["scalars"])
    assert tags[:2] == ["epoch/top1_train", "epoch/top1_val"]
    assert not [tag for tag in tags if tag.startswith("final")]
    assert {"train/loss", "val/top1", "val/best_top1", "epoch_loss/train", "epoch_loss/val"} <= set(tags)
    assert [(event.step, event.value) for event in events.Scalars("epoch/top1_train")] == [(1, 13.75), (2, 13.75)]
    assert [event.step for event in events.Scalars("val/top1")] == [8, 16]
    assert "val/best_top1" not in (tmp_path / "a run" / "metrics.jsonl").read_text()

    contents = {tag: each.plugin_data.content for tag, each in events.summary_metadata.items()}
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    first = {"model.name", "model.downsampling", "train.seed", "optim.lr"}
    assert {column.name for column in experiment.hparam_infos if column.differs} == first  # TensorBoard's first columns
    assert [each.name.tag for each in experiment.metric_infos] == ["val/best_top1", "val/top1"]
    session = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    assert Path(session.group_name) == tmp_path / "a run"
    assert session.hparams["train.seed"].number_value == 3
    assert metadata.SESSION_END_INFO_TAG in contents


def test_setup_start_and_end_in_words(monkeypatch):
    _, state, loader, _ = prepare()
    config = small_config(model__downsampling={"main": "softpool"})
    datasets = {"train": {"images": 1442, "classes": 10}, "val": {"images": 355}}
    lines = messages.describe_setup(config, state.model, torch.device("cpu"), datasets, 46, len(loader))
    parameters = sum(len(value.flatten()) for value in state.model.parameters())
    assert lines[0] == f"network   test_resnet, {parameters:,} parameters, downsampling: {config.model.downsampling}"
    assert re.fullmatch(r"device    cpu: .+; 1 process, float32", lines[1])
    assert lines[2] == "data      1,442 training images and 355 validation images, 10 classes"
    assert lines[3] == "steps     46 of 64 images; an epoch has 23"
    assert messages.describe_start(Path("runs/a"), None, 0) == "run       runs/a: new"
    line = messages.describe_start(Path("runs/a"), Path("runs/a/checkpoints/last.pt"), 1200)
    assert line == "run       runs/a: continued from runs/a/checkpoints/last.pt at step 1,200"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    end = messages.describe_end(Path("runs/a b"), "top1", 70.0, 71.25, 3725.4)
    assert end[0] == "finished  top-1 70.00% last, 71.25% best (selected on val); 1:02:05 since the start"
    assert end[-1] == "evaluate  python eval.py --checkpoint 'runs/a b'"


def test_an_evaluation_shows_a_bar_on_a_terminal_and_on_rank_0_alone(monkeypatch):
    config, state, _, val_loader = prepare(data__name="synthetic", data__images=8, data__eval_batch_size=3)
    printed = {}
    for name, stream, rank in (("terminal", Terminal(), 0), ("file", io.StringIO(), 0), ("rank 1", Terminal(), 1)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(distributed, "is_main", lambda rank=rank: rank == 0)
        evaluate(state.model, val_loader, **how(config))
        printed[name] = stream.getvalue()
    assert f"/{val_loader.samples} [" in printed["terminal"]
    assert "evaluation" in printed["terminal"]
    assert printed["file"] == printed["rank 1"] == ""
