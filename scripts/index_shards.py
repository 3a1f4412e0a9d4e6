"""Index tar shards before they are uploaded:  python scripts/index_shards.py DIR/train DIR/val

Writes DIR/train/index.npz and so on, to be uploaded with the shards. `prepare_imagenet.py --format shards` does too.
"""

import sys
from pathlib import Path

from lip_resnet import cli
from lip_resnet.data.sources.index import FILE, write_index


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="directories of .tar shards")
    for folder in parser.parse_args().folders:
        index = write_index(folder)
        print(f"{folder / FILE}: {len(index.keys)} images")
        if index.left_out is not None and index.left_out.files:
            print(f"note: {folder}: {index.left_out}", file=sys.stderr)


if __name__ == "__main__":
    cli.launch(main)
