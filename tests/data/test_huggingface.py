"""Hugging Face tables: the images of the Parquet files, and the columns and splits that are accepted."""

from pathlib import Path

import datasets
import pytest
import torch
from helpers.sets import as_rank, folder_config, table
from PIL import Image

from lip_resnet.config import DataConfig, InputError
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, describe_source


def settings(root: Path, **changes: object) -> DataConfig:
    return folder_config(root, name="huggingface", decode="fast", **changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_table_gives_the_batches_of_its_folder(image_folder, parquet, workers):
    ours, theirs = settings(parquet, workers=workers), folder_config(image_folder, decode="fast")
    tables, folders = build_sources(ours, 3), build_sources(theirs, 3)
    assert [source.classes for source in tables] == [["ant", "bee", "cat"]] * 2
    loaders = TrainLoader(tables[0], ours, 1, 0), TrainLoader(folders[0], theirs, 1, 0)
    for first in (0, 3):
        for mine, other in zip(*(list(loader.epoch(1, first)) for loader in loaders), strict=True):
            assert torch.equal(mine.parts[0][0], other.parts[0][0])
            assert torch.equal(mine.parts[0][1], other.parts[0][1])
    for mine, other in zip(EvalLoader(tables[1], ours), EvalLoader(folders[1], theirs), strict=True):
        assert torch.equal(mine[0], other[0])
    assert tables[0].path(7) == f"{parquet}/train/7"
    assert describe_source(tables[0])["images"] == 23


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (2, 1), (3, 0)])
def test_every_image_once(parquet, monkeypatch, world, workers):
    config = settings(parquet, batch_size=12, workers=workers)
    source = build_sources(config, 3)[0]
    seen, expected = [], []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        for batch in TrainLoader(source, config, 1, 0).epoch(0):
            seen += [image.numpy().tobytes() for image in batch.parts[0][0]]
    as_rank(monkeypatch, 0, 1)
    for batch in TrainLoader(source, settings(parquet, batch_size=23), 1, 0).epoch(0):
        expected += [image.numpy().tobytes() for image in batch.parts[0][0]]
    assert sorted(seen) == sorted(expected)
    assert len(set(seen)) == 23


def one(image_folder: Path, root: Path, name: str = "train", **more: object) -> DataConfig:
    root.mkdir()
    table(sorted((image_folder / "train").glob("*/*")), **more).to_parquet(root / f"{name}.parquet")
    return settings(root)


def refusal(config: DataConfig, splits: tuple[str, ...] = ("train",)) -> str:
    with pytest.raises(InputError) as caught:
        build_sources(config, 3, splits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns(image_folder, parquet, tmp_path):
    plain = one(image_folder, tmp_path / "plain", kind=datasets.Value("int32"))
    assert build_sources(plain, 3, ("train",))[0].classes == ["0", "1", "2"]
    assert "has the splits train; it needs validation or val or" in refusal(plain, ("train", "val"))
    strange = one(image_folder, tmp_path / "strange", labels="insect", kind=datasets.Value("int64"))
    assert "data.label_column" in refusal(strange)
    assert "the columns image, insect" in refusal(strange)
    named = settings(tmp_path / "strange", label_column="insect")
    assert build_sources(named, 3, ("train",))[0].targets == build_sources(plain, 3, ("train",))[0].targets
    assert "candidates: nonsense" in refusal(settings(tmp_path / "strange", label_column="nonsense"))
    hidden = one(image_folder, tmp_path / "hidden", kind=datasets.Value("int64"), extra=[-1] * 23)
    assert "must hold a class's number" in refusal(hidden.model_copy(update={"label_column": "extra"}))
    blind = tmp_path / "blind"
    blind.mkdir()
    datasets.Dataset.from_dict({"label": [0, 1]}).to_parquet(blind / "train.parquet")
    assert "needs one column of images" in refusal(settings(blind))


def test_a_dataset_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "data.root: cannot load" in refusal(settings(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "data.root: cannot load" in refusal(settings(tmp_path / "empty"))


def test_an_image_that_does_not_decode_is_named(image_folder, parquet):
    paths = sorted((image_folder / "train").glob("*/*"))
    broken = table(paths).cast_column("image", datasets.Image(decode=False)).to_list()
    broken[7]["image"]["bytes"], broken[9]["image"] = b"no image", None
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_list(broken, features=features).to_parquet(parquet / "train-00000-of-00002.parquet")
    (parquet / "train-00001-of-00002.parquet").unlink()
    source = build_sources(settings(parquet), 3, ("train",))[0]
    with pytest.raises(InputError, match="train/7: cannot decode this image"):
        source[7]
    with pytest.raises(InputError, match="train/9: cannot decode this image: the table has no bytes"):
        source[9]
    assert isinstance(source[8][0], Image.Image)
    loader = TrainLoader(source, settings(parquet, on_error="skip"), 1, 0)
    assert sum(len(batch.parts[0][1]) for batch in loader.epoch(0)) == 21
    assert len(loader.skipped) == 2
