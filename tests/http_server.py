"""An HTTP server of the standard library on loopback whose answers the test writes."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request. ``drip``: seconds between the bytes of the body."""

    status: int = 200
    body: bytes | str = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drip: float = 0.0


def completion(text: str | None, finish: str = "stop", **usage: int) -> str:
    """The body of a chat completion."""
    counted = {"prompt_tokens": 7, "completion_tokens": 3} | usage
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": counted})


def asked(body: dict[str, Any]) -> dict[str, Any]:
    """What the user simulator told the model."""
    return json.loads(body["messages"][-1]["content"])


class Server:
    """``script``: replies to the next requests; when it is empty, ``answer(body)`` writes the text of a completion.

    ``routes``: what answers under other paths.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.script: deque[Reply] = deque()
        self.answer: Callable[[dict[str, Any]], str] = lambda body: "well, " + asked(body)["draft"]
        self.routes: dict[str, Callable[[dict[str, Any]], Reply]] = {}
        self.peak = self.now = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def reply(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            planned = self.script.popleft() if self.script else None
        if path in self.routes:
            return planned or self.routes[path](body)
        if path != "/v1/chat/completions":
            return Reply(404, "no such path")
        return planned or Reply(body=completion(self.answer(body)))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet, or each answer waits for an acknowledgement

            def do_POST(self) -> None:
                with server._lock:
                    server.now += 1
                    server.peak = max(server.peak, server.now)
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                reply = server.reply(self.path, body, {name.lower(): value for name, value in self.headers.items()})
                time.sleep(reply.delay)
                with server._lock:
                    server.now -= 1
                try:
                    self._send(reply)
                except OSError:
                    self.close_connection = True  # the client did not wait

            def _send(self, reply: Reply) -> None:
                body = reply.body.encode() if isinstance(reply.body, str) else reply.body
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                pieces = [body[i : i + 1] for i in range(len(body))] if reply.drip else [body]
                for piece in pieces:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    time.sleep(reply.drip)

            def log_message(self, *args: object) -> None:
                pass

        return Handler
