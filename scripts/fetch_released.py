"""Download and verify the authors' weights:  python scripts/fetch_released.py DIR [--data DIR]

Downloads lip_resnet-50.pth, lip_resnet-101.pth and lip_densenet_121.pth from the authors' folder on Google Drive, and
verifies each as verify_checkpoint.py does: strict loading, and with --data the counts. A broken download goes on where
it stopped, also when the command is run again. Files that are in DIR already are only verified.
"""

import argparse
import html
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import verify_checkpoint
from tqdm import tqdm

from lip_commands import DATA_HELP, DATA_NAME_HELP
from lip_resnet import cli, distributed
from lip_resnet.config import InputError
from lip_resnet.evaluation.location import KINDS
from lip_resnet.files import make_folder
from lip_resnet.models.published import RELEASED, RELEASED_FOLDER

LIST = "https://drive.google.com/embeddedfolderview?id=" + RELEASED_FOLDER.rpartition("/")[2]
FILE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
PAUSES = (1.0, 4.0, 16.0)
"""Seconds before each attempt to go on with a broken download."""
_ENTRY = re.compile(r'href="https://drive\.google\.com/file/d/([-\w]+)/view[^"]*"[^>]*>(.*?)</a>', re.DOTALL)
_BROKEN = (OSError, http.client.HTTPException)  # urllib's errors are OSErrors


def list_folder() -> dict[str, str]:
    """The authors' folder: name of a file -> its id."""
    with urllib.request.urlopen(LIST, timeout=30) as page:
        text = page.read().decode("utf-8", "replace")
    return {html.unescape(re.sub(r"<[^>]*>", "", name)).strip(): key for key, name in _ENTRY.findall(text)}


def download(url: str, path: Path) -> None:
    """Download to ``path``.part, from its end on where it exists, and rename it when it is whole.

    Raises:
        OSError, HTTPException: it is not whole after several attempts.
    """
    part = path.with_name(f"{path.name}.part")
    for pause in (*PAUSES, None):
        try:
            append(url, part)
            break
        except _BROKEN as error:
            if pause is None or (isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404)):
                raise
            print(f"note: {path.name}: {error}; retrying in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    os.replace(part, path)


def append(url: str, part: Path) -> None:
    """Download the missing part of a file; a server that cannot begin in the middle sends all of it.

    Raises:
        OSError, HTTPException: the connection broke; the file then holds what came.
    """
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "") == f"bytes */{start}":
            return  # it was whole
        if error.code == 416:
            part.unlink()  # longer than the file: of another one
        raise
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise OSError("Google Drive answers with a page, not the file: its limit of downloads may be reached")
        start = start if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with open(part, "ab" if start else "wb") as file, bar:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            size = file.tell()
    if total is not None and size != total:
        raise OSError(f"the connection broke after {size:,} of {total:,} bytes")


def fetch(folder: Path, names: list[str]) -> None:
    """Download the files that are not in the folder.

    Raises:
        InputError: the folder cannot be made, or a file cannot be downloaded; says what to do by hand.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    what = f"{', '.join(missing)}"
    make_folder(folder)
    try:
        ids = list_folder() if missing else {}
        for name in missing:
            what = name
            if name not in ids:
                raise OSError(f"the folder's page names {', '.join(ids) or 'no files'}")
            download(FILE.format(ids[name]), folder / name)
    except _BROKEN as error:
        raise InputError(
            f"cannot download {what}: {error}; by hand: open {RELEASED_FOLDER} in a browser, save the files in "
            f"{folder}, and run this command again, which verifies them"
        ) from error


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the files are, or are written")
    parser.add_argument(
        "--models", nargs="+", choices=RELEASED, default=list(RELEASED), metavar="NAME", help="some only"
    )
    parser.add_argument("--data", help=f"ImageNet, to compare the counts: {DATA_HELP}")
    parser.add_argument("--data-name", choices=KINDS, metavar="NAME", help=DATA_NAME_HELP)
    parser.add_argument("--workers", type=int, default=8, help="loader processes of each process")
    options = parser.parse_args()
    distributed.on_main(lambda: fetch(options.folder, [RELEASED[name] for name in options.models]))
    accepted = []
    for name in options.models:
        given = {**vars(options), "file": options.folder / RELEASED[name], "export": None, "weights": None}
        accepted.append(verify_checkpoint.verify(argparse.Namespace(**given), expected=name))
    if not all(accepted):
        sys.exit(1)


if __name__ == "__main__":
    cli.launch(main)
