"""Files: atomic when written, safe and strict when read, from whoever wrote them."""

import os
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from helpers.forks import fork

from lip_resnet import checkpoint
from lip_resnet.config import InputError
from lip_resnet.files import write_atomically
from lip_resnet.models.weights import extract_weights, load_weights


@pytest.fixture
def model():
    return timm.create_model("test_resnet", num_classes=10)


def same(model, state) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_every_container_loads(model, tmp_path):
    state = {key: value.clone() for key, value in timm.create_model("test_resnet", num_classes=10).state_dict().items()}
    containers = {
        "bare.pth": state,
        "reference.pth": {
            "epoch": 3,
            "arch": "resnet50",
            "state_dict": {f"module.{key}": value for key, value in state.items()},
            "best_acc1": torch.tensor(78.2),
            "optimizer": {"state": {}, "param_groups": []},
        },
        "ours.pt": {"format": 1, "model": state, "ema": None, "step": 4, "config": {"train": {"epochs": 1}}},
        "compiled.pt": {f"_orig_mod.{key}": value for key, value in state.items()},
    }
    for name, payload in containers.items():
        torch.save(payload, tmp_path / name)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    for name in [*containers, "old.pth", "plain.safetensors"]:
        fresh = timm.create_model("test_resnet", num_classes=10)
        assert not same(fresh, state)
        load_weights(fresh, tmp_path / name)
        assert same(fresh, state), name


def test_names_of_wrappers_are_left_out():
    """DDP, torch.compile, FSDP and activation checkpointing, in each other, around the network or parts of it."""
    keys = ["module.weight", "layer.0.weight", "layer.module.bias", "head_orig_mod.bias"]  # a child called `module`
    state = {key: torch.zeros(1) for key in keys}
    assert list(extract_weights(state, "it")) == keys
    for wrapper in ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.module."):
        assert list(extract_weights({wrapper + key: value for key, value in state.items()}, "it")) == keys, wrapper
    inside = (
        "module._fsdp_wrapped_module.module.weight",
        "module.layer._orig_mod.0._checkpoint_wrapped_module.weight",
        "module.layer._fsdp_wrapped_module._checkpoint_wrapped_module.module.bias",
        "module.head_orig_mod.bias",
    )
    assert list(extract_weights(dict.fromkeys(inside, torch.zeros(1)), "it")) == keys


def test_ema_is_taken_when_asked_for(model, tmp_path):
    ema = {key: value + 1 for key, value in model.state_dict().items()}
    torch.save({"format": 1, "model": model.state_dict(), "ema": ema}, tmp_path / "a.pt")
    load_weights(model, tmp_path / "a.pt", ema=True)
    assert same(model, ema)
    torch.save({"format": 1, "model": model.state_dict(), "ema": None}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="no averaged"):
        load_weights(model, tmp_path / "b.pt", ema=True)


def test_new_head_keeps_the_model_s_own(model, tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "seven.pth")
    head = model.fc.weight.clone()
    with pytest.raises(InputError, match=r"2 keys of another shape.*model.new_head"):
        load_weights(model, tmp_path / "seven.pth")
    load_weights(model, tmp_path / "seven.pth", new_head=True)
    assert torch.equal(model.fc.weight, head)


def test_wrong_weights_are_counted_and_change_nothing(model, tmp_path):
    state = dict(timm.create_model("test_resnet", num_classes=10).state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del state["bn1.weight"], state["bn1.bias"]
    state["extra"] = torch.zeros(1)
    state["fc.bias"] = torch.zeros(3)
    state["bn1.num_batches_tracked"] = torch.tensor(1 + 1j)
    state["conv1.0.weight"] = state["conv1.0.weight"].to("meta")
    state["fc.weight"] = state["fc.weight"].to_sparse()
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(InputError) as caught:
        load_weights(model, tmp_path / "wrong.pth")
    for words in (
        "2 keys missing (bn1.weight, bn1.bias)",
        "1 keys unknown (extra)",
        "1 keys of another shape (fc.bias)",
        "1 keys complex (bn1.num_batches_tracked)",
        "2 keys sparse or without data (conv1.0.weight, fc.weight)",
    ):
        assert words in str(caught.value)
    assert same(model, before)


class _Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch '{self.trace}'",)


@pytest.mark.parametrize("name", ["evil.pth", "text.pth", "empty.pth", "cut.pth", "list.pth", "bad.safetensors"])
def test_hostile_and_broken_files(model, tmp_path, name):
    path = tmp_path / name
    if name == "evil.pth":
        torch.save({"state_dict": _Evil(tmp_path / "executed")}, path)
    elif name == "cut.pth":
        torch.save(model.state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif name == "list.pth":
        torch.save([1, 2], path)
    else:
        path.write_bytes(b"" if name == "empty.pth" else b"no checkpoint at all")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(model, before)
    assert not (tmp_path / "executed").exists()


def test_old_format_cut_anywhere(tmp_path):
    """torch's older format has no checksums and no end: every length but the whole is refused with a line."""
    path = tmp_path / "old.pth"
    torch.save({"fc.weight": torch.arange(6.0), "step": 3}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"old\.pth"):
            checkpoint.load(path)


def test_missing_file(model, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_weights(model, tmp_path / "none.pth")


def die_half_way(file) -> None:
    file.write(b"half")
    file.flush()
    os._exit(9)


def test_a_kill_while_writing_keeps_the_old_file(tmp_path):
    """A process dies half-way through its second write: the first file is still there, whole."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    assert fork(partial(write_atomically, path, die_half_way)).codes == [9]
    assert checkpoint.load(path)["step"] == 1


def test_a_failed_write_leaves_no_litter(tmp_path):
    path = tmp_path / "last.pt"

    def write(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        write_atomically(path, write)
    assert list(tmp_path.iterdir()) == []
