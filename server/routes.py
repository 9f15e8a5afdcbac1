"""The routes that are ours: /health, /ready, /pifa/info, /dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pifa_vllm_server.dashboard import build_page

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pifa_vllm_server.state import ServerState


def add_routes(app: FastAPI, state: ServerState) -> None:
    """Put them before vLLM's, whose /health does not know an engine that hangs.

    Args:
        app: vLLM's.
        state: of this API server process.
    """

    def answer(name: str, reason: str | None) -> Response:
        body = {name: True} if reason is None else {name: False, "reason": reason}
        return JSONResponse(body, status_code=200 if reason is None else 503)

    async def health() -> Response:
        return answer("healthy", state.readiness.fatal)

    async def ready() -> Response:
        return answer("ready", state.readiness.reason)

    async def info() -> Response:
        return JSONResponse({**state.facts.to_dict(), "settings": state.settings.model_dump()})

    async def dashboard() -> Response:
        page = build_page()
        return HTMLResponse(page.html, headers=page.headers)

    router = APIRouter(tags=["pifa"])
    router.add_api_route("/health", health, summary="Is the engine alive, and does it move?")
    router.add_api_route("/ready", ready, summary="Have tokens been generated lately?")
    router.add_api_route("/pifa/info", info, summary="The model, its ranks and densities, versions, settings")
    if state.settings.dashboard:
        router.add_api_route("/dashboard", dashboard, include_in_schema=False)
    app.router.routes[:0] = router.routes
    app.openapi_schema = None
