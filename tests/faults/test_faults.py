"""The fault tests themselves: what they see in a run folder, what counts as a loss, the summary."""

import json
import os
import subprocess
import sys
import time

import inject
import processes
import pytest
import run_contents
import soak
import torch
from helpers import ROOT
from run_contents import EPOCH, TOTAL

from lip_resnet import checkpoint


def payload(step: int) -> dict:
    state = {"model": {"w": torch.arange(4.0) + step}, "ema": None, "optimizer": {}, "scaler": {}}
    return {**state, "window": torch.zeros(1, 4), "step": step, "best": 50.0}


@pytest.fixture
def folder(tmp_path):
    """A run folder at step 10, whose last numbers are of step 12."""
    (tmp_path / "checkpoints").mkdir()
    for name, step in (("step-00000005.pt", 5), ("step-00000010.pt", 10), ("last.pt", 10), ("best.pt", 5)):
        checkpoint.save(tmp_path / "checkpoints" / name, payload(step))
    lines = [{"step": step, "epoch": 0, "train/loss": 1.0 / step, "train/data_wait": 0.5} for step in range(1, 13)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 13, "tr')
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "env.json").write_text("{}")
    return tmp_path


def test_losses_are_seen(folder):
    before, last = run_contents.take_inventory(folder), folder / "checkpoints" / "last.pt"
    assert before.steps == {"step-00000005.pt": 5, "step-00000010.pt": 10, "last.pt": 10, "best.pt": 5}
    assert (before.damaged, before.newest, before.logged) == ([], 10, 12)

    def lost() -> list[str]:
        return run_contents.lost_between(before, run_contents.take_inventory(folder))

    assert lost() == []
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    assert lost() == ["last.pt"]
    middle = whole.index(torch.arange(10.0, 14.0).numpy().tobytes())
    last.write_bytes(whole[: middle + 2] + b"\x41" + whole[middle + 3 :])  # a weight is another number
    assert lost() == ["last.pt"]
    last.unlink()
    assert lost() == ["last.pt"]
    (folder / "checkpoints" / "step-00000010.pt").unlink()
    assert lost() == ["last.pt", "step 10"]
    last.write_bytes(whole)
    (folder / "env.json").write_text('{"a":')
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert lost() == ["env.json", "metrics.jsonl"]


def test_the_hash_is_of_everything_that_counts(folder):
    lines = run_contents.read_metrics(folder)[0]
    before = run_contents.hash_run(folder)
    for change, same in (
        (lambda state, line: None, True),
        (lambda state, line: line.update({"train/data_wait": 0.9}), True),
        (lambda state, line: line.update({"train/loss": 0.5}), False),
        (lambda state, line: state["model"]["w"].add_(1e-4), False),
        (lambda state, line: state["window"].add_(1), False),
        (lambda state, line: state.update(best=50.1), False),
        (lambda state, line: state["optimizer"].update({"momentum": torch.ones(1)}), False),
    ):
        state, changed = payload(10), [dict(line) for line in lines]
        change(state, changed[3])
        checkpoint.save(folder / "checkpoints" / "last.pt", state)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        assert (run_contents.hash_run(folder) == before) is same


def test_phases(folder):
    started = time.time() - 60
    assert run_contents.find_phase(folder, time.time() + 60, 1) == "start-up"
    assert run_contents.find_phase(folder, started, 1) == "training"
    (folder / "checkpoints" / ".step-00000015.pt.7.tmp").touch()
    assert run_contents.find_phase(folder, started, 7) == "writing"
    assert run_contents.find_phase(folder, started, 1) == "training"
    line = {"step": EPOCH, "epoch": 0, "train/loss": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert run_contents.find_phase(folder, started, 1) == "evaluation"
    (folder / "metrics.jsonl").write_text(json.dumps({**line, "step": TOTAL, "val/loss": 1.0}) + "\n")
    assert run_contents.find_phase(folder, started, 1) == "ending"
    assert EPOCH == 1442 // 96  # the digits' training images, in whole batches


def test_processes_are_found_by_their_mark_and_ended(tmp_path):
    group = processes.Group(tmp_path)
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    code += "start_new_session=True); time.sleep(60)"
    process = group.start([sys.executable, "-c", code])
    process.wait_until(lambda: len(group.members()) == 2, seconds=30)
    assert sorted(group.members()) == [process.pid, *process.children()]
    process.kill()
    process.wait()
    assert group.end(seconds=0.5) == 1  # the child has outlived it, and is ended now
    assert group.members() == []


HIT = {"phase": "training", "recomputed": 2, "lost": [], "equal": True, "ok": True}


@pytest.mark.parametrize("change", [{}, {"ok": False, "equal": False}, {"ok": False, "lost": ["last.pt"]}])
def test_summary(change):
    row = inject.summarize([HIT, {**HIT, "phase": "start-up", "recomputed": 0, **change}])
    assert (row["times"], row["phases"]) == (2, {"training": 1, "start-up": 1})
    assert row["recomputed"] == {"median": 1, "most": 2}
    assert row["holds"] is not bool(change)
    assert (row["lost"], row["equal"]) == (len(change.get("lost", [])), 2 - ("equal" in change))


def test_record():
    record = json.loads(inject.RECORD.read_text(encoding="utf-8"))
    assert all(row["holds"] for row in record["faults"].values())
    counts = {fault: row.get("times") or row["cases"] for fault, row in record["faults"].items()}
    assert counts == {fault: times for fault, (times, _) in inject.PLAN.items()}


def test_soak_sees_growth(tmp_path):
    """Planted: a process that gains memory, and one descriptor a start that is never closed."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    def exceeded(leak: float, files: int) -> list[str]:
        run = soak.Soak(tmp_path)
        for start in (1, 2, 3):
            steps = range(30)
            run.starts.append([soak.Sample(10 * i, 900 + leak * i, 20 + files * start, 5) for i in steps])
        return [what.split(",")[0] for what, figure, most in soak.check_bounds(run, processes_left=0) if figure > most]

    assert exceeded(0.1, 0) == []
    assert "memory: late in one process" in exceeded(3.0, 0)
    assert exceeded(0.0, 5) == ["files: at the end of a start"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_fault_once():
    """Through the real command: every run ends as the undisturbed one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/faults/inject.py", "--times", "1"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(f" {fault}: {{" in result.stdout for fault in inject.PLAN)
