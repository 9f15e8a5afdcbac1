"""The dashboard in a real browser: it loads, follows the server under load, chats, and reports no error."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import httpx
import pytest
from pifa_vllm_server.dashboard import build_page

ROOT = Path(__file__).parents[2] / "server" / "dashboard"


def test_page_is_self_contained():
    html = build_page().html
    assert "<!--" not in html.replace("<!-- ", "<!--")[:200]
    for found in re.findall(r"(?:src|href|url|import|from)\s*[=(]?\s*[\"']([^\"']+)[\"']", html):
        assert found.startswith("data:"), found
    assert "uPlot" in html
    assert len(html) < 150_000


def test_policy_allows_the_page_s_own_scripts_only():
    policy = build_page().headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert policy.count("'sha256-") == 6
    assert "unsafe" not in policy
    assert not re.search(r"\son\w+=|style=", (ROOT / "dashboard.html").read_text())


def test_library_is_the_one_that_package_json_names():
    assert '"uplot": "1.6.32"' in (ROOT / "uplot" / "package.json").read_text()
    assert "leeoniya/uPlot (v1.6.32)" in (ROOT / "uplot" / "uPlot.iife.min.js").read_text()
    assert "MIT License" in (ROOT / "uplot" / "LICENSE").read_text()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        own = Path(started.chromium.executable_path).exists()
        executable = None if own else shutil.which("chromium") or shutil.which("google-chrome")
        if not own and executable is None:
            pytest.skip("no Chromium here: neither playwright's own nor a system's")
        launched = started.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield launched
        launched.close()


def wait_until(condition):
    # Not page.wait_for_function: it evaluates strings in the page, which the page's policy forbids.
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def lengths_of_an_answer(page):
    """Ask, and return how long the messages were, together, after each change of theirs."""
    page.fill("#max-tokens", "200")
    page.fill("#question", "Hello")
    page.evaluate(
        """() => {
            window.lengths = [];
            new MutationObserver(() => lengths.push(
                document.querySelector('#messages').textContent.length
            )).observe(document.querySelector('#messages'), {subtree: true, childList: true, characterData: true});
        }"""
    )
    page.click("#send")
    wait_until(lambda: page.evaluate("window.lengths.length") and page.inner_text("#send") == "Send")
    return page.evaluate("window.lengths")


@pytest.mark.vllm
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 380)])
def test_dashboard_in_a_browser(server, browser, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.goto(f"{server.url}/dashboard")
    page.set_default_timeout(60_000)

    text = page.locator
    wait_until(lambda: text("#status").inner_text() == "ready")
    assert text("#model").inner_text() == "tiny"
    assert "density 0." in text("#about").inner_text()
    assert "12 of 14 modules compressed" in text("#ranks-note").inner_text()
    assert text("#chart-ranks canvas").count() == 1
    assert text("#memory i").count() == 4
    assert "more tokens" in text("#gained").inner_text()
    # Nothing sticks out at the side.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    # Under load the figures move.
    for _ in range(3):
        request = {"model": "tiny", "prompt": "Hi", "max_tokens": 60, "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=request, timeout=120).status_code == 200
    wait_until(lambda: text("#generation-rate").inner_text().strip("0.\u2013"))
    wait_until(lambda: text("#ttft").inner_text().endswith("s"))

    # The chat streams: the answer grows.
    for _ in range(5):
        lengths = lengths_of_an_answer(page)
        if len(lengths) > 5:
            break
        # A model of random weights may also end its answer with the first token.
        page.reload()
        wait_until(lambda: text("#status").inner_text() == "ready")
    assert text(".message.user").inner_text() == "Hello"
    assert text(".message.error").count() == 0
    assert len(lengths) > 5
    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[0]

    assert errors == []
    assert hosts == {f"127.0.0.1:{server.port}"}
    context.close()
