"""The fault tests themselves: what they see in a run folder, what counts as a loss, the table, working folders."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import inject
import processes
import pytest
import run_contents
import soak
import summary
import torch
from helpers import ROOT
from run_contents import EPOCH, TOTAL

from lip_resnet import checkpoint
from lip_resnet.config import InputError


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
    worker = processes.Worker(tmp_path)
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    code += "start_new_session=True); time.sleep(60)"
    process = worker.start([sys.executable, "-c", code])
    deadline = time.time() + 30
    while len(process.members()) < 2 and time.time() < deadline:
        time.sleep(0.05)
    assert len(process.members()) == 2
    process.handle.kill()
    process.handle.wait()
    assert worker.end(seconds=0.5) == 1  # the child has outlived it, and is ended now
    assert process.members() == []


HIT = {"phase": "training", "recomputed": 2, "lost": [], "equal": True, "ok": True}
FUZZ = {"cases": 500, "failed": [], "ok": True, "became": {"valid": 100, "refused": 400}, "memory_mb": 3}
HEAD = {
    "environment": {"hardware": "CPU", "torch": "2", "python": "3", "git_commit": "abc"},
    "reference": {"plain": "aa", "sparse": "bb", "pair": "cc"},
}


@pytest.mark.parametrize("change", [{}, {"ok": False, "equal": False}, {"ok": False, "lost": ["last.pt"]}])
def test_table(change):
    lines = {"SIGKILL": [HIT, {**HIT, "phase": "start-up", "recomputed": 0, **change}], "fuzzed config": [FUZZ, FUZZ]}
    rows = summary.summarize(lines)
    assert rows["SIGKILL"]["holds"] is not bool(change)
    lost, equal, holds = len(change.get("lost", [])), 2 - ("equal" in change), "**no**" if change else "yes"
    text = summary.render({**HEAD, "faults": rows})
    assert f"| SIGKILL | 2 | training 1, start-up 1 | 1, 2 | {lost} | {equal} of 2 | {holds} |" in text
    assert "| fuzzed config | 1000 | refused 800, valid 200 | 0 | +3 MB | yes |" in text


def test_page_and_record():
    page, record = inject.PAGE.read_text(encoding="utf-8"), json.loads(inject.RECORD.read_text(encoding="utf-8"))
    assert inject.render(page) == page
    assert all(row["holds"] for row in record["faults"].values())
    counts = {fault: row.get("times") or row["cases"] for fault, row in record["faults"].items()}
    assert counts == {fault: times for fault, (times, _) in inject.PLAN.items()}


def test_finished_groups_are_not_repeated(tmp_path, monkeypatch):
    """Every injection is made once, and again only where the call before did not finish its group."""
    made = []
    environment = {**HEAD["environment"], "git_commit": "abc"}
    monkeypatch.setattr(inject, "describe_environment", lambda _: environment)
    monkeypatch.setattr(inject, "make_reference", lambda _: inject.Reference("aa", "bb", "cc", 1.0, 0.1))

    def record_call(fault, first, count, worker, reference):
        made.append((fault, first, count))
        return [HIT] * count if fault == "SIGKILL" else [{**FUZZ, "cases": count}]

    monkeypatch.setattr(inject, "inject", record_call)
    times = {"SIGKILL": 6, "fuzzed config": 600}
    first = inject.inject_all(tmp_path, times)
    assert sorted(made) == [
        *(("SIGKILL", 0, 4), ("SIGKILL", 4, 2), ("fuzzed config", 0, 500), ("fuzzed config", 500, 100))
    ]
    assert (first["faults"]["SIGKILL"]["times"], first["faults"]["fuzzed config"]["cases"]) == (6, 600)
    made.clear()
    (tmp_path / "SIGKILL-4-2.json").unlink()
    assert inject.inject_all(tmp_path, times) == first
    assert made == [("SIGKILL", 4, 2)]
    environment["git_commit"] = "def"
    with pytest.raises(InputError, match="holds results of commit abc"):
        inject.inject_all(tmp_path, times)


@pytest.mark.parametrize("command", [inject, soak])
def test_work_holds_a_user_s_files(tmp_path, monkeypatch, command):
    """Refused, and left as they are; a folder that an earlier call made is taken again."""
    notes = tmp_path / "run" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("a week of work")
    monkeypatch.setattr(processes.Process, "__init__", lambda *_: pytest.fail("it has started a run there"))
    monkeypatch.setattr(processes, "stop_on_signals", lambda: None)  # it would stay after this test
    monkeypatch.setattr(soak, "stop_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", [command.__name__, "--work", str(tmp_path)])
    with pytest.raises(InputError, match="holds files that this command did not make"):
        command.main()
    assert notes.read_text() == "a week of work"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    own = processes.open_work_folder(tmp_path / "new")
    (own / "run").mkdir()
    assert processes.open_work_folder(own) == own


def test_soak_sees_growth(tmp_path):
    """Planted: a process that gains memory, and one descriptor a start that is never closed."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    def check(leak: float, files: int) -> dict[str, bool]:
        run = soak.Soak(processes.Worker(tmp_path), tmp_path / "run", starts=3)
        for start in (1, 2, 3):
            for index in range(30):
                run.samples.append(soak.Sample(start, index * soak.EVERY, 900 + leak * index, 20 + files * start, 5))
        return {what: holds for what, *_, holds in soak.check_bounds(run, processes_left=0)}

    assert all(check(0.1, 0).values())
    assert not check(3.0, 0)["memory, MB: early and late in one process"]
    assert not check(0.0, 5)["open files: least and most at the end of a start"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_fault_once(tmp_path):
    """Through the real command: every run ends as the undisturbed one, and nothing is repeated by a second call."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/faults/inject.py", "--times", "1", "--work", str(tmp_path / "work")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    groups = sorted(Path(tmp_path / "work").glob("*-0-1.json"))
    assert {path.name.removesuffix("-0-1.json") for path in groups} == set(inject.PLAN)
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "\n0.0 minutes\n" in again.stdout
