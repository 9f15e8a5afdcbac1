"""The rivals keep what their formats can hold, and those that look at the inputs gain by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pifa_vllm.bench.quality.rivals import (
    Change,
    gptq,
    magnitude,
    make_rival,
    round_to_nearest,
    sparsegpt,
    wanda,
)
from pifa_vllm.checkpoint import Shards
from tests.compression.runs import write_text
from tests.conftest import Twins


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gram() -> Tensor:
    """Of inputs that depend on one another and differ in size, as those of a model do."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    x = (x + 0.3 * torch.randn(400, 32, generator=generator)) * torch.linspace(0.2, 3.0, 32)
    return x.T @ x / 400


def loss(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    error = weight - changed
    return float((error @ gram * error).sum())


@pytest.mark.parametrize("group", [8, 12, 100])
def test_rounding(weight: Tensor, group: int) -> None:
    changed = round_to_nearest(4, group)(weight, None)
    for start in range(0, 32, group):
        before, after = weight[:, start : start + group], changed[:, start : start + group]
        step = before.abs().amax(dim=1, keepdim=True) / 7
        assert bool(((before - after).abs() <= step * 0.5001).all())
        assert torch.allclose((after / step).round(), after / step, atol=1e-4)


def test_zeros_stay_zeros() -> None:
    assert not round_to_nearest(4, 8)(torch.zeros(2, 16), None).any()


def test_gptq_loses_less(weight: Tensor, gram: Tensor) -> None:
    changed = gptq(4, 32)(weight, gram)
    assert len(changed[0].unique()) <= 16
    assert loss(weight, changed, gram) < 0.7 * loss(weight, round_to_nearest(4, 32)(weight, None), gram)


def test_two_of_four(weight: Tensor, gram: Tensor) -> None:
    by_method = {method: method(weight, gram) for method in (magnitude, wanda, sparsegpt)}
    for changed in by_method.values():
        assert bool(((changed.view(24, -1, 4) != 0).sum(dim=2) == 2).all())
    # magnitude and wanda leave what stays as it is.
    kept = by_method[magnitude]
    assert torch.equal(kept[kept != 0], weight[kept != 0])
    assert float(kept.abs().sum()) >= float(by_method[wanda].abs().sum())
    losses = {method: loss(weight, changed, gram) for method, changed in by_method.items()}
    assert losses[sparsegpt] < 0.7 * losses[wanda] < losses[magnitude]


def test_a_checkpoint(twins: Twins, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    calibration = {"calibration": str(text), "samples": 2, "length": 64}
    seen: list[Tensor] = []

    def change(weight: Tensor, gram: Tensor | None) -> Tensor:
        assert gram is not None
        seen.append(gram)
        return wanda(weight, gram)

    make_rival(twins.original, tmp_path / "sparse", change, calibration)
    before, after = Shards(twins.original), Shards(tmp_path / "sparse")
    assert set(before.entries) == set(after.entries)
    changed = {name for name in before.entries if not torch.equal(before.load(name), after.load(name))}
    assert changed == {name for name in before.entries if name.endswith("_proj.weight")}
    assert len(seen) == len(changed) == 14
    assert all(bool((torch.linalg.eigvalsh(x.double()) > -1e-5).all()) for x in seen)
    # Of each layer q, k and v have the same inputs, and gate and up; after a norm their mean square is about 1.
    distinct = {tuple(x.diagonal().tolist()) for x in seen}
    assert len(distinct) == 2 * 4
    assert any(float(x.diagonal().mean()) == pytest.approx(1.0, abs=0.25) for x in seen)


def test_later_layers_see_what_was_done_to_those_before(twins: Twins, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    calibration = {"calibration": str(text), "samples": 2, "length": 64}
    seen: dict[float, list[Tensor]] = {}

    def scale(by: float) -> Change:
        def change(weight: Tensor, gram: Tensor | None) -> Tensor:
            assert gram is not None
            seen.setdefault(by, []).append(gram)
            return by * weight

        return change

    for by in (1.0, 2.0):
        make_rival(twins.original, tmp_path / str(by), scale(by), calibration)
    first, second = zip(*seen.values(), strict=True), 7
    for index, (same, other) in enumerate(first):
        assert torch.allclose(same, other) == (index < second)
