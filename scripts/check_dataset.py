"""Look at every image of a data set:  python scripts/check_dataset.py DIR

Counts, class order, and each file decoded as training and evaluation would; bad files are listed. A set without any
gets DIR/fingerprint.json, which runs and rows then carry.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from lip_resnet import checkpoint, distributed
from lip_resnet.config import InputError
from lip_resnet.data.decode import BadImage, check_scan, decode_exact, read_file
from lip_resnet.data.fingerprint import FILE, digest, names_of
from lip_resnet.data.sources import Folder

_IMAGENET = {"train": 1_281_167, "val": 50_000}


def look(path: str) -> tuple[int, str, str | None]:
    """(bytes, sha256, what is wrong) of one file."""
    try:
        data = read_file(path)
        decode_exact(data, path)
        check_scan(data, path)
    except BadImage as error:
        return 0, "", str(error)
    return len(data), hashlib.sha256(data).hexdigest(), None


def check_split(root: Path, workers: int) -> tuple[dict[str, object], list[str], list[str]]:
    """One split -> (its entry of the fingerprint, bad files, files that no reader will take for images)."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise InputError(f"{root} holds no class folders")
    source = Folder(root, classes)
    paths, names = [path for path, _ in source.samples], names_of(source)
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(look, paths, chunksize=32)
        seen = list(tqdm(found, total=len(paths), unit="image", desc=root.name, disable=None))
    bad = [problem for _, _, problem in seen if problem]
    lines = (
        b"%s %d %s" % (name, size, checksum.encode()) for name, (size, checksum, _) in zip(names, seen, strict=True)
    )
    entry = {
        "images": len(paths),
        "classes": len(classes),
        "class_order": digest(map(os.fsencode, classes)),
        "bytes": sum(size for size, _, _ in seen),
        "names": digest(names),
        "content": digest(lines),
    }
    ignored = [
        str(path)
        for path in sorted(root.glob("*/**/*"))
        if path.is_file() and path.suffix.lower() not in IMG_EXTENSIONS
    ]
    return entry, bad, ignored


def main() -> None:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="the directory that holds train/ and val/, or one of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--output", type=Path, help=f"where the fingerprint goes (default: DIR/{FILE})")
    options = parser.parse_args()
    splits = [split for split in ("train", "val") if (options.root / split).is_dir()]
    if not splits:
        raise InputError(f"{options.root} holds neither train/ nor val/")
    entries, problems = {}, []
    for split in splits:
        entry, bad, ignored = check_split(options.root / split, options.workers)
        entries[split] = entry
        print(f"{split}: {entry['images']} images, {entry['classes']} classes, {entry['bytes']} bytes, {len(bad)} bad")
        for line in bad:
            print(f"bad: {line}")
        for path in ignored:
            print(f"ignored, its name is no image's: {path}")
        problems += bad
        folders = [path.name for path in (options.root / split).iterdir() if path.is_dir()]
        if len(folders) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in folders):
            whole = entry["images"] == _IMAGENET[split]
            print(f"{split}: ImageNet has {_IMAGENET[split]} images" + ("" if whole else ": this set is another"))
    if len({entry["class_order"] for entry in entries.values()}) > 1:
        raise InputError(f"{options.root}: the class folders of train/ and val/ differ, so labels would not agree")
    if problems:
        raise InputError(f"{options.root}: {len(problems)} bad files, listed above; the first is {problems[0]}")
    output = options.output or options.root / FILE
    text = json.dumps(entries, indent=2) + "\n"
    checkpoint.write_atomically(output, lambda file: file.write(text.encode()))
    print(f"every image decodes; {output} written")


if __name__ == "__main__":
    distributed.launch(main)
