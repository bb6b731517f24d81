"""A bucket on this machine, as Google Cloud Storage answers, which fails when a test says so.

The emulator keeps the objects. In front of it, a server passes requests on, or fails them, checks the conditions of
writes (`ifGenerationMatch`), which the emulator ignores, and names the generation of what is read, which it leaves out.
"""

import base64
import contextlib
import hashlib
import http.client
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from gcp_storage_emulator.server import create_server


class Asked(NamedTuple):
    """One request. name: of the object, or the prefix of a listing; empty if it has neither."""

    method: str
    path: str
    name: str


class Fault(NamedTuple):
    """What happens to a request. status: the answer in place of the bucket's. cut: the connection is closed, `before`
    the bucket sees the request, `after` it has done what was asked, or in the `middle` of its answer.
    seconds: of waiting before.
    """

    status: int = 0
    cut: str = ""
    seconds: float = 0


Rule = Callable[[Asked], Fault | None]


class BucketServer:
    """The server, and what a test says about it.

    rule: decides which requests fail. requests: all so far.
    """

    def __init__(self) -> None:
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        self._emulator = create_server("127.0.0.1", 0, in_memory=True)
        self._emulator.start()
        self._behind = self._emulator._api._httpd.server_address
        self._emulator._api._httpd.handle_error = lambda *_: None  # clients may leave early
        self.rule: Rule | None = None
        self.requests: list[Asked] = []
        self.writing = threading.Lock()  # a condition is checked and the object written in one
        self._front = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": self}))
        self._front.daemon_threads = True
        self._front.handle_error = lambda *_: None
        threading.Thread(target=self._front.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._front.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """The variables by which gcsfs and TensorStore take this server for Google's, and ask no other."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token-of-a-test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GS_TOKEN": "anon",
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_HOST": "127.0.0.1:9",  # where nobody answers
            "GCE_METADATA_IP": "127.0.0.1:9",
            "GOOGLE_CLOUD_PROJECT": "project-of-a-test",
        }

    def close(self) -> None:
        self._front.shutdown()
        self._front.server_close()
        self._emulator.stop()

    @contextlib.contextmanager
    def failing(self, rule: Rule) -> Iterator[None]:
        """Requests fail as `rule` decides, until the block ends."""
        self.rule = rule
        try:
            yield
        finally:
            self.rule = None

    def make(self, bucket: str) -> None:
        self._call("POST", "/storage/v1/b?project=p", json.dumps({"name": bucket}).encode(), "application/json")

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Names of the objects, sorted."""
        answer = self._call("GET", f"/storage/v1/b/{bucket}/o?prefix={quote(prefix, safe='')}")
        return sorted(item["name"] for item in json.loads(answer).get("items", []))

    def read(self, bucket: str, name: str) -> bytes:
        return self._call("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media")

    def write(self, bucket: str, name: str, content: bytes) -> None:
        self._call("POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}", content)

    def delete(self, bucket: str, name: str) -> None:
        self._call("DELETE", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}")

    def pass_on(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
        """(status, headers, body) of the emulator."""
        connection = http.client.HTTPConnection(*self._behind, timeout=60)
        try:
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def unmet(self, asked: Asked, query: dict[str, list[str]]) -> bool:
        """Whether a condition on the generation of the object is not met."""
        if "ifGenerationMatch" not in query or asked.method not in ("POST", "PUT", "DELETE", "PATCH"):
            return False
        return self.generation(asked) != query["ifGenerationMatch"][0]

    def generation(self, asked: Asked) -> str:
        """That of the object that is asked for; "0" if there is none."""
        bucket = urlsplit(asked.path).path.partition("/b/")[2].split("/")[0]
        status, _, raw = self.pass_on("GET", f"/storage/v1/b/{bucket}/o/{quote(asked.name, safe='')}", {}, b"")
        return str(json.loads(raw)["generation"]) if status == 200 else "0"

    def _call(self, method: str, path: str, body: bytes = b"", kind: str = "application/octet-stream") -> bytes:
        status, _, answer = self.pass_on(method, path, {"Content-Type": kind}, body)
        assert status < 300, (method, path, status, answer[:200])
        return answer


class _Handler(BaseHTTPRequestHandler):
    bucket: BucketServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        asked = Asked(self.command, self.path, _name(url.path, query, body))
        self.bucket.requests.append(asked)
        fault = (self.bucket.rule and self.bucket.rule(asked)) or Fault()
        time.sleep(fault.seconds)
        if fault.cut == "before":
            return self._cut()
        if fault.status:
            text = json.dumps({"error": {"code": fault.status, "message": http.client.responses[fault.status]}})
            return self._send(fault.status, {"Content-Type": "application/json"}, text.encode())
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")}
        with self.bucket.writing if "ifGenerationMatch" in query else contextlib.nullcontext():
            if self.bucket.unmet(asked, query):
                return self._send(412, {}, b"")
            # Asked before the content, so that it is never newer.
            generation = self.bucket.generation(asked) if query.get("alt") == ["media"] else "0"
            status, got, content = self.bucket.pass_on(self.command, self.path, headers, body)
        if generation != "0":
            got["X-Goog-Generation"] = generation
        if fault.cut == "after":
            return self._cut()
        return self._send(status, got, content, half=fault.cut == "middle")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, headers: dict[str, str], content: bytes, half: bool = False) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if half:
            self.wfile.write(content[: len(content) // 2])
            return self._cut()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()


def _name(path: str, query: dict[str, list[str]], body: bytes) -> str:
    if query.get("uploadType") == ["multipart"] and "name" not in query:
        described = re.search(rb'"name": *"([^"]*)"', body)
        return described[1].decode() if described else ""
    return query.get("name", query.get("prefix", [""]))[0] or unquote(path.partition("/o/")[2])


def md5(content: bytes) -> str:
    """As a bucket states it."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def times(count: int, fault: Fault, where: Callable[[Asked], bool]) -> Rule:
    """The first `count` requests for which `where` is true fail."""
    left, lock = [count], threading.Lock()

    def rule(asked: Asked) -> Fault | None:
        with lock:
            if not where(asked) or not left[0]:
                return None
            left[0] -= 1
            return fault

    return rule


@contextlib.contextmanager
def serving() -> Iterator[BucketServer]:
    """A server that has a bucket called `bucket`, and that this process takes for Google's."""
    server = BucketServer()
    server.make("bucket")
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment().items():
                patch.setenv(name, value)
            yield server
    finally:
        server.close()
