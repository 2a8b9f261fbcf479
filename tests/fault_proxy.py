"""A proxy in front of a real server that spoils chosen answers: what networks and object stores do on bad days."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar
from urllib.parse import urlsplit

FAULTS = ("500", "503", "reset", "stall", "truncate", "flip", "expired")
ERROR_BODY = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>spoiled</Message></Error>"


class FaultProxy:
    """Passes requests on to a server and spoils a share of the answers to GET.

    Attributes:
        faults: kind -> share of answers that suffer it; change it at any time.
        spoiled: how many suffered each kind so far.
        num_requests: answered so far.
    """

    def __init__(self, target: str, *, seed: int = 0, stall_seconds: float = 3.0) -> None:
        self.faults: dict[str, float] = {}
        self.spoiled: Counter[str] = Counter()
        self.num_requests = 0
        self.stall_seconds = stall_seconds
        self._target = urlsplit(target)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        """Where to send requests to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _drawn(self) -> str | None:
        with self._lock:
            self.num_requests += 1
            dice = self._random.random()
            for kind, share in self.faults.items():
                if dice < share:
                    self.spoiled[kind] += 1
                    return kind
                dice -= share
            return None


class _Handler(BaseHTTPRequestHandler):
    proxy: ClassVar[FaultProxy]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.pass_on(self.proxy._drawn())

    def do_PUT(self) -> None:
        self.pass_on(None)

    do_HEAD = do_POST = do_DELETE = do_PUT

    def pass_on(self, fault: str | None) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault in ("500", "503", "expired"):
            status, code = {
                "500": (500, "InternalError"),
                "503": (503, "SlowDown"),
                "expired": (400, "ExpiredToken"),
            }[fault]
            self.answer(status, {"Content-Type": "application/xml"}, ERROR_BODY.format(code=code).encode())
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(self.proxy.stall_seconds)
        upstream = http.client.HTTPConnection(self.proxy._target.hostname or "", self.proxy._target.port)
        # The signature covers the Host header, which names the proxy: the server must see it unchanged.
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(body)
        response = upstream.getresponse()
        content = response.read()
        headers = {name: value for name, value in response.getheaders() if name.lower() != "transfer-encoding"}
        upstream.close()
        self.answer(response.status, headers, content, fault)

    def answer(self, status: int, headers: dict[str, str], content: bytes, fault: str | None = None) -> None:
        length = headers.get("Content-Length", str(len(content)))
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "flip" and content:
            content = bytearray(content)
            content[len(content) // 2] ^= 1
        if fault == "truncate":
            content = content[: len(content) // 2]
            self.close_connection = True
        with suppress(OSError):
            self.wfile.write(content)
