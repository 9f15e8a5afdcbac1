"""The page at /dashboard: one HTML document that holds all it needs, so that it works offline."""

from pifa_vllm_server.dashboard.page import Page, build_page

__all__ = ["Page", "build_page"]
