"""What is put around vLLM's OpenAI app: one ASGI middleware, `PIFAServer`, added by vLLM's --middleware flag.

vLLM builds the app, with all of its routes, in each of its API server processes, and adds this class last, which
makes it the outermost layer. When the app starts, this layer adds our routes and metrics to it; when a request
comes, it checks who may do what and how much of it.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.exchange import Exchange
from pifa_vllm_server.limits import ClientGoneError, check_body, check_headers, read_body
from pifa_vllm_server.logs import POLLED, log_request
from pifa_vllm_server.routes import routes
from pifa_vllm_server.state import ServerState, open_state
from pifa_vllm_server.tools import check_tools
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("vllm.pifa_vllm_server")

_POLICY_VIOLATION = 1008  # RFC 6455
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class PIFAServer:
    """The outermost layer.

    Args:
        app: the layers below, vLLM's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.state: ServerState | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, or the start and end of the process."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif self.state is not None and scope["type"] == "http":
            await self._serve(self.state, scope, receive, send)
        elif self.state is not None and scope["type"] == "websocket":
            try:
                self.state.access.check("GET", _path(scope), MutableHeaders(scope=scope))
            except RefusedError:
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            else:
                await self.app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.state = await open_state(scope["app"])
            scope["app"].include_router(routes(self.state))
        except Exception as error:
            # uvicorn takes an exception for an app without start-up code, and would serve without this layer.
            logger.exception("the server's own part did not start")
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self.state.stop()

    async def _serve(self, state: ServerState, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers = MutableHeaders(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
            headers["x-request-id"] = request_id
        exchange = Exchange(receive, send, request_id)
        try:
            await self._admit(state, scope, headers, exchange, receive)
        except RefusedError as refusal:
            await exchange.refuse(refusal)
        except ClientGoneError:
            exchange.client_gone = True
        finally:
            if exchange.refusal is not None:
                state.metrics.rejected.labels(exchange.refusal.reason).inc()
            if scope["path"] not in POLLED:
                state.metrics.responses.labels(str(int(exchange.outcome))).inc()
            log_request(scope, exchange, request_id, time.perf_counter() - began)

    async def _admit(
        self, state: ServerState, scope: Scope, headers: MutableHeaders, exchange: Exchange, receive: Receive
    ) -> None:
        settings, path, method = state.settings, _path(scope), scope["method"]
        check_headers(len(scope.get("raw_path", b"")) + len(scope["query_string"]), headers, settings)
        state.access.check(method, path, headers)
        if path == "/metrics":
            await state.refresh()
        if method in ("GET", "HEAD", "OPTIONS"):
            await exchange.run(self.app, scope)
            return
        with state.slots.take():
            body = await read_body(receive, settings)
            await check_tools(check_body(body, settings).get("tools"))
            await exchange.run(self.app, scope, body, settings.request_timeout)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
