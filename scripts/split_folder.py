"""A folder of photographs to train and val:  python scripts/split_folder.py PHOTOS --output DIR [--val 0.2]

PHOTOS/<class>/*.jpg, of any format that PIL decodes, become links DIR/train/<class>/ and DIR/val/<class>/. Every class
gives the same share of its images to val, at least one. The choice depends on --seed and the names in the class alone.
Nothing is moved, copied or overwritten.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from lip_resnet import cli, seeding
from lip_resnet.config import InputError
from lip_resnet.data.sources.base import say_left_out
from lip_resnet.data.sources.folder import Folder
from lip_resnet.files import to_json, write_text

_SPLITS = {"train", "val", "valid", "validation", "test"}


def open_photographs(root: Path) -> Folder:
    """The images of a folder of class folders, as training would read them.

    Raises:
        InputError: there are no class folders or no images, or it is split already.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; give the one that holds a folder of photographs for each class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"{root} holds no class folders; it must hold a folder of photographs for each class")
    if {name.lower() for name in classes} <= _SPLITS:
        raise InputError(f"{root} is split already: it holds {', '.join(f'{name}/' for name in classes)}")
    return Folder(root, classes)


def choose_val(source: Folder, share: float, seed: int) -> set[str]:
    """The names of the images for val: in each class the nearest whole number to its share, of 1 to all but one.

    A class of one image gives none.
    """
    chosen: set[str] = set()
    labels, names = np.array(source.targets), [path for path, _ in source.samples]
    for label, name in enumerate(source.classes):
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        random = np.random.default_rng(seeding.derive(f"split {name}", seed))
        chosen |= {names[index] for index in random.permutation(members)[:count]}
    return chosen


def write_links(source: Folder, root: Path, val: set[str], output: Path, facts: dict[str, object]) -> None:
    """Make the links in a folder beside ``output``, which is then renamed to it: all of it or nothing appears.

    Raises:
        InputError: it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        try:
            for path, _ in source.samples:
                name = os.path.relpath(path, root)
                link = temporary / ("val" if path in val else "train") / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(root.resolve() / name)
            write_text(temporary / "split.json", to_json(facts, indent=2) + "\n")
            temporary.chmod(0o755)  # mkdtemp's mode is 0700
            os.rename(temporary, output)  # replaces an empty directory, and nothing else
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(f"--output {output}: cannot write: {error.strerror or error}") from error


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="holds a folder of photographs for each class")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder, for train/ and val/")
    parser.add_argument("--val", type=float, default=0.2, help="share of every class for val (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice, 0 or more (default: 0)")
    options = parser.parse_args()
    root, output = options.photos, options.output
    if not 0 < options.val < 1:
        raise InputError(f"--val is {options.val:g}; it must be a share between 0 and 1, such as 0.2")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}; it must be 0 or more")
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise InputError(f"--output {output} exists; choose another")
    if output.resolve().is_relative_to(root.resolve()):
        raise InputError(f"--output {output} is in {root}, where it would be a class; choose another")
    source = open_photographs(root)
    say_left_out(source)
    val = choose_val(source, options.val, options.seed)
    if not val:
        raise InputError(f"{root}: no class has two images, one for train and one for val")
    facts = {"source": str(root.resolve()), "val": options.val, "seed": options.seed}
    write_links(source, root, val, output, facts)
    sizes = f"{len(source) - len(val):,} images in train/, {len(val):,} in val/"
    print(f"{output}: {len(source.classes):,} classes, {sizes}")


if __name__ == "__main__":
    cli.launch(main)
