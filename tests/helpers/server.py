"""An HTTP server of files with range requests, which counts requests and fails on demand."""

import http.server
import re
import threading
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """Serves a directory with range requests."""

    daemon_threads = True
    request_queue_size = 128  # simultaneous connections; those beyond it would wait for a minute

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.ranges = root, True
        self.requests: list[str] = []  # paths of the requests for shards
        self.failures: list[str] = []  # answers to the next requests for shards: "500", "truncated"
        # Requests for shards: now, at most, and how many must be waiting before the first is answered.
        self.concurrent = self.most = self.awaited = 0
        self.changed = threading.Condition()

    def wait_for_others(self) -> None:
        with self.changed:
            self.concurrent += 1
            self.most = max(self.most, self.concurrent)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most >= self.awaited, timeout=2)
            self.concurrent -= 1


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        if path.suffix == ".tar":
            self.server.requests.append(self.path)
            self.server.wait_for_others()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and self.server.ranges:
            data, status = data[int(match[1]) : int(match[2]) + 1], 206 if int(match[1]) < len(data) else 416
        failure = self.server.failures.pop(0) if path.suffix == ".tar" and self.server.failures else None
        if failure == "500":
            self.send_error(500)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if failure == "truncated" else data)
        self.close_connection = failure == "truncated"

    def do_HEAD(self) -> None:
        self.send_error(405)

    def log_message(self, *_: object) -> None:
        pass
