"""An http server of a directory for tests: byte ranges, latency, and faults on demand."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

# Called with the path and how often it has been asked for: what goes wrong this time, if anything.
Fault = Callable[[str, int], str]


@dataclass
class Server:
    """faults: `status 503`, `short`, `hang`, `drop` or ""."""

    directory: Path
    url: str = ""
    latency: float = 0.0
    ranges: bool = True
    fault: Fault = lambda path, times: ""
    retry_after: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)  # path, Range header
    released: threading.Event = field(default_factory=threading.Event)

    def tars(self) -> list[Path]:
        return sorted(self.directory.glob("*.tar"))

    def times(self, name: str) -> int:
        return sum(path == f"/{name}" for path, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, files: Server, *args: object) -> None:
        self.files = files
        super().__init__(*args)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        files = self.files
        files.requests.append((self.path, self.headers.get("Range", "")))
        time.sleep(files.latency)
        fault = files.fault(self.path, sum(path == self.path for path, _ in files.requests))
        if fault.startswith("status"):
            asked = {"Retry-After": files.retry_after} if files.retry_after else {}
            return self._empty(int(fault.split()[1]), asked)
        if fault == "drop":
            self.close_connection = True
            return None
        if fault == "hang":
            files.released.wait(30)
            self.close_connection = True
            return None
        file = files.directory / unquote(self.path.partition("?")[0]).lstrip("/")
        if not file.is_file():
            return self._empty(404)
        whole = file.read_bytes()
        wanted = self.headers.get("Range") if files.ranges else None
        part, headers = whole, {}
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(whole)}"
            part = whole[first : last + 1]
            if not part:
                return self._empty(416, {"Content-Range": f"bytes */{len(whole)}"})
        self.send_response(206 if wanted else 200)
        headers["ETag"] = hashlib.md5(whole).hexdigest()
        headers["Content-Length"] = str(len(part))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if fault == "short" else part)
        if fault == "short":
            self.close_connection = True
        return None

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not wait for the end is no error."""


@contextmanager
def serve(directory: Path) -> Iterator[Server]:
    files = Server(directory)
    server = _Quiet(("127.0.0.1", 0), partial(_Handler, files))
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield files
    finally:
        files.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
