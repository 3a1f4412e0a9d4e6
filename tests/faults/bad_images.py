"""Broken and unusual images, and whether they decode:  python tests/faults/bad_images.py

Makes one file of each kind, reads it as training (both ways of decoding) and as validation, and prints JSON lines.
"""

import io
import json
import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lip_resnet import cli
from lip_resnet.config import DataConfig
from lip_resnet.data.decode import BadImage, read_file
from lip_resnet.data.sources.folder import Folder
from lip_resnet.data.transforms import TrainTransform


def photograph() -> Image.Image:
    """(240, 320) smooth colours, so that the compressed scan covers most of the file."""
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((320, 240), 3)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def make_files(folder: Path) -> dict[str, Path]:
    """One file a kind, all named .JPEG; kind -> path."""
    image = photograph()
    whole = encode(image, quality=95)
    middle = len(whole) // 2
    palette = image.quantize(16)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    noise = np.random.default_rng(1).bytes(200)
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    gray = Image.fromarray((np.arange(64 * 48, dtype=np.uint16) * 21).reshape(48, 64))
    contents = {
        "truncated": whole[:middle],
        "zero bytes": b"",
        "header only": whole[:300],
        "scan damaged by zeros": whole[:middle] + bytes(200) + whole[middle + 200 :],
        "scan damaged by noise": whole[:middle] + noise + whole[middle + 200 :],
        "scan damaged by noise, bytes after the image": whole[:middle] + noise + whole[middle + 200 :] + b"trailing",
        "text file": b"404 Not Found\n" * 50,
        "decompression bomb (PNG, 30000x30000)": _png_header(30000, 30000),
        "decompression bomb (JPEG, 60000x60000)": _giant(whole),
        "truncated PNG": encode(image, "PNG")[:20000],
        "CMYK JPEG": encode(image.convert("CMYK"), quality=95),
        "gray JPEG": encode(image.convert("L"), quality=95),
        "progressive JPEG": encode(image, quality=95, progressive=True),
        "bytes after the image": whole + b"trailing" * 10,
        "PNG": encode(image, "PNG"),
        "PNG with transparency": encode(image.convert("RGBA"), "PNG"),
        "palette PNG": encode(palette, "PNG"),
        "16-bit gray PNG": encode(gray, "PNG"),
        "animated GIF": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "EXIF orientation": encode(image, quality=95, exif=rotated),
    }
    paths = {}
    for number, (kind, data) in enumerate(contents.items()):
        paths[kind] = folder / f"{number:02}.JPEG"
        paths[kind].write_bytes(data)
    paths["unreadable (a link to nothing)"] = folder / "unreadable.JPEG"
    os.symlink(folder / "nothing", paths["unreadable (a link to nothing)"])
    return paths


def _giant(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", 60000, 60000) + jpeg[at + 4 :]


def outcomes(folder: Path) -> dict[str, dict[str, torch.Tensor | Image.Image | BadImage]]:
    """kind -> {exact, fast, validation} -> the result: pixels, an image, or the error."""
    paths = make_files(folder)
    source = Folder(folder.parent, [folder.name])
    index = {path: number for number, (path, _) in enumerate(source.samples)}
    results: dict[str, dict[str, torch.Tensor | Image.Image | BadImage]] = {}
    for kind, path in paths.items():
        results[kind] = {}
        for way in ("exact", "fast", "validation"):
            try:
                if way == "validation":
                    results[kind][way] = source[index[str(path)]][0]
                else:
                    results[kind][way] = _train(source, index[str(path)], way)
            except BadImage as error:
                results[kind][way] = error
    return results


def _train(source: Folder, index: int, decode: str) -> torch.Tensor:
    """Decode and resize the whole image: a crop might miss the damage."""
    crop = {"crop_scale": (1.0, 1.0), "crop_ratio": (0.01, 100.0), "flip": 0.0}
    config = DataConfig(root=".", batch_size=1, decode=decode, size=96, **crop)
    out = torch.empty(96, 96, 3, dtype=torch.uint8)
    path = source.path(index)
    data = read_file(path)
    if TrainTransform(config).data(data, path, 1, out):
        source.check(index, data)
    return out


def rows(outcomes_by_kind: dict[str, dict[str, torch.Tensor | Image.Image | BadImage]]) -> list[dict[str, str]]:
    """For each kind of file, whether training (both ways of decoding) and validation decode or refuse it."""
    return [
        {"file": kind} | {way: "refused" if isinstance(result, BadImage) else "decoded" for way, result in ways.items()}
        for kind, ways in outcomes_by_kind.items()
    ]


def main() -> None:
    cli.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "class"
        folder.mkdir()
        print(*map(json.dumps, rows(outcomes(folder))), sep="\n")


if __name__ == "__main__":
    cli.launch(main)
