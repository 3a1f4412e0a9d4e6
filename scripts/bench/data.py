"""``benchmark.py data``: images per second of loaders.

Our loader, timm's (uint8) and torchvision's (float32), with the same files, workers and batch size: random resized
crops of 224 with flips.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from bench.timing import Row
from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import TrainLoader
from lip_resnet.data.gpu_decode import installed
from lip_resnet.data.sources.folder import Folder

_BASELINE = "timm, uint8"


def make_photographs(folder: Path, count: int = 40) -> None:
    """JPEG files like ImageNet's: 500x375, noise with a photograph's spectrum, edges and grain, about 110 KB each."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
    frequency[0, 0] = 1
    folder.mkdir(parents=True)
    for index in range(count):
        spectrum = np.fft.rfft2(random.normal(size=(3, 375, 500))) / frequency**1.1
        pixels = np.fft.irfft2(spectrum, s=(375, 500)).transpose(1, 2, 0)
        pixels = pixels @ np.array([[1, 0.9, 0.8], [0.1, 0, -0.1], [0.1, -0.1, 0]])  # correlated channels
        pixels = (pixels - pixels.mean()) / pixels.std() * 50 + 120
        pixels[random.integers(100, 250) :, random.integers(100, 350) :] += random.uniform(-60, 60, 3)
        pixels += random.normal(size=(375, 500, 1)) * 7
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{index:03}.JPEG", quality=92)


def link_images(source: Path, root: Path, images: int) -> tuple[int, float]:
    """Make ``images`` links in root/a to the images below ``source``, repeating them; (files linked, their mean bytes).

    Raises:
        InputError: ``source`` has no images.
    """
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)[:images]
    if not files:
        raise InputError(f"--data: there are no images below {source}")
    (root / "a").mkdir(parents=True)
    for index in range(images):
        path = files[index % len(files)]
        (root / "a" / f"{index:06}{path.suffix}").symlink_to(path.resolve())
    return len(files), statistics.fmean(path.stat().st_size for path in files)


def contenders(root: Path, workers: int, batch: int) -> dict[str, Callable[[], int]]:
    """Name -> a function that loads one epoch and returns the number of images; workers persist between epochs."""
    # Ours start their workers at once, the others at their first epoch.
    decoders = ["fast", "exact", *(["gpu"] if _gpu() else [])]
    functions = {f"ours, decode: {decode}": ours(root, workers, batch, decode) for decode in decoders}
    persistent = {"num_workers": workers, "persistent_workers": True}
    timm_loader = create_loader(
        create_dataset("", root=str(root)),
        (3, 224, 224),
        batch,
        is_training=True,
        use_prefetcher=True,
        color_jitter=0,
        interpolation="bilinear",
        device=torch.device("cpu"),
        pin_memory=False,
        **persistent,
    ).loader  # fmt: skip  (the inner loader, without timm's normalisation on the device)
    steps = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*steps, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    images = ImageFolder(str(root), transform)
    torchvision_loader = DataLoader(images, batch, shuffle=True, drop_last=True, **persistent)
    functions[_BASELINE] = lambda: sum(len(labels) for _, labels in timm_loader)
    functions["torchvision, float32"] = lambda: sum(len(labels) for _, labels in torchvision_loader)
    return functions


def ours(root: Path, workers: int, batch: int, decode: str) -> Callable[[], int]:
    """A function that loads the next epoch of our loader and returns the number of images."""
    config = DataConfig(root=str(root), batch_size=batch, workers=workers, decode=decode, last_batch="drop")
    loader, epochs = TrainLoader(Folder(root, ["a"]), config, 1, 0), iter(range(1_000_000))

    def load() -> int:
        images = sum(batch.size for batch in loader.epoch(next(epochs)))
        if decode == "gpu":
            torch.cuda.synchronize()
        return images

    return load


def _gpu() -> bool:
    """Whether this machine can measure ``decode: gpu``."""
    return torch.cuda.is_available() and installed()


def measure(functions: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Images per second of every function in every round; the order rotates, and a warm-up round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            images = functions[name]()
            if number:
                rates[name].append(images / (time.perf_counter() - start))
    return rates


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(25th, 50th, 75th percentile)."""
    return tuple(np.percentile(values, (25, 50, 75)).tolist())


def compare_pixels(root: Path, other: str = "fast", images: int = 200) -> dict[str, float]:
    """Mean |other - exact| of the same crops, levels of 255: over all images, and of the worst image."""
    means = []
    loaders = []
    for decode in ("exact", other):
        config = DataConfig(root=str(root), batch_size=1, workers=0, decode=decode)
        loaders.append(TrainLoader(Folder(root, ["a"]), config, 1, 0).epoch(0))
    for _, exact, second in zip(range(images), *loaders, strict=False):
        difference = exact.parts[0][0].int() - second.parts[0][0].cpu().int()
        means.append(difference.abs().float().mean().item())
    return {"mean": statistics.fmean(means), "worst_image": max(means)}


def data_rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each loader, with quartiles over the rounds; then two workers against one, and pixels against exact.

    Raises:
        InputError: there are no images, or --images is smaller than a batch.
    """
    if options.images < options.batch:
        raise InputError(f"--images {options.images}; it must be at least the batch, {options.batch}")
    with tempfile.TemporaryDirectory() as temporary:
        source, root = options.data, Path(temporary) / "links"
        if source is None:
            source = Path(temporary) / "made"
            make_photographs(source)
        count, size = link_images(source, root, options.images)
        common = {
            "files": f"{count} {'made photographs (no real ones)' if options.data is None else 'files of --data'}",
            "bytes_per_file": size,
            **{name: getattr(options, name) for name in ("images", "workers", "batch", "rounds", "gpu")},
        }
        rates = measure(contenders(root, options.workers, options.batch), options.rounds)
        for name, values in rates.items():
            per_core = statistics.median(values) / options.workers
            ratios = [value / base for value, base in zip(values, rates[_BASELINE], strict=True)]
            figures = {"images_per_second": quartiles(values), "ratio": quartiles(ratios), "all": values}
            row = common | {"loader": name} | figures
            yield row | {"per_core": per_core, "cores_for_gpu": options.gpu / per_core}
        pair = measure({workers: ours(root, workers, options.batch, "fast") for workers in (1, 2)}, options.rounds)
        ratios = [two / one for one, two in zip(pair[1], pair[2], strict=True)]
        yield {"comparison": "two workers against one, fast", "ratio": quartiles(ratios)}
        for decode in ["fast", *(["gpu"] if _gpu() else [])]:
            yield {"comparison": f"pixels, {decode} against exact", **compare_pixels(root, decode)}
