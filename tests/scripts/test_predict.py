"""lip_resnet.load_run and scripts/predict.py: the evaluation's pixels and answers, for any image."""

import json
import pickle
from pathlib import Path

import bad_images
import numpy as np
import predict
import pytest
import torch
from helpers import small_config
from helpers.commands import call, refuse
from helpers.golden import GOLDEN
from PIL import Image

import eval as eval_command
import lip_resnet
from lip_resnet import checkpoint
from lip_resnet.config import InputError
from lip_resnet.data import EvalLoader, build_sources, normalize
from lip_resnet.evaluation.testsets import wnids
from lip_resnet.models import registry

CLASSES = ["ant", "bee", "cat"]
ODD = {"PNG", "palette PNG", "PNG with transparency", "16-bit gray PNG", "CMYK JPEG", "gray JPEG", "EXIF orientation"}
"""Of ``bad_images``: of all modes that PIL opens."""


def write_run(folder: Path, root: Path, **changes: object) -> Path:
    """A run folder of a small network with random weights, whose average is another network's."""
    config = small_config(
        **{"data__name": "folder", "data__root": str(root), "data__eval_resize": 36, "model__num_classes": 3, **changes}
    )
    torch.manual_seed(0)
    model, average = (registry.build_model(config.model) for _ in range(2))
    (folder / "checkpoints").mkdir(parents=True)
    payload = {"model": model.state_dict(), "ema": average.state_dict(), "step": 1, "processes": [1]}
    payload |= {"config": config.model_dump(mode="json"), "class_names": CLASSES}
    checkpoint.save(folder / "checkpoints" / "last.pt", payload)
    return folder


@pytest.fixture
def run(image_folder, tmp_path) -> Path:
    return write_run(tmp_path / "run", image_folder, data__mean=[0.5, 0.4, 0.3], data__interpolation="bicubic")


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_transform_is_the_evaluation_s(image_folder, tmp_path, crop_mode):
    """Bit for bit what the validation loader gives, after the evaluation's normalisation; on ordinary and odd files."""
    root = tmp_path / "data"
    (root / "val").mkdir(parents=True)
    for name in CLASSES[:2]:
        (root / "val" / name).symlink_to(image_folder / "val" / name)
    odd = root / "val" / "cat"
    odd.mkdir()
    for kind, path in bad_images.make_files(odd).items():
        if kind not in ODD:
            path.unlink()
    changes = {"data__crop_mode": crop_mode, "data__mean": [0.5, 0.4, 0.3], "data__interpolation": "bicubic"}
    loaded = lip_resnet.load_run(write_run(tmp_path / "run", root, **changes))
    data = loaded.config.data
    (source,) = build_sources(data, 3, ("val",))
    pixels = [
        normalize(images, torch.tensor(data.mean), torch.tensor(data.std)) for images, _ in EvalLoader(source, data)
    ]
    transform = pickle.loads(pickle.dumps(loaded.transform))
    ours = torch.stack([transform(Image.open(path)) for path, _ in source.samples])
    assert ours.dtype == torch.float32
    assert len(ours) == 8 + 7
    assert torch.equal(ours, torch.cat(pixels))


def test_a_loaded_run(run, tmp_path):
    loaded = lip_resnet.load_run(str(run))
    assert (loaded.classes, loaded.model.training) == (CLASSES, False)
    assert loaded.config.train.epochs == 2
    payload = checkpoint.load(run / "checkpoints" / "last.pt")
    for weights, key in ((None, "model"), ("model", "model"), ("ema", "ema")):
        state = lip_resnet.load_run(run / "checkpoints" / "last.pt", weights=weights).model.state_dict()
        assert all(torch.equal(value, payload[key][name]) for name, value in state.items())
    with pytest.raises(InputError, match="no such file"):
        lip_resnet.load_run(tmp_path / "none.pt")
    with pytest.raises(TypeError, match="takes a PIL image, not a ndarray"):
        loaded.transform(np.zeros((4, 4, 3)))
    with pytest.raises(InputError, match="pixels of mode F have no known range"):
        loaded.transform(Image.new("F", (40, 40)))
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        lip_resnet.load_runs  # noqa: B018


def test_a_released_file(tmp_path):
    """Network and keywords from the keys, ImageNet's classes, the reference's preprocessing."""
    path = tmp_path / "lip_resnet-50.pth"
    shapes = GOLDEN["lip_resnet50_b64"]["state_dict"]
    torch.save({key: torch.full(shape, 0.5) for key, shape in shapes.items()}, path)
    loaded = lip_resnet.load_run(path)
    assert loaded.config.model.args == {"bottleneck_width": 64}
    assert (list(loaded.classes), loaded.config.data.eval_resize) == (wnids(), 256)
    assert all(bool((value == 0.5).all()) for value in loaded.model.parameters())
    assert loaded.transform(Image.new("L", (300, 260), 130)).shape == (3, 224, 224)


