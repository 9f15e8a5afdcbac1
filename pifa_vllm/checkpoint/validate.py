"""What must hold of a PIFA checkpoint before anything allocates or launches for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pifa_vllm.checkpoint.files import check_directory
from pifa_vllm.checkpoint.schema import (
    BIAS,
    COEFFICIENT_SCALE,
    COEFFICIENTS,
    PIVOT_COLUMNS,
    PIVOT_ROWS,
    PIVOT_SCALE,
    PIVOT_WEIGHT,
    WEIGHT_SCALE,
    FactorFormat,
    PIFAConfig,
    factor_shapes,
    parse_section,
    read_model_config,
)
from pifa_vllm.checkpoint.shards import INDEX_NAME, SINGLE_NAME, Shards
from pifa_vllm.checkpoint.sizes import check_quantized, check_sizes, linear_shapes, read_sizes
from pifa_vllm.errors import CheckpointError
from pifa_vllm.factorization import PIFA, PivotColumns
from pifa_vllm.quantization import Quantized

OF_FACTORS = (PIVOT_WEIGHT, PIVOT_SCALE, COEFFICIENTS, COEFFICIENT_SCALE, PIVOT_ROWS, PIVOT_COLUMNS)
_SCALES = (PIVOT_SCALE, COEFFICIENT_SCALE, WEIGHT_SCALE)


@dataclass(frozen=True)
class ModuleEntry:
    """One compressed module as its shard's header describes it; [m, n] is the full matrix.

    Attributes:
        pivots: name of the tensor that says which its pivots are, "pivot_rows" or "pivot_columns".
        dtype: of the pivots' numbers.
    """

    name: str
    m: int
    n: int
    rank: int
    pivots: str
    dtype: torch.dtype
    has_bias: bool
    nbytes: int

    @property
    def parameters(self) -> int:
        """Kept numbers, r(m + n) - r²; indices and bias are not counted."""
        return self.rank * self.n + (self.m - self.rank) * self.rank

    @property
    def density(self) -> float:
        """Kept / dense parameters."""
        return self.parameters / (self.m * self.n)


@dataclass(frozen=True)
class Checkpoint:
    """A PIFA directory whose headers have been checked.

    Attributes:
        config: the validated `quantization_config`.
        shards: its tensors.
        modules: the compressed modules, by name, in the order of `config.ranks`.
        linear: the shape [m, n] of every linear module of the decoder, by name.
    """

    directory: Path
    config: PIFAConfig
    shards: Shards
    modules: dict[str, ModuleEntry]
    linear: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Open a checkpoint, checking files, schema, names, shapes and dtypes against one another.

        Nothing is allocated for it yet, and nothing may be before: transformers and vLLM take sizes from
        config.json that only this holds against the tensors that there are.

        Raises:
            CheckpointError: naming file, tensor, expected and found.
            UnsupportedModelError: if it is another kind of model than those that can be compressed.
        """
        path = directory / "config.json"
        raw = read_model_config(path)
        config = parse_section(raw, path)
        sizes = read_sizes(raw, str(path))
        check_directory(directory)
        shards = Shards(directory)
        _check_files(shards)
        full = linear_shapes(sizes, shards.entries)
        modules = {}
        for name, rank in config.ranks.items():
            _check_not_dense(shards, name, rank)
            if config.factors is None:
                modules[name] = _check_module(shards, name, rank)
            elif name in full:
                modules[name] = _check_quantized_module(shards, name, rank, *full[name], config.factors)
        for tensor, entry in shards.entries.items():
            module, _, suffix = tensor.rpartition(".")
            if suffix in OF_FACTORS and module not in modules:
                raise CheckpointError(
                    f"{entry.file}: tensor {tensor} belongs to a compressed module that "
                    "quantization_config.ranks does not name."
                )
            if suffix in (PIVOT_ROWS, PIVOT_COLUMNS) and suffix != modules[module].pivots:
                raise CheckpointError(
                    f"{entry.file}: tensor {tensor}: expected {modules[module].pivots} of this module by "
                    f"quantization_config, found {suffix}."
                )
            if suffix in _SCALES and (
                config.factors is None or (suffix == WEIGHT_SCALE and module in modules)
            ):
                raise CheckpointError(
                    f"{entry.file}: tensor {tensor}: expected no scales of a module that by "
                    "quantization_config is not quantized so."
                )
        found = dict.fromkeys(config.ranks, (0, 0)) | {name: (x.m, x.n) for name, x in modules.items()}
        check_sizes(sizes, directory, shards.entries, found, config.factors)
        return cls(directory, config, shards, modules, full)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is never quantized: the embedding's."""
        return next(
            x.dtype for name, x in self.shards.entries.items() if name.endswith("embed_tokens.weight")
        )

    def load(self, name: str) -> PIFA | PivotColumns:
        """Load one compressed module, checking its pivots and that every value is finite.

        Quantized factors come as what they stand for, in float32.

        Raises:
            CheckpointError: naming file, tensor, expected and found.
        """
        entry = self.modules[name]
        (_, of_pivots), (_, of_rest) = factor_shapes(entry.pivots, entry.m, entry.n, entry.rank)
        weight = self._load(f"{name}.{PIVOT_WEIGHT}", f"{name}.{PIVOT_SCALE}", of_pivots)
        coefficients = self._load(f"{name}.{COEFFICIENTS}", f"{name}.{COEFFICIENT_SCALE}", of_rest)
        form = PivotColumns if entry.pivots == PIVOT_COLUMNS else PIFA
        return form(weight, coefficients, self.pivots(name))

    def load_dense(self, name: str) -> Tensor:
        """Load one module's weight that is dense; where it is quantized, as what it stands for, in float32.

        Raises:
            CheckpointError: naming file, tensor, expected and found.
        """
        return self._load(f"{name}.weight", f"{name}.{WEIGHT_SCALE}", self.linear[name][1])

    def _load(self, name: str, scale: str, k: int) -> Tensor:
        tensor = self.shards.load(name)
        if self.config.factors is None or scale not in self.shards:
            check_finite(tensor, f"{self.shards.entry(name).file}: tensor {name}")
            return tensor
        scales = self.shards.load(scale)
        check_scale(scales, f"{self.shards.entry(scale).file}: tensor {scale}")
        values = Quantized(tensor, scales, k, self.config.factors.group).values()
        check_finite(values, f"{self.shards.entry(name).file}: tensor {name}")
        return values

    def check_pivots(self) -> None:
        """Read every module's pivots, a few KiB each: the check to make before a server starts.

        Raises:
            CheckpointError: at the first violation.
        """
        for name in self.modules:
            self.pivots(name)

    def verify(self) -> None:
        """Read every tensor: pivots sorted, unique and in range, all values finite.

        Raises:
            CheckpointError: at the first violation.
        """
        for name in self.modules:
            self.load(name)
        self.check_dense()

    def check_dense(self, dtype: torch.dtype | None = None) -> None:
        """Read every tensor that is no factor: biases, norms, the embedding, what was not compressed.

        Args:
            dtype: that it is served in, where values may overflow that are finite as they are stored.

        Raises:
            CheckpointError: naming file and tensor, if a value is not finite.
        """
        for name, entry in self.shards.entries.items():
            module, _, suffix = name.rpartition(".")
            if module in self.modules and suffix in OF_FACTORS:
                continue
            tensor, source = self.shards.load(name), f"{entry.file}: tensor {name}"
            if dtype is not None and tensor.is_floating_point() and tensor.element_size() > 1:
                tensor, source = tensor.to(dtype), f"{source} as {dtype}"
            if suffix == WEIGHT_SCALE:
                check_scale(tensor, source)
            check_finite(tensor, source)

    def pivots(self, name: str) -> Tensor:
        """Load which rows, or columns, of one module are its pivots: int32 [r].

        Raises:
            CheckpointError: naming file, tensor, expected and found.
        """
        entry = self.modules[name]
        tensor = f"{name}.{entry.pivots}"
        pivots, size = self.shards.load(tensor), entry.n if entry.pivots == PIVOT_COLUMNS else entry.m
        check_pivots(pivots, entry.rank, size, f"{self.shards.entry(tensor).file}: tensor {tensor}")
        return pivots


