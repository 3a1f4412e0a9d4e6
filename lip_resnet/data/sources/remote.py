"""Files behind a URL, read a piece at a time through fsspec: http(s)://, s3://, and whatever else it opens."""

import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import fsspec

from lip_resnet.config import InputError

MAX_REQUESTS = 16
"""Concurrent requests of a process."""
RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Waiting time before each retry of a failed request; after the last one fails, the run ends."""


def is_url(root: str) -> bool:
    """Whether a root is a URL, not a local path."""
    return "://" in root


class MissingFile(InputError):
    """A server has no such file."""


class Remote:
    """A directory behind a URL. It may be sent to other processes, each of which opens connections of its own."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._process, self._system, self._path, self._threads = 0, None, "", None
        self._inherited: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return Remote(self.url).__dict__

    def _connect(self) -> None:
        if self._process == os.getpid():
            return
        # A forked process must neither use nor close what it inherits: closing would unhook its parent's connections,
        # since both share one epoll. So it is kept, and fsspec, which closes what it forgets, does not keep it at all.
        self._inherited.append(self._system)
        try:
            self._system, self._path = fsspec.url_to_fs(self.url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise InputError(
                f'data.root: cannot open {self.url}: {error}; pip install ".[remote]" brings http and s3'
            ) from error
        self._threads = ThreadPoolExecutor(MAX_REQUESTS)
        self._process = os.getpid()

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file's bytes, or those from ``start`` to before ``end``.

        Raises:
            MissingFile: there is no such file.
            InputError: the server failed at every retry of ``RETRY_SECONDS``, or gave another number of bytes.
        """
        self._connect()
        url = f"{self.url}/{name}"
        for pause in (*RETRY_SECONDS, None):
            try:
                data = self._system.cat_file(f"{self._path.rstrip('/')}/{name}", start=start, end=end)
                break
            except FileNotFoundError as error:
                raise MissingFile(f"data.root: there is no {url}") from error
            except Exception as error:  # each protocol's library has exceptions of its own
                reason = f"{type(error).__name__} {error}".strip()
                if pause is None:
                    raise InputError(
                        f"{url}: cannot read from byte {start or 0} on, {len(RETRY_SECONDS) + 1} times: {reason}"
                    ) from error
                print(f"note: {url}: asking again from byte {start or 0} on: {reason}", file=sys.stderr, flush=True)
                time.sleep(pause)
        if end is not None and len(data) != end - start:
            raise InputError(
                f"{url}: the server gave {len(data)} bytes where the index has {end - start}, from byte {start} on: "
                "the shard is cut, or not the one indexed, or the server answers no range requests"
            )
        return data

    def read_async(self, name: str, start: int, end: int) -> "Future[bytes]":
        """``read`` in the background; at most ``MAX_REQUESTS`` at a time, the others wait."""
        self._connect()
        return self._threads.submit(self.read, name, start, end)
