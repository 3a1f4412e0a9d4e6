"""Fixtures that tests of several folders use: small sets of images as folders, Parquet files and shards."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.register_assert_rewrite("helpers")  # before any test imports them: their checks fail with the values
# Tests run side by side, a process a core: OpenMP threads that wait for each other would cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """root/{train,val}/{ant,bee,cat}: 23 and 11 photographs of coloured noise, of differing sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, images in (("train", 23), ("val", 11)):
        for index in range(images):
            label = index % 3
            folder = root / split / ("ant", "bee", "cat")[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 120, (40 + index, 60 - index, 3), dtype=np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(folder / f"{folder.name}_{index}.JPEG", quality=95)
    return root


@pytest.fixture
def parquet(image_folder, tmp_path, monkeypatch) -> Path:
    """The shared folder as Parquet files, train in two."""
    import datasets  # a second of imports that few tests need
    from helpers.sets import table

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    root = tmp_path / "set"
    root.mkdir()
    train = sorted((image_folder / "train").glob("*/*"))
    for number, paths in enumerate((train[:10], train[10:])):
        table(paths).to_parquet(root / f"train-{number:05}-of-00002.parquet")
    table(sorted((image_folder / "val").glob("*/*"))).to_parquet(root / "validation-00000-of-00001.parquet")
    return root


@pytest.fixture
def served(image_folder, tmp_path, monkeypatch):
    """(server, URL) of the shared folder in shards of five, indexed."""
    from helpers.server import Server
    from helpers.sets import add_shards

    from lip_resnet.data.sources import remote
    from lip_resnet.data.sources.index import write_index

    add_shards(image_folder, tmp_path)
    for split in ("train", "val"):
        write_index(tmp_path / split)
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    server = Server(tmp_path)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: they are the longest, and must not be what everything else waits for at the end."""
    items.sort(key=lambda item: item.path.parent.name != "whole")
