"""What a checkpoint restores, which checkpoints stay, and when a run evaluates; on one linear layer."""

import copy
import types
from pathlib import Path

import pytest
import torch
from helpers import small_config
from torch import nn

from lip_resnet import checkpoint, distributed
from lip_resnet.config import InputError
from lip_resnet.training import run
from lip_resnet.training.checkpoints import Checkpoints
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import TrainState, build_state
from lip_resnet.training.nonfinite import Rollback

CHANGES = {"model__num_classes": 4, "train__ema_decay": 0.5, "train__precision": "float16", "train__max_steps": 12}


def fresh(**changes: object) -> TrainState:
    config = small_config(**CHANGES | changes)
    return build_state(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), config, CPU, Classification(config, CPU))


CPU = torch.device("cpu")


def worn() -> TrainState:
    """A state in which nothing is at its first value."""
    state = fresh()
    for module in (state.model, state.ema.module):
        for tensor in module.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) * 9 + 1)
    for value in state.optimizer.state.values():
        value["momentum_buffer"].uniform_(1, 2)
    state.optimizer.param_groups[0]["lr"] = 0.375
    state.scaler.scale(torch.ones(()))
    state.scaler.update(128.0)
    state.window.sums.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    state.step, state.evaluated, state.skipped, state.best = 7, 4, 3, 55.5
    state.excluded_steps, state.rollbacks = {2, 5}, 1
    state.guard.counters.copy_(torch.tensor([6, 2]))
    return state


def payload_of(state: TrainState) -> dict:
    return {**copy.deepcopy(state.state_dict()), "processes": [1]}


def test_everything_is_restored():
    torch.manual_seed(0)
    old, new = worn(), fresh()
    new.load_state_dict(payload_of(old), "it")
    for part in ("model", "ema", "optimizer", "scaler"):
        ours, theirs = (state.state_dict()[part] for state in (new, old))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert new.window.sums.tolist() == [1, 2, 3, 4]
    assert (new.step, new.evaluated, new.skipped, new.best) == (7, 4, 3, 55.5)
    assert (new.excluded_steps, new.rollbacks, new.guard.counters.tolist()) == ({2, 5}, 1, [6, 2])
    assert new.scaler.get_scale() == 128


def test_counts_of_other_numbers_of_processes_are_summed(monkeypatch):
    """Two processes' counts, continued by one and by three; by two, each has its own."""
    payload = payload_of(worn()) | {"window": torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]], dtype=torch.float64)}
    for world, rank, sums in (
        (1, 0, [11, 22, 33, 44]),
        (3, 0, [11, 22, 33, 44]),
        (3, 1, [0] * 4),
        (2, 1, [10, 20, 30, 40]),
    ):
        state = fresh()
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        state.load_state_dict(payload, "it")
        assert state.window.sums.tolist() == sums
        assert state.skipped == (3 if rank == 0 else 0)  # summed over processes when it was saved
        monkeypatch.undo()


def test_a_state_before_its_first_log_is_saved_with_its_counts():
    state = worn()
    assert state.state_dict()["window"].tolist() == [[1, 2, 3, 4]]
    state.window.sums[2] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite at step 7; they are not saved"):
        state.state_dict()


DATASETS = {split: {"images": 9, "classes": 4, "names": "sha256:a"} for split in ("train", "val")}


def save(path: Path, **entries: object) -> Path:
    config = small_config(**CHANGES).model_dump(mode="json")
    extra = {"config": config, "datasets": DATASETS, "initial_weights": {"sha256": "b"}, "processes": [2, 4]}
    checkpoint.save(path, payload_of(worn()) | extra | entries)
    return path


def test_restoring_takes_the_provenance_on(tmp_path, monkeypatch):
    for world, processes in ((4, [2, 4]), (2, [2, 4, 2]), (1, [2, 4, 1])):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: 1)
        state, provenance = fresh(), run.Provenance([world], copy.deepcopy(DATASETS))
        path = save(tmp_path / "last.pt")
        monkeypatch.setattr(run.distributed, "world_size", lambda world=world: world)
        monkeypatch.setattr(run.distributed, "on_main", lambda function: function())
        run.restore(state, small_config(**CHANGES), path, provenance)
        assert provenance.processes == processes
        assert provenance.initial_weights == {"sha256": "b"}
        assert state.best == 55.5
        monkeypatch.undo()


@pytest.mark.parametrize(
    "change",
    [{"data__eval_resize": 40}, {"data__crop_mode": "squash"}, {"data__eval_size": 24}, {"train__rules": "ema"}],
)
def test_another_evaluation_chooses_the_best_afresh(tmp_path, change):
    state = fresh()
    run.restore(state, small_config(**CHANGES | change), save(tmp_path / "last.pt"), run.Provenance([1], DATASETS))
    assert (state.best, state.step) == (-torch.inf, 7)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("key", "value"), [("images", 8), ("classes", 3), ("names", "sha256:c")])
