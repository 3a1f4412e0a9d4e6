"""A machine on which the launch files can be called."""

import os

import pytest
from helpers.launch import FAKES, executable


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A machine with Slurm's, torchrun's and Apptainer's names on PATH; returns the folder of their records."""
    tools, record, venv = tmp_path / "tools", tmp_path / "record", tmp_path / "venv"
    for folder in (tools, record, venv / "bin"):
        folder.mkdir(parents=True)
    for name, body in FAKES.items():
        executable(tools / name, body)
    (venv / "bin" / "activate").write_text("")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    job["SLURM_CPUS_PER_TASK"] = "96"
    for name, value in {**job, "SLURM_GPUS_ON_NODE": "8", "RECORD": str(record), "VENV": str(venv)}.items():
        monkeypatch.setenv(name, value)
    return record
