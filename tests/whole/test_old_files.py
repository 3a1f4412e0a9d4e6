"""Files written by version 0.1.0 load, resume and give deltas: a run stopped at step 30 of 46, and two rows."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from helpers.training import run_train

from lip_resnet import checkpoint
from lip_resnet.evaluation.rows import read_rows
from lip_resnet.evaluation.tables import build_table

OLD = Path(__file__).parents[1] / "fixtures" / "written_by_0.1.0"


@pytest.fixture
def old_run(tmp_path) -> Path:
    """The run folder, its checkpoint unpacked."""
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.pt").write_bytes(gzip.decompress((run / "last.pt.gz").read_bytes()))
    (run / "last.pt.gz").unlink()
    return run


def test_a_run_resumes(old_run, monkeypatch):
    """The figures of the steps that follow are those that 0.1.0 logged in an uninterrupted run."""
    arguments = ("--config", old_run / "config.yaml", "--output", old_run, "--resume", "auto")
    run_train(monkeypatch, *arguments, "train.max_steps=null")
    lines = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for line in lines if line["step"] == 46 for name, value in line.items()}
    assert [line["step"] for line in lines] == [23, 23, 30, 30, 46, 46]
    assert last["train/lr"] == pytest.approx(0.0002329, rel=1e-3)
    assert last["val/loss"] == pytest.approx(2.2986787, rel=1e-4)
    assert last["val_ema/loss"] == pytest.approx(2.3000484, rel=1e-4)
    payload = checkpoint.load(old_run / "checkpoints" / "last.pt")
    assert payload["step"] == 46
    assert payload["processes"] == [1]


def test_rows_give_a_delta():
    """10.986 with LIP, blur and average pooling in place of 10.423 of the network as it is."""
    header, lines, notes = build_table(read_rows([str(OLD / "row.json"), str(OLD / "baseline_row.json")]), {})
    cells = dict(zip(header, lines[0], strict=True))
    assert (cells["top-1 (%)"], cells["delta top-1"], notes) == ("10.99", "+0.56", [])
