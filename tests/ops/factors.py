"""Random layers in pivoting form, and the dense products that they stand for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pifa_vllm.factorization import PIFA
from pifa_vllm.ops import stacked_rows
from pifa_vllm.quantization import QuantizedPIFA, round_to_nearest

# Relative to the largest output; the reference is float64 on the rounded factors.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (ranks, out_features, n): ranks off every tile, rank 0, no remaining rows, unequal shards.
ODD_SHAPES = [
    *[((r,), (m,), n) for m in (1, 5, 123) for n in (1, 5, 123) for r in (0, 1, 5, 123) if r <= m],
    ((5, 0, 123), (5, 1, 130), 123),
    ((0, 0), (3, 5), 5),
    ((32, 17), (123, 64), 64),
    ((100, 33, 192), (300, 192, 192), 577),
    ((270,), (600,), 520),
]


@dataclass
class Layer:
    """Arguments of `pifa_linear` beside x."""

    shards: list[PIFA]
    bias: Tensor | None
    n: int

    @classmethod
    def random(cls, ranks, out_features, n, dtype=torch.float32, *, with_bias=False, seed=0):
        g = torch.Generator().manual_seed(seed)
        shards = []
        for r, m in zip(ranks, out_features, strict=True):
            rows = torch.randperm(m, generator=g)[:r].sort().values.to(torch.int32)
            pivot_weight = torch.randn(r, n, generator=g) / n**0.5
            coefficients = (torch.rand(m - r, r, generator=g) * 2 - 1) / max(r, 1) ** 0.5
            shards.append(PIFA(pivot_weight.to(dtype), coefficients.to(dtype), rows))
        bias = torch.randn(sum(out_features), generator=g).to(dtype) if with_bias else None
        return cls(shards, bias, n)

    def arguments(self):
        ranks, out_features = [s.rank for s in self.shards], [s.shape[0] for s in self.shards]
        return [
            torch.cat([s.pivot_weight for s in self.shards]),
            torch.cat([s.coefficients.flatten() for s in self.shards]),
            stacked_rows([s.pivot_rows for s in self.shards], out_features),
            ranks,
            out_features,
            self.bias,
        ]

    def quantized(self, pivot_dtype, coefficient_dtype, group_size):
        """The same arguments with quantized factors, and a layer of what they stand for."""
        arguments = self.arguments()
        shards = [
            QuantizedPIFA(
                round_to_nearest(shard.pivot_weight.float(), pivot_dtype, group_size),
                round_to_nearest(shard.coefficients.float(), coefficient_dtype, group_size),
                shard.pivot_rows,
            )
            for shard in self.shards
        ]
        arguments[0] = torch.cat([shard.pivot_weight.numbers for shard in shards])
        arguments[1] = torch.cat([shard.coefficients.numbers.flatten() for shard in shards])
        scales = [
            torch.cat([shard.pivot_weight.scale for shard in shards]),
            torch.cat([shard.coefficients.scale.flatten() for shard in shards]),
            group_size,
        ]
        return [*arguments, *scales], Layer([shard.values() for shard in shards], self.bias, self.n)

    def expected(self, x):
        """The dense product in float64."""
        weight = torch.cat([s.to(torch.float64).dense() for s in self.shards])
        y = x.double() @ weight.T
        return y if self.bias is None else y + self.bias.double()


def check(actual, expected, dtype, tolerance=None):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    if expected.numel():
        error = (actual.double() - expected).abs().max()
        assert error <= (tolerance or TOLERANCE[dtype]) * expected.abs().max().clamp(min=1.0)
