"""The digest of a set's names: unchanged since the first version, and fast."""

import hashlib
import os
from pathlib import Path

import pytest

from lip_resnet.data import describe_source
from lip_resnet.data.sources.base import Files


@pytest.mark.parametrize(
    "names",
    [
        ["a/1.JPEG", "b/line\nfeed.JPEG", "b/\udcff.JPEG"],
        ["0.tar:./1", "0.tar:a//2", "0.tar:a/./3", "0.tar:a/../4", "0.tar:b/"],  # a shard's key can be anything
        ["a/1", "../elsewhere/2"],
        [],
    ],
)
@pytest.mark.parametrize(
    "root", [Path("/data/train"), Path("train"), Path(), Path("../x"), Path("/"), "s3://x", "hub/x"]
)
def test_digests_of_names_do_not_change(root, names):
    """Relative paths by os.path, each with a line feed: the digests of old runs stay valid."""
    samples = [(f"{root}/{name}", 0) for name in names]
    lines = names if isinstance(root, str) else [os.path.relpath(path, root) for path, _ in samples]
    source = Files(root, ["a"], samples)
    expected = hashlib.sha256(b"".join(os.fsencode(line) + b"\n" for line in lines)).hexdigest()
    assert describe_source(source)["names"] == f"sha256:{expected}"
    assert source.samples == samples


def test_names_in_normal_form_need_no_path_functions(monkeypatch):
    """``os.path.relpath`` for each of ImageNet's names took ten seconds."""
    source = Files(Path("/data"), ["a"], [(f"/data/a/{n}.JPEG", 0) for n in range(100)])
    expected = describe_source(source)
    monkeypatch.setattr(os.path, "relpath", lambda *_: pytest.fail("a call of os.path.relpath"))
    assert describe_source(source) == expected
