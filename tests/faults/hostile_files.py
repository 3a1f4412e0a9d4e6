"""For the fault harness and the tests: files that are no good checkpoint, from a good one and a number."""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from torch import nn

Maker = Callable[[random.Random, dict[str, Any], bytes, Path], bytes]
"""(random numbers, the good payload, its bytes, the file that no pickle may make) -> a bad file."""


def truncate(whole: bytes, kilobytes: int) -> bytes:
    """The first so many kilobytes."""
    return whole[: kilobytes << 10]


def flip(rng: random.Random, whole: bytes) -> bytes:
    """One flipped bit, or eight, or a stretch of noise."""
    data = bytearray(whole)
    kind = rng.randrange(3)
    if kind == 2:
        start, length = rng.randrange(len(data)), rng.randint(2, 4096)
        data[start : start + length] = rng.randbytes(len(data[start : start + length]))
        return bytes(data)
    for _ in range((1, 8)[kind]):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def saved(payload: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(payload, buffer, **options)
    return buffer.getvalue()


# --- pickles that execute code


class Evil:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def execute(rng: random.Random, payload: dict[str, Any], _: bytes, canary: Path) -> bytes:
    """Somewhere in the file stands a call that would make ``canary``."""
    line = f"open({str(canary)!r}, 'w').close()"
    evil = rng.choice(
        [
            Evil(os.system, f"touch '{canary}'"),
            Evil(exec, line),
            Evil(eval, line),
            Evil(subprocess.Popen, ["touch", str(canary)]),
            Evil(Path.touch, canary),
            Evil(torch.utils.data.get_worker_info),  # harmless, and code all the same
        ]
    )
    place = rng.choice(["model", "ema", "optimizer", "config", "step", "deep", "whole"])
    if place == "whole":
        return rng.choice([saved(evil), pickle.dumps(evil), saved(evil, _use_new_zipfile_serialization=False)])
    bad = {**payload, place: evil}
    if place == "deep":
        bad = {**payload, "optimizer": {**payload["optimizer"], "state": {0: [evil]}}}
    if rng.random() < 0.3:
        return pickle.dumps(bad, protocol=rng.randint(0, 5))
    return saved(bad, _use_new_zipfile_serialization=rng.random() < 0.7)


# --- bombs


def _entries(whole: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _zip(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


BOMB_MB = 1024
_blown_up: dict[str, bytes] = {}


def deflated_bomb(rng: random.Random, _: dict[str, Any], whole: bytes, __: Path) -> bytes:
    """A megabyte that unpacks to one gigabyte."""
    entries = _entries(whole)
    name = rng.choice([name for name in entries if "/data" in name])
    if name not in _blown_up:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for other, data in entries.items():
                with archive.open(other, "w", force_zip64=other == name) as entry:
                    for _block in range(BOMB_MB if other == name else 0):
                        entry.write(bytes(1 << 20))
                    if other != name:
                        entry.write(data)
        _blown_up.clear()
        _blown_up[name] = buffer.getvalue()
    return _blown_up[name]


def deflated(_: random.Random, __: dict[str, Any], whole: bytes, ___: Path) -> bytes:
    """The good content, compressed, as torch.save never does."""
    return _zip(_entries(whole), zipfile.ZIP_DEFLATED)


def declared_size(rng: random.Random, _: dict[str, Any], whole: bytes, __: Path) -> bytes:
    """The directory says of an entry that it has almost 4 GB."""
    data = bytearray(whole)
    places = [at for at in range(len(data) - 46) if data[at : at + 4] == b"PK\x01\x02"]
    at = rng.choice(places)
    size = rng.choice([0xFFFFFFFE, 0x7FFFFFFF, 1 << 30])
    struct.pack_into(
        "<II", data, at + 20, *rng.choice([(size, size), (struct.unpack_from("<I", data, at + 20)[0], size)])
    )
    return bytes(data)


def overlapping(rng: random.Random, payload: dict[str, Any], __: bytes, ___: Path) -> bytes:
    """A thousand entries, and tensors, that are all the same stretch of the file."""
    big = torch.zeros(1 << 18)
    entries = _entries(saved({**payload, "extra": [big] + [torch.zeros(1) for _ in range(999)]}))
    size = big.nbytes
    name = next(name for name, data in entries.items() if len(data) == size)
    data = bytearray(_zip(entries))
    places, at = {}, data.find(b"PK\x01\x02")
    while at >= 0:
        length = struct.unpack_from("<H", data, at + 28)[0]
        places[bytes(data[at + 46 : at + 46 + length]).decode()] = at
        at = data.find(b"PK\x01\x02", at + 46)
    source = places[name]
    for other, at in places.items():
        if "/data/" in other and len(entries[other]) == 4:
            data[at + 16 : at + 28] = data[source + 16 : source + 28]  # checksum and sizes
            data[at + 42 : at + 46] = data[source + 42 : source + 46]  # where it begins
    return bytes(data)


def more_than_stored(rng: random.Random, payload: dict[str, Any], _: bytes, __: Path) -> bytes:
    """Tensors that claim more numbers than the file has for them: reading them would read foreign memory."""
    entries = _entries(saved(payload))
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    data, size = entries[pickled], rng.choice([1000, 100_000, 2**31 - 1])
    key = next(iter(payload["model"].values())).numel()
    small, large = b"M" + struct.pack("<H", key), b"J" + struct.pack("<i", size)
    assert small in data or b"K" + bytes([key % 256]) in data
    small = small if small in data else b"K" + bytes([key])
    return _zip({**entries, pickled: data.replace(small, large)})


def expanded(rng: random.Random, payload: dict[str, Any], _: bytes, __: Path) -> bytes:
    """A tensor of a few bytes with 10^10 elements, all of them the same one."""
    huge = torch.zeros(1).expand(100_000, 100_000)
    place = rng.choice(["model", "ema", "window", "optimizer"])
    if place == "window":
        return saved({**payload, "window": huge})
    if place == "optimizer":
        return saved({**payload, "optimizer": _with_buffers(payload["optimizer"], lambda _: huge)})
    return saved({**payload, place: dict.fromkeys(payload[place], huge)})


def many_faces(rng: random.Random, payload: dict[str, Any], _: bytes, __: Path) -> bytes:
    """A list of two that are one, forty deep: small in the file, endless to whoever walks it."""
    node: Any = [1, 2]
    for _level in range(40):
        node = [node, node]
    place = rng.choice(["config", "args", "step", "model", "optimizer", "best"])
    if place == "args":
        config = payload["config"]
        return saved({**payload, "config": {**config, "model": {**config["model"], "args": {"x": node}}}})
    return saved({**payload, place: {"x": node} if place != "step" else node})


def deep(rng: random.Random, payload: dict[str, Any], _: bytes, __: Path) -> bytes:
    """A hundred thousand lists in each other."""
    depth = rng.choice([2000, 100_000])
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


# --- other entries than a training checkpoint has


def _with_buffers(optimizer: dict[str, Any], change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    state = {
        key: {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
        for key, entry in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def altered(rng: random.Random, payload: dict[str, Any], _: bytes, __: Path) -> bytes:
    """An entry is missing, or of a type or shape that it cannot have."""
    weights = payload["model"]
    name = rng.choice(list(weights))
    shape = _with_buffers(payload["optimizer"], lambda value: value[..., None])
    bad_groups = {**payload["optimizer"], "param_groups": []}
    choices = [
        *({key: value for key, value in payload.items() if key != gone} for gone in ("step", "model", "optimizer")),
        *({key: value for key, value in payload.items() if key != gone} for gone in ("ema", "window", "processes")),
        *({**payload, "step": value} for value in ("ten", None, -1, 1.5, [10], torch.tensor(10.0))),
        *({**payload, "processes": value} for value in (None, [], "two", ["two"], 2, {}, [-1])),
        *(
            {**payload, "window": value}
            for value in (None, torch.zeros(0), torch.zeros(3, 2, 1), torch.zeros(1, 2), "x")
        ),
        *({**payload, "best": value} for value in ("high", None, [1])),
        *({**payload, "evaluated": value} for value in ("no", None, -1, 1 << 40)),
        *({**payload, "datasets": value} for value in (5, None, {"train": 5}, {"train": {"images": 3}})),
        *({**payload, "config": value} for value in (None, [], "x", {"model": 3}, {1: 2})),
        *(
            {**payload, "optimizer": value}
            for value in (None, {}, [], shape, bad_groups, {"state": 3, "param_groups": 3})
        ),
        *({**payload, "model": value} for value in (None, {}, [], "x", {"a": 1}, {1: torch.zeros(1)})),
        *({**payload, "model": {**weights, name: value}} for value in (None, 3, torch.zeros(3, 1, 7), [1.0])),
        {**payload, "model": {key: value for key, value in weights.items() if key != name}},
        {**payload, "model": {**weights, "unknown.weight": torch.zeros(2)}},
        {**payload, "model": {**weights, name: torch.empty_like(weights[name], device="meta")}},
        {**payload, "model": {**weights, name: weights[name].float().cfloat() + 1j}},
        {**payload, "model": {key: value[..., None] for key, value in weights.items()}},
        {**payload, "ema": {key: value[:0] if value.ndim else value for key, value in payload["ema"].items()}},
    ]
    return saved(rng.choice(choices))


def wrong_model(rng: random.Random, payload: dict[str, Any], _: bytes, __: Path) -> bytes:
    """Whole checkpoints of other networks, or of other classes."""
    other = timm.create_model(
        rng.choice(["test_efficientnet", "test_vit", "test_byobnet"]), num_classes=10
    ).state_dict()
    classes = {
        name: torch.zeros(7, *value.shape[1:]) if name.startswith("fc.") else value
        for name, value in payload["model"].items()
    }
    state = rng.choice([other, classes])
    if rng.random() < 0.5:
        return saved({**payload, "model": state, "ema": state})
    return saved(
        rng.choice([state, {"state_dict": state}, {"state_dict": {f"module.{k}": v for k, v in state.items()}}])
    )


# --- other projects' files


def _foreign() -> list[bytes]:
    arrays, tar, scripted = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(arrays, weight=np.zeros(3))
    with tarfile.open(fileobj=tar, mode="w") as archive:
        info = tarfile.TarInfo("model/weights")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"12345"))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), scripted)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return [
        b"",
        b"\0" * 4096,
        b"model: lip_resnet50\n",
        json.dumps({"state_dict": {}}).encode(),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 95652\n",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"\x89HDF\r\n\x1a\n" + bytes(2000),
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(64),
        b"\x08\x07\x12\x07pytorch" + bytes(200),
        b"\x1f\x8b\x08\0" + bytes(50),
        arrays.getvalue(),
        tar.getvalue(),
        scripted.getvalue(),
        _zip({"readme.txt": b"no tensors here"}),
        _zip({"archive/data.pkl": b"", "archive/version": b"3\n"}),
        pickle.dumps([1, 2, 3]),
        pickle.dumps({"weight": [1.0, 2.0]}),
        pickle.dumps({"weight": np.zeros(3)}),
        saved(nn.Linear(2, 2)),
        saved(torch.zeros(2)),
        saved({1: torch.zeros(2)}),
        saved({"model": {"weight": 3}}),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", len(header)) + header,
        safetensors.torch.save({"weight": torch.zeros(4)})[:-3],
        b"\x80\x02" + b"\x8e" + struct.pack("<Q", 2**62) + b"x",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"x",
    ]


_formats: list[bytes] = []


def foreign(rng: random.Random, _: dict[str, Any], __: bytes, ___: Path) -> bytes:
    """What other programs write, or nothing at all."""
    if not _formats:
        _formats.extend(_foreign())
    return rng.choice(_formats)


SPECIAL: dict[str, tuple[Maker, int]] = {
    "executes code": (execute, 60),
    "zip bomb": (deflated_bomb, 8),
    "compressed": (deflated, 4),
    "declared size": (declared_size, 20),
    "overlapping entries": (overlapping, 6),
    "more than stored": (more_than_stored, 15),
    "expanded": (expanded, 12),
    "walked for ever": (many_faces, 12),
    "deeply nested": (deep, 4),
    "altered entries": (altered, 90),
    "wrong model or classes": (wrong_model, 24),
    "other formats": (foreign, 60),
}
"""Maker and how often in a thousand."""


def plan(kilobytes: int, count: int = 1000) -> list[tuple[str, int]]:
    """(what, number) of ``count`` bad files: every kilobyte cut, SPECIAL, and bit flips for the rest; well mixed."""
    cases = [("truncated", number) for number in range(kilobytes)]
    cases += [(name, number) for name, (_, times) in SPECIAL.items() for number in range(times)]
    cases += [("bit flips", number) for number in range(max(0, count - len(cases)))]
    return random.Random(0).sample(cases, len(cases))[:count]


def make(what: str, number: int, payload: dict[str, Any], whole: bytes, canary: Path) -> bytes:
    """The bad file of that name and number."""
    if what == "truncated":
        return truncate(whole, number)
    rng = random.Random(f"{what} {number}")
    return flip(rng, whole) if what == "bit flips" else SPECIAL[what][0](rng, payload, whole, canary)
