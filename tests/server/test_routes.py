"""Every route that vLLM has, by every method, without a key, with a wrong and with the right one."""

from __future__ import annotations

from typing import get_args

import httpx
import pytest

pytest.importorskip("vllm")

from pifa_vllm_server.access import Access, read_table
from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.settings import ServerSettings
from starlette.datastructures import MutableHeaders

from tests.release import vllm_before

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
OURS = {"GET /health", "GET /ready", "GET /pifa/info", "GET /dashboard"}
# Of models that no test builds an app for: what pools has routes by its task, cohere's are a flag's, and redoc goes
# where the offline documentation comes.
OTHERS = {
    "GET /redoc",
    "GET /tokenizer_info",
    "POST /classify",
    "POST /cohere/v2/chat",
    "POST /cohere/v2/chat/render",
    "POST /pooling",
    "POST /rerank",
    "POST /score",
    "POST /start_profile",
    "POST /stop_profile",
    "POST /v1/embeddings",
    "POST /v1/rerank",
    "POST /v1/score",
    "POST /v2/embed",
    "POST /v2/rerank",
}


@pytest.fixture(scope="module")
def found():
    """The routes of vLLM's app with everything on."""
    import vllm.tasks
    from pifa_vllm_server.launch import parse_arguments
    from vllm.entrypoints.launchers.app import build_app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        arguments = parse_arguments("model", ["--enable-offline-docs"])
        arguments.enable_fault_tolerance = True
        tasks = (*get_args(vllm.tasks.GenerationTask), *get_args(vllm.tasks.PoolingTask), "render")
        app = build_app(arguments, tasks, None)
    routes = set()
    for route in app.routes:
        kind = type(route).__name__
        for method in getattr(route, "methods", None) or ():
            routes.add(f"{method} {route.path}")
        if "WebSocket" in kind:
            routes.add(f"WEBSOCKET {route.path}")
        elif kind == "Mount":
            routes.add(f"MOUNT {route.path}")
    return routes - {"HEAD /openapi.json"}


@pytest.mark.skipif(vllm_before("0.32"), reason="the table is of 0.32's routes")
def test_every_route_has_its_place(found):
    table = read_table()
    placed = [route for routes in table.values() for route in routes]
    assert len(placed) == len(set(placed))
    known = set(placed) | {"MOUNT /static"}
    assert not found - known, "give these a place in server/routes.toml"
    # And nothing stands there that vLLM does not have.
    gone = set(placed) - found - OURS - OTHERS - {"GET /static/{path:path}"}
    assert not gone, "vLLM has these no more"


def decided(access, method, path, headers):
    try:
        access.check(method, path, MutableHeaders(headers))
    except RefusedError as refusal:
        return int(refusal.status)
    return 200


@pytest.mark.parametrize("admin", [False, True])
def test_the_table_is_what_is_decided(found, admin):
    table = read_table()
    access = Access(["right"], ServerSettings(admin_routes=admin))
    allowed = set(table["open"] + table["key"] + table["admin"] * admin)
    allowed.add("GET /v1/responses/render")  # for vLLM, too, a response of that id
    paths = {route.partition(" ")[2] for route in found | set().union(*table.values())}
    tried = 0
    for template in paths:
        path = (
            template.replace("{path:path}", "a/b.js")
            .replace("{response_id}", "x")
            .replace("{adapter_name}", "x")
        )
        for method in METHODS:
            route = f"{'GET' if method == 'HEAD' else method} {template}"
            known = any(place.endswith(f" {template}") for place in allowed)
            right = 200 if route in allowed else 405 if known else 404
            guarded = 200 if route in table["open"] else 401
            assert decided(access, method, path, {}) == guarded, route
            assert decided(access, method, path, {"authorization": "Bearer wrong"}) == guarded, route
            assert decided(access, method, path, {"authorization": "Bearer right"}) == right, route
            tried += 3
    assert tried > 2000


@pytest.mark.vllm
def test_on_a_running_server_nothing_else_is_reached(server):
    """Without a key here; with one, tests/server/test_operation.py asks."""
    schema = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    table = read_table()
    open_to_all = {route.partition(" ")[2] for route in table["open"] + table["key"]}
    shut = {route.partition(" ")[2] for route in table["admin"]} - open_to_all
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path in [*shut, "/v1/load_lora_adapter%0A", "/sleep%0A", "//sleep", "/v1/..%2fsleep"]:
            for method in METHODS:
                path = path.replace("{adapter_name}", "x")
                status = client.request(method, path).status_code
                assert status in ((400, 404) if method == "BREW" else (404,)), (method, path)
        for path in schema["paths"]:
            for method in ("PUT", "PATCH", "DELETE", "OPTIONS"):
                path = path.replace("{response_id}", "x")
                response = client.request(method, path)
                assert response.status_code in (404, 405), (method, path)
                assert "pifa_" not in response.text


@pytest.mark.vllm
def test_websockets_are_off(server):
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    for path in ("/v1/realtime", "/v1/models", "/metrics"):
        assert httpx.get(f"{server.url}{path}", headers=upgrade, timeout=60).status_code == 403
