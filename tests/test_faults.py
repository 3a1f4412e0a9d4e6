"""The fault harness: what it sees in a run folder, what it counts as a loss, its table. Runs of it are slow tests."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT

from lip_resnet import checkpoint
from lip_resnet.config import InputError

sys.path.insert(0, str(ROOT / "scripts"))
import fault_runs
import fault_table
import faults
import soak


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


def test_inventory(folder):
    now = fault_runs.take_inventory(folder)
    assert now.steps == {"step-00000005.pt": 5, "step-00000010.pt": 10, "last.pt": 10, "best.pt": 5}
    assert (now.torn, now.newest, now.logged) == ([], 10, 12)


def test_losses_are_seen(folder):
    before = fault_runs.take_inventory(folder)
    last = folder / "checkpoints" / "last.pt"

    def lost() -> list[str]:
        return fault_runs.lost_between(before, fault_runs.take_inventory(folder))

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


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda state, line: None, True),
        (lambda state, line: line.update({"train/data_wait": 0.9}), True),
        (lambda state, line: line.update({"train/loss": 0.5}), False),
        (lambda state, line: state["model"]["w"].add_(1e-4), False),
        (lambda state, line: state["window"].add_(1), False),
        (lambda state, line: state.update(best=50.1), False),
        (lambda state, line: state["optimizer"].update({"momentum": torch.ones(1)}), False),
    ],
)
def test_the_hash_is_of_everything_that_counts(folder, change, same):
    before = fault_runs.hash_state(folder)
    state, lines = payload(10), fault_runs.read_metrics(folder)[0]
    change(state, lines[3])
    checkpoint.save(folder / "checkpoints" / "last.pt", state)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (fault_runs.hash_state(folder) == before) is same


def test_phases(folder):
    started = time.time() - 60
    assert fault_runs.find_phase(folder, time.time() + 60, 1) == "start-up"
    assert fault_runs.find_phase(folder, started, 1) == "training"
    (folder / "checkpoints" / ".step-00000015.pt.7.tmp").touch()
    assert fault_runs.find_phase(folder, started, 7) == "writing"
    assert fault_runs.find_phase(folder, started, 1) == "training"
    line = {"step": fault_runs.EPOCH, "epoch": 0, "train/loss": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert fault_runs.find_phase(folder, started, 1) == "evaluation"
    (folder / "metrics.jsonl").write_text(json.dumps({**line, "step": fault_runs.TOTAL, "val/loss": 1.0}) + "\n")
    assert fault_runs.find_phase(folder, started, 1) == "ending"


def test_epochs_of_the_recipe():
    assert fault_runs.EPOCH == 1442 // 96  # the digits' training images, in whole batches


def test_processes_are_found_by_their_mark_and_ended(tmp_path):
    lane = fault_runs.Lane(0, tmp_path, threading.Event())
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    code += "start_new_session=True); time.sleep(60)"
    process = lane.start([sys.executable, "-c", code])
    deadline = time.time() + 30
    while len(process.members()) < 2 and time.time() < deadline:
        time.sleep(0.05)
    assert len(process.members()) == 2
    process.handle.kill()
    process.handle.wait()
    assert lane.leftovers(seconds=0.5) == 1  # the child has outlived it, and is ended now
    assert process.members() == []


LINE = {"fault": "SIGKILL", "step": 12, "phase": "training", "recomputed": 2, "lost": [], "seconds": 1.0, "ok": True}
LINE |= {"kind": "SIGKILL", "seed": 0, "lane": 0, "sha256": "aa", "equal": True, "left": 0, "litter": 0}
FUZZ = {"fault": "fuzzed config", "kind": "fuzzed config", "seed": 0, "lane": 1, "cases": 500, "failed": [], "ok": True}
FUZZ |= {"became": {"valid": 100, "refused": 400}, "memory_mb": 3, "seconds": 9.0}
TORN = {**LINE, "fault": "contrast: SIGKILL in a write", "kind": "contrast", "lost": ["last.pt"], "recomputed": 12}
HEAD = {
    "environment": {"hardware": "CPU", "torch": "2", "python": "3", "git_commit": "abc"},
    "references": {"plain": "aa", "sparse": "bb", "pair": "cc", "startup": 1.0, "step": 0.1},
}


def test_table():
    lines = [HEAD, LINE, {**LINE, "phase": "start-up", "recomputed": 0, "step": 10}, FUZZ, TORN]
    text = fault_table.render(lines)
    assert "| SIGKILL | 2 | training 1, start-up 1 | 1, 2 | 0 | 2 of 2 | yes |" in text
    assert "| fuzzed config | 500 | refused 400, valid 100 | 0 | +3 MB | yes |" in text
    assert "| contrast: SIGKILL in a write | 1 | training 1 | 12, 12 | 1 | 1 of 1 could not go on |" in text
    assert fault_table.rows_that_do_not_hold(lines) == []


@pytest.mark.parametrize("change", [{"ok": False, "equal": False}, {"ok": False, "lost": ["last.pt"]}])
def test_a_row_turns_red(change):
    lines = [HEAD, LINE, {**LINE, **change}]
    assert fault_table.rows_that_do_not_hold(lines) == ["SIGKILL"]
    assert "| **no** |" in fault_table.render(lines)


def test_a_harness_that_does_not_bite_is_noticed():
    assert fault_table.rows_that_do_not_hold([HEAD, {**TORN, "lost": []}]) == [f"{TORN['fault']} (it lost nothing)"]


def test_a_record_goes_on(tmp_path):
    path = tmp_path / "faults.jsonl"
    record = faults.Record(path, 0.06, ["SIGKILL", "fuzzed config"])
    taken = [record.take() for _ in range(5)]
    assert taken[:3] == [("SIGKILL", 0, 4), ("SIGKILL", 1, 2), ("fuzzed config", 0, 500)]
    assert taken[3:] == [("fuzzed config", 1, 100), None]
    record.add(*taken[0], 0, [LINE, LINE, LINE])  # one of four came too late
    record.add(*taken[2], 1, [FUZZ])
    assert record.take() == ("SIGKILL", 2, 1)
    again = faults.Record(path, 0.06, ["SIGKILL", "fuzzed config"])  # what was under way is done again
    assert [again.take() for _ in range(3)] == [("SIGKILL", 1, 3), ("fuzzed config", 1, 100), None]


def test_page_is_current():
    page = faults.PAGE.read_text(encoding="utf-8")
    lines = fault_table.read_lines(faults.RECORD)
    if lines:
        assert faults.render(page) == page
        assert fault_table.rows_that_do_not_hold(lines) == []
        counts = {kind: sum(line.get("cases", 1) for line in lines if line.get("kind") == kind) for kind in faults.PLAN}
        assert all(counts[kind] >= faults.PLAN[kind].times for kind in faults.PLAN), counts
    else:
        assert "Not run yet." in page
        with pytest.raises(InputError, match="has no lines"):
            faults.render(page)


def test_soak_sees_growth(tmp_path):
    """Planted: a process that gains memory, and one descriptor a start that is never closed."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    lane = fault_runs.Lane(0, tmp_path, threading.Event())

    def judged(leak: float, files: int) -> dict[str, bool]:
        found = soak.Soak(lane, tmp_path / "run", None, starts=3)
        for start in (1, 2, 3):
            for index in range(30):
                sample = soak.Sample(start, index * soak.EVERY, 900 + leak * index, 20 + files * start, 5)
                found.samples.append(sample)
        return {what: holds for what, *_, holds in soak.judge(found, left=0)}

    assert all(judged(0.1, 0).values())
    assert not judged(3.0, 0)["memory, MB: early and late in one process"]
    assert not judged(0.0, 5)["open files: least and most at the end of a start"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_small_share_of_the_faults(tmp_path):
    """Every kind once, through the real command; the ends are the uninterrupted run's, and the contrast loses."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "scripts/faults.py", "--scale", "0.01", "--work", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = fault_table.read_lines(tmp_path / "faults.jsonl")
    assert {line["kind"] for line in lines[1:]} == set(faults.PLAN)
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.startswith("0.0 minutes")  # nothing is repeated
