"""What real shards hold beside images and labels: read, counted, or refused in one line that names it."""

import io
import os
import tarfile

import numpy as np
import pytest
from helpers.sets import add, folder_config, refusal, shards

from lip_resnet.config import InputError
from lip_resnet.data import build_sources
from lip_resnet.data.sources import index


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (b"1000000000", ":b: its label is 1000000000; 3 classes have the labels 0 to 2"),
        (b"100000000000000000000", ": the label b.cls holds '100000000000000000000'; it must be the class's number"),
        (b"9" * 5000, f": the label b.cls holds '{'9' * 64}';"),
        (b"-1", ": the label b.cls holds '-1';"),
        (b"1.0", ": the label b.cls holds '1.0';"),
        (b"", ": the label b.cls holds '';"),
        ("caf\xe9".encode("latin-1"), r": the label b.cls holds 'caf\\xe9';"),
        ("\N{SUPERSCRIPT TWO}".encode(), ": the label b.cls holds '\N{SUPERSCRIPT TWO}';"),
    ],
)
def test_odd_labels_of_shards(tmp_path, label, words):
    config = shards(tmp_path, ("b.jpg", b"x"), ("b.cls", label))
    assert f"{tmp_path}/train/0.tar{words}" in refusal(config)
    assert words.partition(";")[0] in refusal(config, None)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([member("b.jpg", tarfile.SYMTYPE, "nothing")], "'b.jpg' is a symbolic link to 'nothing'"),
        ([member("b.jpg", tarfile.LNKTYPE, "good.jpg"), ("b.cls", b"0")], "'b.jpg' is a hard link to 'good.jpg'"),
        ([member("b.jpg", tarfile.DIRTYPE)], "'b.jpg' is a directory"),
        ([("b.jpg", b"x"), member("b.cls", tarfile.SYMTYPE, "good.cls")], "'b.cls' is a symbolic link"),
        ([("b.jpg", b"x"), member("b.cls", tarfile.LNKTYPE, "good.cls")], "'b.cls' is a hard link"),
        ([("b.jpg", b"x"), member("b.cls", tarfile.DIRTYPE)], "'b.cls' is a directory"),
        ([member("b.jpg", tarfile.FIFOTYPE)], "'b.jpg' is no file"),
        ([("b.jpg", b"x"), ("b.cls", b"0"), ("b.cls", b"1")], "two labels have the key 'b'"),
    ],
)
def test_odd_members_of_shards(tmp_path, members, words):
    assert f"{tmp_path}/train/0.tar: {words}" in refusal(shards(tmp_path, *members))


def test_odd_files_beside_shards(tmp_path):
    config = shards(tmp_path, names="café\n".encode("latin-1"))
    assert "train/classes.txt: byte 3 is not UTF-8; save the file as UTF-8" in refusal(config, 1)
    (tmp_path / "train" / "classes.txt").unlink()
    (tmp_path / "train" / "classes.txt").symlink_to("nothing")
    assert "train/classes.txt: cannot read: No such file" in refusal(config, 1)
    (tmp_path / "train" / "classes.txt").unlink()
    (tmp_path / "train" / "._0.tar").write_bytes(b"a Mac's")
    (tmp_path / "train" / "loose.JPEG").touch()
    (tmp_path / "train" / "part2").mkdir()
    source = build_sources(config, 1, ("train",))[0]
    assert (len(source), source.left_out.first) == (1, ("loose.JPEG", "part2/"))
    (tmp_path / "train" / "1.tar").symlink_to("nothing")
    assert "1.tar: cannot read: No such file" in refusal(config, 1)


def test_odd_indexes(tmp_path):
    """An index is checked whole; one of an older version, which does not tell what it leaves out, is still read."""
    build_sources(shards(tmp_path), 1, ("train",))
    data = (tmp_path / "train" / index.FILE).read_bytes()
    arrays = dict(np.load(io.BytesIO(data)))

    def changed(**values: object) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in {**arrays, **values}.items() if value is not None})
        return buffer.getvalue()

    for values in (
        {"labels": np.array([-1])},
        {"labels": np.array([0.5])},
        {"labels": np.array([[0]])},
        {"labels": np.array([None])},
        {"places": np.array([[3, 512, 9]])},
        {"places": np.array([[0, 0, 9]])},
        {"places": np.array([[0, 512, -9]])},
        {"places": np.array([512])},
        {"places": None},
        {"labels": np.array([], int), "keys": np.array([], np.uint8), "places": np.zeros((0, 3), int)},
        {"left_out": np.array("x")},
    ):
        with pytest.raises(InputError, match=r"^x: not an index of shards: "):
            index.Index.from_bytes(changed(**values), "x")
    for damaged in (b"", data[:100], data[:200] + b"\0" * 300 + data[500:]):
        with pytest.raises(InputError, match=r"^x: not an index of shards: "):
            index.Index.from_bytes(damaged, "x")
    old = changed(left_out=None, left_out_first=None)
    assert index.Index.from_bytes(old, "x").left_out is None
    (tmp_path / "train" / index.FILE).write_bytes(old)
    assert build_sources(folder_config(tmp_path, name="shards"), 1, ("train",))[0].left_out.files == 0


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_that_are_not_utf8(tmp_path, form):
    """Read under their bytes, also from the stored index; reported where they do not decode."""
    (tmp_path / "train").mkdir()
    key = os.fsdecode(b"caf\xe9")
    with tarfile.open(tmp_path / "train" / "0.tar", "w", format=form) as archive:
        for name, data in ((f"{key}.jpg", b"x"), (f"{key}.cls", b"0"), (f"{key}.txt", b"")):
            add(archive, name, data)
    for _ in range(2):
        (source,) = build_sources(folder_config(tmp_path, name="shards"), 1, ("train",))
        assert os.fsencode(source.path(0)).endswith(b"0.tar:caf\xe9")
        assert source.left_out.first == (r"0.tar:caf\xe9.txt",)
        with pytest.raises(InputError, match=r"0\.tar:caf\udce9: cannot decode this image"):
            source[0]
