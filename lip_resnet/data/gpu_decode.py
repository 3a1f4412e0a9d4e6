"""``data.decode: gpu``: workers read files and draw crops, the training process decodes the crops on its GPU.

A worker sends a JPEG file still encoded, with the crop and flip that it drew; other images it decodes itself. The
decoder is nvImageCodec: nvJPEG on a GPU, libjpeg-turbo on the CPU, with the same calls, so that tests need no GPU.
"""

import importlib.util
import io
import os
import sys
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lip_resnet import distributed
from lip_resnet.config import InputError
from lip_resnet.data.decode import decode_exact

# On a GPU, torch keeps the weights of its antialiased resize in shared memory, which is enough up to about 90.
_LARGEST_SHRINK = 64
# libjpeg-turbo interpolates the colours of a narrow crop differently from those of the whole image.
_SMALLEST_CROP = 8  # pixels

Box = tuple[int, int, int, int]
"""(top, left, height, width), pixels."""


class Piece(NamedTuple):
    """One image of a parcel: ``data[start:end]``."""

    start: int
    end: int
    path: str = ""
    box: Box | None = None
    """The crop of an encoded file; None if the bytes are (side, side, 3) pixels."""
    flip: bool = False


class Parcel(NamedTuple):
    """A batch as a worker sends it."""

    data: Tensor
    """(n,) uint8: encoded files and pixels, concatenated."""
    pieces: list[Piece]
    side: int
    """Of the images of the batch, pixels."""


class Packer:
    """Collects a batch, image by image.

    Args:
        side: of the images of the batch, pixels.
    """

    def __init__(self, side: int) -> None:
        self.side, self.end = side, 0
        self.pieces: list[Piece] = []
        self.chunks: list[np.ndarray] = []

    def takes(self, data: bytes, box: Box) -> bool:
        """Whether a JPEG file is decoded on the GPU: its colours are YCbCr or gray, the crop neither tiny nor huge."""
        colours, sides = simplejpeg.decode_jpeg_header(data)[2], box[2:]
        usual = colours in ("YCbCr", "Gray")
        return usual and min(sides) >= _SMALLEST_CROP and max(sides) <= _LARGEST_SHRINK * self.side

    def add_file(self, data: bytes, path: str, box: Box, flip: bool) -> None:
        """Add a JPEG file, which is then decoded, cropped, resized and flipped on the device."""
        self._add(np.frombuffer(data, np.uint8), path, box, flip)

    def add_pixels(self, pixels: Tensor) -> None:
        """Add finished pixels, (side, side, 3) uint8."""
        self._add(pixels.numpy().reshape(-1))

    def _add(self, chunk: np.ndarray, path: str = "", box: Box | None = None, flip: bool = False) -> None:
        self.chunks.append(chunk)
        self.pieces.append(Piece(self.end, self.end + len(chunk), path, box, flip))
        self.end += len(chunk)

    def seal(self) -> Parcel:
        """The images added, in their order."""
        data = np.concatenate(self.chunks) if self.chunks else np.empty(0, np.uint8)
        return Parcel(torch.from_numpy(data), self.pieces, self.side)


