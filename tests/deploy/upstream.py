"""What stands behind the proxy in test_proxy.py, in place of the server: it tells what it has seen."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

# Paths of requests that have come in, and what became of those that did not end by themselves.
seen: list[str] = []
left: dict[str, float] = {}


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """One ASGI application for all paths."""
    if scope["type"] != "http":
        return
    path = scope["path"]
    seen.append(path)
    if path == "/seen":
        return await answer(send, {"seen": seen, "left": left})
    body = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            left[path] = time.monotonic()
            return None
        body += len(message.get("body", b""))
        more = message.get("more_body", False)
    gone = asyncio.ensure_future(receive())
    kind = path.rpartition("/")[2]
    if kind == "tokens":
        await start(send, "text/event-stream")
        for number in range(5):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            await asyncio.sleep(0.2)
        await send({"type": "http.response.body"})
    elif kind == "flood":
        await start(send, "text/event-stream")
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        left[path] = time.monotonic()
    elif kind == "never":
        await gone
        left[path] = time.monotonic()
    else:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        await answer(send, {"client": scope["client"][0], "headers": headers, "body": body})
    gone.cancel()
    return None


async def start(send: Any, kind: str) -> None:
    headers = [(b"content-type", kind.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def answer(send: Any, found: dict[str, Any]) -> None:
    await start(send, "application/json")
    await send({"type": "http.response.body", "body": json.dumps(found).encode()})
