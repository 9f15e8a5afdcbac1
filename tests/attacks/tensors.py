"""Attacks by tensors: pivot rows, factors and values that are not what they must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.attacks.spoiling import SHARD, Kind, Q, Spoil, both, drop, put, rank, tensors, value

ROWS, WEIGHT, COEFFICIENTS = f"{Q}.pivot_rows", f"{Q}.pivot_weight", f"{Q}.coefficients"
# Of every base: the outputs and the rank of q_proj.
M, R = 128, 32


def rows(*values: int, then: int = 0) -> Tensor:
    """Pivot rows that begin with some values and go on ascending from `then`."""
    return torch.tensor([*values, *range(then, then + R - len(values))], dtype=torch.int32)


pivots = Kind("pivot rows")
pivots.add("row out of range", value(ROWS, M, -1), ROWS, str(M))
pivots.add("row far out of range", value(ROWS, 2**31 - 1, -1), ROWS, "2147483647")
pivots.add("negative row", value(ROWS, -1), ROWS, "-1")
pivots.add("most negative row", value(ROWS, -(2**31)), ROWS, "-2147483648")
pivots.add("duplicate row", put(ROWS, rows(0, 0, then=2)), ROWS, "increasing")
pivots.add("unsorted rows", put(ROWS, rows(5, 1, then=6)), ROWS, "increasing")
pivots.add("descending rows", put(ROWS, rows(then=0).flip(0)), ROWS, "increasing")
pivots.add("rows of int64", put(ROWS, rows().to(torch.int64)), SHARD, ROWS, "int64")
pivots.add("rows of uint8", put(ROWS, rows().to(torch.uint8)), SHARD, ROWS, "uint8")
pivots.add("rows of float32", put(ROWS, rows().to(torch.float32)), SHARD, ROWS, "float32")
pivots.add("one row too few", put(ROWS, rows()[:-1]), SHARD, ROWS, str(R - 1))
pivots.add("no rows", put(ROWS, rows()[:0]), SHARD, ROWS, "[0]")
pivots.add("rows with two axes", put(ROWS, rows().view(1, R)), SHARD, ROWS, "[1, 32]")
pivots.add("rows missing", drop(ROWS), ROWS, "missing")


def factors(weight: tuple[int, ...], coefficients: tuple[int, ...], dtype: torch.dtype) -> Spoil:
    return tensors(
        lambda held: held.update(
            {WEIGHT: torch.zeros(weight, dtype=dtype), COEFFICIENTS: torch.zeros(coefficients, dtype=dtype)}
        )
    )


def rename(old: str, new: str) -> Spoil:
    return tensors(lambda held: held.update({new: held.pop(old)}))


shapes = Kind("factors")
shapes.add(
    "weight transposed", tensors(lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()})), SHARD, WEIGHT
)
shapes.add("coefficients transposed", put(COEFFICIENTS, torch.zeros(R, M - R)), SHARD, COEFFICIENTS)
shapes.add("coefficients of a larger matrix", put(COEFFICIENTS, torch.zeros(M, R)), SHARD, Q, "160")
shapes.add("coefficients flat", put(COEFFICIENTS, torch.zeros((M - R) * R)), SHARD, COEFFICIENTS)
shapes.add("weight with three axes", put(WEIGHT, torch.zeros(R, M, 1)), SHARD, WEIGHT)
shapes.add("weight of a wider input", put(WEIGHT, torch.zeros(R, M + 1)), SHARD, Q, "129")
shapes.add("weight without columns", put(WEIGHT, torch.zeros(R, 0)), SHARD, WEIGHT)
shapes.add("integer factors", factors((R, M), (M - R, R), torch.int32), SHARD, COEFFICIENTS, "int32")
shapes.add("factors of two dtypes", put(COEFFICIENTS, torch.zeros(M - R, R).half()), SHARD, COEFFICIENTS)
shapes.add("factors in float8", factors((R, M), (M - R, R), torch.float8_e4m3fn), SHARD, "float8_e4m3fn")
shapes.add("coefficients missing", drop(COEFFICIENTS), COEFFICIENTS, "missing")
shapes.add("weight missing", drop(WEIGHT), WEIGHT, "missing")
shapes.add("dense weight beside factors", put(f"{Q}.weight", torch.zeros(M, M)), SHARD, f"{Q}.weight")
shapes.add("orphan factors", put("lm_head.coefficients", torch.zeros(2, 2)), SHARD, "lm_head.coefficients")
shapes.add("bias too long", put(f"{Q}.bias", torch.zeros(M + 1)), SHARD, f"{Q}.bias", base="qwen2")
shapes.add("norm too short", put("model.norm.weight", torch.ones(M - 1)), SHARD, "model.norm.weight")
shapes.add("norm missing", drop("model.norm.weight"), "model.norm.weight", "missing")
shapes.add("embedding missing", drop("model.embed_tokens.weight"), "model.embed_tokens.weight", "missing")
shapes.add(
    "embedding of integers",
    put("model.embed_tokens.weight", torch.zeros(258, M, dtype=torch.int64)),
    SHARD,
    "model.embed_tokens.weight",
    "int64",
)
shapes.add(
    "dense projection missing",
    drop("model.layers.0.self_attn.k_proj.weight"),
    "model.layers.0.self_attn.k_proj.weight",
    "missing",
)
shapes.add(
    "name that clears the screen",
    rename("model.norm.weight", "model.norm.weight\x1b[2J\n"),
    "printable",
    r"\x1b[2J",
)
shapes.add("name of 10,000 letters", put("x" * 10_000, torch.ones(1)), "printable", "xxx")
shapes.add(
    "factors in place of the embedding",
    both(
        rank(2, "model.embed_tokens"),
        drop("model.embed_tokens.weight"),
        put("model.embed_tokens.pivot_weight", torch.zeros(2, M)),
        put("model.embed_tokens.coefficients", torch.zeros(256, 2)),
        put("model.embed_tokens.pivot_rows", torch.arange(2, dtype=torch.int32)),
    ),
    "model.embed_tokens",
)

values = Kind("values")
for kind, tensor, base in (
    ("a pivot weight", WEIGHT, "llama"),
    ("coefficients", COEFFICIENTS, "llama"),
    ("a dense projection", "model.layers.0.self_attn.k_proj.weight", "llama"),
    ("a norm", "model.layers.1.input_layernorm.weight", "llama"),
    ("the last norm", "model.norm.weight", "mistral"),
    ("a norm of the heads", "model.layers.0.self_attn.q_norm.weight", "qwen3"),
    ("the embedding", "model.embed_tokens.weight", "llama"),
    ("the head", "lm_head.weight", "untied"),
    ("the bias of a compressed module", f"{Q}.bias", "qwen2"),
    ("the bias of a dense module", "model.layers.0.self_attn.k_proj.bias", "qwen2"),
):
    for word, number in (("NaN", math.nan), ("infinity", -math.inf if "bias" in tensor else math.inf)):
        values.add(f"{word} in {kind}", value(tensor, number, -1), tensor, "NaN", base=base)
