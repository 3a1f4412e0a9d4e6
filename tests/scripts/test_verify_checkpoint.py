"""scripts/verify_checkpoint.py: files in the authors' format are identified, loaded, compared and exported."""

import functools
import hashlib
import json

import pytest
import timm
import torch
import torchvision
import verify_checkpoint
import yaml
from helpers import ROOT, small_config
from helpers.commands import call
from helpers.golden import GOLDEN, images, released_state_dict
from PIL import Image
from torchvision.transforms import v2

import eval as eval_command
from lip_resnet import checkpoint
from lip_resnet.config import InputError
from lip_resnet.evaluation.paper import PAPER_FILE
from lip_resnet.models import registry
from lip_resnet.models.identify import Network, identify
from lip_resnet.models.weights import load_weights


@pytest.fixture
def run(capsys, monkeypatch):
    return functools.partial(call, capsys, monkeypatch, verify_checkpoint)


def three_classes(golden: str) -> dict[str, torch.Tensor]:
    """Released keys and filled weights, of the first three classes only."""
    state = released_state_dict(golden)
    for key in ("fc.weight", "fc.bias", "classifier.weight", "classifier.bias"):
        if key in state:
            state[key] = state[key][:3].clone()
    return state


@pytest.fixture(scope="module")
def densenet(tmp_path_factory):
    """A LIP-DenseNet-121 of three classes, a bare state dict in the format of PyTorch 1.0."""
    path = tmp_path_factory.mktemp("weights") / "lip_densenet_121.pth"
    torch.save(three_classes("lip_densenet121"), path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] != b"PK"  # not a zip
    return path


@pytest.mark.parametrize(
    ("golden", "model", "args"),
    [
        ("lip_resnet50", "lip_resnet50", {}),
        ("lip_resnet50_b64", "lip_resnet50", {"bottleneck_width": 64}),
        ("lip_resnet50_b256", "lip_resnet50", {"bottleneck_width": 256}),
        ("lip_resnet101", "lip_resnet101", {}),
        ("lip_densenet121", "lip_densenet121", {}),
    ],
)
def test_released_keys_name_the_network(golden, model, args):
    shapes = GOLDEN[golden]["state_dict"]
    state = {f"module.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert identify({"state_dict": state, "best_acc1": torch.tensor(78.2)}, "x") == (model, args, 1000)
    network = identify({key.removeprefix("module."): value for key, value in state.items()}, "x")
    assert network == (model, args, 1000)


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "densenet121"])
def test_torchvision_keys_name_the_network(name):
    with torch.device("meta"):
        state = torchvision.models.get_model(name, num_classes=7).state_dict()
    assert identify(state, "x") == (name, {}, 7)


def test_what_fits_nothing_is_compared_with_the_nearest():
    with torch.device("meta"):
        state = timm.create_model("lip_resnet50", bottleneck_width=64).state_dict()
        del state["layer3.2.conv1.weight"]
        with pytest.raises(InputError, match=r"1 keys missing \(layer3.2.conv1.weight\).* lip_resnet50 \(bottleneck_w"):
            identify(state, "x")
        with pytest.raises(InputError, match="not the weights of this"):
            identify(timm.create_model("resnet18").state_dict(), "x")


def test_without_data_the_accuracy_is_not_checked(run, densenet):
    code, out, _ = run(densenet)
    assert code == 0
    assert hashlib.sha256(densenet.read_bytes()).hexdigest() in out
    assert "holds     a bare state dict" in out
    assert "lip_densenet121, 3 classes" in out
    parameters = GOLDEN["lip_densenet121"]["params"] - 997 * 1025
    assert f"{parameters:,} parameters" in out
    assert "NOT checked" in out


