"""FLOPs and bytes are those of the factors, and of the format that a rival is served in."""

from __future__ import annotations

import pytest

from pifa_vllm.bench.quality.cost import cost
from pifa_vllm.bench.quality.plan import Variant
from pifa_vllm.checkpoint import Checkpoint
from tests.conftest import Twins

# 2 layers of q, o [64, 64], k, v [32, 64], gate, up [112, 64], down [64, 112].
NUMBERS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 112 * 64)


def test_dense(twins: Twins) -> None:
    found = cost(twins.original, None)
    assert found == {"kept_density": 1.0, "flops_per_token": 2 * NUMBERS, "bytes": 2 * NUMBERS}


def test_pifa(twins: Twins) -> None:
    # Rank 32 of q and o, 16 of v, 32 of gate, up and down; k is dense.
    kept = 2 * (2 * (32 * 128 - 32**2) + 32 * 64 + (16 * 96 - 16**2) + 3 * (32 * 176 - 32**2))
    found = cost(twins.pifa, None)
    assert found["kept_density"] == pytest.approx(kept / NUMBERS)
    assert found["flops_per_token"] == 2 * kept
    ranks = Checkpoint.open(twins.pifa).config.ranks
    assert found["bytes"] == 2 * kept + 4 * sum(ranks.values())


@pytest.mark.parametrize(
    ("variant", "bits", "flops"),
    [
        (Variant(rival="round", bits=8, group=64), 8.25, 1.0),
        (Variant(rival="gptq", bits=4, group=32), 4.5, 1.0),
        (Variant(rival="wanda"), 9.0, 0.5),
        (Variant(directory="x", number_bits=3.0, flops_share=0.7), 3.0, 0.7),
        (Variant(directory="x"), 16.0, 1.0),
    ],
)
def test_rivals(twins: Twins, variant: Variant, bits: float, flops: float) -> None:
    found = cost(twins.dense, variant)
    assert found["bytes"] == NUMBERS * bits / 8
    assert found["flops_per_token"] == round(2 * NUMBERS * flops)
