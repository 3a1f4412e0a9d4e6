"""Training images decoded on the GPU: a worker reads, checks and draws, the training process decodes.

A worker hands a JPEG file over as it is, with the crop and flip that it drew; every other image it decodes itself. The
decoder is nvImageCodec (nvJPEG on a GPU, libjpeg-turbo on the CPU: the same calls, which is how this code is tested).
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

# On a GPU, torch keeps the weights of its antialiased resize in shared memory; there is room up to about 90.
_LARGEST_SHRINK = 64
# libjpeg-turbo interpolates the colours of a column that is cropped out alone in another way than within the image.
_SMALLEST_CROP = 8

Box = tuple[int, int, int, int]


class Piece(NamedTuple):
    """One image's place in a parcel."""

    start: int
    end: int
    path: str = ""
    box: Box | None = None
    """(top, left, height, width) of the crop; None where the bytes are (side, side, 3) pixels."""
    flip: bool = False


class Parcel(NamedTuple):
    """The images of a batch on their way to the device."""

    data: Tensor
    """(n,) uint8: files and pixels, one after the other."""
    pieces: list[Piece]
    side: int
    """Of the images in the end, pixels."""


class Packer:
    """Gathers a batch, image by image.

    Args:
        side: of the images in the end, pixels.
    """

    def __init__(self, side: int) -> None:
        self.side, self.pieces, self.chunks, self.end = side, [], [], 0

    def takes(self, data: bytes, box: Box) -> bool:
        """Whether a JPEG file is for the GPU: its colours are the usual ones, the crop neither tiny nor huge."""
        colours, sides = simplejpeg.decode_jpeg_header(data)[2], box[2:]
        usual = colours in ("YCbCr", "Gray")
        return usual and min(sides) >= _SMALLEST_CROP and max(sides) <= _LARGEST_SHRINK * self.side

    def add_file(self, data: bytes, path: str, box: Box, flip: bool) -> None:
        """A JPEG file, to be cropped and then flipped."""
        self._add(np.frombuffer(data, np.uint8), path, box, flip)

    def add_pixels(self, pixels: Tensor) -> None:
        """(side, side, 3) uint8, finished."""
        self._add(pixels.numpy().reshape(-1))

    def _add(self, chunk: np.ndarray, *about: Any) -> None:
        self.chunks.append(chunk)
        self.pieces.append(Piece(self.end, self.end + len(chunk), *about))
        self.end += len(chunk)

    def seal(self) -> Parcel:
        """All that was added, in its order."""
        data = np.concatenate(self.chunks) if self.chunks else np.empty(0, np.uint8)
        return Parcel(torch.from_numpy(data), self.pieces, self.side)


class BatchDecoder:
    """Parcels to batches, on the current stream of ``device``.

    The library is loaded when the first parcel comes: its threads must not be there yet when loader processes start.

    Args:
        device: a GPU; or the CPU, to see what a GPU would be asked for.
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
            raise InputError(f"data.decode: gpu needs nvImageCodec: {_hint()}; without it: decode: fast")

    def __call__(self, parcel: Parcel) -> Tensor:
        """(b, 3, side, side) uint8 on the device, channels-last.

        Raises:
            BadImage: the GPU's decoder refuses an image, and PIL does too.
            InputError: nvJPEG cannot be used.
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
        """The crops of JPEG files, each (height, width, 3) uint8 on the device."""
        if not files:
            return []
        decoded = self._decode(files, [piece.box for piece in pieces])
        for number, crop in enumerate(decoded):
            if crop is None:
                decoded[number] = self._by_pil(files[number], pieces[number])
        return decoded

    def _decode(self, files: list[np.ndarray], boxes: list[Box]) -> list[Tensor | None]:
        if self._decoder is None:
            self._open()
        library, streams = self._library, []
        for file, (top, left, height, width) in zip(files, boxes, strict=True):
            region = library.Region(top, left, top + height, left + width)
            streams.append(library.CodeStream(file).get_sub_code_stream(region=region))
        # As ImageFolder does, without the EXIF orientation.
        wanted = library.DecodeParams(apply_exif_orientation=False, color_spec=library.ColorSpec.SRGB)
        if self.device.type == "cpu":
            images = self._decoder.decode(streams, params=wanted)
            return [None if image is None else torch.from_numpy(np.asarray(image)) for image in images]
        # Decoded, resized and freed in the order of one stream.
        images = self._decoder.decode(
            streams, params=wanted, cuda_stream=torch.cuda.current_stream(self.device).cuda_stream
        )
        return [None if image is None else torch.from_dlpack(image) for image in images]

    def _open(self) -> None:
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # it complains of codecs that nobody needs here
        from nvidia import nvimgcodec as library

        kinds, threads = library.BackendKind, 0
        if self.device.type == "cpu":
            number, chosen, threads = library.NVIMGCODEC_DEVICE_CPU_ONLY, [kinds.CPU_ONLY], 1
        else:
            # nvJPEG's CUDA decoder alone. The library would share a batch out among all that it has (some GPUs have a
            # JPEG engine, whose colours differ), so pixels would depend on the batch; without nvJPEG it would take the
            # CPU and say nothing.
            number = torch.cuda.current_device() if self.device.index is None else self.device.index
            chosen = [kinds.HYBRID_CPU_GPU]
        self._library = library
        # Fancy upsampling of colours is what libjpeg does.
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

    def _by_pil(self, file: np.ndarray, piece: Piece) -> Tensor:
        image = decode_exact(file.tobytes(), piece.path)
        self.refused += 1
        if self.refused == 1:
            tqdm.write(f"{piece.path}: PIL decodes what the GPU's decoder refuses, this image first", file=sys.stderr)
        top, left, height, width = piece.box
        pixels = np.asarray(image)[top : top + height, left : left + width]
        return torch.from_numpy(pixels.copy()).to(self.device)

    def _resize(self, crop: Tensor, side: int, flip: bool) -> Tensor:
        """(h, w, 3) uint8 -> (side, side, 3), whole numbers: torch's antialiased resize, which on GPUs needs floats.

        The rows first and then the columns, with levels rounded in between: so do PIL and torch's resize of bytes.
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
        raise InputError("data.decode: gpu needs a GPU, and this process has none; take decode: fast (or exact)")
    return BatchDecoder(device, interpolation)


def installed() -> bool:
    """Whether nvImageCodec is there."""
    try:
        return importlib.util.find_spec("nvidia.nvimgcodec") is not None
    except ModuleNotFoundError:
        return False


def _hint() -> str:
    major = (torch.version.cuda or "13").split(".")[0]
    return f'pip install "nvidia-nvimgcodec-cu{major}[nvjpeg]"'
