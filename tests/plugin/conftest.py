"""Two tiny models of one shape, each dense, compressed, and as the matrices that the compressed one stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model


def ranks(name: str, m: int, n: int) -> int | None:
    """Unequal ranks in every fused layer; dense modules beside compressed ones."""
    if name.endswith(("0.self_attn.k_proj", "1.mlp.up_proj", "1.mlp.down_proj")):
        return None
    share = {"q_proj": 0.5, "k_proj": 0.8, "v_proj": 0.37, "gate_proj": 0.6}.get(name.rsplit(".")[-1], 0.7)
    return round(share * min(m, n))


def other_ranks(name: str, m: int, n: int) -> int | None:
    """The same, but for one module."""
    rank = ranks(name, m, n)
    return rank - 3 if rank is not None and name.endswith("1.self_attn.o_proj") else rank


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories: `first` and `second`, `-pifa`, `-twin`, and `other-pifa`, which is `second` at other ranks."""
    root = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(("first", "second")):
        # vLLM's CPU attention takes head sizes from 32 on.
        save_tiny_model(root / name, "llama", hidden=128, intermediate=176, seed=seed)
        save_pifa_twin(root / name, root / f"{name}-pifa", root / f"{name}-twin", ranks=ranks)
    save_pifa_twin(root / "second", root / "other-pifa", root / "other-twin", ranks=other_ranks)
    return root