def check_pivots(pivots: Tensor, rank: int, size: int, source: str) -> None:
    """Check that `pivots` are `rank` strictly increasing indices in [0, size).

    A row out of range would make a scatter kernel write out of bounds, so this comes before any launch.

    Args:
        pivots: any tensor that claims to be pivot rows or columns.
        rank: expected length.
        size: rows, or columns, of the full matrix.
        source: file and tensor to name in errors.

    Raises:
        CheckpointError: naming the first violation.
    """
    if pivots.dtype != torch.int32 or tuple(pivots.shape) != (rank,):
        raise CheckpointError(
            f"{source}: expected int32 [{rank}], found {pivots.dtype} {list(pivots.shape)}."
        )
    if rank == 0:
        return
    what = "columns" if source.endswith(PIVOT_COLUMNS) else "rows"
    low, high = int(pivots.min()), int(pivots.max())
    if low < 0 or high >= size:
        raise CheckpointError(f"{source}: expected {what} in [0, {size}), found {low if low < 0 else high}.")
    steps = pivots[1:] - pivots[:-1]
    if bool((steps <= 0).any()):
        place = int((steps <= 0).nonzero()[0])
        raise CheckpointError(
            f"{source}: expected strictly increasing {what}, found {int(pivots[place])} followed by "
            f"{int(pivots[place + 1])} at index {place}."
        )


