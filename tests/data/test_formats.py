"""Every format: the same samples on any number of processes and workers and after a resume; constant memory."""

import os
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.server import Server
from helpers.sets import add_shards, as_rank, table
from PIL import Image

from lip_resnet.config import DataConfig
from lip_resnet.data import TrainLoader, build_sources
from lip_resnet.data.sources.index import write_index
from lip_resnet.data.transforms import eval_transform
from lip_resnet.recipe import load_config

FORMATS = ["folder", "shards", "remote", "huggingface", "digits"]
LINUX = Path("/proc/self/statm").exists()  # which shows memory and open files


@pytest.fixture(scope="module")
def roots(image_folder, tmp_path_factory):
    """Format -> data.root, the same 23 training images in each."""
    shards, tables = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("tables")
    add_shards(image_folder, shards)
    for split in ("train", "val"):
        write_index(shards / split)
        table(sorted((image_folder / split).glob("*/*"))).to_parquet(tables / f"{split}.parquet")
    server = Server(shards)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    url = f"http://127.0.0.1:{server.server_port}"
    yield {"folder": image_folder, "shards": shards, "remote": url, "huggingface": tables, "digits": None}
    datasets.config.HF_DATASETS_CACHE = before
    server.shutdown()
    server.server_close()


def config(roots: dict, kind: str, **changes: object) -> DataConfig:
    values = {"name": {"remote": "shards"}.get(kind, kind), "root": (kind != "digits" and str(roots[kind])) or None}
    sizes = {"size": 16, "eval_size": 16, "eval_resize": 18, "workers": 0, "decode": "fast"}
    return DataConfig(**{**values, **sizes, "batch_size": 150 if kind == "digits" else 12, **changes})


def pixels(batches: list) -> list[bytes]:
    return [image.numpy().tobytes() for batch in batches for images, _ in batch.parts for image in images]


@pytest.mark.parametrize("kind", FORMATS)
def test_ranks_workers_and_resume(roots, monkeypatch, kind):
    source = build_sources(config(roots, kind), 10 if kind == "digits" else 3, ("train",))[0]
    whole = list(TrainLoader(source, config(roots, kind), 1, 0).epoch(3))
    expected = pixels(whole)
    sampler = TrainLoader(source, config(roots, kind), 1, 0).sampler
    assert sorted(index for part in sampler for _, index, _ in part) == list(range(len(source)))
    assert len(expected) == len(source)
    for world, workers in ((1, 1), (1, 3), (2, 0), (2, 3), (3, 1), (3, 0)):
        seen = []
        for rank in range(world):
            as_rank(monkeypatch, rank, world)
            seen += pixels(list(TrainLoader(source, config(roots, kind, workers=workers), 1, 0).epoch(3)))
        assert sorted(seen) == sorted(expected)
    as_rank(monkeypatch, 0, 1)
    resumed = TrainLoader(build_sources(config(roots, kind), len(source.classes))[0], config(roots, kind), 1, 0)
    assert pixels(list(resumed.epoch(3, 1))) == expected[config(roots, kind).batch_size :]


@pytest.mark.skipif(not LINUX, reason="memory and open files are seen in /proc")
@pytest.mark.parametrize("kind", ["shards", pytest.param("remote", marks=pytest.mark.slow), "huggingface"])
def test_memory_and_open_files_are_flat_over_fifty_epochs(roots, kind):
    loader = TrainLoader(build_sources(config(roots, kind), 3)[0], config(roots, kind, workers=1), 1, 0)
    pids = [os.getpid(), *(worker.pid for worker in loader.loader._iterator._workers)]
    memory, files = [], []
    for epoch in range(50):
        for _ in loader.epoch(epoch):
            pass
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
        memory.append(sum(pages) * os.sysconf("SC_PAGESIZE"))
        files.append(len(os.listdir(f"/proc/{pids[1]}/fd")))
    assert max(memory[25:]) - max(memory[:25]) < 4 << 20
    assert max(files[25:]) <= max(files[:25])


def test_recipes_of_named_sets_fit_their_data():
    """A recipe for 32 pixels takes the set's images as they are: nothing is resized in validation."""
    for path in sorted((ROOT / "configs" / "cifar10").glob("*.yaml")):
        data = load_config(path).data
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        assert torch.equal(eval_transform(data)(image).permute(1, 2, 0), torch.from_numpy(np.array(image)))
