"""Networks that take each other's weights and compute something else are told apart by the recipe in a checkpoint."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import small_config
from torch import nn

from lip_resnet import checkpoint
from lip_resnet.config import InputError, ModelConfig
from lip_resnet.models.registry import build_model
from lip_resnet.models.weights import load_weights, put_weights

CHANNELS = {"channels": [8, 8, 8, 8], "stem_width": 8}
SMALL = {"resnet18": CHANNELS, "test_resnet": {}}


def build(name: str, downsampling: dict[str, str] | None = None, **args: Any) -> nn.Module:
    config = ModelConfig(
        name=name, num_classes=10, args={**SMALL.get(name, {}), **args}, downsampling=downsampling or {}
    )
    return build_model(config)


def trained(name: str, downsampling: dict[str, str] | None = None, **args: Any) -> dict[str, Any]:
    """The checkpoint of a run, with the network's first weights."""
    config = small_config(
        model__name=name, model__args={**SMALL.get(name, {}), **args}, model__downsampling=downsampling or {}
    )
    recipe = config.model_dump(mode="json")
    return {"format": 1, "model": build_model(config.model).state_dict(), "ema": None, "config": recipe}


MAX = {"stem": "max", "main": "max", "shortcut": "average"}


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (("resnet18", MAX), ("resnet18",), "downsampling={'stem': 'max'.*conv1.pool is MaxPool2d in the file, nothing"),
        (("resnet18",), ("resnet18", MAX), "conv1.pool is nothing in the file, MaxPool2d here"),
        (("resnet18", MAX), ("resnet18", {**MAX, "main": "blur"}), "pool is MaxPool2d in the file, Blur here"),
        (("resnet18", {"stem": "average"}), ("resnet18",), "maxpool is AvgPool2d in the file, MaxPool2d here"),
        (("resnet18", {"main": "blur"}), ("resnet18", {"shortcut": "blur"}), r"conv1.pool is Blur.*downsample.0"),
    ],
)
def test_downsampling(theirs, ours, words):
    model = build(*ours)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=words) as caught:
        put_weights(model, trained(*theirs), "it")
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "args", "others", "words"),
    [
        ("lip_resnet18", {"gate_coefficient": 6.0}, {}, r"gate.coefficient is 6.0 in the file, 12.0 here"),
        ("lip_resnet18", {"gate": False}, {}, "logits.gate is nothing in the file, Gate here"),
        ("lip_resnet18", {"main": "max"}, {"main": "softpool"}, "pool is MaxPool2d in the file, SoftPool here"),
        ("lip_resnet18", {"kernel_size": 2}, {}, r"kernel_size is 2 in the file, 3 here"),
        ("resnet18", {"act_layer": "gelu"}, {}, "act1 is GELU in the file, ReLU here"),
        ("resnet18", {"global_pool": "max"}, {}, "global_pool.pool_type is max in the file, avg here"),
        ("test_resnet", {"output_stride": 8}, {}, "dilation is 2 in the file, 1 here"),
        ("test_vit", {"num_heads": 4}, {}, "attn.head_dim is 16 in the file, 32 here"),
    ],
)
def test_arguments_of_the_model(name, args, others, words):
    with torch.device("meta"):
        payload = trained(name, **args)
        with pytest.raises(InputError, match=words):
            put_weights(build(name, **others), payload, "it")
        put_weights(build(name, **args), payload, "it")


def test_what_changes_no_output_is_not_compared():
    payload = trained("resnet18")
    same = [
        build("resnet18", drop_path_rate=0.1, drop_rate=0.1),
        nn.SyncBatchNorm.convert_sync_batchnorm(build("resnet18")),
        build("resnet18").eval(),
    ]
    for model in same:
        put_weights(model, payload, "it")
    recomputing = build("lip_resnet18", recompute_logits=True)
    recomputing.set_grad_checkpointing()
    put_weights(recomputing, trained("lip_resnet18"), "it")
    state = torch.get_rng_state()
    put_weights(same[0], payload, "it")
    assert torch.equal(torch.get_rng_state(), state)  # a library is a guest


def test_a_new_head_and_a_conversion_stay_possible():
    payload = trained("resnet18", MAX)
    other = timm.create_model("resnet18", num_classes=3, **CHANNELS)
    with pytest.raises(InputError, match="trained as another network"):
        put_weights(other, payload, "it", new_head=True)
    put_weights(other, payload, "it", new_head=True, convert=True)
    assert torch.equal(other.conv1.weight, payload["model"]["conv1.weight"])
    assert len(other.fc.bias) == 3


def test_torchvision_s_network_of_the_same_layers():
    recipe = small_config(model__name="resnet18").model_dump(mode="json")
    model = torchvision.models.resnet18(num_classes=10)
    payload = {"format": 1, "model": model.state_dict(), "config": recipe}
    put_weights(torchvision.models.resnet18(num_classes=10), payload, "it")
    model.maxpool = nn.AvgPool2d(3, 2, 1)
    with pytest.raises(InputError, match="maxpool is MaxPool2d in the file, AvgPool2d here"):
        put_weights(model, payload, "it")


def test_files_without_a_readable_recipe_are_not_compared():
    payload = trained("resnet18", MAX)
    for config in ({"train": {"epochs": 1}}, {**payload["config"], "model": {"name": "a network of another package"}}):
        put_weights(build("resnet18"), {**payload, "config": config}, "it")
    put_weights(build("resnet18"), {"state_dict": payload["model"], "config": {"lr": 1}}, "it")


def test_an_exported_file_is_a_checkpoint_with_its_description(tmp_path):
    payload, path = trained("resnet18", MAX), tmp_path / "model.safetensors"
    for kind in ("model", "ema"):
        description = {"config": payload["config"], "class_names": ["ant", "bee"], "weights": kind}
        path.write_bytes(checkpoint.to_safetensors(payload["model"], description))
        loaded = checkpoint.load(path)
        assert (loaded["config"], loaded["class_names"]) == (payload["config"], ["ant", "bee"])
        load_weights(build("resnet18", MAX), path)
        with pytest.raises(InputError, match="trained as another network"):
            load_weights(build("resnet18"), path)
    architecture = {"name": "lip_resnet18", "args": {"gate_coefficient": 6.0}, "num_classes": 10}
    model = build("lip_resnet18", gate_coefficient=6.0)
    path.write_bytes(checkpoint.to_safetensors(model.state_dict(), {"architecture": architecture, "weights": "model"}))
    load_weights(model, path)
    with pytest.raises(InputError, match=r"coefficient is 6\.0"):
        load_weights(build("lip_resnet18"), path)
    path.write_bytes(checkpoint.to_safetensors(model.state_dict(), {"weights": "none"}))
    with pytest.raises(InputError, match="does not say which weights"):
        checkpoint.load(path)
