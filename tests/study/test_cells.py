"""The cells of a study: they go on, are never repeated, and end with it; with stand-ins for train.py and eval.py."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.studies import write

from lip_resnet import lifeline
from lip_resnet.config import InputError
from lip_resnet.errors import Stopped
from lip_resnet.study import cells, design


def test_cells_go_on_and_are_never_repeated(tmp_path, stand_ins):
    folder = tmp_path / "out"
    study = design.load_design(write(tmp_path), output=folder)
    design.write_design(study)
    (folder / "lip" / "broken").touch()
    failed = cells.run_cells(study, study.cells()[:4], jobs=2)  # one shard of it
    failed |= cells.run_cells(study, study.cells(), jobs=2)
    assert failed == {"lip/seed1": "train.py: error: optim.lr: too high"}
    assert json.loads((folder / "lip" / "seed1.json").read_text())["status"] == "failed"
    assert not cells.run_cells(study, [], jobs=1)
    (folder / "lip" / "broken").unlink()
    # An evaluation that was killed between its predictions and its row.
    (folder / "plain" / "seed2" / "eval.json").unlink()
    assert not cells.run_cells(study, study.cells(), jobs=1)
    assert all(cell.finished for cell in study.cells())
    starts = {str(cell): len((cell.folder / "starts").read_text()) for cell in study.cells()}
    # The failed cell is tried again; train.py itself says that plain/seed2 is trained already.
    assert starts.pop("lip/seed1") >= 2
    assert starts.pop("plain/seed2") == 2
    assert set(starts.values()) == {1}
    assert cells.read_record(study.cells()[0])["seconds"] > 0


def test_cells_that_run_together_have_gpus_of_their_own(tmp_path, stand_ins, monkeypatch):
    """By the environment of the started processes; the first waits for the second, the third takes what is free."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5")
    (stand_ins / "train.py").write_text(
        "import os, pathlib, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r}) / 'gpus'\n"
        "(folder / str(os.getpid())).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while len(list(folder.iterdir())) < 2: time.sleep(0.01)\n"
    )
    (stand_ins / "eval.py").write_text("")
    (tmp_path / "gpus").mkdir()
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    design.write_design(study)
    cells.run_cells(study, study.cells()[:3], jobs=2)
    used = [path.read_text() for path in (tmp_path / "gpus").iterdir()]
    assert len(used) == 3
    assert set(used) == {"4", "5"}


