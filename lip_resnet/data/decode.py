"""Bytes of an image file to RGB pixels, or an error that names the file; no image is ever replaced by another.

Two decoders. PIL is the reference, for every format. simplejpeg (libjpeg-turbo) decodes JPEG files faster to the same
pixels, can stop at the last row that a crop needs, and reports damage that PIL ignores.
"""

import contextlib
import io
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError
from tqdm import tqdm

from lip_resnet.config import InputError

# libjpeg's warnings about compressed data that no encoder writes. Its other warnings (bytes after the image, an unknown
# version number) do not affect the pixels.
_DAMAGE = ("premature end of data segment", "bad Huffman code", "bad arithmetic code", "instead of RST")
_END = b"\xff\xd9"  # the marker EOI, with which a JPEG ends
_EXTRANEOUS = "extraneous bytes before marker"
_IMAGE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, MemoryError, OverflowError, ZeroDivisionError),
    *(struct.error, zlib.error, Image.DecompressionBombError, Warning),  # warnings under python -W error
)
_NOT_DECODED = {"EPS", "MPEG"}  # EPS needs another program, Ghostscript; of MPEG, PIL reads the header alone
_warned: set[str] = set()  # PIL's warnings that this process has shown
_MCU = 16  # rows of the tallest minimum coded unit (MCU) of the JPEG files that are decoded in part


class BadImage(InputError):
    """One image cannot be read, decoded, resized or augmented; the message begins with its path."""


