"""The routes that are ours: /ready, /pifa/info, /dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pifa_vllm_server.dashboard import build_page

if TYPE_CHECKING:
    from pifa_vllm_server.state import ServerState


def routes(state: ServerState) -> APIRouter:
    """Build the routes of one API server process."""

    async def ready() -> Response:
        reason = state.readiness.reason
        if reason is None:
            return JSONResponse({"ready": True})
        return JSONResponse({"ready": False, "reason": reason}, status_code=503)

    async def info() -> Response:
        return JSONResponse({**state.facts.to_dict(), "settings": state.settings.model_dump()})

    async def dashboard() -> Response:
        page = build_page()
        return HTMLResponse(page.html, headers=page.headers)

    router = APIRouter(tags=["pifa"])
    router.add_api_route("/ready", ready, summary="Has a token been generated lately?")
    router.add_api_route("/pifa/info", info, summary="The model, its ranks and densities, versions, settings")
    if state.settings.dashboard:
        router.add_api_route("/dashboard", dashboard, include_in_schema=False)
    return router
