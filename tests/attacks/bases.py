"""The good checkpoints that the attacks spoil."""

from __future__ import annotations

from pathlib import Path

from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model

SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "mistral": ("mistral", {}),
    # With biases.
    "qwen2": ("qwen2", {}),
    # With norms of the heads, and an explicit head_dim.
    "qwen3": ("qwen3", {}),
}


def save_bases(root: Path, *names: str) -> dict[str, Path]:
    """Save a tiny PIFA checkpoint per base, all of them by default, and return their directories."""
    found = {}
    for name in names or SETTINGS:
        architecture, settings = SETTINGS[name]
        # vLLM's CPU attention takes head sizes from 32 on.
        save_tiny_model(root / f"{name}-dense", architecture, hidden=128, intermediate=176, **settings)
        save_pifa_twin(
            root / f"{name}-dense",
            root / name,
            root / f"{name}-twin",
            ranks=lambda module, m, n: None if module.endswith("k_proj") else min(m, n) // 4,
        )
        found[name] = root / name
    return found
