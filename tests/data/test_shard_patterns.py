"""Shards of both splits in one folder or bucket, named by brace patterns: the same pixels as from class folders."""

import re
import shutil
from pathlib import Path

import fsspec
import index_shards
import pytest
import torch
from helpers import small_config
from helpers.commands import call, refuse
from helpers.sets import add_shards, folder_config

from lip_resnet.config import InputError
from lip_resnet.data import EvalLoader, TrainLoader, build_sources
from lip_resnet.data.sources import remote
from lip_resnet.data.sources.patterns import expand, split_pattern, summarise
from lip_resnet.evaluation.protocol import EvalConfig, adapt
from lip_resnet.recipe import load_config, parse_config

TRAIN, VAL = "set-train-{0000..0004}.tar", ["set-val-{00,01}.tar", "set-val-02.tar"]


@pytest.fixture
def flat(image_folder, tmp_path, monkeypatch) -> Path:
    """Five shards of train and three of val in one folder, with one list of classes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    made, root = tmp_path / "made", tmp_path / "flat"
    made.mkdir()
    root.mkdir()
    add_shards(image_folder, made)
    for split, digits in (("train", 4), ("val", 2)):
        for number, path in enumerate(sorted((made / split).glob("*.tar"))):
            path.rename(root / f"set-{split}-{number:0{digits}}.tar")
    (made / "val" / "classes.txt").rename(root / "classes.txt")
    return root


@pytest.fixture
def bucket(flat):
    """The same shards in a bucket in memory."""
    system = fsspec.filesystem("memory")
    for path in flat.iterdir():
        system.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


def settings(root: object, **changes: object):
    return folder_config(root, **{"name": "shards", "train": TRAIN, "val": VAL, "decode": "fast", **changes})


def check_same_pixels(root: object, image_folder: Path) -> None:
    ours, theirs = settings(root), folder_config(image_folder, decode="fast")
    sources = build_sources(ours, 3), build_sources(theirs, 3)
    for mine, other in zip(*sources, strict=True):
        assert (mine.classes, mine.targets) == (other.classes, other.targets)
    loaders = TrainLoader(sources[0][0], ours, 1, 0), TrainLoader(sources[1][0], theirs, 1, 0)
    for mine, other in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert torch.equal(mine.parts[0][0], other.parts[0][0])
    for mine, other in zip(EvalLoader(sources[0][1], ours), EvalLoader(sources[1][1], theirs), strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])


def test_a_flat_folder(flat, image_folder, capsys, monkeypatch):
    check_same_pixels(flat, image_folder)
    files = {path: path.read_bytes() for path in flat.glob("index-*.npz")}
    assert len(files) == 2
    code, out, _ = call(capsys, monkeypatch, index_shards, f"{flat}/{TRAIN}", f"{flat}/set-val-{{00..02}}.tar")
    assert code == 0
    assert sorted(out.replace(": ", "\n").split("\n")[::2][:2]) == sorted(map(str, files))  # the very same files
    assert sorted(re.findall(r"(\d+) images", out)) == ["11", "23"]
    assert {path: path.read_bytes() for path in flat.glob("index-*.npz")} == files


def test_a_bucket(bucket, image_folder, capsys, monkeypatch, tmp_path):
    """The index is written into the bucket, and where that is not allowed to the local cache."""
    url = "memory://bucket"
    patterns = f"{url}/{TRAIN}", f"{url}/set-val-{{00..02}}.tar"
    with pytest.raises(InputError, match=rf"there is no {url}/index-\w+\.npz, the index; make it: .*'{url}/set-train"):
        build_sources(settings(url), 3)
    for read_only in (True, False):
        if read_only:
            monkeypatch.setattr(
                type(bucket), "pipe_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no"))
            )
        code, out, err = call(capsys, monkeypatch, index_shards, *patterns)
        assert (code, err.count("the index goes to the local cache")) == (0, 2 * read_only), err
        assert out.count(str(tmp_path / "cache") if read_only else url) == 2
        check_same_pixels(url, image_folder)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    capsys.readouterr()
    assert "several splits" in refuse(capsys, monkeypatch, index_shards, url)
    assert "there is no memory://bucket/none-0.tar" in refuse(capsys, monkeypatch, index_shards, f"{url}/none-0.tar")


def test_where_an_evaluation_reads(flat, bucket):
    """A pattern as --data, and a directory or URL below which the recipe's own pattern is."""
    (flat.parent / "made" / "val" / "x.tar").write_bytes((flat / "set-val-00.tar").read_bytes())
    tree = small_config().model_dump()
    with_pattern, plain = (
        EvalConfig.from_recipe(parse_config(tree | {"data": data.model_dump()}, "test"))
        for data in (settings("elsewhere"), folder_config("elsewhere"))
    )
    pattern = "set-val-{00..02}.tar"
    for config, data, expected in (
        (plain, f"{flat}/{pattern}", (pattern,)),
        (plain, f"memory://bucket/{pattern}", (pattern,)),
        (with_pattern, str(flat), tuple(VAL)),
        (with_pattern, "memory://bucket", tuple(VAL)),
        (with_pattern, f"{flat.parent}/made", ()),
    ):
        adapted, split = adapt(config, None, data)
        assert (adapted.data.name, split, adapted.data.val) == ("shards", "val", expected)
    with pytest.raises(InputError, match=r"several splits: set-train-\{0000..0004\}.tar, set-val-\{00..02\}.tar"):
        build_sources(folder_config(flat.parent, name="shards"), 3, ("flat",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train": "set-train-{0005..0007}.tar"},
            r"3 of the 3 shards that are named are missing.* it holds set-train-\{0000\.\.0004\}\.tar, s",
        ),
        (
            {"train": "set-train-{0000..0005}.tar"},
            r"1 of the 6 shards that are named are missing in .*, the first is set-train-0005",
        ),
        ({"val": "set-train-{0000..0001}.tar"}, "data.val names 2 shards that data.train names too"),
        ({"train": "set-val-{00..02}.tar", "val": TRAIN}, "the shards of each other's split"),
        ({"train": "set-*.tar"}, r"has '\*'; write braces"),
        ({"train": "set-{0001..0000}.tar"}, "must rise"),
        ({"train": "set-{5}.tar"}, "braces hold a range"),
        ({"train": "set-{1..2.tar"}, r"has '\{'"),
        ({"train": "set-{1,{2..3}}.tar"}, "has braces in braces"),
        ({"train": "../x.tar"}, "it must be a .tar file below data.root"),
        ({"train": "set-train-{0000..0004}"}, "it must be a .tar file below data.root"),
        ({"train": ["a.tar", "{a,b}.tar"]}, "names a.tar twice"),
        ({"train": (), "val": ()}, r"has no train/; name its shards by data.train and data.val: set-train-\{0000"),
    ],
)
def test_wrong_patterns(flat, changes, words):
    with pytest.raises(InputError, match=words):
        build_sources(settings(flat, **changes), 3)


def test_braces():
    for pattern, names in (
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{b,a}/x{0..1}.tar", ["a/x0.tar", "a/x1.tar", "b/x0.tar", "b/x1.tar"]),
    ):
        assert expand([pattern], "it") == names
    assert split_pattern("s3://b/c/{d,e}/x.tar") == ("s3://b/c", "{d,e}/x.tar")
    assert (split_pattern("x.tar"), split_pattern("/x.tar"), split_pattern("/x")) == (
        (".", "x.tar"),
        ("/", "x.tar"),
        None,
    )
    assert summarise(["a-01.tar", "a-02.tar", "b.tar"]) == "a-{01..02}.tar, b.tar"


def test_patterns_that_the_shell_has_expanded(capsys, monkeypatch, flat):
    overrides = [f"data.train=set-train-000{number}.tar" for number in range(5)]
    with pytest.raises(InputError, match=r"data\.train is given more than once; quote the pattern"):
        load_config("digits/resnet50", overrides)
    shards = sorted(flat.glob("set-val-*.tar"))
    assert "quote the pattern" in refuse(capsys, monkeypatch, index_shards, *shards)
    with pytest.raises(InputError, match=r"train needs data\.name: shards; data\.name is digits"):
        small_config(data__train="x.tar")