def test_gpus_of_jobs(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-2,3,4")
    assert cells.assign_gpus(3, 2) == ["0,1", "GPU-2,3", "0,1"]  # shared, for there are too few
    assert cells.assign_gpus(1, 2) == cells.assign_gpus(1, 1) == [None]
    assert cells.assign_gpus(2, 4) == [None, None]  # one group
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cells.assign_gpus(2, 1) == [None, None]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(cells.torch.cuda, "device_count", lambda: 3)
    assert cells.assign_gpus(4, 1) == ["0", "1", "2", "0"]


def test_the_message_of_a_failure_is_of_the_last_start(tmp_path, stand_ins):
    (stand_ins / "train.py").write_text("import sys; sys.exit('RuntimeError: a bug')")
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    design.write_design(study)
    cell = study.cells()[0]
    cell.log.write_text("train.py: error: of an earlier start\n")
    assert cells.run_cells(study, [cell], jobs=1) == {"plain/seed0": "RuntimeError: a bug"}


def test_a_signal_stops_the_cells(tmp_path, stand_ins):
    (stand_ins / "train.py").write_text("import time; time.sleep(60)")
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    design.write_design(study)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        cells.run_cells(study, study.cells(), jobs=2)
    assert time.monotonic() - started < 30
    assert json.loads((tmp_path / "out" / "plain" / "seed0.json").read_text())["status"] == "stopped"


@pytest.mark.parametrize("text", ["4", "a/b", "4/4", "1/0", "-1/4"])
def test_shards(text):
    with pytest.raises(InputError, match="--shard"):
        cells.parse_shard(text)
    assert cells.parse_shard("1/4") == (1, 4)


def test_a_refused_variant_is_not_tried_with_further_seeds(tmp_path, stand_ins, capfd):
    """Exit code 2: the recipe or the data is wrong, with any seed; other variants go on."""
    refuse = "import sys\nif '/lip/' in sys.argv[4]: print('train.py: error: no such layer'); sys.exit(2)\n"
    (stand_ins / "train.py").write_text(refuse + (stand_ins / "train.py").read_text())
    study = design.load_design(write(tmp_path, seeds=[0, 1]), output=tmp_path / "out")
    design.write_design(study)
    assert cells.run_cells(study, study.cells(), jobs=1) == {"lip/seed0": "train.py: error: no such layer"}
    assert "lip is not tried with further seeds" in capfd.readouterr().err
    assert {str(cell) for cell in study.cells() if cell.finished} == {
        f"{name}/seed{seed}" for name in ("plain", "average") for seed in (0, 1)
    }
    assert not cells.read_record(study.cells()[4])  # lip/seed1


def test_cells_that_another_process_runs_or_has_run(tmp_path, stand_ins):
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    design.write_design(study)
    plain, lip, average = study.cells()[:3]
    # While plain is trained, lip is finished by another process.
    other = f"import pathlib\nother = pathlib.Path({str(lip.folder)!r})\nother.mkdir(exist_ok=True)\n"
    other += "(other / 'eval.json').touch(); (other / 'predictions.csv').touch()\n"
    (stand_ins / "train.py").write_text(other + (stand_ins / "train.py").read_text())
    with open(average.folder.with_name(".seed0.lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not cells.run_cells(study, [plain, lip, average], jobs=1)
    assert plain.finished
    assert (lip.row.read_text(), lip.log.exists(), cells.read_record(lip)) == ("", False, {})
    assert (average.folder.exists(), cells.read_record(average)) == (False, {})
    assert not cells.run_cells(study, [average], jobs=1)
    assert average.finished


def test_a_stop_keeps_the_records_of_cells_that_were_not_begun(tmp_path, stand_ins):
    study = design.load_design(write(tmp_path), output=tmp_path / "out")
    design.write_design(study)
    failed = study.cells()[3]
    failed.record.write_text(json.dumps({"status": "failed", "seconds": 2.0, "message": "loss is nan"}))
    (stand_ins / "train.py").write_text("import os, signal, sys; os.kill(os.getppid(), signal.SIGTERM); sys.exit(75)")
    with pytest.raises(Stopped):
        cells.run_cells(study, study.cells(), jobs=1)
    assert cells.read_record(study.cells()[0])["status"] == "stopped"
    assert cells.read_record(failed)["message"] == "loss is nan"
    failed.record.write_text("{}")
    with pytest.raises(InputError, match=r"seed1\.json: not the record of a cell; remove it"):
        cells.read_record(failed)


def test_commands_end_with_this_process_even_if_it_is_gone_before_they_look(tmp_path, monkeypatch):
    """The process to watch is named to the command: the system's answer would be another one if it had ended."""
    started = []
    monkeypatch.setattr(cells.subprocess, "Popen", lambda line, **keywords: started.append(line))
    for processes in (1, 2):
        cells.Children(threads=1).start(["train.py", "--config", "x"], sys.stderr, processes)
    assert all(f"exit_with_parent({os.getpid()})" in line[2] for line in started)
    ended = threading.Event()
    monkeypatch.setattr(lifeline.os, "_exit", lambda code: ended.set())
    lifeline.exit_with_parent(os.getpid())  # this process is not its own parent: as if that were gone
    assert ended.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_study_takes_its_cells_along(tmp_path):
    """SIGKILL of the study ends train.py long before its last step; the same command then finishes the study."""
    folder, steps = tmp_path / "out", 1000
    lip = {"model": {"downsampling": {"main": "lip_projection"}}}
    recipe = {"model": {"name": "test_resnet"}, "data": {"batch_size": 16}, "train": {"epochs": 20, "eval_every": 20}}
    path = write(tmp_path, seeds=[0], recipe=recipe, variants={"plain": {}, "lip": lip})
    command = [sys.executable, "scripts/study.py", "run", str(path), "--output", str(folder)]
    command += [f"train.max_steps={steps}", "train.log_every=1", "train.checkpoint_steps=50"]
    study = subprocess.Popen(command)
    metrics = folder / "plain" / "seed0" / "metrics.jsonl"
    while not metrics.exists():
        assert study.poll() is None
        time.sleep(0.05)
    study.kill()
    study.wait()
    while _alive(str(folder)):
        time.sleep(0.05)
    assert 0 < len(metrics.read_text().splitlines()) < steps
    assert not (folder / "plain" / "seed0" / "eval.json").exists()
    assert subprocess.run(command, check=False).returncode == 0
    assert all((folder / name / "seed0" / "predictions.csv").is_file() for name in ("plain", "lip"))
    assert (folder / "report.html").is_file()


def _alive(text: str) -> bool:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return any(text in line and "train.py" in line for line in listed.splitlines())
