"""Files behind a URL, whole or by ranges of bytes, through fsspec: http(s)://, s3:// and its other protocols."""

import io
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from lip_resnet.config import InputError

MAX_REQUESTS = 16
"""Concurrent requests of a process."""
_BLOCK = 8 << 20
"""Bytes of a request of a file that is read from front to back."""
RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Waiting time before each retry of a failed request; if the last one fails too, the run ends."""


def is_url(root: str) -> bool:
    """Whether a root is a URL rather than a local path."""
    return "://" in root


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()[:200]


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
                reason = _reason(error)
                if pause is None:
                    raise InputError(
                        f"{url}: cannot read from byte {first} on, {len(RETRY_SECONDS) + 1} times: {reason}"
                    ) from error
                print(f"note: {url}: retrying from byte {first}: {reason}", file=sys.stderr, flush=True)
                time.sleep(pause)
        if end is not None and len(data) != end - first:
            raise InputError(
                f"{url}: the server gave {len(data)} bytes where the index has {end - first}, from byte {first} on: "
                "the shard is truncated, is not the one that was indexed, or the server answers no range requests"
            )
        return data

    def size(self, name: str) -> int:
        """A file's length in bytes.

        Raises:
            MissingFile: there is no such file.
            InputError: the server does not say.
        """
        self._connect()
        try:
            size = self._system.info(f"{self._path.rstrip('/')}/{name}")["size"]
        except FileNotFoundError as error:
            raise MissingFile(f"data.root: there is no {self.url}/{name}") from error
        except Exception as error:  # each protocol's library has exceptions of its own
            raise InputError(f"{self.url}/{name}: cannot ask for its size: {_reason(error)}") from error
        if size is None:
            raise InputError(f"{self.url}/{name}: the server does not say how long it is")
        return int(size)

    def open(self, name: str) -> BinaryIO:
        """A file that is read in blocks, each as by ``read``."""
        return io.BufferedReader(_Blocks(self, name, self.size(name)), _BLOCK)

    def list(self) -> list[str]:
        """The names in the directory.

        Raises:
            InputError: there is no such directory, or the server does not list it.
        """
        self._connect()
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in self._system.ls(self._path, detail=False)]
        except Exception as error:
            raise InputError(
                f"{self.url}: cannot list this directory: {_reason(error)}; name the shards, such as "
                f"{self.url}/imagenet-train-{{0000..1023}}.tar"
            ) from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file.

        Raises:
            InputError: it is not allowed.
        """
        self._connect()
        try:
            self._system.pipe_file(f"{self._path.rstrip('/')}/{name}", data)
        except Exception as error:
            raise InputError(f"{self.url}/{name}: cannot write: {_reason(error)}") from error

    def read_async(self, name: str, start: int, end: int) -> "Future[bytes]":
        """``read`` in a thread; ``MAX_REQUESTS`` run at a time."""
        self._connect()
        assert self._threads is not None
        return self._threads.submit(self.read, name, start, end)


class _Blocks(io.RawIOBase):
    """A file behind a URL, by requests of ranges."""

    def __init__(self, remote: Remote, name: str, size: int) -> None:
        self.remote, self.name, self.size, self.at = remote, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        data = self.remote.read(self.name, self.at, end)
        buffer[: len(data)] = data
        self.at = end
        return len(data)
