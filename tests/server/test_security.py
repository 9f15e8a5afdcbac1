"""Who may call what, and what a request may contain: the rules by themselves, without an engine."""

from __future__ import annotations

import base64
import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("pydantic_settings")

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.limits import check_body, check_headers, text_length
from pifa_vllm_server.security import Access, is_admin
from pifa_vllm_server.settings import ServerSettings
from starlette.datastructures import MutableHeaders

from tests.release import vllm_before


def headers(**fields):
    return MutableHeaders({name.replace("_", "-"): value for name, value in fields.items()})


def bearer(key):
    return headers(authorization=f"Bearer {key}")


def basic(key, **fields):
    return headers(authorization="Basic " + base64.b64encode(f"me:{key}".encode()).decode(), **fields)


@pytest.fixture
def access():
    return Access(["first", "second"], ServerSettings())


def refusal(access, path, sent, method="GET"):
    with pytest.raises(RefusedError) as caught:
        access.check(method, path, sent)
    return caught.value


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/metrics", "/pifa/info", "/dashboard", "/docs", "/tokenize", "/load", "/version", "/"],
)
def test_the_key_guards_everything(access, path):
    for sent in (headers(), bearer("third"), bearer(""), headers(authorization="first"), basic("third")):
        assert refusal(access, path, sent).status == 401
    for key in ("first", "second"):
        access.check("GET", path, bearer(key))


def test_probes_need_no_key(access):
    for path in ("/health", "/ready"):
        access.check("GET", path, headers())
    # Similar paths are not the same.
    assert refusal(access, "/health/", headers()).status == 401
    assert refusal(access, "/ready2", headers()).status == 404


def test_metrics_by_choice():
    Access(["key"], ServerSettings(public_metrics=True)).check("GET", "/metrics", headers())


def test_without_keys_all_is_open():
    Access([], ServerSettings()).check("POST", "/v1/completions", headers())
    # vLLM takes an empty variable for no key.
    Access([""], ServerSettings()).check("GET", "/metrics", headers())


def test_browsers_send_the_key_as_a_password(access):
    assert refusal(access, "/dashboard", headers()).headers["WWW-Authenticate"].startswith("Basic")
    assert refusal(access, "/v1/models", headers()).headers["WWW-Authenticate"] == "Bearer"
    for site in ("none", "same-origin"):
        sent = basic("second", sec_fetch_site=site)
        access.check("POST", "/v1/chat/completions", sent)
        # vLLM's own check, below /v1, wants a bearer token.
        assert sent["authorization"] == "Bearer second"
    for site in ("cross-site", "same-site"):
        assert refusal(access, "/pifa/info", basic("second", sec_fetch_site=site)).status == 401
        # A link on another page, but not a frame in it.
        access.check("GET", "/dashboard", basic("second", sec_fetch_site=site, sec_fetch_dest="document"))
        for dest in ("iframe", "empty"):
            sent = basic("second", sec_fetch_site=site, sec_fetch_dest=dest)
            assert refusal(access, "/dashboard", sent).status == 401
        sent = basic("second", sec_fetch_site=site, sec_fetch_dest="document")
        assert refusal(access, "/v1/completions", sent, "POST").status == 401


def test_origins_tell_sites_apart_without_https(access):
    """Browsers send no Sec-Fetch-Site to http://gpu-box:8000."""
    own = {"host": "gpu-box:8000", "origin": "http://gpu-box:8000"}
    access.check("POST", "/v1/chat/completions", basic("second", **own))
    for origin in ("http://elsewhere", "http://gpu-box:3000", "null"):
        sent = basic("second", **{**own, "origin": origin})
        assert refusal(access, "/v1/chat/completions", sent, "POST").status == 401


@pytest.mark.parametrize("value", ["Basic", "Basic ", "Basic !!!", "Basic /w==", "Bearer é", "Bearer  ", "x"])
def test_broken_credentials_are_refused(access, value):
    sent = MutableHeaders(raw=[(b"authorization", value.encode("latin-1"))])
    assert refusal(access, "/v1/models", sent).status == 401


def test_refusals_are_openai_shaped():
    with pytest.raises(RefusedError) as caught:
        check_body(b'{"n": 99}', ServerSettings())
    shaped = json.loads(caught.value.body())["error"]
    assert shaped == {
        "message": "n: expected at most 16, found 99.",
        "type": "BadRequestError",
        "param": "n",
        "code": 400,
    }
    assert json.loads(caught.value.event().removeprefix(b"data: "))["error"] == shaped


