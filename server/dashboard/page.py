"""Puts the dashboard's parts into one document."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PARTS = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """An HTML document, and the headers that keep a browser from running anything else in it."""

    html: str
    headers: dict[str, str]


@cache
def build_page() -> Page:
    """Read template, style sheets and scripts, and put them together."""
    styles = [_read("uplot/uPlot.min.css"), _read("dashboard.css")]
    scripts = [_read("uplot/uPlot.iife.min.js"), _read("metrics.js"), _read("chat.js"), _read("dashboard.js")]
    html = _read("dashboard.html")
    html = html.replace("<!-- styles -->", "".join(f"<style>{text}</style>" for text in styles))
    html = html.replace("<!-- scripts -->", "".join(f"<script>{text}</script>" for text in scripts))
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; style-src {_hashes(styles)}; script-src {_hashes(scripts)}"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Page(html, headers)


def _hashes(texts: list[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _read(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")
