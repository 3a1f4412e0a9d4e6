"""Atomic writes of files, strict JSON, digests of files, and folders for a command's output."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from lip_resnet.errors import InputError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` with a temporary file beside ``path``, then rename it to ``path``.

    File and folder are synced to disk: even after a power failure ``path`` is the complete old or new file.

    Raises:
        InputError: the file cannot be written (full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to a file, as ``write_atomically``."""
    write_atomically(path, lambda file: file.write(text.encode()))


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON (RFC 8259), without a line feed at its end.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    return json.dumps(value, indent=indent, allow_nan=False)


def sync_folder(folder: Path) -> None:
    """fsync a directory: renames and links in it are then on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_empty(folder: Path) -> None:
    """Check that a command's ``--output`` is a new or empty folder.

    Raises:
        InputError: it is not.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"--output {folder} exists and is not an empty folder; give a new one or empty it")


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where it does not exist.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot make this folder: {error.strerror}") from error


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
