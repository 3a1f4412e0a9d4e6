"""Photographs of every mode that a user may have, and a set's fixed images."""

import io

import numpy as np
import pytest
import torch
from helpers import photograph, small_config
from PIL import Image

from lip_resnet.config import InputError
from lip_resnet.data import EvalLoader, build_sources
from lip_resnet.data.decode import BadImage
from lip_resnet.data.photographs import find_photographs, read_photograph, sample_images

CONFIG = small_config().data
SCENE = photograph(60, 90)


def oriented() -> bytes:
    """A JPEG whose EXIF orientation says that it was turned by a quarter: its pixels are 90 wide, it is 60 wide."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    SCENE.save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "image"),
    [
        ("gray.png", SCENE.convert("L")),
        ("cmyk.jpg", SCENE.convert("CMYK")),
        ("alpha.png", SCENE.convert("RGBA")),
        ("palette.gif", SCENE.convert("P", palette=Image.Palette.ADAPTIVE)),
        ("bilevel.png", SCENE.convert("1")),
        ("sixteen.png", Image.fromarray(np.asarray(SCENE.convert("L")).astype(np.uint16) * 257)),
    ],
)
def test_modes(tmp_path, file, image):
    image.save(tmp_path / file)
    read = read_photograph(tmp_path / file, CONFIG)
    assert read.size == (90, 60)
    assert read.shown.shape == (60, 90, 3)
    assert (read.pixels.shape, read.pixels.dtype) == ((3, 32, 48), torch.uint8)
    like = SCENE if file.startswith(("cmyk", "alpha", "palette")) else SCENE.convert("L").convert("RGB")
    if file != "bilevel.png":
        assert np.abs(read.shown.astype(int) - np.asarray(like)).mean() < 12


def test_orientation_and_size(tmp_path):
    (tmp_path / "turned.jpg").write_bytes(oriented())
    turned = read_photograph(tmp_path / "turned.jpg", CONFIG)
    assert turned.size == (60, 90)
    upright = np.asarray(SCENE.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(turned.shown - upright).mean() < 6
    assert turned.pixels.shape == (3, 48, 32)
    photograph(30, 20).resize((2000, 3000)).save(tmp_path / "large.jpg", quality=30)
    large = read_photograph(tmp_path / "large.jpg", CONFIG)
    assert large.size == (2000, 3000)
    assert large.shown.shape == (800, 533, 3)
    assert large.pixels.shape == (3, 48, 32)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    photograph(5, 100).save(tmp_path / "strip.png")
    whole = oriented()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for file, words in (
        ("text.jpg", "PIL knows no such format"),
        ("empty.png", "the file is empty"),
        ("strip.png", "100x5 pixels; an image can be 8 times"),
        ("cut.jpg", "cannot decode"),
    ):
        with pytest.raises(BadImage, match=words) as error:
            read_photograph(tmp_path / file, CONFIG)
        assert str(tmp_path / file) in str(error.value)


def test_files_and_folders(tmp_path):
    folder = tmp_path / "photographs"
    for name in ("b.png", "a/c.JPG", ".hidden/d.png", "notes.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    loose = tmp_path / "without_suffix"
    loose.touch()
    assert find_photographs([folder, loose, folder / "b.png"]) == [folder / "a/c.JPG", folder / "b.png", loose]
    (tmp_path / "none").mkdir()
    for path, words in (("none", "holds no image"), ("missing.jpg", "no such file")):
        with pytest.raises(InputError, match=words):
            find_photographs([tmp_path / path])


def test_images_of_a_set_are_those_of_its_evaluation():
    (val,) = build_sources(CONFIG, 10, ("val",))
    images = sample_images(val, CONFIG, 3)
    assert [each.name for each in images] == ["digits/val[0]", "digits/val[118]", "digits/val[236]"]  # of 355
    loader = EvalLoader(val, CONFIG)
    for each, index in zip(images, (0, 118, 236), strict=True):
        loader.choose(range(index, index + 1))
        ((evaluated, _),) = loader
        assert torch.equal(each.pixels, evaluated[0])
        np.testing.assert_array_equal(each.shown, evaluated[0].permute(1, 2, 0))
        assert each.size == (8, 8)
    assert [each.name for each in sample_images([val[0], val[1]], CONFIG, 5)] == ["sample 0", "sample 1"]
