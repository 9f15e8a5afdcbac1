"""The layers of a PIFA checkpoint as torch modules, with its tensors under its names for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pifa_vllm.checkpoint import FactorFormat, check_pivots
from pifa_vllm.checkpoint.schema import PIVOT_COLUMNS, PIVOT_ROWS, factor_shapes
from pifa_vllm.factorization import PIFA
from pifa_vllm.ops import Matrix, column_order, dense, pifa_linear, pivot_columns_linear, stacked_rows
from pifa_vllm.ops.cpu import load
from pifa_vllm.ops.reference import pifa_linear_reference
from pifa_vllm.quantization import Quantized, QuantizedPIFA, groups, row_width


class PIFALinear(nn.Module):
    """A linear layer [m, n] of rank r in pivoting form, y = x Wᵀ + b (see `pifa_vllm.factorization`).

    Attributes:
        pivots: "pivot_rows".
        pivot_weight: parameter [r, n].
        coefficients: parameter [m - r, r].
        pivot_rows: int32 buffer [r].
        bias: parameter [m] or None.
        out_rows: int32 buffer [m], derived from `pivot_rows` by `finish_loading`, not saved.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.pivots = PIVOT_ROWS
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pivot_weight = nn.Parameter(torch.empty(rank, in_features, **kind))
        self.coefficients = nn.Parameter(torch.empty(out_features - rank, rank, **kind))
        self.bias = nn.Parameter(torch.empty(out_features, **kind)) if bias else None
        self.pivot_rows: Tensor
        self.out_rows: Tensor
        self.register_buffer("pivot_rows", torch.empty(rank, device=device, dtype=torch.int32))
        rows = torch.empty(out_features, device=device, dtype=torch.int32)
        self.register_buffer("out_rows", rows, persistent=False)
        # Other pivot rows with the old outputs would give wrong outputs without a word.
        self.register_load_state_dict_post_hook(_finish_state_dict)  # type: ignore[no-untyped-call]  # torch's

    def finish_loading(self, source: str) -> None:
        """Check the pivot rows and derive the rows of the outputs from them.

        Raises:
            CheckpointError: naming `source`, if they are not strictly increasing rows in [0, m).
        """
        check_pivots(self.pivot_rows, self.rank, self.out_features, source)
        self.out_rows = stacked_rows([self.pivot_rows], [self.out_features])
        if self.out_rows.device.type == "cpu":
            load()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., n] to [..., m], in the dtype of the factors, or of torch.autocast where that is on."""
        if self.training and torch.is_grad_enabled() and self.pivot_weight.requires_grad:
            return linear(x, self._assembled(), self.bias)
        ranks, out_features = [self.rank], [self.out_features]
        coefficients = self.coefficients.flatten()
        # Autocast casts for torch's own ops only; the kernels take one dtype.
        autocast = torch.is_autocast_enabled(x.device.type)
        layer = pifa_linear_reference if autocast else pifa_linear
        return layer(x, self.pivot_weight, coefficients, self.out_rows, ranks, out_features, self.bias)

    def _assembled(self) -> Tensor:
        """W [m, n], differentiable, in the dtype of the factors.

        Where factors are trained, on many tokens at a time, making W and one product with it are faster than two
        products with activations between them, which are put in order forth and back.
        """
        with torch.autocast(self.pivot_weight.device.type, enabled=False):
            rows = torch.cat([self.pivot_weight, self.coefficients @ self.pivot_weight])  # [m, n], stacked
        return torch.zeros_like(rows).index_copy(0, self.out_rows.long(), rows)

    def dense(self) -> nn.Linear:
        """Rebuild the ordinary layer, multiplied in float64 and rounded to the dtype of the factors."""
        factors = PIFA(self.pivot_weight.detach(), self.coefficients.detach(), self.pivot_rows)
        weight = factors.to(torch.float64).dense().to(self.pivot_weight.dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", self.bias)
        return linear

    def extra_repr(self) -> str:
        """Show the shape as torch.nn.Linear does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


def _finish_state_dict(module: PIFALinear | QuantizedLinear, _: object) -> None:
    module.finish_loading(f"state dict: tensor {module.pivots}")