def test_admin_routes_are_off_unless_asked_for():
    closed, opened = (Access([], ServerSettings(admin_routes=on)) for on in (False, True))
    for path in ("/collective_rpc", "/sleep", "/v1/load_lora_adapter", "/v1/load_lora_adapter/", "/metrics2"):
        assert refusal(closed, path, headers(), "POST").status == 404
        opened.check("POST", path, headers())


PUBLIC_ROUTES = {
    "/detokenize",
    "/docs",
    "/docs/oauth2-redirect",
    "/generative_scoring",
    "/health",
    "/invocations",
    "/load",
    "/metrics",
    "/openapi.json",
    "/ping",
    "/redoc",
    "/tokenize",
    "/version",
}


@pytest.mark.vllm
def test_every_route_of_vllm_is_known(monkeypatch):
    """A new vLLM may bring routes: look at each, then put it here."""
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    from pifa_vllm_server.launch import parse_arguments
    from vllm.entrypoints.launchers.app import build_app

    app = build_app(parse_arguments("tiny", []), ("generate",), None)
    paths = {route.path for route in app.routes}
    public = {path for path in paths if not is_admin(path)}
    assert {"/v1/chat/completions", "/v1/models", "/health", "/metrics", "/tokenize"} <= public
    below = ("/v1/", "/v2/", "/inference/")
    assert {path for path in public if not path.startswith(below)} == PUBLIC_ROUTES
    admin = {"/collective_rpc", "/sleep", "/reset_prefix_cache", "/v1/load_lora_adapter", "/scale_elastic_ep"}
    assert admin <= paths - public
    assert vllm_before("0.32") or "/inference/v1/abort_requests" in paths - public


def test_numbers_and_prompts_within_limits():
    settings = ServerSettings(max_prompt_chars=10, max_prompts=2)
    good = [
        {"prompt": "0123456789", "n": 16},
        {"prompt": ["a", "b"]},
        {"prompt": list(range(100))},
        {"messages": [{"role": "user", "content": "short"}]},
        {"n": "many", "prompt": 5, "messages": None},
        {"n": True, "best_of": [5], "sampling_params": 5},
        {"messages": [{"role": "u", "content": "a"}] * 3},
        {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:" + "A" * 99}}]}]},
    ]
    for request in good:
        check_body(json.dumps(request).encode(), settings)
    bad = [
        ("prompt", {"prompt": "0123456789a"}),
        ("prompt", {"prompt": ["a", "b", "c"]}),
        ("prompt", {"prompt": [[1], [2], [3]]}),
        ("messages", {"messages": [{"role": "user", "content": "012345678"}] * 2}),
        ("messages", {"messages": [{"content": [{"type": "text", "text": "0123456789a"}]}]}),
        ("input", {"input": "data:0123456"}),
        ("best_of", {"best_of": 17}),
        # What vLLM takes for a number.
        ("n", {"n": 17.0}),
        ("n", {"n": "17"}),
        ("n", {"sampling_params": {"n": 17}}),
        # Several conversations in one request.
        ("messages", {"messages": [[{"role": "user", "content": "a"}]] * 3}),
        ("prompt", {"prompt": [1, "b", "c"]}),
        ("instructions", {"instructions": "0123456789a"}),
    ]
    for param, request in bad:
        with pytest.raises(RefusedError) as caught:
            check_body(json.dumps(request).encode(), settings)
        assert (caught.value.status, caught.value.param) == (400, param)


def test_what_other_parsers_refuse_is_checked():
    """vLLM's app reads JSON as Python's own parser does, which takes more than others."""
    deep = "[" * 300 + "]" * 300
    for text in ('{"x": "\\ud800", "n": 99}', f'{{"x": {deep}, "n": 99}}', '{"x": NaN, "n": 99}'):
        with pytest.raises(RefusedError, match="n: expected at most 16, found 99"):
            check_body(text.encode(), ServerSettings())
    with pytest.raises(RefusedError, match="n: expected at most 16, found 99"):
        check_body('{"n": 99}'.encode("utf-16"), ServerSettings())


def test_what_is_not_json_is_left_to_vllm():
    for body in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000):
        check_body(body, ServerSettings())


def test_sizes_are_counted():
    assert text_length({"a": ["bc", {"d": "efg"}], "n": 5, "x": None}) == 5
    with pytest.raises(RefusedError, match="at most 32768 bytes of headers"):
        check_headers(10, headers(x="a" * 33_000), ServerSettings())
    with pytest.raises(RefusedError, match="at most 4194304 bytes, found 9999999"):
        check_headers(10, headers(content_length="9999999"), ServerSettings())
    check_headers(10, headers(x="a" * 32_000, content_length="4194304"), ServerSettings())