@contextlib.contextmanager
def image_errors(path: str, what: str) -> Iterator[None]:
    """What goes wrong with one image in this block names it.

    Args:
        path: the image's name.
        what: what the block does with it, such as "decode".

    Raises:
        BadImage: an exception that an image's content or size can cause.
        RuntimeError: any other, which is a bug; an InputError passes unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"{path}: cannot {what} this image: PIL knows no such format") from error
    except _IMAGE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"{path}: cannot {what} this image: {reason}") from error
    except Exception as error:
        raise RuntimeError(f"{path}: {type(error).__name__}: {error}") from error


def one_line(message: str) -> str:
    """A message about a file whose name may hold line feeds."""
    return message.replace("\n", "\\n").replace("\r", "\\r")


def readable_suffixes() -> set[str]:
    """The suffixes, such as ".jpg", of the formats that this process's PIL decodes, those of its plugins included."""
    extensions = Image.registered_extensions()  # loads PIL's plugins, which fill Image.OPEN
    stubs = {  # formats that PIL recognises and needs a handler for, such as HDF5
        name
        for name, (factory, _) in Image.OPEN.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    formats = {*Image.OPEN, "MPO"} - stubs - _NOT_DECODED  # MPO is opened as JPEG
    return {suffix for suffix, name in extensions.items() if name in formats}


def read_file(path: str) -> bytes:
    """A file's bytes.

    Raises:
        BadImage: it cannot be read, or is empty.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise BadImage(f"{path}: cannot read this image: {error.strerror}") from error
    if not data:
        raise BadImage(f"{path}: cannot decode this image: the file is empty")
    return data


def decode_exact(data: bytes, path: str) -> Image.Image:
    """PIL's RGB image, as torchvision's ImageFolder loads it: EXIF orientation is ignored, a palette's transparency is
    dropped, an animation gives its first frame. Only 16-bit gray differs: it is scaled to 8 bits, where PIL clips.

    Args:
        path: the image's name, for errors.

    Raises:
        BadImage: it does not decode, or has more pixels than twice ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    with image_errors(path, "decode"), _named_warnings(path):
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise BadImage(f"{path}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, which hides truncated files")
        return to_rgb(Image.open(io.BytesIO(data)), path)


def to_rgb(image: Image.Image, path: str) -> Image.Image:
    """A PIL image of any mode as RGB, as ``decode_exact`` converts it; ``path`` is its name in errors.

    Raises:
        BadImage: its pixels are 32-bit numbers of no known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadImage(f"{path}: cannot decode this image: pixels of mode {image.mode} have no known range")
    return image.convert("RGB")


@contextlib.contextmanager
def _named_warnings(path: str) -> Iterator[None]:
    """Show each of PIL's warnings once, with the first image that causes it."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for text in (str(warning.message) for warning in caught):
        kind = re.sub(r"\d+", "", text)  # numbers, such as of pixels, are the image's own
        if kind not in _warned:
            _warned.add(kind)
            tqdm.write(f"warning: {path}: {text} (shown for the first such image)", file=sys.stderr)


def check_scan(data: bytes, path: str) -> bool:
    """Decode a JPEG's whole scan, at an eighth of its size, for damage that PIL does not report; skip other formats.

    Args:
        path: the image's name, for errors.

    Returns:
        Whether it is a JPEG that libjpeg decodes without a warning, so that any decoder may be used. PIL must decode
        the others.

    Raises:
        BadImage: the compressed data is damaged. (Damage that decodes without a warning cannot be detected.)
    """
    whole = simplejpeg.is_jpeg(data)
    if not whole:  # simplejpeg does not recognise a JPEG with bytes after its end
        data = data[: data.rfind(_END) + len(_END)]
        if not simplejpeg.is_jpeg(data):
            return False
    try:
        colours = simplejpeg.decode_jpeg_header(data)[2]
        space = "CMYK" if colours in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, space, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        _refuse_damage(str(error), path)
        return False
    return whole


def _refuse_damage(message: str, path: str) -> None:
    if any(warning in message for warning in _DAMAGE):
        raise BadImage(f"{path}: cannot decode this image: {message}")


class JpegDecoder:
    """Decodes into one buffer that grows as needed: allocating costs more than copying the result."""

    def __init__(self) -> None:
        self.buffer = np.empty(0, np.uint8)

    def read_size(self, data: bytes) -> tuple[int, int] | None:
        """(height, width) from the header; None for what PIL must decode: other formats, CMYK, oversized images."""
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return None
        if colours not in ("YCbCr", "RGB", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        return height, width

    def decode(self, data: bytes, path: str, size: tuple[int, int], rows: int) -> np.ndarray | None:
        """The image's first ``rows`` rows, or more, (height, width, 3) uint8; valid until the next call.

        Returns:
            None if simplejpeg does not decode it: PIL must.

        Raises:
            BadImage: the compressed data of these rows is damaged.
        """
        height, width = size
        needed = height * width * 3
        if len(self.buffer) < needed:
            self.buffer = np.empty(needed, np.uint8)
        kept = -(-rows // _MCU) * _MCU + _MCU  # one MCU more: colours of the last row are interpolated with the next
        field = _find_height(data) if kept < height else None
        patched: bytes | bytearray = data
        if field is not None:
            patched = bytearray(data)
            patched[field : field + 2] = struct.pack(">H", kept)
        try:
            return simplejpeg.decode_jpeg(patched, "RGB", buffer=self.buffer)
        except ValueError as error:
            message = str(error)
        _refuse_damage(message, path)
        if field is not None and _EXTRANEOUS in message:  # the rows are decoded; the rest of the scan is extraneous
            return self.buffer[: kept * width * 3].reshape(kept, width, 3)
        return None


def _find_height(data: bytes) -> int | None:
    """The offset of the height in a JPEG's header, if one scan holds all components (baseline, interleaved); else None.

    With a smaller height there, a decoder decodes the rows up to it, bit for bit the same, and stops.
    """
    at, frame = 2, -1
    while at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in (0xC0, 0xC1):  # baseline and extended sequential frames
            frame = at
        elif 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # progressive, lossless, arithmetic
            return None
        elif marker == 0xDA:
            return frame + 5 if frame >= 0 and data[at + 4] == data[frame + 9] else None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None
