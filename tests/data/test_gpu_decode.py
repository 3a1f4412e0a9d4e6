"""decode: gpu with nvImageCodec's CPU backend: the calls are those of a GPU, the pixels those of libjpeg-turbo."""

import importlib.util
import io
from pathlib import Path

import bad_images
import numpy as np
import pytest
import torch
from bad_images import encode
from helpers import photograph
from PIL import Image
from torch.nn import functional

from lip_resnet import seeding
from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import TrainLoader, build_sources, gpu_decode
from lip_resnet.data.decode import check_scan
from lip_resnet.data.gpu_decode import BatchDecoder, Packer, Piece
from lip_resnet.data.transforms import TrainTransform

needs_library = pytest.mark.skipif(not gpu_decode.installed(), reason="nvImageCodec is published for Linux only")
CPU = torch.device("cpu")


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


CONTENTS = {
    "444": encode(photograph(120, 160), quality=92, subsampling=0),
    "422": encode(photograph(161, 119, 1), quality=92, subsampling=1),
    "420": encode(photograph(97, 203, 2), quality=92, subsampling=2),
    "progressive": encode(photograph(150, 150, 3), quality=60, progressive=True),
    "gray": encode(photograph(80, 64, 4).convert("L"), quality=92),
    "EXIF orientation": encode(photograph(90, 140, 5), quality=92, exif=rotated()),
    "bytes after the image": encode(photograph(90, 140, 6), quality=92) + b"more" * 9,
    "tiny": encode(photograph(7, 9, 7), quality=92),
    "CMYK": encode(photograph(70, 110, 8).convert("CMYK"), quality=92),
    "PNG": encode(photograph(70, 110, 9), "PNG"),
    "palette GIF": encode(photograph(60, 50, 10), "GIF"),
}
FOR_THE_GPU = set(CONTENTS) - {"bytes after the image", "tiny", "CMYK", "PNG", "palette GIF"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every kind twice, all named .JPEG."""
    root = tmp_path_factory.mktemp("mixed")
    for name in ("ant", "bee"):
        (root / "train" / name).mkdir(parents=True)
        for kind, data in CONTENTS.items():
            (root / "train" / name / f"{kind}.JPEG").write_bytes(data)
    return root


def settings(root: Path | str, **changes: object) -> DataConfig:
    base = {"root": str(root), "batch_size": 11, "size": 48, "workers": 0, "decode": "gpu"}
    return DataConfig(**{**base, **changes})


def loader(config: DataConfig) -> TrainLoader:
    decoder = BatchDecoder(CPU, config.interpolation) if config.decode == "gpu" else None
    classes = len(list((Path(config.root) / "train").iterdir()))
    return TrainLoader(build_sources(config, classes, ("train",))[0], config, 1, 7, decoder)


def batches(config: DataConfig, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [part for batch in loader(config).epoch(epoch) for part in batch.parts]


@needs_library
@pytest.mark.parametrize("kind", sorted(FOR_THE_GPU))
def test_crops_are_pil_s_bit_for_bit(kind):
    data, random = CONTENTS[kind], np.random.default_rng(0)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    height, width = pixels.shape[:2]
    boxes = [(0, 0, height, width), (height - 8, width - 8, 8, 8)]
    for _ in range(20):
        h, w = int(random.integers(8, height + 1)), int(random.integers(8, width + 1))
        boxes.append((int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w))
    decoder = BatchDecoder(CPU, "bilinear")
    pieces = [Piece(0, len(data), "x", box) for box in boxes]
    crops = decoder.crops([np.frombuffer(data, np.uint8)] * len(boxes), pieces)
    for crop, (top, left, h, w) in zip(crops, boxes, strict=True):
        assert np.array_equal(crop.numpy(), pixels[top : top + h, left : left + w])
    assert decoder.refused == 0


@needs_library
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_fast_s(folder, workers, interpolation):
    """Kinds, order, labels, crops and flips; apart only where float and integer weights round apart."""
    changes = {"interpolation": interpolation, "workers": workers, "size_schedule": [[1, 32]]}
    ours = loader(settings(folder, **changes))
    theirs = loader(settings(folder, **{**changes, "decode": "fast"}))
    for epoch in (0, 1):
        parts = [part for batch in ours.epoch(epoch) for part in batch.parts]
        expected = [part for batch in theirs.epoch(epoch) for part in batch.parts]
        assert len(parts) == len(expected) == 2
        for (images, labels), (images_fast, labels_fast) in zip(parts, expected, strict=True):
            assert torch.equal(labels, labels_fast)
            assert images.dtype == torch.uint8
            assert images.shape == images_fast.shape == (11, 3, (48, 32)[epoch], (48, 32)[epoch])
            assert images.is_contiguous(memory_format=torch.channels_last)
            difference = (images.int() - images_fast.int()).abs()
            assert difference.max() <= 2
            assert difference.float().mean() < 0.03
    assert ours.decoder.refused == 0


@needs_library
def test_what_workers_send(folder):
    """JPEG files are sent encoded, with torchvision's crop and flip; other images decoded, bit for bit as by fast."""
    config = settings(folder)
    ours, flips = loader(config), set()
    transform = TrainTransform(settings(folder, decode="fast"))
    ours.sampler.epoch = 0
    for keys in ours.sampler:
        parcel = ours.loader.dataset.__getitems__((None, keys)).images
        for (epoch, index, repeat), piece in zip(keys, parcel.pieces, strict=True):
            name = Path(ours.source.path(index)).stem
            sent = parcel.data[piece.start : piece.end].numpy().tobytes()
            seed = seeding.derive("augment", 7, epoch, index, repeat)
            expected = torch.empty(48, 48, 3, dtype=torch.uint8)
            transform.data(CONTENTS[name], name, seed, expected)
            left_encoded = name in FOR_THE_GPU and min(transform.draw(CONTENTS[name], seed)[0][2:]) >= 8
            assert left_encoded == (piece.box is not None)
            if left_encoded:
                assert sent == CONTENTS[name]
                top, left, height, width = piece.box
                pixels = np.asarray(Image.open(io.BytesIO(sent)).convert("RGB"))[
                    top : top + height, left : left + width
                ]
                crop = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
                resized = functional.interpolate(crop, (48, 48), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
                assert torch.equal(resized.flip(1) if piece.flip else resized, expected)
                flips.add(piece.flip)
            else:
                assert sent == expected.numpy().tobytes()
    assert flips == {True, False}


def test_which_crops_workers_decode():
    packer, data = Packer(8), CONTENTS["444"]
    assert packer.takes(data, (0, 0, 512, 8))
    for box in ((0, 0, 513, 8), (0, 0, 512, 7), (0, 0, 7, 512)):
        assert not packer.takes(data, box)
    assert not packer.takes(CONTENTS["CMYK"], (0, 0, 64, 64))


@pytest.fixture
def bad_folder(tmp_path) -> Path:
    (tmp_path / "train" / "class").mkdir(parents=True)
    bad_images.make_files(tmp_path / "train" / "class")
    return tmp_path


@needs_library
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_refused_like_everywhere(bad_folder, workers):
    """nvImageCodec decodes truncated files and damaged scans without an error, so workers check each file first."""
    crop = {"crop_scale": (1.0, 1.0), "crop_ratio": (0.01, 100.0), "flip": 0.0}  # a crop need not meet the damage
    changes = {"batch_size": 21, "on_error": "skip", "workers": workers, **crop}
    listed, pixels = {}, {}
    for decode in ("exact", "fast", "gpu"):
        reader = loader(settings(bad_folder, decode=decode, **changes))
        for epoch in (0, 1):  # the second time, a file has been checked
            (batch,) = reader.epoch(epoch)
        listed[decode] = sorted(line.split(":")[0] for line in reader.skipped)
        assert set(reader.skipped.values()) == {2}
        assert len(reader.skipped) == 11
        pixels[decode] = batch.parts[0][0]
        assert len(pixels[decode]) == 10
    assert listed["gpu"] == listed["exact"] == listed["fast"]
    assert (pixels["gpu"].int() - pixels["fast"].int()).abs().max() <= 2


@needs_library
@pytest.mark.parametrize("kind", ["truncated", "scan damaged by noise"])
def test_stopping_names_the_file(folder, tmp_path, kind):
    (tmp_path / "made").mkdir()
    broken = bad_images.make_files(tmp_path / "made")[kind].read_bytes()
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "good.JPEG").write_bytes(CONTENTS["420"])
    (tmp_path / "train" / "bee" / "bad.JPEG").write_bytes(broken)
    with pytest.raises(InputError, match=r"bad\.JPEG: cannot decode"):
        batches(settings(tmp_path, batch_size=3))


def test_the_scan_check_says_which_files_any_decoder_may_decode(tmp_path):
    paths = bad_images.make_files(tmp_path)
    for kind in ("gray JPEG", "progressive JPEG", "EXIF orientation"):
        assert check_scan(paths[kind].read_bytes(), kind)
    for kind in ("truncated", "header only", "text file", "PNG"):
        assert not check_scan(paths[kind].read_bytes(), kind)  # PIL decodes or refuses it


@needs_library
def test_pil_decodes_what_the_gpu_refuses(folder, monkeypatch, capfd):
    expected = batches(settings(folder))
    ours = loader(settings(folder))
    monkeypatch.setattr(ours.decoder, "_decode", lambda files, boxes: [None] * len(files))
    parts = [part for batch in ours.epoch(0) for part in batch.parts]
    for (images, labels), (expected_images, expected_labels) in zip(parts, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
    assert ours.decoder.refused > len(FOR_THE_GPU)
    assert capfd.readouterr().err.count("PIL decodes images that the GPU's decoder refuses") == 1


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for version, package in (("13.0", r"lip-resnet\[gpu_decode\]"), ("12.8", r"nvidia-nvimgcodec-cu12\[nvjpeg\]")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(InputError, match=f'needs nvImageCodec: pip install "{package}"; .*decode: fast'):
            BatchDecoder(CPU, "bilinear")


def test_without_a_gpu(folder, monkeypatch):
    monkeypatch.setattr("lip_resnet.distributed.device", lambda: CPU)
    config = settings(folder)
    with pytest.raises(InputError, match="decode: gpu needs a GPU"):
        TrainLoader(build_sources(config, 2, ("train",))[0], config, 1, 0)


@pytest.mark.parametrize(
    "change", [{"color_jitter": 0.4}, {"rand_augment": "rand-m7-mstd0.5"}, {"random_erasing": 0.1}]
)
def test_augmentations_of_pixels_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} needs decode: exact or fast"):
        settings(".", **change)
