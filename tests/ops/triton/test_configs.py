"""What is launched depends on shapes and the bucket of the token count alone."""

import pytest

from pifa_vllm.ops.triton.configs import DECODE_TOKENS, PREFILL, Device, plan_decode, plan_prefill

H100 = Device("sm_90", 132)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("ranks", [(0,), (16,), (1184,), (3328, 512)])
def test_decode_has_one_plan_per_bucket(bits, ranks):
    sizes = tuple(r + 2912 for r in ranks)
    plans = [plan_decode(H100, bits, tokens, 4096, ranks, sizes) for tokens in range(1, DECODE_TOKENS + 1)]
    assert len(set(plans)) == 4
    assert all(plan.block_tokens >= tokens for tokens, plan in enumerate(plans, 1))


def test_few_pivot_rows_are_split_and_many_are_not():
    few = plan_decode(H100, 16, 1, 4096, (128,), (4096,))
    assert few.splits == 8  # 16 tiles of rows; two tiles of inputs per split
    assert plan_decode(H100, 16, 1, 4096, (4000,), (8000,)).splits == 1


def test_a_split_has_several_steps():
    assert plan_decode(H100, 16, 1, 576, (64,), (576,)).splits == 1


@pytest.mark.parametrize("family", PREFILL)
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("tokens", [65, 4096, 100_000])
def test_prefill_always_finds_a_plan(family, bits, tokens):
    for ranks, sizes in (((0,), (5,)), ((5,), (5,)), ((1184, 448), (4096, 1024))):
        plan = plan_prefill(Device(family, 100), bits, tokens, 4096, ranks, sizes)
        assert {plan.pivots, plan.outputs} <= set(PREFILL[family][bits])


def test_large_prefills_take_large_tiles_unsplit():
    plan = plan_prefill(H100, 16, 8192, 4096, (3552,), (12288,))
    assert plan.splits == 1
    assert plan.pivots.tokens * plan.pivots.rows == 128 * 256


def test_precision_and_overlap_follow_the_device():
    assert Device("hip", 304).precision == "ieee"
    assert not Device("hip", 304).overlap
    assert not Device("sm_89", 142).overlap
    assert H100.overlap
