"""Files that are no good checkpoint, made from a good one and a number."""

import functools
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
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from torch import nn

BOMB_MB = 1024


class Good(NamedTuple):
    """A good checkpoint, and what a bad one is made with."""

    payload: dict[str, Any]
    whole: bytes
    """The file's content."""
    canary: Path
    """A file that exists only if a pickle's code was executed."""


def truncate(whole: bytes, kilobytes: int) -> bytes:
    """The first so many kilobytes."""
    return whole[: kilobytes << 10]


def flip(rng: random.Random, whole: bytes) -> bytes:
    """One flipped bit, or eight, or a stretch of noise."""
    data, kind = bytearray(whole), rng.randrange(3)
    if kind == 2:
        start, length = rng.randrange(len(data)), rng.randint(2, 4096)
        data[start : start + length] = rng.randbytes(len(data[start : start + length]))
    for _ in range((1, 8, 0)[kind]):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def saved(payload: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(payload, buffer, **options)
    return buffer.getvalue()


# --- pickles that execute code


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def execute(rng: random.Random, good: Good) -> bytes:
    """A call that would make the canary, somewhere in the file."""
    canary, line = str(good.canary), f"open({str(good.canary)!r}, 'w').close()"
    call = rng.choice(
        [
            *(Call(os.system, f"touch '{canary}'"), Call(exec, line), Call(eval, line)),
            *(Call(subprocess.Popen, ["touch", canary]), Call(Path.touch, good.canary)),
            Call(torch.utils.data.get_worker_info),  # harmless, and code all the same
        ]
    )
    entry = rng.choice(["model", "ema", "optimizer", "config", "step", "deep", "whole"])
    if entry == "whole":
        return rng.choice([saved(call), pickle.dumps(call), saved(call, _use_new_zipfile_serialization=False)])
    bad = {**good.payload, entry: call}
    if entry == "deep":
        bad = {**good.payload, "optimizer": {**good.payload["optimizer"], "state": {0: [call]}}}
    if rng.random() < 0.3:
        return pickle.dumps(bad, protocol=rng.randint(0, 5))
    return saved(bad, _use_new_zipfile_serialization=rng.random() < 0.7)


# --- files that unpack, or stand, for more than they hold


def _unzip(whole: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _zip(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def bomb(rng: random.Random, good: Good) -> bytes:
    """A megabyte that unpacks to ``BOMB_MB``, in one entry."""
    entries, buffer = _unzip(good.whole), io.BytesIO()
    name = rng.choice([name for name in entries if "/data" in name])
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for other, data in entries.items():
            with archive.open(other, "w", force_zip64=other == name) as entry:
                for block in (bytes(1 << 20) for _ in range(BOMB_MB)) if other == name else (data,):
                    entry.write(block)
    return buffer.getvalue()


def compressed(_: random.Random, good: Good) -> bytes:
    """The good content, compressed, as torch.save never does."""
    return _zip(_unzip(good.whole), zipfile.ZIP_DEFLATED)


def declared_size(rng: random.Random, good: Good) -> bytes:
    """An entry whose size, by the directory, is almost 4 GB."""
    data = bytearray(good.whole)
    at = rng.choice([at for at in range(len(data) - 46) if data[at : at + 4] == b"PK\x01\x02"])
    size = rng.choice([0xFFFFFFFE, 0x7FFFFFFF, 1 << 30])
    stored = rng.choice([size, struct.unpack_from("<I", data, at + 20)[0]])
    struct.pack_into("<II", data, at + 20, stored, size)
    return bytes(data)


def overlapping(_: random.Random, good: Good) -> bytes:
    """A thousand entries, and tensors, that are all the same stretch of the file."""
    big = torch.zeros(1 << 18)
    entries = _unzip(saved({**good.payload, "extra": [big] + [torch.zeros(1) for _ in range(999)]}))
    data, headers = bytearray(_zip(entries)), {}
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        length = struct.unpack_from("<H", data, at + 28)[0]
        headers[bytes(data[at + 46 : at + 46 + length]).decode()] = at
        at = data.find(b"PK\x01\x02", at + 46)
    source = headers[next(name for name, content in entries.items() if len(content) == big.nbytes)]
    for name, at in headers.items():
        if "/data/" in name and len(entries[name]) == 4:
            data[at + 16 : at + 28] = data[source + 16 : source + 28]  # checksum and sizes
            data[at + 42 : at + 46] = data[source + 42 : source + 46]  # where it begins
    return bytes(data)


def more_than_stored(rng: random.Random, good: Good) -> bytes:
    """Tensors that claim more numbers than the file has for them: reading them would read foreign memory."""
    entries = _unzip(saved(good.payload))
    name = next(name for name in entries if name.endswith("data.pkl"))
    count = next(iter(good.payload["model"].values())).numel()
    small, large = b"M" + struct.pack("<H", count), b"J" + struct.pack("<i", rng.choice([1000, 100_000, 2**31 - 1]))
    small = small if small in entries[name] else b"K" + bytes([count])
    assert small in entries[name]
    return _zip({**entries, name: entries[name].replace(small, large)})


def expanded(rng: random.Random, good: Good) -> bytes:
    """A tensor of a few bytes with 10^10 elements, all of them the same one."""
    huge, payload = torch.zeros(1).expand(100_000, 100_000), good.payload
    entry = rng.choice(["model", "ema", "window", "optimizer"])
    if entry == "window":
        return saved({**payload, "window": huge})
    if entry == "optimizer":
        return saved({**payload, "optimizer": _with_buffers(payload["optimizer"], lambda _: huge)})
    return saved({**payload, entry: dict.fromkeys(payload[entry], huge)})


def shared_lists(rng: random.Random, good: Good) -> bytes:
    """A list that holds one list twice, and so on 40 deep: small in the file, 2^40 leaves for whoever walks it."""
    node: Any = [1, 2]
    for _ in range(40):
        node = [node, node]
    entry, config = rng.choice(["config", "args", "step", "model", "optimizer", "best"]), good.payload["config"]
    if entry == "args":
        return saved({**good.payload, "config": {**config, "model": {**config["model"], "args": {"x": node}}}})
    return saved({**good.payload, entry: {"x": node} if entry != "step" else node})


def nested(rng: random.Random, _: Good) -> bytes:
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


def altered_payloads(rng: random.Random, good: Good) -> list[dict[str, Any]]:
    """Payloads with one entry missing, or of a type or shape that it cannot have."""
    payload, weights, optimizer = good.payload, good.payload["model"], good.payload["optimizer"]
    name = rng.choice(list(weights))
    tensor, shapes = weights[name], _with_buffers(optimizer, lambda value: value[..., None])
    values: dict[str, tuple[Any, ...]] = {
        "step": ("ten", None, -1, 1.5, [10], torch.tensor(10.0)),
        "processes": (None, [], "two", ["two"], 2, {}, [-1]),
        "window": (None, torch.zeros(0), torch.zeros(3, 2, 1), torch.zeros(1, 2), "x"),
        "best": ("high", None, [1]),
        "evaluated": ("no", None, -1, 1 << 40),
        "datasets": (5, None, {"train": 5}, {"train": {"images": 3}}),
        "config": (None, [], "x", {"model": 3}, {1: 2}),
        "optimizer": (None, {}, [], shapes, {**optimizer, "param_groups": []}, {"state": 3, "param_groups": 3}),
        "model": (
            *(None, {}, [], "x", {"a": 1}, {1: torch.zeros(1)}),
            *({**weights, name: value} for value in (None, 3, torch.zeros(3, 1, 7), [1.0])),
            *({**weights, name: value} for value in (torch.empty_like(tensor, device="meta"), tensor.cfloat() + 1j)),
            {key: value for key, value in weights.items() if key != name},
            {**weights, "unknown.weight": torch.zeros(2)},
            {key: value[..., None] for key, value in weights.items()},
        ),
        "ema": ({key: value[:0] if value.ndim else value for key, value in payload["ema"].items()},),
    }
    choices = [{**payload, entry: value} for entry, given in values.items() for value in given]
    for gone in ("step", "model", "optimizer", "ema", "window", "processes"):
        choices.append({key: value for key, value in payload.items() if key != gone})
    return choices


def altered(rng: random.Random, good: Good) -> bytes:
    """One of ``altered_payloads``."""
    return saved(rng.choice(altered_payloads(rng, good)))


def wrong_model(rng: random.Random, good: Good) -> bytes:
    """Whole checkpoints of other networks, or of other classes."""
    name = rng.choice(["test_efficientnet", "test_vit", "test_byobnet"])
    classes = {
        name: torch.zeros(7, *value.shape[1:]) if name.startswith("fc.") else value
        for name, value in good.payload["model"].items()
    }
    state = rng.choice([timm.create_model(name, num_classes=10).state_dict(), classes])
    if rng.random() < 0.5:
        return saved({**good.payload, "model": state, "ema": state})
    prefixed = {f"module.{key}": value for key, value in state.items()}
    return saved(rng.choice([state, {"state_dict": state}, {"state_dict": prefixed}]))


@functools.cache
def _other_formats() -> list[bytes]:
    arrays, tar, scripted = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(arrays, weight=np.zeros(3))
    with tarfile.open(fileobj=tar, mode="w") as archive:
        info = tarfile.TarInfo("model/weights")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"12345"))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), scripted)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return [
        *(b"", b"\0" * 4096, b"model: lip_resnet50\n", json.dumps({"state_dict": {}}).encode()),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 95652\n",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        *(b"\x89HDF\r\n\x1a\n" + bytes(2000), b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(64)),
        *(b"\x08\x07\x12\x07pytorch" + bytes(200), b"\x1f\x8b\x08\0" + bytes(50)),
        *(arrays.getvalue(), tar.getvalue(), scripted.getvalue()),
        *(_zip({"readme.txt": b"no tensors here"}), _zip({"archive/data.pkl": b"", "archive/version": b"3\n"})),
        *(pickle.dumps(value) for value in ([1, 2, 3], {"weight": [1.0, 2.0]}, {"weight": np.zeros(3)})),
        *(saved(nn.Linear(2, 2)), saved(torch.zeros(2)), saved({1: torch.zeros(2)}), saved({"model": {"weight": 3}})),
        *(struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", len(header)) + header),
        safetensors.torch.save({"weight": torch.zeros(4)})[:-3],
        *(start + struct.pack("<Q", 2**62) + b"x" for start in (b"\x80\x02\x8e", b"\x80\x04\x95")),
    ]


MAKERS: dict[str, tuple[Callable[[random.Random, Good], bytes], int]] = {
    "executes code": (execute, 60),
    "zip bomb": (bomb, 8),
    "compressed": (compressed, 4),
    "declared size": (declared_size, 20),
    "overlapping entries": (overlapping, 6),
    "more than stored": (more_than_stored, 15),
    "expanded": (expanded, 12),
    "shared lists": (shared_lists, 12),
    "deeply nested": (nested, 4),
    "altered entries": (altered, 90),
    "wrong model or classes": (wrong_model, 24),
    "other formats": (lambda rng, _: rng.choice(_other_formats()), 60),
}
"""Kind -> its maker, and how many in a thousand."""


def plan(kilobytes: int, count: int = 1000) -> list[tuple[str, int]]:
    """(kind, number) of ``count`` bad files: every kilobyte cut, MAKERS, and bit flips for the rest; shuffled."""
    cases = [("truncated", number) for number in range(kilobytes)]
    cases += [(name, number) for name, (_, times) in MAKERS.items() for number in range(times)]
    cases += [("bit flips", number) for number in range(max(0, count - len(cases)))]
    return random.Random(0).sample(cases, len(cases))[:count]


def make(kind: str, number: int, payload: dict[str, Any], whole: bytes, canary: Path) -> bytes:
    """The bad file of that kind and number."""
    rng = random.Random(f"{kind} {number}")
    if kind in MAKERS:
        return MAKERS[kind][0](rng, Good(payload, whole, canary))
    return truncate(whole, number) if kind == "truncated" else flip(rng, whole)
