"""Weight files of other projects and other habits: all load, nothing in them is executed."""

import argparse
import os
import pathlib
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from lip_resnet import checkpoint
from lip_resnet.config import InputError
from lip_resnet.models.identify import identify
from lip_resnet.models.weights import choose_weights, extract_weights, hash_weights, load_weights, put_weights


def build(num_classes: int = 10) -> nn.Module:
    return timm.create_model("test_resnet", num_classes=num_classes)


def is_loaded(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def test_training_files_of_other_projects(tmp_path):
    state, average = build().state_dict(), build().state_dict()
    options = argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("runs/a"), crop=[0.08, 1.0], resume=None)
    model_ema = {"n_averaged": torch.tensor(7), **prefixed("module.", average)}
    files: dict[str, dict[str, Any]] = {
        "timm": {
            **{"epoch": 3, "arch": "test_resnet", "version": 2, "args": options, "metric": np.float64(71.5)},
            **{"state_dict": state, "state_dict_ema": average, "optimizer": {"lr": np.float32(0.1)}},
        },
        "torchvision": {"model": state, "optimizer": {}, "epoch": 3, "args": options, "model_ema": model_ema},
        "deit": {"model": state, "model_ema": average, "scaler": {"scale": 1.0}, "args": options},
        "rng": {"state_dict": state, "state_dict_ema": average, "numpy": np.random.RandomState(0).get_state()[1]},
        "ema": {"model": state, "ema": model_ema, "lr_scheduler": {"last_epoch": 3}},
        "tutorial": {"model_state_dict": state, "ema_state_dict": average, "loss": torch.tensor(0.4)},
    }
    for name, payload in files.items():
        torch.save(payload, tmp_path / name)
        for ema, expected in ((False, state), (True, average)):
            model = build()
            load_weights(model, tmp_path / name, ema=ema)
            assert is_loaded(model, expected), (name, ema)
    only_average = {"averaged": model_ema, "timm": {"state_dict_ema": average}}
    for name, payload in only_average.items():
        torch.save(payload, tmp_path / name)
        model = build()
        load_weights(model, tmp_path / name)
        assert is_loaded(model, average), name
    assert choose_weights(only_average["timm"], "it", None) == "ema"
    with pytest.raises(InputError, match="it: holds only averaged"):
        choose_weights(only_average["timm"], "it", "model")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"module.module.{key}",
        lambda key: f"_orig_mod.module._orig_mod.{key}",
        lambda key: f"model.{key}",
        lambda key: f"net._orig_mod.module.{key}",
        lambda key: f"_forward_module.module.model.{key}",
        lambda key: f"module._fsdp_wrapped_module._orig_mod.{key}",
        lambda key: f"classifier_to_train.{key}",  # the attribute of a LightningModule
        lambda key: key.replace("layer1.", "layer1.module."),
        lambda key: "module." + key.replace("layer2.0.", "layer2._orig_mod.0.module._checkpoint_wrapped_module."),
        lambda key: "model.module." + key.replace("layer3.", "layer3._fsdp_wrapped_module.module.module."),
    ],
)
def test_names_of_wrappers(wrap):
    state = build().state_dict()
    for payload in ({wrap(key): value for key, value in state.items()}, {"n_averaged": torch.tensor(2)}):
        if "n_averaged" in payload:  # AveragedModel around the same
            payload |= {f"module.{wrap(key)}": value for key, value in state.items()}
        model = build()
        put_weights(model, {"state_dict": payload}, "it")
        assert is_loaded(model, state)