def test_other_data_of_either_split_are_refused(split, key, value):
    ours = copy.deepcopy(DATASETS)
    run.check_same_data(DATASETS, ours, "it")
    ours[split][key] = value
    with pytest.raises(
        InputError, match=f"it was trained with other data: {key} of {split}: {DATASETS[split][key]}, here"
    ):
        run.check_same_data(DATASETS, ours, "it")
    run.check_same_data({split: {}}, ours, "it")  # an earlier version recorded nothing


def saved(folder: Path, keep: int, *steps: int, best: int = 0) -> Checkpoints:
    folder.mkdir()
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save({"step": step}, best=step == best)
    checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_and_the_best_stay(tmp_path, keep):
    saved(tmp_path / "a", keep, 1, 2, 3, 4, 5, best=2)
    files = {path.name: torch.load(path, weights_only=True)["step"] for path in (tmp_path / "a").glob("*.pt")}
    newest = {f"step-{step:08d}.pt": step for step in range(6 - keep, 6)}
    assert files == {"best.pt": 2, "last.pt": 5, **newest}


def test_the_newest_whole_checkpoint(tmp_path):
    checkpoints = saved(tmp_path / "a", 3, 1, 2, 3)
    last = tmp_path / "a" / "last.pt"
    assert checkpoints.newest_whole() == (last, [])
    assert checkpoints.newer_than(tmp_path / "a" / "step-00000002.pt") == last
    assert checkpoints.newer_than(tmp_path / "a" / "step-00000003.pt") is None
    last.unlink()
    last.write_bytes(b"damaged")
    source, (line,) = checkpoints.newest_whole()
    assert source == tmp_path / "a" / "step-00000003.pt"
    assert "last.pt" in line


def a_run(state: object, **changes: object) -> run.Run:
    """Of three epochs of four steps."""
    config = small_config(train__epochs=3, **changes)
    log = types.SimpleNamespace(rewind=lambda *given: None, say=lambda line: None)
    one = run.Run(config, state, range(4), None, log, 12, run.Provenance([1]), [])
    one.watchdog = types.SimpleNamespace(pause=lambda: None)
    return one


@pytest.mark.parametrize(("every", "due"), [(1, [4, 8, 12]), (2, [8, 12]), (3, [12]), (5, [12])])
def test_when_a_run_evaluates(every, due):
    """After every so many epochs, and always at the end; each step once."""
    state = types.SimpleNamespace(step=0, evaluated=0)
    one, evaluated, finished = a_run(state, train__eval_every=every), [], []
    for step in range(1, 13):
        state.step = step
        finished.append(one.finished)
        if one._evaluation_is_due():
            evaluated.append(step)
            state.evaluated = step
            assert not one._evaluation_is_due()
    assert evaluated == due
    assert not any(finished)
    assert one.finished


def test_a_run_evaluates_its_weights_and_their_average(monkeypatch):
    state = worn()
    results = {state.model: 10.0, state.ema.module: 20.0}
    monkeypatch.setattr(
        state.task, "evaluate", lambda network: dict.fromkeys(("top1", "top5", "loss"), results[network])
    )
    values = a_run(state, train__ema_decay=0.5).validate()
    assert values == {
        f"{name}/{key}": top1 for name, top1 in (("val", 10.0), ("val_ema", 20.0)) for key in ("loss", "top1", "top5")
    }


def test_rollbacks_are_limited(monkeypatch, tmp_path):
    """A limit of two: twice it goes back, without the batches it could not take; the third time it ends."""
    state = worn()
    state.excluded_steps, state.rollbacks = set(), 0
    one = a_run(state, train__on_nonfinite="rollback", train__nonfinite_limit=2)
    one.checkpoints = types.SimpleNamespace(newest_whole=lambda: (tmp_path / "last.pt", []), wait=lambda: None)
    monkeypatch.setattr(run, "restore", lambda *_: vars(state).update(step=4, excluded_steps=set(), rollbacks=0))
    for number, step in ((1, 6), (2, 8)):
        one._roll_back(Rollback(step, "not finite"))
        assert (state.step, state.rollbacks) == (4, number)
    assert state.excluded_steps == {6, 8}
    with pytest.raises(FloatingPointError, match="rolled back 2 times already"):
        one._roll_back(Rollback(9, "not finite"))


def test_undone_steps_are_counted_in_all_and_in_a_row():
    guard, sums, rows = fresh().guard, torch.zeros(4), []
    for bad in (1, 1, 0, 1, 0):
        guard.start_step(sums)
        guard.undo_if(torch.tensor(float(bad)))
        rows.append(guard.counters.tolist())
    assert rows == [[1, 1], [2, 2], [2, 0], [3, 1], [3, 0]]


def test_the_profiler_traces_the_steps_after_the_first_five(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.profiler, "profile", lambda **given: given["schedule"])
    schedule = run.profiler(small_config(train__profile=2).train, tmp_path)
    assert [schedule(step).name for step in range(9)] == [
        *("NONE", "NONE", "NONE", "NONE", "WARMUP", "RECORD", "RECORD_AND_SAVE", "NONE", "NONE")
    ]
