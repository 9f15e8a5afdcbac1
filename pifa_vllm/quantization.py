"""Matrices of 8- or 4-bit numbers, with a scale for each group of neighbours in a row.

A row of k numbers is stored as one of

    int8           [k]           values in [-127, 127]
    uint8          [16 ⌈k/32⌉]   values in [-8, 7], two to a byte: of the b-th 16 bytes, byte j has number
                                 32b + j, plus 8, in its low half and number 32b + 16 + j, plus 8, in its high half;
                                 8 beyond k
    float8_e4m3fn  [k]

beside float16 scales, one for every `group_size` numbers or one for the whole row. A number stands for its value
times its group's scale. A scale may be negative: of 4 bits -8 is the largest number, and the scale says which sign
it stands for. Halves of 32 numbers, not neighbours, share a byte because a vector register of bytes then
comes apart by a mask and a shift, in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pifa_vllm.factorization import PIFA, PivotColumns

BLOCK = 32  # 4-bit numbers that are packed together
GROUP_SIZES = (32, 64, 128, 256)
DTYPES = {(8, "int"): torch.int8, (4, "int"): torch.uint8, (8, "float"): torch.float8_e4m3fn}
_LARGEST = {torch.int8: 127.0, torch.uint8: 7.0, torch.float8_e4m3fn: 448.0}
_SMALLEST_SCALE = 2.0**-24  # of float16


def row_width(k: int, dtype: torch.dtype) -> int:
    """Elements of `dtype` that a row of k numbers takes."""
    return -(-k // BLOCK) * (BLOCK // 2) if dtype == torch.uint8 else k


def groups(k: int, group_size: int) -> int:
    """Scales of a row of k numbers: one for every `group_size` of them, or where that is 0, one."""
    return -(-k // group_size) if group_size else min(k, 1)


def unit(dtype: torch.dtype, group_size: int) -> int:
    """Numbers of a row that can be cut off only together: those that share a scale, or bytes."""
    return max(group_size, BLOCK if dtype == torch.uint8 else 1)


def fit_scales(values: Tensor, dtype: torch.dtype, group_size: int, clip: float = 1.0) -> Tensor:
    """Choose scales: float16 [rows, groups(k)], positive ones.

    Args:
        values: [rows, k].
        dtype: of storage.
        group_size: 0 for one scale a row.
        clip: that share of a group's largest value becomes the largest number; what is beyond it is cut off.
    """
    rows, k = values.shape
    width = groups(k, group_size)
    size = group_size or max(k, 1)
    peaks = pad(values.abs(), (0, width * size - k)).view(rows, width, size).amax(dim=2)
    return (peaks * (clip / _LARGEST[dtype])).clamp(_SMALLEST_SCALE, 65504.0).to(torch.float16)


def round_to(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values to numbers of the grid, to nearest: in the dtype of `values`, not packed.

    Args:
        values: [..., any], floating.
        scale: of each value; broadcast.
        dtype: of storage.
    """
    numbers = values / scale.to(values.dtype)
    if dtype == torch.float8_e4m3fn:
        return numbers.clamp(-448.0, 448.0).to(dtype).to(values.dtype)
    low = -8.0 if dtype == torch.uint8 else -127.0
    return numbers.round().clamp(low, _LARGEST[dtype])


def pack(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Store numbers of the grid [rows, k] as [rows, row_width(k)]."""
    if dtype != torch.uint8:
        return numbers.to(dtype)
    rows, k = numbers.shape
    width = row_width(k, dtype)
    halves = pad((numbers + 8).to(torch.uint8), (0, 2 * width - k), value=8).view(rows, width // 16, 2, 16)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).view(rows, width)


def unpack(stored: Tensor, k: int) -> Tensor:
    """Read numbers [rows, k] back from [rows, row_width(k)]: float32."""
    if stored.dtype != torch.uint8:
        return stored.float()
    rows, width = stored.shape
    blocks = stored.view(rows, width // 16, 1, 16)
    return torch.cat([blocks & 15, blocks >> 4], dim=2).view(rows, 2 * width)[:, :k].float() - 8.0


def dequantize(stored: Tensor, scale: Tensor, k: int, group_size: int) -> Tensor:
    """Return the matrix [rows, k] that numbers and scales stand for, float32.

    Args:
        stored: [rows, row_width(k)].
        scale: [rows, groups(k)].
        k: numbers of a row.
        group_size: 0 for one scale a row.
    """
    return unpack(stored, k) * spread(scale, k, group_size)


def spread(scale: Tensor, k: int, group_size: int) -> Tensor:
    """Repeat scales [rows, groups(k)] for each number of a row: float32 [rows, k]."""
    return scale.float().repeat_interleave(group_size or max(k, 1), dim=1)[:, :k]


@dataclass(frozen=True)
class Quantized:
    """A matrix [rows, k] of quantized numbers.

    Attributes:
        numbers: [rows, row_width(k)], as they are stored.
        scale: float16 [rows, groups(k)].
        k: numbers of a row.
        group_size: 0 for one scale a row.
    """

    numbers: Tensor
    scale: Tensor
    k: int
    group_size: int

    def values(self) -> Tensor:
        """What it stands for: float32 [rows, k]."""
        return dequantize(self.numbers, self.scale, self.k, self.group_size)


def round_to_nearest(values: Tensor, dtype: torch.dtype, group_size: int) -> Quantized:
    """Quantize a matrix [rows, k] number by number: what better ways are compared with."""
    k = values.shape[1]
    scale = fit_scales(values, dtype, group_size)
    numbers = round_to(values, spread(scale, k, group_size), dtype)
    return Quantized(pack(numbers, dtype), scale, k, group_size)


@dataclass(frozen=True)
class QuantizedPIFA:
    """A matrix in pivoting form with quantized factors, see `pifa_vllm.factorization`.

    Attributes:
        pivots: int32 [r], of rows or columns.
        columns: whether it has pivot columns.
    """

    pivot_weight: Quantized
    coefficients: Quantized
    pivots: Tensor
    columns: bool = False

    def values(self) -> PIFA | PivotColumns:
        """What it stands for, in float32."""
        form = PivotColumns if self.columns else PIFA
        return form(self.pivot_weight.values(), self.coefficients.values(), self.pivots)