class Nested(nn.Module):
    """A network whose own children have the names of wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(OrderedDict(module=nn.Linear(2, 2), net=nn.Linear(2, 2)))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module.", "model.module.", "net.model."])
def test_children_with_the_names_of_wrappers(prefix):
    state = Nested().state_dict()
    model = Nested()
    put_weights(model, prefixed(prefix, state), "it")
    assert is_loaded(model, state)


def test_two_tensors_of_one_name():
    state = {"_orig_mod.fc.weight": torch.zeros(1), "fc.weight": torch.ones(1)}
    with pytest.raises(InputError, match=r"two tensors of one name; it holds _orig_mod.fc.weight \(tensor of shape"):
        extract_weights(state, "it")


def test_missing_counters_as_in_strict_loading():
    """Accepted where the file does not say that its batch norm is of version 2."""
    whole = build().state_dict()
    state = OrderedDict((key, value) for key, value in whole.items() if "num_batches_tracked" not in key)
    versions = whole._metadata
    old = {name: {**entry, "version": 1} if entry.get("version") == 2 else entry for name, entry in versions.items()}
    for metadata, accepted in ((None, True), (old, True), (versions, False)):
        if metadata is not None:
            state._metadata = OrderedDict(metadata)
        model = build()
        for load in (lambda model: model.load_state_dict(state), lambda model: put_weights(model, state, "it")):
            model = build()
            if not accepted:
                with pytest.raises((RuntimeError, InputError), match="num_batches_tracked"):
                    load(model)
                continue
            load(model)
            assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
            assert model.bn1.num_batches_tracked == 0
    with torch.device("meta"):
        released = timm.create_model("lip_resnet50", num_classes=3).state_dict()
    assert identify({k: v for k, v in released.items() if "num_batches" not in k}, "it") == ("lip_resnet50", {}, 3)


def test_the_content_decides_on_the_format(tmp_path):
    state = build().state_dict()
    safetensors.torch.save_file(state, tmp_path / "pytorch_model.bin")
    torch.save({"state_dict": state}, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("pytorch_model.bin", "model.safetensors", "old.safetensors"):
        model = build()
        load_weights(model, tmp_path / name)
        assert is_loaded(model, state)
        assert hash_weights(extract_weights(checkpoint.load(tmp_path / name), name)) == hash_weights(state)
    assert hash_weights({**state, "fc.bias": state["fc.bias"] + 1}) != hash_weights(state)


class Evil:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def test_what_a_file_holds_is_named(tmp_path):
    """One line, and nothing is executed: not in the arguments beside the weights either."""
    state = build().state_dict()
    evil, trace = Evil(tmp_path / "executed"), tmp_path / "executed"
    scripted = tmp_path / "scripted"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), scripted)
    files: dict[str, tuple[Any, str]] = {
        "whole": (nn.Linear(2, 2), "torch.nn.modules.linear.Linear; save the weights alone"),
        "args": ({"model": state, "args": argparse.Namespace(hook=evil)}, f"refused.*executed: {os.name}.system;"),
        "results": (
            {"epoch": 3, "model": "resnet50", "log": [1]},
            r"it holds epoch \(int\), model \(str\), log \(list",
        ),
        "nested": ({"state_dict": {"a": {"b": state}}}, r"it holds state_dict \(dictionary of 1: a"),
        "arguments": ({"args": argparse.Namespace(lr=1)}, r"it holds args \(object\)"),
        "lines": ({"a\n" * 99: 1, "b": {"\0\n": 2}}, r"it holds a\\na\\n.* \(int\), b \(dictionary of 1: \\x00\\n"),
        "list": ([state], "holds a list; a checkpoint is a dictionary"),
        "tensor": (torch.zeros(3), r"holds a tensor of shape \(3,\)"),
        "empty": ({}, "it holds nothing"),
    }
    for name, (payload, _) in files.items():
        torch.save(payload, tmp_path / name)
    for path, words in [*((tmp_path / name, words) for name, (_, words) in files.items()), (scripted, "a TorchScript")]:
        with pytest.raises(InputError, match=words) as caught:
            load_weights(build(), path)
        assert str(caught.value).startswith(str(path))
        assert len(str(caught.value).splitlines()) == 1
    assert not trace.exists()