def check_finite(tensor: Tensor, source: str) -> None:
    """Raise CheckpointError, naming `source`, if a floating tensor holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    finite = torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)
    if not bool(finite.all()):
        raise CheckpointError(
            f"{source}: expected finite values, found {int((~finite).sum())} NaN or infinite."
        )


def check_scale(tensor: Tensor, source: str) -> None:
    """Raise CheckpointError, naming `source`, if a scale is not a finite number other than 0."""
    good = torch.isfinite(tensor) & (tensor != 0)
    if not bool(good.all()):
        raise CheckpointError(
            f"{source}: expected finite scales other than 0, found {int((~good).sum())} that are not."
        )


def _check_files(shards: Shards) -> None:
    """Check that loaders which prefer model.safetensors, or read whole shards, see what is validated here."""
    single = shards.directory / SINGLE_NAME
    others = sorted({entry.file.name for entry in shards.entries.values()} - {SINGLE_NAME})
    if single.is_file() and others:
        raise CheckpointError(
            f"{single}: lies beside {INDEX_NAME}, which names {others}; expected one or the other."
        )
    for path in sorted(shards.directory.glob("*.safetensors")):
        # Without an index, vLLM loads every one of them.
        if path.name not in (SINGLE_NAME, *others):
            raise CheckpointError(
                f"{path}: expected no shards but those that {INDEX_NAME} names, found one more."
            )
    for file, name in shards.unindexed:
        raise CheckpointError(f"{file}: tensor {name} lies here, but {INDEX_NAME} does not place it here.")


def _check_not_dense(shards: Shards, name: str, rank: int) -> None:
    if f"{name}.weight" in shards:
        raise CheckpointError(
            f"{shards.entry(f'{name}.weight').file}: tensor {name}.weight is dense, but "
            f"quantization_config.ranks names {name} as compressed to rank {rank}."
        )


def _check_module(shards: Shards, name: str, rank: int) -> ModuleEntry:
    weight = shards.entry(f"{name}.{PIVOT_WEIGHT}")
    coefficients = shards.entry(f"{name}.{COEFFICIENTS}")
    rows = shards.entry(f"{name}.{PIVOT_ROWS}")
    if len(weight.shape) != 2 or weight.shape[0] != rank:
        raise CheckpointError(
            f"{weight.file}: tensor {name}.{PIVOT_WEIGHT}: expected [{rank}, in] as "
            f"quantization_config.ranks says, found {list(weight.shape)}."
        )
    if len(coefficients.shape) != 2 or coefficients.shape[1] != rank:
        raise CheckpointError(
            f"{coefficients.file}: tensor {name}.{COEFFICIENTS}: expected [out - {rank}, {rank}], "
            f"found {list(coefficients.shape)}."
        )
    if rows.shape != (rank,) or rows.dtype != torch.int32:
        raise CheckpointError(
            f"{rows.file}: tensor {name}.{PIVOT_ROWS}: expected int32 [{rank}], "
            f"found {rows.dtype} {list(rows.shape)}."
        )
    if weight.dtype != coefficients.dtype or not weight.is_float:
        raise CheckpointError(
            f"{coefficients.file}: tensor {name}.{COEFFICIENTS}: expected the floating dtype of "
            f"{PIVOT_WEIGHT}, {weight.dtype}, found {coefficients.dtype}."
        )
    m, n = coefficients.shape[0] + rank, weight.shape[1]
    if rank > n or m == 0 or n == 0:
        raise CheckpointError(
            f"{weight.file}: tensor {name}.{PIVOT_WEIGHT}: expected a rank of at most min(out, in) of a "
            f"matrix that is not empty, found rank {rank} of [{m}, {n}]."
        )
    nbytes = weight.nbytes + coefficients.nbytes + rows.nbytes
    has_bias = f"{name}.{BIAS}" in shards
    if has_bias:
        bias = shards.entry(f"{name}.{BIAS}")
        if bias.shape != (m,) or bias.dtype != weight.dtype:
            raise CheckpointError(
                f"{bias.file}: tensor {name}.{BIAS}: expected {weight.dtype} [{m}], "
                f"found {bias.dtype} {list(bias.shape)}."
            )
    return ModuleEntry(name, m, n, rank, PIVOT_ROWS, weight.dtype, has_bias, nbytes)


def _check_quantized_module(
    shards: Shards, name: str, rank: int, m: int, n: int, factors: FactorFormat
) -> ModuleEntry:
    if rank > min(m, n):
        raise CheckpointError(
            f"{shards.directory / 'config.json'}: quantization_config.ranks[{name!r}]: expected at most "
            f"{min(m, n)} of a matrix [{m}, {n}], found {rank}."
        )
    pivots = factors.pivots(name)
    weight, coefficients = factor_shapes(pivots, m, n, rank)
    for numbers, scale, shape, dtype in (
        (PIVOT_WEIGHT, PIVOT_SCALE, weight, factors.dtype),
        (COEFFICIENTS, COEFFICIENT_SCALE, coefficients, factors.coefficient_dtype),
    ):
        check_quantized(
            shards.entries, shards.directory, f"{name}.{numbers}", f"{name}.{scale}", shape, dtype, factors
        )
    indices = shards.entry(f"{name}.{pivots}")
    if indices.shape != (rank,) or indices.dtype != torch.int32:
        raise CheckpointError(
            f"{indices.file}: tensor {name}.{pivots}: expected int32 [{rank}], "
            f"found {indices.dtype} {list(indices.shape)}."
        )
    has_bias = f"{name}.{BIAS}" in shards
    if has_bias:
        bias = shards.entry(f"{name}.{BIAS}")
        if bias.shape != (m,) or not bias.is_float:
            raise CheckpointError(
                f"{bias.file}: tensor {name}.{BIAS}: expected a floating dtype [{m}], "
                f"found {bias.dtype} {list(bias.shape)}."
            )
    stored = (PIVOT_WEIGHT, PIVOT_SCALE, COEFFICIENTS, COEFFICIENT_SCALE, pivots)
    nbytes = sum(shards.entry(f"{name}.{suffix}").nbytes for suffix in stored)
    return ModuleEntry(name, m, n, rank, pivots, factors.dtype, has_bias, nbytes)
