"""Who may call what: an allow-list of (method, route), the key, and the Host header where there is no key."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
import tomllib
from collections.abc import Iterable
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from pifa_vllm_server.errors import RefusedError
from pifa_vllm_server.settings import ServerSettings
from starlette.datastructures import Headers, MutableHeaders

_DASHBOARD = "/dashboard"


def read_table() -> dict[str, list[str]]:
    """Read routes.toml: lists of "METHOD /route" under open, key, admin and off."""
    return tomllib.loads(Path(__file__).with_name("routes.toml").read_text(encoding="utf-8"))


class Access:
    """Decides by method, path, key and Host.

    Args:
        keys: any of them opens the server; with none, it is open to whoever reaches the port.
        settings: public_metrics, admin_routes and allowed_hosts.
    """

    def __init__(self, keys: Iterable[str], settings: ServerSettings) -> None:
        # Compared as hashes, so that the time taken tells nothing about length or content.
        self._keys = [_digest(key) for key in keys if key]
        self._hosts = frozenset(settings.allowed_hosts)
        table = read_table()
        routes = table["open"] + table["key"] + table["admin"] * settings.admin_routes
        self._open = _pattern(table["open"] + ["GET /metrics"] * settings.public_metrics)
        self._routes = _pattern(routes)
        self._paths = _pattern(route.partition(" ")[2] for route in routes)

    def check(self, method: str, path: str, headers: MutableHeaders) -> None:
        """Let a request pass, or not.

        Args:
            method: of the request.
            path: decoded, without the root path.
            headers: of the request. A key that a browser sent as a password becomes vLLM's bearer token.

        Raises:
            RefusedError: 401 without a valid key, 404 or 405 for a route that is off, 421 for a name that is not
                this server's.
        """
        if not self._keys:
            self._check_host(headers.get("host", ""))
        if method == "OPTIONS" and {"origin", "access-control-request-method"} <= set(headers):
            return  # vLLM's CORS middleware answers all of these, by --allowed-origins
        route = f"{'GET' if method == 'HEAD' else method} {path}"
        if not self._open.fullmatch(route):
            self._check_key(method, path, headers)
        if not self._routes.fullmatch(route):
            status = HTTPStatus.METHOD_NOT_ALLOWED if self._paths.fullmatch(path) else HTTPStatus.NOT_FOUND
            raise RefusedError(status, f"No route {method} {path} here.")

    def _check_host(self, host: str) -> None:
        """Against a page whose own name leads to this server: its scripts would be this server's own."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            # Nobody can own a name without a dot on the internet.
            if name in self._hosts or name.endswith(".localhost") or not {".", ":"} & set(name):
                return
            ip_address(name)
        except ValueError:
            raise RefusedError(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"Host: expected an address, a local name, or one of --server.allowed-hosts, found {host!r}. "
                "With an API key any name will do.",
            ) from None

    def _check_key(self, method: str, path: str, headers: MutableHeaders) -> None:
        if not self._keys:
            return
        scheme, key = _credentials(headers)
        trusted = scheme == "bearer" or (scheme == "basic" and _asked_by_user(method, path, headers))
        if trusted and any(secrets.compare_digest(_digest(key), known) for known in self._keys):
            headers["authorization"] = f"Bearer {key}"
            return
        found = "another one." if "authorization" in headers else "none."
        raise RefusedError(
            HTTPStatus.UNAUTHORIZED,
            f"Expected a valid API key (Authorization: Bearer KEY), found {found}",
            {"WWW-Authenticate": "Basic realm=pifa-vllm" if path == _DASHBOARD else "Bearer"},
        )


def _pattern(routes: Iterable[str]) -> re.Pattern[str]:
    """To be matched in full; a parameter is one part of the path, or with `:path` all the rest."""
    parts = (re.split(r"(\{.*?\})", route) for route in routes)
    return re.compile("|".join("".join(map(_part, route)) for route in parts))


def _part(text: str) -> str:
    if not text.startswith("{"):
        return re.escape(text)
    return r"[\w./-]+" if text.endswith(":path}") else r"[^/\s]+"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _credentials(headers: Headers) -> tuple[str, str]:
    """The scheme, and the bearer token or the password."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    scheme, value = scheme.lower(), value.strip()
    if scheme == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            value = ""
    return scheme, value


def _asked_by_user(method: str, path: str, headers: Headers) -> bool:
    """Browsers send Basic credentials by themselves, so another site's page must not profit from them.

    A link to the dashboard may stand anywhere. Browsers tell the site over HTTPS and to localhost only; with
    whatever can change something they also send the page's origin.
    """
    site = headers.get("sec-fetch-site")
    if site is None:
        origin = headers.get("origin")
        return origin is None or origin.partition("://")[2] == headers.get("host")
    if method == "GET" and path == _DASHBOARD and headers.get("sec-fetch-dest") == "document":
        return True
    return site in ("none", "same-origin")