def test_training_checkpoint_and_export(run, tmp_path):
    state = released_state_dict("lip_resnet50_b64")
    path, export = tmp_path / "model_best.pth.tar", tmp_path / "export"
    payload = {"epoch": 90, "arch": "lip_resnet50", "best_acc1": torch.tensor(77.5), "optimizer": {"state": {}}}
    payload["state_dict"] = {f"module.{key}": value for key, value in state.items()}
    torch.save(payload, path, _use_new_zipfile_serialization=False)

    code, out, _ = run(path, "--export", export)
    assert code == 0
    assert "epoch 90, arch lip_resnet50, best_acc1 77.5" in out
    assert "lip_resnet50 (bottleneck_width=64), 1000 classes" in out
    loaded = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    model = timm.create_model("lip_resnet50", bottleneck_width=64).eval()
    load_weights(model, path)
    batch = images(2, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(batch), model(batch), rtol=0, atol=0)
    protocol = timm.data.resolve_model_data_config(loaded)
    assert (protocol["interpolation"], protocol["crop_pct"]) == ("bilinear", 0.875)
    assert tuple(protocol["input_size"]) == (3, 224, 224)

    before = (export / "model.safetensors").read_bytes()
    code, out, err = run(path, "--export", export)
    assert (code, out) == (2, "")
    assert "exists" in err
    assert (export / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["export", "model_best.pth.tar"]


def test_export_of_a_run(run, tmp_path):
    """A run folder exports the weights that its recipe's train.rules selects, and the run's evaluation protocol."""
    with torch.device("meta"):
        shapes = timm.create_model("resnet50", num_classes=3).state_dict()
    weights = {key: torch.full(value.shape, 0.25, dtype=value.dtype) for key, value in shapes.items()}
    tree = yaml.safe_load((ROOT / "configs" / "imagenet" / "resnet50_modern300.yaml").read_text())
    tree["model"]["num_classes"] = 3
    average = {key: value + 1 for key, value in weights.items()}
    folder, export = tmp_path / "run", tmp_path / "export"
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint.save(folder / "checkpoints" / "last.pt", {"model": weights, "ema": average, "step": 1, "config": tree})
    code, out, err = run(folder, "--export", export)
    assert code == 0, err
    assert "averaged (EMA)" in out
    loaded = timm.create_model(f"local-dir:{export}", pretrained=True)
    assert all(torch.equal(value, average[key]) for key, value in loaded.state_dict().items())
    data, cfg = tree["data"], loaded.pretrained_cfg
    assert tuple(cfg["input_size"]) == (3, data["eval_size"], data["eval_size"])
    assert cfg["crop_pct"] == pytest.approx(data["eval_size"] / data["eval_resize"], rel=1e-6)
    assert cfg["interpolation"] == data["interpolation"] != "bilinear"
    assert run(folder, "--weights", "model")[0] == 0


def test_export_of_our_own_smaller_networks(run, capsys, monkeypatch, tmp_path, image_folder):
    """The recipe names the network; the exported file is evaluated as the run, and by no other network."""
    changes = {
        "data__name": "folder",
        "data__root": str(image_folder),
        "model__num_classes": 3,
        "data__mean": [0.5] * 3,
    }
    placed = {"layer": "max", "placement": "after_activation"}
    batch, rows = images(2, 64, 64), {}
    for number, (model, args, layers) in enumerate(
        (
            ("lip_densenet121", {"block_config": [1, 1], "gate_coefficient": 6.0}, {}),
            ("test_resnet", {}, {"model__downsampling": {"stem": "blur", "main": placed}}),
            ("test_resnet", {}, {"model__circular_padding": True}),
        )
    ):
        config = small_config(**changes, model__name=model, model__args=args, **layers)
        network, folder = registry.build_model(config.model), tmp_path / f"run{number}"
        export = tmp_path / f"export{number}"
        (folder / "checkpoints").mkdir(parents=True)
        payload = {"model": network.state_dict(), "ema": None, "step": 1, "processes": [1]}
        payload |= {"config": config.model_dump(mode="json"), "class_names": ["ant", "bee", "cat"]}
        checkpoint.save(folder / "checkpoints" / "last.pt", payload)
        code, out, err = run(folder, "--export", export)
        assert (code, f"network   {model}" in out) == (0, True), err
        weights = export / "model.safetensors"
        blocks = {key: value for key, value in args.items() if key == "block_config"}
        with pytest.raises(InputError, match="trained as another network"):
            load_weights(timm.create_model(model, num_classes=3, **blocks), weights)
        for source in (folder, weights):
            row = tmp_path / f"{number}{source.name}.json"
            assert call(capsys, monkeypatch, eval_command, "--checkpoint", source, "--output", row)[0] == 0
            rows[source] = json.loads(row.read_text())
        same = ("model", "args", "downsampling", "circular_padding", "correct1", "loss", "protocol", "step", "weights")
        assert rows[weights]["circular_padding"] is config.model.circular_padding
        assert [rows[weights][key] for key in same] == [rows[folder][key] for key in same]
        assert (export / "config.json").exists() is not bool(layers)  # timm could not build it
        if not layers:
            loaded = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
            torch.testing.assert_close(loaded(batch), network.eval()(batch), rtol=0, atol=0)
            assert loaded.pretrained_cfg["mean"] == [0.5] * 3


def test_export_of_circular_padding(run, tmp_path):
    """timm builds the network without it from the same weights: the export has no config.json."""
    config = small_config(model__circular_padding=True)
    payload = {"model": registry.build_model(config.model).state_dict(), "config": config.model_dump(mode="json")}
    checkpoint.save(tmp_path / "last.pt", payload)
    code, out, err = run(tmp_path / "last.pt", "--export", tmp_path / "export")
    assert (code, "circular_padding True, 10 classes" in out) == (0, True), (out, err)
    assert [file.name for file in (tmp_path / "export").iterdir()] == ["model.safetensors"]


def test_a_negative_variance_is_not_exported(run, tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    state["layer1.0.bn1.running_var"][:2] = -1
    config = small_config(model__name="test_resnet", model__num_classes=1000)
    checkpoint.save(tmp_path / "last.pt", {"model": state, "config": config.model_dump(mode="json")})
    code, _, err = run(tmp_path / "last.pt", "--export", tmp_path / "export")
    assert (code, "the first is layer1.0.bn1.running_var" in err) == (1, True), err
    assert not (tmp_path / "export").exists()


def test_export_of_a_plain_network_describes_the_reference_protocol(tmp_path):
    network = Network("resnet50", {}, 5)
    verify_checkpoint.write(tmp_path / "export", network.build(), network, {"weights": "model"})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert loaded.num_classes == 5
    config = loaded.pretrained_cfg
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 0.875)
    assert tuple(config["input_size"]) == (3, 224, 224)
    assert not config.get("test_input_size")
    assert not config.get("license")  # timm's own weights have one, these do not


def count_by_hand(path, folder) -> tuple[int, int]:
    """Top-1 and top-5 counts of a LIP-DenseNet, image by image, with torchvision's transforms."""
    model = timm.create_model("lip_densenet121", num_classes=3).eval()
    load_weights(model, path)
    transform = v2.Compose(
        [
            *(v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    correct, seen = 0, 0
    for label, name in enumerate(("ant", "bee", "cat")):
        for file in sorted((folder / name).iterdir()):
            with torch.inference_mode():
                logits = model(transform(Image.open(file).convert("RGB"))[None])[0]
            correct += logits.argmax().item() == label
            seen += 1
    return correct, seen  # among three classes every label is in the top five


def figures(path, top1: int, top5: int, total: int):
    """Write figures with other published counts, for three classes."""
    tree = yaml.safe_load(PAPER_FILE.read_text())
    tree |= {"images": total, "classes": 3, "gains": []}
    tree["rows"] = [row for row in tree["rows"] if row["name"] == "lip_densenet121"]
    tree["rows"][0]["correct"] = {"source": "readme", "top1": top1, "top5": top5}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_verdicts(run, monkeypatch, tmp_path, densenet, image_folder, parquet):
    top1, top5 = count_by_hand(densenet, image_folder / "val")
    assert (top5, 0 < top1 < 11) == (11, True)
    export = tmp_path / "export"
    for offset, code, verdict in (((0, 0), 0, "identical"), ((25, -1), 0, "within 25 images"), ((0, 26), 1, "differs")):
        path = figures(tmp_path / "paper.yaml", top1 + offset[0], top5 + offset[1], 11)
        monkeypatch.setattr(verify_checkpoint, "FIGURES", path)
        data = {"identical": image_folder, "within 25 images": image_folder / "val", "differs": parquet}[verdict]
        arguments = ("--export", export) if verdict == "differs" else ()
        got, out, _ = run(densenet, "--data", data, "--workers", 0, *arguments)
        assert got == code, out
        assert f"verdict   {verdict}\n" in out
        assert f"top-1 {top1}, top-5 11 of 11" in out
        assert f"diff      top-1 {-offset[0]:+d}, top-5 {-offset[1]:+d} images" in out
        assert f"torch {torch.__version__}" in out
    assert not export.exists()


def test_refusals(run, monkeypatch, tmp_path, densenet, image_folder):
    monkeypatch.setattr(verify_checkpoint, "FIGURES", figures(tmp_path / "paper.yaml", 1, 1, 12))
    code, _, err = run(densenet, "--data", image_folder)
    assert code == 2
    assert "has 11 images; the published counts are of 12" in err
    assert "is not a directory" in run(densenet, "--data", "/nonexistent")[2]
    assert "no such file" in run("/nonexistent.pth")[2]
    (tmp_path / "mine.txt").write_text("mine")
    assert "exists" in run(densenet, "--export", tmp_path)[2]
    assert "is not a directory" in run(densenet, "--export", tmp_path / "none" / "export")[2]

    state = three_classes("lip_densenet121")
    state["features.norm5.bias"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    code, _, err = run(tmp_path / "nan.pth")
    assert code == 1
    assert "1 tensors hold NaN or infinity, the first is features.norm5.bias" in err
    torch.save({"weights": verify_checkpoint.describe}, tmp_path / "code.pth")
    code, _, err = run(tmp_path / "code.pth")
    assert code == 2
    assert "refused" in err
