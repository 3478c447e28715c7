"""An HTTP server of the standard library on loopback, and what a dialogue needs besides a user."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.policy.two_level import TwoLevelPolicy
from openrlhf_gopo.rollout.engine import Generation

ROOT = Path(__file__).parents[2]


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
    """``script``: replies to the next requests; when it is empty, ``answer(body)`` writes the text."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.script: deque[Reply] = deque()
        self.answer: Callable[[dict[str, Any]], str] = lambda body: "well, " + asked(body)["draft"]
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


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def policy() -> TwoLevelPolicy:
    """Both roles over a small ChatML tokenizer, with labels for the shop."""
    from openrlhf_gopo.platform.media import hide_what_cuda_builds_break

    hide_what_cuda_builds_break()
    where = ROOT / "examples" / "quickstart" / "build_model.py"
    spec = importlib.util.spec_from_file_location("quickstart_model", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = module.train_tokenizer(["Customer: hello, I want a refund. Agent: sorry"] * 5, 400, 4096)
    return TwoLevelPolicy(tokenizer, tokenizer, 26)


class Engine:
    """Writes ``reply`` under the label ``choose(allowed)``: the same actions whatever the customer says."""

    def __init__(
        self,
        policy: TwoLevelPolicy,
        reply: str = "sorry about that",
        choose: Callable[[tuple[int, ...]], int] = lambda allowed: allowed[0],
    ) -> None:
        self._ids = policy.responder.tokenizer.encode(reply, add_special_tokens=False)
        self._choose = choose

    def generators(self) -> dict[str, Any]:
        return {EXPERT: self._generate, RESPONDER: self._generate}

    async def _generate(self, tokens: list[int], sampling: Any) -> Generation:
        if sampling.allowed:
            return Generation([self._choose(sampling.allowed)], [-1.0])
        return Generation([*self._ids, sampling.stop_token], [-0.5] * (len(self._ids) + 1))
