"""Files behind a URL, whole or by ranges of bytes, through fsspec: http(s)://, s3:// and its other protocols."""

import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lip_resnet.config import InputError

MAX_REQUESTS = 16
"""Concurrent requests of a process."""
RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Waiting time before each retry of a failed request; if the last one fails too, the run ends."""


def is_url(root: str) -> bool:
    """Whether a root is a URL rather than a local path."""
    return "://" in root


class MissingFile(InputError):
    """A server has no such file."""


class Remote:
    """A directory behind a URL. It can be pickled; each process opens connections of its own."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._process, self._path = 0, ""
        self._system: Any = None
        self._threads: ThreadPoolExecutor | None = None
        self._inherited: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return Remote(self.url).__dict__

    def _connect(self) -> None:
        if self._process == os.getpid():
            return
        # A forked process must neither use nor close inherited connections: it shares an epoll instance with its
        # parent, whose connections closing would unregister. So they are kept referenced here, and not in fsspec's
        # instance cache, from which they could be dropped.
        self._inherited.append(self._system)
        try:
            import fsspec

            self._system, self._path = fsspec.url_to_fs(self.url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise InputError(
                f'data.root: cannot open {self.url}: {error}; http and s3 need pip install "lip-resnet[data]"'
            ) from error
        self._threads = ThreadPoolExecutor(MAX_REQUESTS)
        self._process = os.getpid()

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file's bytes, or those from ``start`` to before ``end``.

        Raises:
            MissingFile: there is no such file.
            InputError: the request and all retries failed, or the answer has another number of bytes.
        """
        self._connect()
        first = start or 0
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
                        f"{url}: cannot read from byte {first} on, {len(RETRY_SECONDS) + 1} times: {reason}"
                    ) from error
                print(f"note: {url}: asking again from byte {first} on: {reason}", file=sys.stderr, flush=True)
                time.sleep(pause)
        if end is not None and len(data) != end - first:
            raise InputError(
                f"{url}: the server gave {len(data)} bytes where the index has {end - first}, from byte {first} on: "
                "the shard is truncated, is not the one that was indexed, or the server answers no range requests"
            )
        return data

    def read_async(self, name: str, start: int, end: int) -> "Future[bytes]":
        """``read`` in a thread; ``MAX_REQUESTS`` run at a time."""
        self._connect()
        assert self._threads is not None
        return self._threads.submit(self.read, name, start, end)
