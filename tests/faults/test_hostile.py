"""Broken and hostile checkpoints: one clear line, or nothing of them differs; and paths as people have them."""

import os
import random
import subprocess
import sys
import zipfile

import hostile_files
import pytest
import torch
from helpers import ROOT, small_config
from processes import RECIPE
from run_contents import hash_value

from lip_resnet import checkpoint
from lip_resnet.config import InputError
from lip_resnet.models import registry
from lip_resnet.recipe import load_config, parse_config
from lip_resnet.training.checkpoints import Checkpoints
from lip_resnet.training.classification import Classification
from lip_resnet.training.engine import build_state

SMALL = ["model.args.channels=[8,8,8,8]", "model.args.stem_width=8"]


def fresh_state():
    config = load_config(RECIPE, SMALL)
    cpu = torch.device("cpu")
    return build_state(registry.build_model(config.model), config, cpu, Classification(config, cpu)), config


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small training checkpoint: (payload, bytes)."""
    state, config = fresh_state()
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.step = 10
    path = tmp_path_factory.mktemp("good") / "good.pt"
    checkpoint.save(path, {**state.state_dict(), "config": config.model_dump(mode="json"), "processes": [1]})
    return checkpoint.load(path), path.read_bytes()


def refusal(path, state) -> str | None:
    """The one line by which a file is refused as a checkpoint to continue from; None if it is taken."""
    try:
        payload = checkpoint.load(path)
        parse_config(payload.get("config", {}), str(path))
        state.load_state_dict(payload, str(path))
    except InputError as error:
        return str(error)
    return None


def test_the_good_one_is_taken(good, tmp_path):
    path = tmp_path / "good.pt"
    path.write_bytes(good[1])
    assert refusal(path, fresh_state()[0]) is None


def test_cut_at_every_kilobyte(good, tmp_path):
    path = tmp_path / "cut.pt"
    kilobytes = len(good[1]) // 1024 + 1
    assert kilobytes > 100
    for number in range(kilobytes):
        path.write_bytes(hostile_files.truncate(good[1], number))
        with pytest.raises(InputError) as caught:
            checkpoint.load(path)
        assert str(caught.value).startswith(f"{path}: not a checkpoint"), number


def test_flipped_bits(good, tmp_path):
    """Of 300 altered files none is loaded with another content; some have an altered byte that means nothing."""
    path, became = tmp_path / "flipped.pt", []
    for number in range(300):
        path.write_bytes(hostile_files.flip(random.Random(number), good[1]))
        try:
            payload = checkpoint.load(path)
        except InputError:
            became.append("refused")
            continue
        became.append("harmless")
        assert hash_value(payload) == hash_value(good[0]), number
    assert became.count("refused") > 200


def test_a_flipped_weight_is_noticed(good, tmp_path):
    """torch.load itself takes it for the weight."""
    path = tmp_path / "weight.pt"
    path.write_bytes(good[1])
    with zipfile.ZipFile(path) as archive:
        weights = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        largest = max(weights, key=lambda entry: entry.file_size)
        middle = good[1].index(archive.read(largest)) + largest.file_size // 2
    data = bytearray(good[1])
    data[middle] ^= 0x40
    path.write_bytes(data)
    wrong = torch.load(path, weights_only=True)
    assert hash_value(wrong) != hash_value(good[0])
    with pytest.raises(InputError, match=r"the checksum of .* is wrong"):
        checkpoint.load(path)


@pytest.mark.parametrize("what", [what for what in hostile_files.MAKERS if what not in ("zip bomb", "declared size")])
def test_hostile_files(good, tmp_path, what):
    state, _ = fresh_state()
    path, canary = tmp_path / "bad.pt", tmp_path / "canary"
    files = range({"other formats": 40, "executes code": 30}.get(what, 6))
    if what == "altered entries":  # every one of them
        files = hostile_files.altered_payloads(random.Random(0), hostile_files.Good(*good, canary))
    for number, bad in enumerate(files):
        if what == "altered entries":
            torch.save(bad, path)
        else:
            path.write_bytes(hostile_files.make(what, number, *good, canary))
        before = hash_value(state.model.state_dict())
        line = refusal(path, state)
        if line is None:
            loaded = torch.load(path, weights_only=True)
            same = all(hash_value(loaded[key]) == hash_value(good[0][key]) for key in state.state_dict())
            assert same, f"{what} {number} is taken, and is not the good one"
            continue
        assert line.startswith(str(path))
        assert len(line.splitlines()) == 1
        if what in ("executes code", "other formats"):
            assert hash_value(state.model.state_dict()) == before
    assert not canary.exists()


@pytest.mark.parametrize("what", ["zip bomb", "declared size"])
def test_bombs_are_not_unpacked(good, tmp_path, monkeypatch, what):
    monkeypatch.setattr(hostile_files, "BOMB_MB", 8)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load would unpack it"))
    path = tmp_path / "bomb.pt"
    for number in range(6):
        path.write_bytes(hostile_files.make(what, number, *good, tmp_path / "canary"))
        with pytest.raises(InputError, match=r"unpack to more|not a checkpoint"):
            checkpoint.load(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(InputError, match="not a file"):
        checkpoint.load(tmp_path / "folder.pt")


def test_the_newest_whole_one_is_found(good, tmp_path):
    """A flipped bit in the newest, and a half-written one: the older one is taken, and both are named."""
    flipped = bytearray(good[1])
    flipped[len(flipped) // 2] ^= 1
    for step, data in ((5, good[1]), (10, good[1][:50_000]), (15, bytes(flipped))):
        (tmp_path / f"step-{step:08d}.pt").write_bytes(data)
    os.link(tmp_path / "step-00000015.pt", tmp_path / "last.pt")
    found, skipped = Checkpoints(tmp_path, keep=2).newest_whole()
    assert found == tmp_path / "step-00000005.pt"
    assert [line.partition(":")[0].rpartition("/")[2] for line in skipped] == [
        "last.pt",
        "step-00000015.pt",
        "step-00000010.pt",
    ]


def run(*command: object, cwd) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_paths_as_people_have_them(tmp_path, image_folder):
    """Spaces, unicode, symbolic links, relative paths, trailing slashes: train, continue, evaluate."""
    here = tmp_path / "Ünï cødé  'Bilder' 图 #1"
    here.mkdir()
    (here / "mit Leer").mkdir()
    (here / "data link").symlink_to(image_folder)
    (here / "store").mkdir()
    (here / "runs link").symlink_to(here / "store")
    recipe = here / "mit Leer" / "rezept = ä, [b].yaml"
    changes = {"data__name": "folder", "data__root": f"{here}/data link/", "model__num_classes": 3, "train__epochs": 9}
    recipe.write_text(small_config(**changes, data__batch_size=8, data__last_batch="drop").dump())
    (here / "recipe link.yaml").symlink_to(recipe)

    train, evaluate = ROOT / "train.py", ROOT / "eval.py"
    output = "runs link//läuft gut/"
    run(train, "--config", "recipe link.yaml", "--output", output, "train.max_steps=2", cwd=here)
    assert (here / "store" / "läuft gut" / "checkpoints" / "last.pt").is_file()
    source = here / "store" / "läuft gut" / ".." / "läuft gut" / "checkpoints" / "last.pt"
    common = ["--config", recipe, "--output", here / "store" / "läuft gut", "train.max_steps=3"]
    run(train, *common, "data.root=data link", "--resume", source, cwd=here)
    assert torch.load(source, weights_only=True)["step"] == 3
    row = here / "eine Zeile.json"
    shown = run(evaluate, "--checkpoint", output, "--data", "data link/val/", "--output", row, cwd=here)
    assert "* Acc@1" in shown.stdout
    assert row.is_file()


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "/dev/null", "/proc/self/mem"])
def test_paths_that_cannot_be(path):
    with pytest.raises(InputError) as caught:
        checkpoint.load(path)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError):
        load_config(path)
