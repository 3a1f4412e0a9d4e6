"""Checkpoint files: written atomically, read without executing anything in them."""

import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lip_resnet.config import Config, Recipe
from lip_resnet.errors import InputError
from lip_resnet.files import to_json, write_atomically
from lip_resnet.recipe import R, of_task, parse_recipe

FORMAT = 1
_METADATA = "lip_resnet"
"""Entry of a safetensors file's metadata: what an exported file holds beside its tensors, as JSON."""


class _Inert:
    """Stands for an object that other libraries save beside their weights: it is neither imported nor executed."""

    def __new__(cls, *_arguments: Any) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, _state: Any) -> None:
        """Ignore it."""


_NUMPY = ("multiarray.scalar", "multiarray._reconstruct")
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_DICTIONARIES = (
    *("lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
    *("pytorch_lightning.utilities.parsing.AttributeDict", "yacs.config.CfgNode", "easydict.EasyDict"),
)
_STAND_INS: list[Any] = [
    *((_Inert, name) for name in ("argparse.Namespace", "numpy.dtype", "numpy.ndarray")),
    *((_Inert, f"numpy.{module}.{name}") for module in ("core", "_core") for name in _NUMPY),
    *((_Inert, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *((OrderedDict, name) for name in _DICTIONARIES),
]
"""What is put in the place of classes that a file names, beside those that torch itself allows."""

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


def to_safetensors(weights: dict[str, Tensor], description: Mapping[str, Any]) -> bytes:
    """A safetensors file that ``load`` reads as a checkpoint.

    Args:
        description: entries of the checkpoint beside the weights, plain values; ``weights`` says which the weights are,
            "model" or "ema".
    """
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    return safetensors.torch.save(tensors, metadata={"format": "pt", _METADATA: to_json(dict(description))})


def load(path: str | Path) -> dict[str, Any]:
    """Read a file of torch.save or safetensors, whatever its name, onto the CPU; nothing in it is executed.

    Objects that other libraries save beside their weights (command-line arguments, numpy scalars, paths) are read as
    placeholders.

    Raises:
        InputError: no such file, not a checkpoint, damaged, or it holds more than tensors and plain values.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
        if _is_safetensors(path):
            payload = _load_safetensors(path)
        else:
            _check_archive(path)
            # A file object: of a path torch.load would take the name into account.
            with open(path, "rb") as file, torch.serialization.safe_globals(_STAND_INS):
                payload = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise InputError(f"{path}: not a checkpoint: damaged, or not a file that torch.save wrote") from error
        raise InputError(
            f"{path}: refused, it holds more than tensors and numbers, and nothing in it is executed: "
            f"{code[1][:200]}; save the weights alone, model.state_dict()"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from error
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: not a checkpoint: {_first_line(error)}") from error
    if not isinstance(payload, dict) or not all(isinstance(key, str) for key in payload):
        raise InputError(f"{path}: holds a {_describe_value(payload)}; a checkpoint is a dictionary of names")
    return payload


def describe_entries(entries: Mapping[Any, Any]) -> str:
    """The first names of a dictionary with the kinds of their values, for messages."""
    shown = [f"{printable(name)} ({_describe_value(value)})" for name, value in list(entries.items())[:5]]
    return ", ".join(shown) + (f", ... ({len(entries)} entries)" if len(entries) > 5 else "") or "nothing"


def printable(name: Any) -> str:
    """A name out of a file, as one short line."""
    return repr(str(name)[:60])[1:-1]


def _describe_value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        names = ", ".join(map(printable, list(value)[:2]))
        return f"dictionary of {len(value)}" + (f": {names}, ..." if value else "")
    return "object" if isinstance(value, _Inert) else type(value).__name__


def read_recipe(payload: dict[str, Any], source: str, schema: type[R] = Config) -> R | None:  # type: ignore[assignment]
    """The recipe in one of our checkpoints or exported files; None in files of others.

    Args:
        schema: of the task that it must be of; ``Recipe`` for any.

    Raises:
        InputError: it is not a recipe of this version, or is of another task; ``source`` names the file.
    """
    recipe = payload.get("config")
    ours = isinstance(recipe, dict) and recipe.keys() >= Recipe.model_fields.keys()
    if not ours and not {"format", "config"} <= payload.keys():
        return None
    return of_task(parse_recipe(payload["config"], source), schema, source)


def _is_safetensors(path: Path) -> bool:
    """Whether a file is in the safetensors format, by its first bytes: the length of a JSON object, and its brace."""
    with open(path, "rb") as file:
        start = file.read(9)
        return start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.seek(0, os.SEEK_END)


def _load_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    tensors = safetensors.torch.load_file(path)
    if _METADATA not in metadata:
        return tensors
    description = json.loads(metadata[_METADATA])
    if not isinstance(description, dict) or description.get("weights") not in ("model", "ema"):
        raise InputError(f"{path}: damaged: its metadata does not say which weights it holds")
    return {**description, "format": FORMAT, description["weights"]: tensors}


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
            if any(entry.filename.endswith("/constants.pkl") for entry in entries):
                raise InputError(f"{path}: holds a TorchScript program; save the weights alone, model.state_dict()")
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
