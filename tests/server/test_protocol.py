"""Connections of clients that leave their answers unread, on a real uvicorn and real sockets."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import asynccontextmanager, closing
from functools import partial

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httptools")
pytest.importorskip("pydantic_settings")
pytest.importorskip("uvloop")

import uvicorn
import uvloop
from pifa_vllm_server.exchange import Exchange
from pifa_vllm_server.protocol import LimitedProtocol
from pifa_vllm_server.settings import ServerSettings
from starlette.responses import Response, StreamingResponse

LOOPS = pytest.mark.parametrize(
    "loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
PIECE = b"x" * 65536
# More than the sockets of both ends hold.
PIECES = 1024


@asynccontextmanager
async def served(app, **settings):
    """The app below an Exchange, behind our protocol: its port, and the exchanges as they end."""
    ended: asyncio.Queue[Exchange] = asyncio.Queue()

    async def outer(scope, receive, send):
        exchange = Exchange(receive, send, "id-1")
        await exchange.run(app, scope)
        ended.put_nowait(exchange)

    protocol = partial(LimitedProtocol, settings=ServerSettings(**settings))
    config = uvicorn.Config(outer, port=0, http=protocol, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1], ended
    server.should_exit = True
    await task


def asks(port):
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
    return closing(connection)


def read_to_the_end(connection, pause=0.0):
    """Bytes that come, with a pause after each MiB."""
    size = 0
    while data := connection.recv(1 << 20, socket.MSG_WAITALL):
        size += len(data)
        time.sleep(pause)
    return size


def streaming(left):
    async def app(scope, receive, send):
        async def pieces():
            try:
                for _ in range(PIECES):
                    yield PIECE
            finally:
                left.append(True)

        await StreamingResponse(pieces(), media_type="text/event-stream")(scope, receive, send)

    return app


@LOOPS
def test_a_client_that_reads_nothing_is_left(loop):
    left = []

    async def case():
        async with served(streaming(left), send_timeout=0.3) as (port, ended):
            with asks(port):
                exchange = await asyncio.wait_for(ended.get(), 30)
            assert left
            assert exchange.refusal.reason == "slow_client"
            assert exchange.refusal.message == "The client read nothing for 0.3 s."

    asyncio.Runner(loop_factory=loop).run(case())


@LOOPS
def test_a_client_that_reads_slowly_gets_everything(loop):
    """All of it takes longer than send_timeout, no part of it does."""

    async def case():
        async with served(streaming([]), send_timeout=2.0) as (port, ended):
            with asks(port) as connection:
                size = await asyncio.to_thread(read_to_the_end, connection, 0.05)
            exchange = await asyncio.wait_for(ended.get(), 30)
            assert size > PIECES * len(PIECE)
            assert exchange.refusal is None

    asyncio.Runner(loop_factory=loop).run(case())


@LOOPS
def test_an_answer_that_is_complete_is_not_kept_for_ever(loop):
    """Its request is over, but what is unread stays in memory."""

    async def app(scope, receive, send):
        await Response(PIECE * PIECES)(scope, receive, send)

    async def case():
        async with served(app, send_timeout=0.3) as (port, ended):
            with asks(port) as connection:
                await asyncio.wait_for(ended.get(), 30)
                await asyncio.sleep(1.5)
                with pytest.raises(ConnectionResetError):
                    await asyncio.to_thread(read_to_the_end, connection)

    asyncio.Runner(loop_factory=loop).run(case())


@LOOPS
def test_one_large_piece_may_take_its_time(loop):
    """The transport has it in a single write, of which it tells when all of it is gone."""
    body = PIECE * PIECES

    async def app(scope, receive, send):
        await Response(body)(scope, receive, send)

    async def case():
        async with served(app, send_timeout=1.0) as (port, _):
            with asks(port) as connection:
                size = await asyncio.to_thread(read_to_the_end, connection, 0.05)
            assert size > len(body)

    asyncio.Runner(loop_factory=loop).run(case())


def test_every_request_of_a_lost_connection_is_told():
    """The second request comes before the first is answered."""
    told = []

    async def app(scope, receive, send):
        assert (await receive())["type"] == "http.request"
        told.append((await receive())["type"])

    async def case():
        async with served(app) as (port, ended):
            with asks(port) as connection:
                connection.sendall(b"GET /second HTTP/1.1\r\nHost: here\r\n\r\n")
                await asyncio.sleep(0.2)
            exchange = await asyncio.wait_for(ended.get(), 30)
            assert exchange.client_gone
        assert told == ["http.disconnect"]

    asyncio.run(case())


def test_any_send_timeout_can_be_set():
    """Linux refuses keep-alive times of more than nine hours, and a connection without one is never read."""

    async def app(scope, receive, send):
        await Response(b"here")(scope, receive, send)

    async def case():
        async with served(app, send_timeout=86400.0) as (port, _):
            with asks(port) as connection:
                assert await asyncio.wait_for(asyncio.to_thread(read_to_the_end, connection), 30)

    asyncio.run(case())


def test_the_next_client_is_served():
    async def case():
        async with served(streaming([]), send_timeout=0.3) as (port, ended):
            with asks(port):
                assert (await asyncio.wait_for(ended.get(), 30)).refusal is not None
            with asks(port) as connection:
                assert await asyncio.to_thread(read_to_the_end, connection) > PIECES * len(PIECE)
            assert (await asyncio.wait_for(ended.get(), 30)).refusal is None

    asyncio.run(case())
