"""What is put around vLLM's OpenAI app: one ASGI middleware, `PIFAServer`, added by vLLM's --middleware flag.

vLLM builds the app in each of its API server processes, and adds this class last, as the outermost layer. At the
start it adds routes and metrics; of each request it checks who asks for what, and logs what became of it.
"""

from __future__ import annotations

import logging
import time
from http import HTTPStatus

from pifa_vllm_server.answer import Answer
from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.limits import check_values
from pifa_vllm_server.logs import POLLED, log_request
from pifa_vllm_server.memory import return_free_memory
from pifa_vllm_server.routes import add_routes
from pifa_vllm_server.state import ServerState, open_state
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("vllm.pifa_vllm_server")


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
        else:
            await send({"type": "websocket.close", "code": 1008})  # policy violation (RFC 6455)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            state = await open_state(scope["app"])
            add_routes(scope["app"], state)
        except Exception as error:
            # uvicorn takes an exception for an app without start-up code, and would serve without this layer.
            logger.exception("the server's own part did not start")
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        self.state = state
        try:
            await self.app(scope, receive, send)
        finally:
            state.stop()

    async def _serve(self, state: ServerState, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        answer = Answer(receive, send)
        try:
            await self._answer(state, scope, answer)
        except RefusedError as refusal:
            await refusal.response()(scope, answer.receive, answer.send)
        finally:
            if scope["path"] not in POLLED:
                state.metrics.responses.labels(str(answer.outcome)).inc()
            log_request(scope, answer, time.perf_counter() - began)

    async def _answer(self, state: ServerState, scope: Scope, answer: Answer) -> None:
        settings, path, root = state.settings, scope["path"], scope.get("root_path", "").rstrip("/")
        if root and path.startswith(f"{root}/"):
            path = path.removeprefix(root)
        headers = MutableHeaders(scope=scope)
        state.access.check(scope["method"], path, headers)
        if state.readiness.stopping and path not in POLLED:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "The server is stopping.")
        if path == "/metrics":
            await state.refresh()
        values = 0
        try:
            if scope["method"] == "POST" and not headers.get("content-type", "").startswith("multipart/"):
                values = check_values(path, await answer.read(settings.max_body_bytes), settings.max_values)
            await self.app(scope, answer.receive, answer.send)
            if values > 256 and answer.status == HTTPStatus.BAD_REQUEST:
                return_free_memory()  # of as many errors; it takes some 20 ms
        except RefusedError:
            raise
        except Exception as error:
            if answer.client_gone:
                return
            # vLLM answers some of them itself, as a client's mistake.
            response = await scope["app"].exception_handlers[Exception](Request(scope), error)
            if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                logger.exception("%s %s failed", scope["method"], ascii(path))
                if not settings.admin_routes:  # who changes the engine is told why it did not work
                    text = "The server failed; its log says why."
                    response = RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, text).response()
            if answer.started:
                answer.status = HTTPStatus.INTERNAL_SERVER_ERROR
            else:
                await response(scope, answer.receive, answer.send)