def test_predictions_are_the_evaluation_s(capsys, monkeypatch, run, image_folder, tmp_path):
    csv = tmp_path / "predictions.csv"
    arguments = ("--checkpoint", run, "--predictions", csv, "--output", tmp_path / "row.json", "--device", "cpu")
    assert call(capsys, monkeypatch, eval_command, *arguments)[0] == 0
    expected = {line.split(",")[0]: line.split(",") for line in csv.read_text().splitlines()[1:]}
    for flags in ((), ("--batch-size", 3, "--workers", 1)):
        code, out, err = call(
            capsys, monkeypatch, predict, run, image_folder / "val", "--format", "jsonl", "--device", "cpu", *flags
        )
        assert (code, err) == (0, "")
        lines = [json.loads(line) for line in out.splitlines()]
        assert len(lines) == 11
        for line in lines:
            row = expected[line["image"].removeprefix(f"{image_folder}/val/")]
            names = [each["class"] for each in line["predictions"]]
            assert names == [CLASSES[int(label)] for label in row[3].split()]
            probabilities = {each["class"]: each["probability"] for each in line["predictions"]}
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
            loss = -np.log(probabilities[CLASSES[int(row[1])]])
            assert loss == pytest.approx(float(row[5]), abs=2e-5 / min(probabilities.values()))


def test_a_table_and_images_that_cannot_be_read(capsys, monkeypatch, run, image_folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    files = bad_images.make_files(photos)
    image = image_folder / "val" / "ant" / "ant_0.JPEG"
    code, out, err = call(capsys, monkeypatch, predict, run, image, photos, "--top", 1, "--device", "cpu")
    header, _, *lines = out.splitlines()
    assert (code, header.split()) == (2, ["|", "image", "|", "1", "|"])
    decoded = [f"{photos}/{path.name}" for kind, path in files.items() if str(path) in out]
    assert len(lines) == 1 + len(decoded)
    assert all(any(name in line for name in CLASSES) and "%" in line for line in lines)
    refused = [path for path in files.values() if f"{path}:" in err]
    assert len(refused) + len(decoded) == len(files)
    assert err.splitlines()[-1].endswith(
        f"{len(refused)} of {1 + len(files)} images cannot be read; they are named above"
    )


def test_exif_orientation(capsys, monkeypatch, run, tmp_path):
    """Ignored as in evaluations, with a note; --upright turns the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "upright.png")

    def answer(name: str, *flags: object) -> tuple[object, str]:
        arguments = (run, tmp_path / name, "--format", "jsonl", "--device", "cpu", *flags)
        code, out, err = call(capsys, monkeypatch, predict, *arguments)
        assert code == 0
        return json.loads(out)["predictions"], err

    assert answer("turned.png")[0] == answer("plain.png")[0] != answer("upright.png")[0]
    assert "1 of 1 images have an EXIF orientation" in answer("turned.png")[1]
    assert answer("turned.png", "--upright") == (answer("upright.png")[0], "")


def test_sigmoids_and_wrong_arguments(capsys, monkeypatch, run, image_folder, tmp_path):
    other = write_run(tmp_path / "sigmoid", image_folder, train__loss="binary_cross_entropy")
    image = image_folder / "val" / "ant" / "ant_0.JPEG"
    code, out, _ = call(capsys, monkeypatch, predict, other, image, "--format", "jsonl", "--device", "cpu")
    loaded = lip_resnet.load_run(other)
    with torch.inference_mode():
        logits = loaded.model(loaded.transform(Image.open(image))[None])[0]
    printed = {each["class"]: each["probability"] for each in json.loads(out)["predictions"]}
    assert code == 0
    assert [printed[name] for name in CLASSES] == pytest.approx((1 / (1 + (-logits).exp())).tolist(), abs=1e-5)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("text")
    for arguments, words in (
        ((run, tmp_path / "none.jpg"), "no such file or folder"),
        ((run, tmp_path / "empty"), "holds no image that PIL decodes"),
        ((run, tmp_path / "text.jpg"), "text.jpg: cannot decode this image: PIL knows no such format"),
        ((tmp_path / "none", image), "none: no such file"),
        ((tmp_path / "text.jpg", image), "not a checkpoint"),
        ((run, image, "--top", 0), "--top is 0; it must be at least 1"),
        ((run, image, "--batch-size", 0), "--batch-size is 0"),
        ((run,), "IMAGES"),
    ):
        assert words in refuse(capsys, monkeypatch, predict, *arguments), words
