"""The fast decoder against PIL and torchvision, and the buffers that workers share."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_images import encode
from helpers import photograph, small_config
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from lip_resnet import distributed, seeding
from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import TrainLoader, build_sources
from lip_resnet.data.decode import JpegDecoder, decode_exact
from lip_resnet.data.transforms import TrainTransform
from lip_resnet.data.workers import BufferPool


def jpeg(image: Image.Image, **options: object) -> bytes:
    return encode(image, **{"quality": 92, **options})


def config(**changes: object) -> DataConfig:
    return DataConfig(**{"root": ".", "batch_size": 4, "size": 96, "workers": 0, **changes})


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (33, 500), (500, 33), (7, 7), (1, 90)])
def test_crops_are_torchvision_s_draw_for_draw(size):
    transform = TrainTransform(config())
    theirs = v2.RandomResizedCrop(96, (0.08, 1.0), (3 / 4, 4 / 3))
    image = Image.new("RGB", size[::-1])
    for seed in range(200):
        seeding.reseed(seed)
        expected = theirs.make_params([image])
        after = torch.rand(1)
        seeding.reseed(seed)
        assert transform.crop_box(*size) == tuple(expected[key] for key in ("top", "left", "height", "width"))
        assert torch.equal(torch.rand(1), after)  # the same number of draws


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_exact_pixels_are_torchvision_s(interpolation):
    settings = config(interpolation=interpolation, color_jitter=0.3, random_erasing=0.5)
    transform = TrainTransform(settings)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(96, interpolation=InterpolationMode(interpolation)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3),
            v2.PILToTensor(),
            v2.RandomErasing(0.5),
        ]
    )
    image, out = photograph(120, 150), torch.empty(96, 96, 3, dtype=torch.uint8)
    for seed in range(20):
        transform.image(image, seed, out)
        seeding.reseed(seed)
        assert torch.equal(out.permute(2, 0, 1), theirs(image))


@pytest.mark.parametrize(
    "options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}, {"optimize": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoded_rows_are_pil_s(mode, options):
    """Bit for bit, however early decoding stops."""
    data = jpeg(photograph(203, 150).convert(mode), restart_marker_rows=3 if "optimize" in options else 0, **options)
    expected, decoder = np.asarray(decode_exact(data, "x")), JpegDecoder()
    assert decoder.read_size(data) == (203, 150)
    for rows in (1, 15, 16, 17, 100, 176, 190, 203):
        pixels = decoder.decode(data, "x", (203, 150), rows)
        assert len(pixels) >= rows
        assert np.array_equal(pixels[:rows], expected[:rows])
        if rows == 17 and "progressive" not in options:
            assert len(pixels) == 48  # it stopped early


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_fast_pixels_are_close_to_exact(interpolation):
    data = jpeg(photograph(375, 500))
    outs = {}
    for decode in ("exact", "fast"):
        transform = TrainTransform(config(decode=decode, interpolation=interpolation))
        outs[decode] = torch.empty(30, 96, 96, 3, dtype=torch.uint8)
        by_pil = [transform.data(data, "x", seed, out) for seed, out in enumerate(outs[decode])]
        assert by_pil == [decode == "exact"] * 30
    difference = (outs["fast"].int() - outs["exact"].int()).abs().float()
    assert difference.mean() < 0.1
    assert difference.max() <= 2


@pytest.mark.parametrize(
    "extras", [{"rand_augment": "rand-m7-mstd0.5"}, {"color_jitter": 0.4}, {"random_erasing": 1.0}]
)
def test_fast_draws_the_same_augmentations(extras):
    """The same augmentation as exact: on average less than half a level apart, where another would differ by tens."""
    data, outs = jpeg(photograph(150, 200)), []
    for decode in ("exact", "fast"):
        transform = TrainTransform(config(decode=decode, **extras))
        out = torch.empty(10, 96, 96, 3, dtype=torch.uint8)
        for seed in range(10):
            transform.data(data, "x", seed, out[seed])
        outs.append(out.float())
    assert (outs[0] - outs[1]).abs().mean() < 0.5


@pytest.mark.parametrize("kind", ["png", "cmyk"])
def test_pil_decodes_what_the_fast_decoder_refuses(kind):
    image, buffer = photograph(120, 150), io.BytesIO()
    image.convert("CMYK").save(buffer, "JPEG") if kind == "cmyk" else image.save(buffer, "PNG")
    outs = []
    for decode in ("exact", "fast"):
        outs.append(torch.empty(96, 96, 3, dtype=torch.uint8))
        assert TrainTransform(config(decode=decode)).data(buffer.getvalue(), "x", 5, outs[-1])
    assert torch.equal(*outs)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for index in range(24):
        folder = root / "train" / ("ant", "bee")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photograph(60 + index, 90 - index, index).save(folder / f"{index:02}.JPEG", quality=92)
    return root


def loader(root: Path, **changes: object) -> TrainLoader:
    settings = config(root=str(root), size=32, **changes)
    return TrainLoader(build_sources(settings, 2, ("train",))[0], settings, 1, 0)


def pixels_of(batches: list) -> torch.Tensor:
    return torch.cat([images for batch in batches for images, _ in batch.parts])


@pytest.mark.parametrize("workers", [1, 2])
def test_kept_batches_do_not_change(photographs, workers):
    """Buffers are reused only when they are no longer referenced: the batches of an epoch can all be kept."""
    alone = loader(photographs, decode="fast")
    shared = loader(photographs, decode="fast", workers=workers)
    for epoch in range(3):
        kept = list(shared.epoch(epoch))
        assert torch.equal(pixels_of(kept), pixels_of(list(alone.epoch(epoch))))


def test_buffers_come_back():
    pool = BufferPool(2, 64)
    first, second = pool.acquire(), pool.acquire()
    assert pool.acquire() is None
    tensor = pool.lend(first, (4, 3))
    view = tensor.permute(1, 0)[:2]
    del tensor
    assert pool.acquire() is None  # a view still refers to it
    del view
    assert pool.acquire() == first
    lent = pool.lend(second, (8,))
    pool.reset()  # `first` was requested and never delivered
    assert pool.free == [first]
    del lent
    assert sorted(pool.free) == [0, 1]


def test_an_abandoned_epoch_loses_no_buffer(photographs):
    shared = loader(photographs, workers=2)
    for epoch in range(4):
        batches = shared.epoch(epoch)
        next(batches)
        del batches
    whole = list(shared.epoch(9))
    assert torch.equal(pixels_of(whole), pixels_of(list(loader(photographs).epoch(9))))
    del whole
    list(shared.epoch(10, first_step=6))
    assert len(shared.pool.free) + len(shared.pool.lent) == len(shared.pool.memory)


def test_workers_run_before_the_first_epoch(photographs):
    """Forked before autograd, TensorBoard and progress bars have started threads."""
    shared = loader(photographs, workers=2)
    assert [worker.is_alive() for worker in shared.loader._iterator._workers] == [True, True]


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory_is_flat_over_fifty_epochs(photographs):
    shared = loader(photographs, decode="fast", workers=2)
    pids = [os.getpid(), *(worker.pid for worker in shared.loader._iterator._workers)]
    can_see = Path("/proc/self/statm").exists()  # Linux; elsewhere only the buffers are counted
    sizes = []
    for epoch in range(50):
        for _ in shared.epoch(epoch):
            pass
        assert len(shared.pool.lent) <= 1
        sizes.append(sum(map(_resident, pids)) if can_see else 0)
    assert max(sizes[25:]) - max(sizes[:25]) < 4 << 20


def test_repeats(photographs, monkeypatch):
    repeated = loader(photographs, batch_size=6, repeats=3)
    assert len(repeated) == 4  # an epoch is as long as without
    repeated.sampler.epoch = 5
    seen = []
    for keys in repeated.sampler:
        assert [repeat for _, _, repeat in keys] == [0, 0, 1, 1, 2, 2]
        indices = [index for _, index, _ in keys]
        assert indices == indices[:2] * 3
        seen += indices[:2]
    assert len(set(seen)) == 8  # a third of the images, each once
    batch = next(repeated.epoch(5))
    images = batch.parts[0][0]
    assert not torch.equal(images[0], images[2])  # the same image, another augmentation
    # Three processes get one repeat each: the same global batch.
    shares = []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(next(loader(photographs, batch_size=6, repeats=3).epoch(5)).parts[0][0])
    assert torch.equal(torch.cat(shares), images)


def test_repeats_of_a_partial_batch(photographs):
    partial = loader(photographs, batch_size=9, repeats=3)  # 24 = 9 + 9 + 6
    assert [len(keys) for keys in partial.sampler] == [9, 9, 6]
    assert len({index for keys in partial.sampler for _, index, _ in keys}) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_progressive_sizes(photographs, workers):
    growing = loader(photographs, size_schedule=[[1, 48], [3, 40]], workers=workers)
    for epoch, side in enumerate([32, 48, 48, 40]):
        assert {tuple(batch.parts[0][0].shape) for batch in growing.epoch(epoch)} == {(4, 3, side, side)}
    synthetic = small_config(data__name="synthetic", data__size_schedule=[[1, 48]]).data
    source = build_sources(synthetic, 10, ("train",))[0]
    assert next(TrainLoader(source, synthetic, 1, 0).epoch(1)).parts[0][0].shape[-1] == 48


def test_bad_keys():
    for key, value, words in (
        ("repeats", 3, "does not divide by repeats 3"),
        ("size_schedule", [[3, 96], [1, 128]], "they must rise"),
        ("size_schedule", [[1, 0]], "greater than 0"),
        ("decode", "quick", "'exact', 'fast' or 'gpu'"),
    ):
        with pytest.raises(InputError, match=words):
            small_config(**{f"data__{key}": value})
