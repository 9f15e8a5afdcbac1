"""Solving one module: low-rank factors by the chosen method, then the form that is stored."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # it is not re-exported

from pifa_vllm.checkpoint import Checkpoint
from pifa_vllm.checkpoint.schema import PIVOT_COLUMNS, WEIGHT_SCALE
from pifa_vllm.checkpoint.writer import module_tensors
from pifa_vllm.compression.allocation import PARAMETERS
from pifa_vllm.compression.correction import fit_correction
from pifa_vllm.compression.decoder import StagedLayer, layer_name
from pifa_vllm.compression.lowrank import (
    Factors,
    alternating_update,
    output_error,
    target_cross,
    truncated_svd,
    whitened_svd,
)
from pifa_vllm.compression.moments import Moments
from pifa_vllm.compression.options import CompressOptions
from pifa_vllm.compression.quantize import quantize_columns, quantize_factors, round_matrix
from pifa_vllm.compression.report.schema import ModuleReport
from pifa_vllm.errors import PifaError
from pifa_vllm.factorization import PIFA, PivotColumns, by_columns, factorize
from pifa_vllm.quantization import QuantizedPIFA


class LayerSolver:
    """Solves the modules of one decoder layer and collects what the checkpoint stores of them.

    Args:
        options: of the run.
        layer: index of the decoder layer.
        dense: the layer with its original weights.
        ranks: rank by full module name; modules that are not named stay dense.
        outputs: S by path in the layer, see `whitened_svd`; None where errors are measured on the inputs alone.
        dtype: storage dtype.
        expected: by full module name, see `ModuleReport.expected_loss`.
        given: the checkpoint that has the factors, where they are only to be quantized.
        on_module: told of each finished module.
    """

    def __init__(
        self,
        options: CompressOptions,
        layer: int,
        dense: StagedLayer,
        ranks: dict[str, int],
        outputs: dict[str, Tensor] | None,
        dtype: torch.dtype,
        expected: dict[str, float],
        given: Checkpoint | None,
        on_module: Callable[[ModuleReport], None],
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.reports: list[ModuleReport] = []
        self._options = options
        self._layer = layer
        self._dense = dense
        self._ranks = ranks
        self._outputs = outputs
        self._dtype = dtype
        self._format = options.factors
        self._expected = expected
        self._given = given
        self._on_module = on_module

    def __call__(self, module: str, weight: Tensor, moments: Moments) -> Tensor:
        """Solve a module and return the weight [m, n], float32, that the stored form stands for.

        Raises:
            PifaError: if its inputs or its solution are not finite.
        """
        started = time.perf_counter()
        name = layer_name(self._layer, module)
        gram = moments.gram()
        if not bool(torch.isfinite(gram).all()):
            raise PifaError(
                f"{name}: its calibration inputs overflow float32, expected finite activations. Does the model "
                "work on this text (`pifa-vllm eval`)?"
            )
        m, n = weight.shape
        bias = self._dense.linears[module].bias
        if name not in self._ranks:
            return self._keep_dense(name, weight, moments, bias, started)

        factors: PIFA | None = None
        if self._given is not None:
            given = self._given.load(name).to(torch.float64)
            if not isinstance(given, PIFA):
                raise PifaError(
                    f"{name}: expected pivot rows, which are what is quantized, found pivot columns."
                )
            factors = given
            product = factors.dense()
            target = product + self._correction(weight, moments)
        else:
            try:
                u, v = self._factors(module, weight, gram, moments)
            except LinAlgError as error:
                raise PifaError(
                    f"{name}: its decomposition did not converge ({error}). A larger --ridge helps."
                ) from error
            product = target = u @ v
        if not bool(torch.isfinite(product).all()):
            raise PifaError(f"{name}: its solution is not finite. A larger --ridge helps.")
        if self._options.representation == "pifa":
            if factors is None:
                factors = factorize(u, v)
            rank, largest = factors.rank, factors.max_coefficient
            plain = factors.to(self._dtype)
            stored: PIFA | QuantizedPIFA = plain
            values: PIFA | PivotColumns = plain
            if self._format is not None:
                if self._format.pivots(name) == PIVOT_COLUMNS:
                    rounded = quantize_columns(by_columns(factors), target, gram, self._format)
                else:
                    rounded = quantize_factors(factors, target, gram, self._format)
                stored, values = rounded, rounded.values()
                # Columns may turn out to be of less rank than the rows were.
                rank, largest = values.rank, values.max_coefficient
            # In float64 before rounding once: the product of stored factors, not of a float32 GEMM's error.
            used = values.to(torch.float64).dense()
            self.tensors.update(module_tensors(name, stored, bias, self._dtype))
        else:
            rank, largest = self._ranks[name], 0.0
            used = product.to(self._dtype).double()
            self._store_dense(name, used, bias)
        if not bool(torch.isfinite(used).all()):
            raise PifaError(
                f"{name}: its rank-{rank} solution does not fit {self._dtype}, expected finite values."
            )
        scale = float(product.norm())
        self._report(
            name,
            m,
            n,
            rank=rank,
            density=PARAMETERS[self._options.representation](m, n, rank) / (m * n),
            output_error=output_error(weight, used, gram),
            weight_error=float((used - product).norm()) / scale if scale > 0.0 else 0.0,
            max_coefficient=largest,
            started=started,
        )
        return used.float()

    def _factors(self, module: str, weight: Tensor, gram: Tensor, moments: Moments) -> Factors:
        method, ridge = self._options.method, self._options.effective_ridge
        rank = self._ranks[layer_name(self._layer, module)]
        outputs = None if self._outputs is None else self._outputs[module].to(weight.device)
        if method == "svd":
            return truncated_svd(weight, rank)
        if method == "svd-llm":
            return whitened_svd(weight, gram, rank, ridge, outputs)
        mix = self._options.effective_mix
        if method == "mpifa":
            target = target_cross(weight, gram, moments.cross(), mix)
            return alternating_update(weight, gram, target, rank, ridge)
        target = weight.double() + self._correction(weight, moments)
        # Reduced-rank regression: the best rank-r answer to the least-squares one, in the metric of the inputs.
        return whitened_svd(target, gram, rank, ridge, outputs)

    def _correction(self, weight: Tensor, moments: Moments) -> Tensor:
        return fit_correction(weight, moments, self._options.effective_mix, self._options.feedback).delta

    def _keep_dense(
        self, name: str, weight: Tensor, moments: Moments, bias: Tensor | None, started: float
    ) -> Tensor:
        used = weight.to(self._dtype)
        self._store_dense(name, used, bias)
        gram = moments.gram()
        if self._format is not None:
            target = weight.double()
            if self._options.folds == 2:
                target += self._correction(weight, moments)
            found = round_matrix(target, gram, self._format.dtype, self._format.group)
            used = found.values()
            self.tensors |= {f"{name}.weight": found.numbers, f"{name}.{WEIGHT_SCALE}": found.scale}
        m, n = weight.shape
        scale = float(weight.norm())
        self._report(
            name,
            m,
            n,
            rank=min(m, n),
            density=1.0,
            output_error=output_error(weight, used.double(), gram) if self._format else 0.0,
            weight_error=float((used - weight).norm()) / scale if self._format and scale > 0.0 else 0.0,
            max_coefficient=0.0,
            started=started,
            dense=True,
        )
        return used.float()

    def _store_dense(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        self.tensors[f"{name}.weight"] = weight.to(self._dtype)
        if bias is not None:
            self.tensors[f"{name}.bias"] = bias.to(self._dtype)

    def _report(
        self, name: str, m: int, n: int, *, started: float, dense: bool = False, **figures: float
    ) -> None:
        report = ModuleReport.model_validate(
            {
                "name": name,
                "layer": self._layer,
                "kind": name.rsplit(".", 1)[1],
                "m": m,
                "n": n,
                "dense": dense,
                "seconds": time.perf_counter() - started,
                "expected_loss": self._expected.get(name),
                **figures,
            }
        )
        self.reports.append(report)
        self._on_module(report)