class QuantizedLinear(nn.Module):
    """A linear layer [m, n] with quantized numbers (`pifa_vllm.quantization`), in pivoting form or dense.

    Attributes:
        rank: r, or None where it is dense.
        pivots: "pivot_rows" or "pivot_columns".
        pivot_weight, pivot_scale, coefficients, coefficient_scale: parameters without gradients, and
        pivot_rows, or pivot_columns: int32 buffer [r], where there is a rank.
        weight, weight_scale: parameters without gradients, where there is none.
        bias: parameter [m] or None.
        order: int32 buffer, derived from the pivots by `finish_loading`, not saved: the outputs' rows [m]
            (`ops.stacked_rows`), or the inputs' order [n] (`ops.column_order`).
    """

    pivot_weight: Tensor
    pivot_scale: Tensor
    coefficients: Tensor
    coefficient_scale: Tensor
    weight: Tensor
    weight_scale: Tensor
    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None,
        kind: FactorFormat,
        *,
        pivots: str = PIVOT_ROWS,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.kind = in_features, out_features, rank, kind
        self.pivots = pivots
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        sizes = in_features if pivots == PIVOT_COLUMNS else out_features
        order = None if rank is None else torch.empty(sizes, device=device, dtype=torch.int32)
        self.register_buffer("order", order, persistent=False)

        def matrix(numbers: str, scale: str, rows: int, k: int, stored: torch.dtype) -> None:
            for name, width, kind_of in (
                (numbers, row_width(k, stored), stored),
                (scale, groups(k, kind.group), torch.float16),
            ):
                tensor = torch.empty(rows, width, device=device, dtype=kind_of)
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

        if rank is None:
            matrix("weight", "weight_scale", out_features, in_features, kind.dtype)
            return
        weight, coefficients = factor_shapes(pivots, out_features, in_features, rank)
        matrix("pivot_weight", "pivot_scale", *weight, kind.dtype)
        matrix("coefficients", "coefficient_scale", *coefficients, kind.coefficient_dtype)
        self.register_buffer(pivots, torch.empty(rank, device=device, dtype=torch.int32))
        self.register_load_state_dict_post_hook(_finish_state_dict)  # type: ignore[no-untyped-call]  # torch's

    def finish_loading(self, source: str) -> None:
        """Check the pivots, if there are any, and derive the order of outputs or inputs from them.

        Raises:
            CheckpointError: naming `source`, if they are not strictly increasing rows in [0, m), or columns in
                [0, n).
        """
        if self.rank is not None:
            columns = self.pivots == PIVOT_COLUMNS
            pivots, size = self.get_buffer(self.pivots), self.in_features if columns else self.out_features
            check_pivots(pivots, self.rank, size, source)
            self.order = column_order(pivots, size) if columns else stacked_rows([pivots], [size])
        if next(self.parameters()).device.type == "cpu":
            load()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., n] to [..., m], in the dtype of x."""
        bias, group = None if self.bias is None else self.bias.to(x.dtype), self.kind.group
        if self.rank is None:
            return dense(x, Matrix(self.weight, self.weight_scale, group), bias)
        if self.pivots == PIVOT_COLUMNS:
            pivots = Matrix(self.pivot_weight, self.pivot_scale, group)
            rest = Matrix(self.coefficients, self.coefficient_scale, group)
            return pivot_columns_linear(x, pivots, rest, cast("Tensor", self.order), bias)
        return pifa_linear(
            x,
            self.pivot_weight,
            self.coefficients.flatten(),
            self.order,
            [self.rank],
            [self.out_features],
            bias,
            self.pivot_scale,
            self.coefficient_scale.flatten(),
            group,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move to another device, never to another dtype: `to(torch.bfloat16)` is for the rest of a model."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call, no-any-return]  # torch's

    def dense(self) -> nn.Linear:
        """Rebuild the ordinary layer, multiplied in float64, in float32."""
        group = self.kind.group
        if self.rank is None:
            weight = Quantized(self.weight, self.weight_scale, self.in_features, group).values()
        else:
            (_, k), (_, of_rest) = factor_shapes(self.pivots, self.out_features, self.in_features, self.rank)
            pivots = Quantized(self.pivot_weight, self.pivot_scale, k, group)
            rest = Quantized(self.coefficients, self.coefficient_scale, of_rest, group)
            columns = self.pivots == PIVOT_COLUMNS
            factors = QuantizedPIFA(pivots, rest, self.get_buffer(self.pivots), columns).values()
            weight = factors.to(torch.float64).dense().float()
        found = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        found.weight = nn.Parameter(weight)
        found.register_parameter("bias", self.bias)
        return found

    def extra_repr(self) -> str:
        """Show the shape as torch.nn.Linear does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bits={self.kind.bits}, bias={self.bias is not None}"
        )
