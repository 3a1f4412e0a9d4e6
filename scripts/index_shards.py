"""Index tar shards before training from a URL:  python scripts/index_shards.py DIR/train DIR/val s3://bucket/train ...

An argument is a directory of shards, its URL, or a quoted pattern of either, 'DIR/imagenet-train-{0000..1023}.tar', as
data.train and data.val name them. The index is written beside the shards, and where a bucket is read-only to the local
cache. `prepare_imagenet.py --format shards` writes it too.
"""

import sys
from collections import Counter
from pathlib import Path

from lip_resnet import cli
from lip_resnet.config import InputError
from lip_resnet.data.sources.index import index_file, index_remote, write_index
from lip_resnet.data.sources.patterns import expand, split_pattern
from lip_resnet.data.sources.remote import Remote, is_url


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "shards", nargs="+", metavar="DIR_URL_OR_PATTERN", help="directories of .tar shards, or patterns"
    )
    given = parser.parse_args().shards
    single = Counter(split_pattern(path)[0] for path in given if path.lower().endswith(".tar") and "{" not in path)
    if single and max(single.values()) > 1:
        raise InputError(f"{max(single.values())} shards of one directory are given one by one; quote the pattern")
    for path in given:
        root, pattern = split_pattern(path) or (path, None)
        names = None if pattern is None else expand([pattern], path)
        if is_url(root):
            index, where = index_remote(Remote(root), names)
        else:
            index, where = write_index(Path(root), names), str(Path(root) / index_file(names))
        print(f"{where}: {len(index.keys)} images")
        if index.left_out is not None and index.left_out.files:
            print(f"note: {root}: {index.left_out}", file=sys.stderr)


if __name__ == "__main__":
    cli.launch(main)
