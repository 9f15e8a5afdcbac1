import pytest
import torch

from pifa_vllm.quantization import (
    DTYPES,
    fit_scales,
    groups,
    pack,
    round_to_nearest,
    row_width,
    spread,
    unpack,
)

SIZES = (0, 1, 5, 31, 32, 33, 123, 256, 257)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_what_is_packed_comes_back(rows, k, dtype):
    low, high = {torch.int8: (-127, 127), torch.uint8: (-8, 7), torch.float8_e4m3fn: (-16, 16)}[dtype]
    numbers = torch.randint(low, high + 1, (rows, k)).float()
    stored = pack(numbers, dtype)
    assert stored.dtype == dtype
    assert stored.shape == (rows, row_width(k, dtype))
    assert torch.equal(unpack(stored, k), numbers)


def test_bytes_of_4_bits_hold_the_halves_of_32_numbers():
    numbers = torch.arange(40).remainder(16).float()[None] - 8
    stored = pack(numbers, torch.uint8)[0].tolist()
    assert stored[:16] == [j | j << 4 for j in range(16)]
    # Numbers 32 to 39 are there, and zeros, stored as 8, beyond them.
    assert stored[16:] == [j | 8 << 4 for j in range(8)] + [8 | 8 << 4] * 8


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("group_size", [0, 32, 64, 256])
@pytest.mark.parametrize("k", SIZES)
def test_the_error_is_at_most_half_a_step(k, group_size, dtype):
    values = torch.randn(4, k) * torch.logspace(0, 3, 4)[:, None]
    scale = fit_scales(values, dtype, group_size)
    assert scale.dtype == torch.float16
    assert scale.shape == (4, groups(k, group_size))
    steps = spread(scale, k, group_size)
    found = round_to_nearest(values, dtype, group_size).values()
    # A scale is rounded, too, by up to a thousandth of 127 steps; floats of 8 bits have 4 significant ones.
    bound = (
        values.abs() / 16 + steps * 2**-9
        if dtype == torch.float8_e4m3fn
        else steps * 0.5 + values.abs() * 2**-10
    )
    assert bool(((found - values).abs() <= bound).all())


def test_scales_stay_within_what_float16_holds():
    for size in (0.0, 1e-12, 1e12):
        scale = fit_scales(torch.full((2, 64), size), torch.int8, 32)
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())
