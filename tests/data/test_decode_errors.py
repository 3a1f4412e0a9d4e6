"""What fails while an image is decoded, resized or augmented: one line that names the image."""

import io
import warnings
from pathlib import Path

import pytest
import torch
from helpers.sets import encoded, folder_config
from PIL import Image
from torch.utils.data import Dataset

from lip_resnet.config import InputError
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, decode
from lip_resnet.data.transforms import TrainTransform, eval_transform

LONG = (60000, 1)


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_no_resize_can_hold(root, crop_mode, workers):
    (root / "val" / "ant" / "long.png").write_bytes(encoded("PNG", LONG))
    config = folder_config(root, crop_mode=crop_mode, workers=workers, eval_resize=256)
    loader = EvalLoader(build_sources(config, 3)[1], config)
    if crop_mode == "squash":
        assert sum(len(labels) for _, labels in loader) == 12
        return
    result = {"center": "15360000x256", "border": "256x0"}[crop_mode]
    with pytest.raises(InputError, match=rf"ant/long\.png: cannot load this image: its 60000x1 pixels .* {result}"):
        list(loader)


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize("error", [MemoryError(), ValueError("height and width must be > 0"), KeyError("x")])
def test_errors_after_decoding_name_the_image(root, monkeypatch, decoder, error):
    """In resize and augmentation, in training and evaluation; what an image cannot cause keeps its traceback."""
    config = folder_config(root, decode=decoder, batch_size=23, random_erasing=1.0)
    train, val = build_sources(config, 3)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(TrainTransform, "_finish", fail)
    loader, evaluation = TrainLoader(train, config, 1, 0), EvalLoader(val, config)
    evaluation.loader.dataset.transform = fail
    kind = RuntimeError if isinstance(error, KeyError) else InputError
    for batches in (loader.epoch(0), evaluation):
        with pytest.raises(kind, match=r"/\w+_\d+\.JPEG: ") as caught:
            list(batches)
        assert type(error).__name__ in str(caught.value) or str(error) in str(caught.value)


class Custom(Dataset):
    """A user's own set."""

    classes = ("a",)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 2:
            raise OSError("connection lost")
        return Image.new("RGB", (40, 40)), 0


def test_errors_of_a_user_s_set_name_the_sample():
    for batches in (
        TrainLoader(Custom(), folder_config(Path(".")), 1, 0).epoch(0),
        EvalLoader(Custom(), folder_config(Path("."))),
    ):
        with pytest.raises(InputError, match="sample 2: cannot load this image: connection lost"):
            list(batches)


def test_a_crop_has_a_pixel():
    """A ratio that no crop of a line can have."""
    config = folder_config(Path("."), crop_ratio=(0.1, 0.2), crop_scale=(1.0, 1.0), size=8)
    for size in ((60000, 1), (1, 60000)):
        out = torch.empty(8, 8, 3, dtype=torch.uint8)
        TrainTransform(config).image(Image.new("RGB", size, (9, 8, 7)), 0, out)
        assert out.unique().tolist() == [7, 8, 9]


def test_warnings_of_pil_name_the_image(monkeypatch, capsys):
    """Once each, with the first image; not where the user silences them."""
    monkeypatch.setattr(decode, "_warned", set())
    palette = Image.new("P", (4, 4))
    palette.putpalette([1, 2, 3] * 256)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=bytes(range(256)))
    for name in ("first.png", "second.png"):
        decode.decode_exact(buffer.getvalue(), name)
    printed = capsys.readouterr().err
    assert printed.startswith("warning: first.png: Palette images with Transparency")
    assert printed.count("\n") == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    for side in (9, 10):  # each warning has another number
        decode.decode_exact(encoded("BMP", (side, 9)), f"{side}.bmp")
    assert capsys.readouterr().err.count("9.bmp: Image size (81 pixels) exceeds limit") == 1
    monkeypatch.setattr(decode, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decode.decode_exact(buffer.getvalue(), "x")
    assert not capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"third\.png: cannot decode this image: Palette images"):
            decode.decode_exact(buffer.getvalue(), "third.png")


@pytest.mark.parametrize("text", ["nonsense", "rand-x3", "rand-m9-m", "auto-m9"])
def test_the_reason_is_never_empty(text):
    try:
        TrainTransform(folder_config(Path("."), rand_augment=text))
    except InputError as error:
        assert ": ;" not in str(error)  # noqa: PT017
        assert "give one such as rand-m7-mstd0.5-inc1" in str(error)  # noqa: PT017


def test_evaluation_s_transform_can_be_sent_to_workers():
    import pickle

    transform = pickle.loads(pickle.dumps(eval_transform(folder_config(Path(".")))))
    assert transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