class BatchDecoder:
    """Parcels to batches, on the current stream of ``device``.

    The library is loaded with the first parcel, so that it starts no threads before the loader's processes are forked.

    Args:
        device: a GPU; or the CPU, for tests.
        interpolation: ``data.interpolation``.

    Raises:
        InputError: nvImageCodec is not installed.
    """

    def __init__(self, device: torch.device, interpolation: str) -> None:
        self.device, self.interpolation = device, interpolation
        self.refused = 0
        self._decoder: Any = None
        self._library: Any = None
        if not installed():
            raise InputError(f"data.decode: gpu needs nvImageCodec: {_hint()}; without it, set decode: fast")

    def __call__(self, parcel: Parcel) -> Tensor:
        """(b, 3, side, side) uint8 on the device, channels-last.

        Raises:
            BadImage: neither the GPU's decoder nor PIL decodes an image.
            InputError: nvJPEG does not work on the device.
        """
        side, data = parcel.side, parcel.data.numpy()
        out = torch.empty((len(parcel.pieces), side, side, 3), dtype=torch.uint8, device=self.device)
        files = [piece for piece in parcel.pieces if piece.box is not None]
        crops = iter(self.crops([data[piece.start : piece.end] for piece in files], files))
        for row, piece in zip(out, parcel.pieces, strict=True):
            if piece.box is None:
                row.copy_(parcel.data[piece.start : piece.end].view(side, side, 3))
            else:
                row.copy_(self._resize(next(crops), side, piece.flip))
        return out.permute(0, 3, 1, 2)

    def crops(self, files: list[np.ndarray], pieces: list[Piece]) -> list[Tensor]:
        """The crops of JPEG files, each (height, width, 3) uint8 on the device; every piece has a box."""
        if not files:
            return []
        boxes = [piece.box for piece in pieces if piece.box is not None]
        decoded = zip(self._decode(files, boxes), files, pieces, boxes, strict=True)
        return [self._by_pil(file, piece.path, box) if crop is None else crop for crop, file, piece, box in decoded]

    def _decode(self, files: list[np.ndarray], boxes: list[Box]) -> list[Tensor | None]:
        if self._decoder is None:
            self._open()
        library, streams = self._library, []
        for file, (top, left, height, width) in zip(files, boxes, strict=True):
            region = library.Region(top, left, top + height, left + width)
            streams.append(library.CodeStream(file).get_sub_code_stream(region=region))
        # ImageFolder ignores the EXIF orientation too.
        params = library.DecodeParams(apply_exif_orientation=False, color_spec=library.ColorSpec.SRGB)
        if self.device.type == "cpu":
            images = self._decoder.decode(streams, params=params)
            return [None if image is None else torch.from_numpy(np.asarray(image)) for image in images]
        # Decoded, resized and freed on one stream.
        images = self._decoder.decode(
            streams, params=params, cuda_stream=torch.cuda.current_stream(self.device).cuda_stream
        )
        return [None if image is None else torch.from_dlpack(image) for image in images]

    def _open(self) -> None:
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # no warnings about missing codecs of other formats
        from nvidia import nvimgcodec as library

        kinds, threads = library.BackendKind, 0
        if self.device.type == "cpu":
            number, chosen, threads = library.NVIMGCODEC_DEVICE_CPU_ONLY, [kinds.CPU_ONLY], 1
        else:
            # nvJPEG's CUDA decoder alone. By default the library splits a batch among its decoders (some GPUs have a
            # JPEG engine, whose colours differ), so pixels would depend on the batch; and without nvJPEG it would use
            # the CPU without a message.
            number = torch.cuda.current_device() if self.device.index is None else self.device.index
            chosen = [kinds.HYBRID_CPU_GPU]
        self._library = library
        # libjpeg upsamples colours in the same way ("fancy upsampling").
        self._decoder = library.Decoder(
            device_id=number,
            max_num_cpu_threads=threads,
            backends=[library.Backend(kind) for kind in chosen],
            options=":fancy_upsampling=1",
        )
        probe = io.BytesIO()
        Image.new("RGB", (64, 64), (200, 100, 50)).save(probe, "JPEG")
        if self._decode([np.frombuffer(probe.getvalue(), np.uint8)], [(0, 0, 64, 64)])[0] is None:
            raise InputError(f"data.decode: gpu: nvJPEG does not decode on {self.device}: {_hint()}")

    def _by_pil(self, file: np.ndarray, path: str, box: Box) -> Tensor:
        image = decode_exact(file.tobytes(), path)
        self.refused += 1
        if self.refused == 1:
            tqdm.write(f"{path}: PIL decodes images that the GPU's decoder refuses; this is the first", file=sys.stderr)
        top, left, height, width = box
        pixels = np.asarray(image)[top : top + height, left : left + width]
        return torch.from_numpy(pixels.copy()).to(self.device)

    def _resize(self, crop: Tensor, side: int, flip: bool) -> Tensor:
        """(h, w, 3) uint8 -> (side, side, 3) float32 with integer values, by torch's antialiased resize.

        On GPUs it needs floats. PIL and torch's resize of uint8 round between the horizontal and the vertical pass; so
        does this.
        """
        pixels = crop.permute(2, 0, 1)[None].float()
        for size in ((len(crop), side), (side, side)):
            pixels = functional.interpolate(
                pixels, size, mode=self.interpolation, align_corners=False, antialias=True
            ).round_()
            pixels.clamp_(0, 255)
        if flip:
            pixels = pixels.flip(-1)
        return pixels[0].permute(1, 2, 0)


def on_this_gpu(interpolation: str) -> BatchDecoder:
    """The decoder of this process's GPU.

    Raises:
        InputError: there is no GPU, or no nvImageCodec.
    """
    device = distributed.device()
    if device.type != "cuda":
        raise InputError("data.decode: gpu needs a GPU, and this process has none; set decode: fast or exact")
    return BatchDecoder(device, interpolation)


def installed() -> bool:
    """Whether nvImageCodec is installed."""
    try:
        return importlib.util.find_spec("nvidia.nvimgcodec") is not None
    except ModuleNotFoundError:
        return False


def _hint() -> str:
    major = (torch.version.cuda or "13").split(".")[0]
    package = "lip-resnet[gpu_decode]" if major == "13" else f"nvidia-nvimgcodec-cu{major}[nvjpeg]"
    return f'pip install "{package}"'
