"""Random bytes for an HTTP port: requests that are nearly right, and what no client would send."""

from __future__ import annotations

import json
import random

_PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/health",
    "/version",
    "/nothing",
    "/v1/models/%00",
    "*",
    "//",
    "/" + "x" * 5000,
)
_METHODS = ("GET", "POST", "POST", "POST", "PUT", "OPTIONS", "HEAD", "CONNECT", "BREW", "")
_VERSIONS = ("HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/9.9", "HTTP", "")
_HEADERS = (
    "content-type: application/json",
    "content-type: text/html",
    "content-encoding: gzip",
    "expect: 100-continue",
    "connection: upgrade",
    "upgrade: websocket",
    "authorization: Bearer \xff",
    "x-session-id: " + "s" * 2000,
    "x: " + "y" * 70000,
    "traceparent: 00-nonsense",
    "no colon",
    ": no name",
    " folded",
    "content-length: -1",
    "content-length: 99999999999999999999",
    "content-length: 1e3",
    "transfer-encoding: gzip",
)


def wild_request(draw: random.Random) -> bytes:
    """What a connection sends before it ends."""
    if draw.random() < 0.1:
        return draw.randbytes(draw.randrange(300))
    body = _body(draw)
    path = draw.choice(_PATHS[:2]) if draw.random() < 0.6 else draw.choice(_PATHS)
    lines = [f"{draw.choice(_METHODS)} {path} {draw.choice(_VERSIONS)}", "host: x"]
    if draw.random() < 0.4:
        lines += draw.sample(_HEADERS, draw.randrange(1, 4))
    if draw.random() < 0.7:
        lie = draw.choice((0, 0, 0, 0, 1, -1, 1000, 2**40))
        lines.append(f"content-length: {max(0, len(body) + lie)}")
    else:
        lines.append("transfer-encoding: chunked")
        body = b"".join(_chunk(draw, body[at : at + 40]) for at in range(0, len(body), 40)) + b"0\r\n\r\n"
    data = bytearray("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    match draw.randrange(4):
        case 0:
            del data[draw.randrange(len(data)) :]
        case 1:
            for _ in range(draw.randrange(1, 5)):
                data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data) * draw.choice((1, 1, 1, 2))


def _chunk(draw: random.Random, data: bytes) -> bytes:
    size = draw.choice((f"{len(data):x}",) * 8 + (f"{len(data) + 5:x}", "-1", "zz", "f" * 30))
    return f"{size}\r\n".encode() + data + b"\r\n"


def _body(draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return draw.choice((b"", b"null", b"[]", b'{"model"', b"\xff\xfe", b"[" * 5000, b'{"a":' * 3000, b"1" * 4000))
    body: dict[str, object] = {"model": "scripted", "max_tokens": draw.choice((1, 4, 0, -1, 10**30, "4", None))}
    if draw.random() < 0.5:
        body["prompt"] = draw.choice(("a", "the fox", [41, 42], [2**40], [], {}, "\ud800", "\x00", ["a", "b"]))
    else:
        body["messages"] = draw.choice(([{"role": "user", "content": "a"}], [{"role": "x"}], "a", [[]], [None]))
    if draw.random() < 0.5:
        body["stream"] = draw.choice((True, True, False, 1))
    if draw.random() < 0.3:
        body[draw.choice(("n", "seed", "temperature", "stop", "logprobs", "top_k", "wrong"))] = draw.choice(
            (0, 1, -1, 10**20, 1e300, "x", [], ["x"], {}, True)
        )
    return json.dumps(body).encode()
