"""Checkpoint files: written atomically, read without executing anything in them."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from lip_resnet.errors import InputError
from lip_resnet.files import write_atomically

FORMAT = 1

# Raised by torch and safetensors for files that are truncated, altered, or of another format.
_DAMAGE = (
    *(RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError),
    *(struct.error, OverflowError),
    *(SafetensorError, zipfile.BadZipFile, UnicodeDecodeError, MemoryError),
)


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write a dictionary of tensors, numbers, strings, and dicts and lists of them, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    buffer = io.BytesIO()  # torch.save turns a full disk's OSError into a RuntimeError that does not name it
    torch.save({"format": FORMAT, **payload}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load(path: str | Path) -> dict[str, Any]:
    """Read a ``.pth``, ``.pt`` or ``.safetensors`` file onto the CPU; nothing in it is executed.

    Raises:
        InputError: no such file, not a checkpoint, damaged, or it holds more than tensors and plain values.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
        if path.suffix == ".safetensors":
            payload = safetensors.torch.load_file(path)
        else:
            _check_archive(path)
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), None)
        if code is None:
            raise InputError(f"{path}: not a checkpoint: damaged, or not a file that torch.save wrote") from error
        raise InputError(f"{path}: refused, it holds more than tensors and numbers: {code[:200]}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: not a checkpoint: {_first_line(error)}") from error
    if not isinstance(payload, dict) or not all(isinstance(key, str) for key in payload):
        raise InputError(f"{path}: holds a {type(payload).__name__}; a checkpoint is a dictionary of names")
    return payload


def _check_archive(path: Path) -> None:
    """Check a zip file, the format of torch.save: checksums, and that nothing in it is compressed.

    torch.load checks neither: a flipped bit would change a weight, and a megabyte could unpack to a terabyte.

    Raises:
        InputError: a check failed.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # the test by which torch.load recognises a zip file
            return
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > size or any(entry.compress_type for entry in entries):
                raise InputError(f"{path}: not a checkpoint: it would unpack to more than its {size:,} bytes")
            damaged = archive.testzip()
    if damaged is not None:
        raise InputError(f"{path}: damaged: the checksum of {damaged} in it is wrong")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def resolve(path: str | Path) -> Path:
    """The checkpoint file that a path names: ``last.pt`` of a run folder or of its ``checkpoints/``, else the path."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    inner = path / "checkpoints"
    return (path if not inner.is_dir() and any(path.glob("*.pt")) else inner) / "last.pt"
