"""Who may call which route."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import urlsplit

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.settings import ServerSettings
from starlette.datastructures import Headers, MutableHeaders

# What a client of the API needs, by first part of the path. Everything else that vLLM has, or a later vLLM adds,
# changes or inspects the engine: sleeping, caches, profiles, weights, RPC, scaling.
PUBLIC = frozenset(
    {
        "/v1",
        "/v2",
        "/classify",
        "/dashboard",
        "/detokenize",
        "/docs",
        "/generative_scoring",
        "/health",
        "/inference",
        "/invocations",
        "/load",
        "/metrics",
        "/openapi.json",
        "/pifa",
        "/ping",
        "/pooling",
        "/ready",
        "/redoc",
        "/rerank",
        "/score",
        "/static",
        "/tokenize",
        "/version",
    }
)
# Below those, but for whoever runs the server: other clients' requests can be aborted by their ids.
ADMIN = frozenset({"/inference/v1/abort_requests", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
# Probes of an orchestrator have no key.
OPEN = frozenset({"/health", "/ready"})

_DASHBOARD = "/dashboard"


class Access:
    """Decides by path and API key.

    Args:
        keys: any of them opens the server; with none, it is open.
        settings: public_metrics and admin_routes.
    """

    def __init__(self, keys: Iterable[str], settings: ServerSettings) -> None:
        # Compared as hashes, so that the time taken tells nothing about length or content.
        self._keys = {_digest(key): key for key in keys if key}
        self._admin = settings.admin_routes
        self._open = OPEN | ({"/metrics"} if settings.public_metrics else set())

    def check(self, method: str, path: str, headers: MutableHeaders) -> None:
        """Let a request pass, or not.

        A browser that opens /dashboard cannot send a bearer token. It may send the key as the password of HTTP
        Basic authentication instead; vLLM, which checks keys itself below /v1, then gets it as the bearer token
        that it expects.

        Raises:
            RefusedError: 401 without a valid key, 404 for a route that is off.
        """
        if not self._admin and is_admin(path):
            raise RefusedError(HTTPStatus.NOT_FOUND, "route", f"No route {method} {path} here.")
        if not self._keys or path in self._open or method == "OPTIONS":
            return
        key = self._valid(_bearer(headers))
        if key is None and _asked_by_user(method, path, headers):
            key = self._valid(_basic_password(headers))
            if key is not None:
                headers["authorization"] = f"Bearer {key}"
        if key is None:
            challenge = "Basic realm=pifa-vllm" if path == _DASHBOARD else "Bearer"
            raise RefusedError(
                HTTPStatus.UNAUTHORIZED,
                "api_key",
                "Expected a valid API key (Authorization: Bearer KEY), found "
                + ("another one." if "authorization" in headers else "none."),
                headers={"WWW-Authenticate": challenge},
            )

    def _valid(self, key: str | None) -> str | None:
        if key is None:
            return None
        digest, found = _digest(key), None
        for known, text in self._keys.items():
            if secrets.compare_digest(digest, known):
                found = text
        return found


def is_admin(path: str) -> bool:
    """Tell whether a path is for whoever runs the server only."""
    first = "/" + path.lstrip("/").partition("/")[0]
    return path != "/" and (first not in PUBLIC or path.rstrip("/") in ADMIN)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else None


def _basic_password(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return None


def _asked_by_user(method: str, path: str, headers: Headers) -> bool:
    """Browsers send Basic credentials by themselves, so another site's page must not profit from them.

    A link to the dashboard may stand anywhere. Browsers tell the site over HTTPS and to localhost only; with
    whatever can change something they also send the page's origin.
    """
    site = headers.get("sec-fetch-site")
    if site is None:
        origin = headers.get("origin")
        return origin is None or urlsplit(origin).netloc == headers.get("host")
    if method == "GET" and path == _DASHBOARD and headers.get("sec-fetch-dest") == "document":
        return True
    return site in ("none", "same-origin")
