"""Shards behind a URL give the same batches as the folders they were made from; a server's failure names its URL."""

import re
import shutil

import pytest
import torch
from helpers.sets import as_rank, folder_config

from lip_resnet.config import InputError
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, describe_source
from lip_resnet.data.sources import remote
from lip_resnet.data.sources.index import FILE
from lip_resnet.evaluation import testsets


@pytest.mark.parametrize("workers", [0, 2])
def test_a_url_gives_the_batches_of_its_folder(image_folder, served, workers):
    server, url = served
    ours = folder_config(url, name="shards", decode="fast", workers=workers)
    theirs = folder_config(image_folder, decode="fast")
    far, near = build_sources(ours, 3), build_sources(theirs, 3)
    assert [source.classes for source in far] == [["ant", "bee", "cat"]] * 2
    loaders = TrainLoader(far[0], ours, 1, 0), TrainLoader(near[0], theirs, 1, 0)
    for first in (0, 3):  # and in the middle of an epoch
        for mine, other in zip(*(list(loader.epoch(2, first)) for loader in loaders), strict=True):
            assert torch.equal(mine.parts[0][0], other.parts[0][0])
            assert torch.equal(mine.parts[0][1], other.parts[0][1])
    for mine, other in zip(EvalLoader(far[1], ours), EvalLoader(near[1], theirs), strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])
    assert len(server.requests) == 23 + (23 - 3 * 4) + 11  # one request an image, none twice
    assert far[0].path(7) == f"{url}/train/0005.tar:./000007"
    assert describe_source(far[0])["images"] == 23


@pytest.mark.parametrize("failures", [["500"], ["truncated", "500"], ["500", "truncated", "truncated"]])
def test_a_server_may_fail_twice_in_a_row(served, failures, capfd):
    server, url = served
    settings = folder_config(url, name="shards", batch_size=1)
    loader = TrainLoader(build_sources(settings, 3, ("train",))[0], settings, 1, 0)
    server.failures[:] = failures[:2]
    whole = list(loader.epoch(0))
    assert len(whole) == 23
    assert capfd.readouterr().err.count("retrying from byte") == len(failures[:2])
    server.failures[:] = ["500", *failures[:2], "500"][-3:]
    with pytest.raises(
        InputError, match=rf"{url}/train/\d+\.tar: cannot read from byte \d+ on, 3 times: \w+"
    ) as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_and_missing_shards_are_never_skipped(served, workers):
    """A truncated shard, a replaced one, a missing one, and a server that sends whole files."""
    server, url = served
    settings = folder_config(url, name="shards", on_error="skip", workers=workers)
    source = build_sources(settings, 3, ("train",))[0]
    shard = server.root / "train" / "0010.tar"
    whole = shard.read_bytes()

    def refusal() -> str:
        loader = TrainLoader(source, settings, 1, 0)
        message = ""
        try:
            list(loader.epoch(0))
        except InputError as error:  # pytest.raises would keep the loader and its workers
            message = str(error)
        assert "\n" not in message
        return message

    shard.write_bytes(whole[: len(whole) // 2])
    assert re.search(rf"{url}/train/0010\.tar: (the server gave \d+ bytes where|cannot read from byte)", refusal())
    shard.write_bytes(whole[512:] + bytes(512))
    words = "its tar header is another; the shard is not the one that was indexed"
    assert re.search(rf"train/0010\.tar:\./\d+: {words}", refusal())
    shard.unlink()
    assert f"there is no {url}/train/0010.tar" in refusal()
    shard.write_bytes(whole)
    server.ranges = False
    assert "the server answers no range requests" in refusal()
    server.ranges = True
    assert len(list(TrainLoader(source, settings, 1, 0).epoch(0))) == 6


def test_index_and_classes_beside_remote_shards(served, tmp_path):
    server, url = served
    settings = folder_config(url, name="shards")
    (server.root / "train" / "classes.txt").unlink()
    assert build_sources(settings, 3, ("train",))[0].classes == ["0", "1", "2"]
    (server.root / "train" / FILE).write_bytes(b"PK no index")
    with pytest.raises(InputError, match=rf"{url}/train/index\.npz: not an index of shards"):
        build_sources(settings, 3, ("train",))
    (server.root / "train" / FILE).unlink()
    with pytest.raises(
        InputError, match=rf"there is no {url}/train/index\.npz, the index; make it.*scripts/index_shards\.py"
    ):
        build_sources(settings, 3, ("train",))
    with pytest.raises(InputError, match="cannot open nonsense://x/train"):
        build_sources(folder_config("nonsense://x", name="shards"), 3)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 1), (3, 0), (3, 1)])
def test_every_image_once(served, monkeypatch, world, workers):
    settings = folder_config(served[1], name="shards", batch_size=12, workers=workers)
    source = build_sources(settings, 3, ("train",))[0]
    seen = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        for batch in TrainLoader(source, settings, 1, 0).epoch(1):
            for images, labels in batch.parts:
                seen += [(label, image.numpy().tobytes()) for image, label in zip(images, labels.tolist(), strict=True)]
    as_rank(monkeypatch, 0, 1)
    alone = folder_config(served[1], name="shards", batch_size=23)
    ((images, labels),) = next(TrainLoader(source, alone, 1, 0).epoch(1)).parts
    expected = [(label, image.numpy().tobytes()) for image, label in zip(images, labels.tolist(), strict=True)]
    assert sorted(seen) == sorted(expected)
    assert len(set(seen)) == 23


@pytest.mark.parametrize("command", ["train", "eval"])
def test_requests_of_a_batch_are_concurrent(served, command):
    """Sixteen at a time, also through the set that eval.py reads."""
    server, url = served
    settings = folder_config(url, name="shards", batch_size=23, eval_batch_size=23)
    source = build_sources(settings, 3, ("train",))[0]
    joined = testsets.Joined([testsets.EvalSet("shards", source, settings, {"": range(23)})])
    loader = TrainLoader(source, settings, 1, 0).epoch(0) if command == "train" else EvalLoader(joined, settings)
    server.awaited = 16
    assert len(list(loader)) == 1
    assert server.most == remote.MAX_REQUESTS == 16


@pytest.mark.parametrize("content", [b"ant\n\ncat\nbee\n", b"\xffant\nbee\ncat\n"])
def test_a_list_of_classes_is_read_like_a_local_one(served, content):
    server, url = served
    (server.root / "train" / "classes.txt").write_bytes(content)
    for root in (url, server.root):
        with pytest.raises(InputError, match=r"train/classes\.txt: (line 2 is blank|byte 0 is not UTF-8)"):
            build_sources(folder_config(root, name="shards"), 3, ("train",))
    (server.root / "train" / "classes.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee \r\ncat\r\n\r\n")
    for root in (url, server.root):
        assert build_sources(folder_config(root, name="shards"), 3, ("train",))[0].classes == ["ant", "bee", "cat"]


def test_other_file_systems(served):
    """fsspec's own: a directory, as file://."""
    settings = folder_config(f"file://{served[0].root}", name="shards")
    source = build_sources(settings, 3, ("train",))[0]
    assert len(list(TrainLoader(source, settings, 1, 0).epoch(0))) == 6
    shutil.rmtree(served[0].root / "train")
    with pytest.raises(InputError, match="there is no file://"):
        list(TrainLoader(source, settings, 1, 0).epoch(0))
