"""PIFA checkpoints for the tests, made from small dense models without the compressor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pifa_vllm.checkpoint import CheckpointWriter, FactorFormat, PIFAConfig, Shards, read_json
from pifa_vllm.checkpoint.schema import PIVOT_COLUMNS, PIVOT_ROWS
from pifa_vllm.checkpoint.writer import module_tensors
from pifa_vllm.factorization import PIFA, by_columns, factorize
from pifa_vllm.quantization import QuantizedPIFA, round_to_nearest

RankOf = Callable[[str, int, int], int | None]


def save_pifa_twin(
    dense_dir: Path, pifa_dir: Path, twin_dir: Path, *, ranks: RankOf, kind: FactorFormat | None = None
) -> None:
    """Truncate the projections of a dense model and save the result twice: as PIFA, and as dense weights.

    Args:
        dense_dir: a Hugging Face directory.
        pifa_dir: the PIFA checkpoint to create, in the dtype of the dense weights.
        twin_dir: the dense checkpoint to create, which holds the matrices that the PIFA one stands for.
        ranks: (module name, out features, in features) to a rank from 0 to min(out, in); None stays dense.
        kind: how the projections are quantized, None where they are not.
    """
    shards = Shards(dense_dir)
    pifa: dict[str, Tensor] = {}
    twin: dict[str, Tensor] = {}
    kept: dict[str, int] = {}
    parameters = dense_parameters = 0
    for tensor_name in shards.entries:
        tensor = shards.load(tensor_name)
        module = tensor_name.removesuffix(".weight")
        rank = None
        if module.endswith("_proj"):
            rank = ranks(module, *tensor.shape)
            dense_parameters += tensor.numel()
        if rank is None:
            pifa[tensor_name] = twin[tensor_name] = tensor
            if tensor_name.endswith("_proj.weight"):
                parameters += tensor.numel()
                if kind is not None:
                    found = round_to_nearest(tensor, kind.dtype, kind.group)
                    pifa |= {tensor_name: found.numbers, f"{tensor_name}_scale": found.scale}
                    twin[tensor_name] = found.values()
            continue
        factors = factors_of(tensor, rank)
        kept[module] = factors.rank
        parameters += factors.parameters
        stored: PIFA | QuantizedPIFA = factors.to(tensor.dtype)
        if kind is not None:
            stored = quantized(factors, kind, kind.pivots(module))
        pifa |= module_tensors(module, stored, None, tensor.dtype)
        values = stored if isinstance(stored, PIFA) else stored.values()
        twin[tensor_name] = values.to(torch.float64).dense().to(tensor.dtype)

    config = read_json(dense_dir / "config.json")
    section = PIFAConfig(
        format_version=1 if kind is None else 2,
        density=max(parameters, 1) / dense_parameters,
        ranks=kept,
        factors=kind,
    )
    for directory, tensors, pifa_config in ((pifa_dir, pifa, section), (twin_dir, twin, None)):
        writer = CheckpointWriter(directory, directory.with_name(directory.name + ".staging"))
        writer.copy_companions(dense_dir)
        writer.write_shard("model.safetensors", tensors)
        writer.publish(config, pifa_config)


def quantized(factors: PIFA, kind: FactorFormat, pivots: str = PIVOT_ROWS) -> QuantizedPIFA:
    """Round factors, with pivot rows or columns, to nearest."""
    columns = pivots == PIVOT_COLUMNS
    form = by_columns(factors) if columns else factors
    return QuantizedPIFA(
        round_to_nearest(form.pivot_weight.float(), kind.dtype, kind.group),
        round_to_nearest(form.coefficients.float(), kind.coefficient_dtype, kind.group),
        form.pivot_rows if isinstance(form, PIFA) else form.pivot_columns,
        columns,
    )


def factors_of(weight: Tensor, rank: int) -> PIFA:
    """Truncate a matrix [m, n] by its SVD; in float64."""
    m, n = weight.shape
    if rank == 0:
        empty = torch.empty(0, dtype=torch.int32)
        return PIFA(weight.new_empty(0, n), weight.new_empty(m, 0), empty)
    u, s, vh = torch.linalg.svd(weight.to(torch.float64), full_matrices=False)
    return factorize(u[:, :rank] * s[:rank], vh[:rank])
