"""Who may call what: the rules by themselves, without an engine."""

from __future__ import annotations

import base64
import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("pydantic_settings")

from pifa_vllm_server.access import Access
from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.settings import ServerSettings
from starlette.datastructures import MutableHeaders


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
    "path", ["/v1/models", "/metrics", "/pifa/info", "/dashboard", "/docs", "/load", "/"]
)
def test_the_key_guards_everything(access, path):
    for sent in (headers(), bearer("third"), bearer(""), headers(authorization="first"), basic("third")):
        assert refusal(access, path, sent).status == 401
    for key in ("first", "second"):
        if path == "/":
            assert refusal(access, path, bearer(key)).status == 404
        else:
            access.check("GET", path, bearer(key))


def test_probes_need_no_key(access):
    for path in ("/health", "/ready"):
        access.check("GET", path, headers())
        access.check("HEAD", path, headers())
        assert refusal(access, path, headers(), "POST").status == 401
    # Similar paths are not the same.
    for path in ("/health/", "/ready2", "/health\n", "//health", "/v1/../health"):
        assert refusal(access, path, headers()).status == 401


def test_metrics_by_choice():
    access = Access(["key"], ServerSettings(public_metrics=True))
    access.check("GET", "/metrics", headers())
    for method in ("OPTIONS", "PUT", "POST"):
        assert refusal(access, "/metrics", headers(), method).status == 401
        assert refusal(access, "/metrics", bearer("key"), method).status == 405


def test_without_keys_all_is_open_but_admin_routes():
    for keys in ([], [""]):  # vLLM takes an empty variable for no key
        access = Access(keys, ServerSettings())
        access.check("POST", "/v1/completions", headers())
        access.check("GET", "/metrics", headers())
        assert refusal(access, "/sleep", headers(), "POST").status == 404


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/inference/v1/abort_requests", "/sleep", "/adapters"]
)
def test_admin_routes_are_off(access, path):
    for odd in (path, f"{path}\n", f"{path}/", path.upper(), f"/{path}", f"{path}\x00", f"{path};a"):
        assert refusal(access, odd, bearer("first"), "POST").status == 404
    Access(["first"], ServerSettings(admin_routes=True)).check("POST", path, bearer("first"))


def test_parameters_are_one_part_of_the_path(access):
    access.check("GET", "/v1/responses/resp_1", bearer("first"))
    access.check("POST", "/v1/responses/resp_1/cancel", bearer("first"))
    access.check("GET", "/static/swagger/ui.js", bearer("first"))
    for path in ("/v1/responses/", "/v1/responses/a/b", "/v1/responses/a\n", "/v1/responses/a b"):
        assert refusal(access, path, bearer("first")).status == 404


def test_preflights_are_vllms(access):
    asked = headers(origin="http://a", access_control_request_method="POST")
    access.check("OPTIONS", "/metrics", asked)
    for sent in (headers(), headers(origin="http://a"), headers(access_control_request_method="GET")):
        assert refusal(access, "/metrics", sent, "OPTIONS").status == 401


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


@pytest.mark.parametrize(
    "origin", ["http://elsewhere", "http://gpu-box:3000", "null", "http://[", "[", "", "://"]
)
def test_origins_tell_sites_apart_without_https(access, origin):
    """Browsers send no Sec-Fetch-Site to http://gpu-box:8000."""
    own = {"host": "gpu-box:8000", "origin": "http://gpu-box:8000"}
    access.check("POST", "/v1/chat/completions", basic("second", **own))
    sent = basic("second", **{**own, "origin": origin})
    assert refusal(access, "/v1/chat/completions", sent, "POST").status == 401


@pytest.mark.parametrize("value", ["Basic", "Basic ", "Basic !!!", "Basic /w==", "Bearer é", "Bearer  ", "x"])
def test_broken_credentials_are_refused(access, value):
    sent = MutableHeaders(raw=[(b"authorization", value.encode("latin-1"))])
    assert refusal(access, "/v1/models", sent).status == 401


def test_without_a_key_names_of_others_are_refused():
    """A page of evil.example whose name leads here has this server's answers for its own."""
    access = Access([], ServerSettings(allowed_hosts=["llm.example.org"]))
    for host in ("127.0.0.1:8000", "localhost", "gpu-box:80", "[::1]:8000", "10.0.0.2", "a.localhost", ""):
        access.check("GET", "/v1/models", headers(host=host))
    access.check("GET", "/v1/models", headers(host="LLM.example.org:8000"))
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[",
        "a.b]",
    ):
        assert refusal(access, "/v1/models", headers(host=host)).status == 421
        assert refusal(access, "/health", headers(host=host)).status == 421
    # With a key such a page has nothing to send.
    Access(["key"], ServerSettings()).check(
        "GET", "/v1/models", MutableHeaders({**bearer("key"), "host": "a.b"})
    )


def test_refusals_are_openai_shaped(access):
    response = refusal(access, "/v1/models", headers()).response()
    assert json.loads(response.body)["error"] == {
        "message": "Expected a valid API key (Authorization: Bearer KEY), found none.",
        "type": "UnauthorizedError",
        "param": None,
        "code": 401,
    }
