"""Calibration tokens in a file, so that several runs use the very same ones and none is drawn twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pifa_vllm.checkpoint.atomic import replace_file
from pifa_vllm.errors import CalibrationError


def write_tokens(path: Path, tokens: Tensor, record: dict[str, Any]) -> None:
    """Save tokens, int64 [samples, length], and their provenance, whole or not at all.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    metadata = {"record": json.dumps(record)}
    whole = tokens.contiguous()
    replace_file(path, lambda scratch: save_file({"tokens": whole}, scratch, metadata=metadata))


def read_tokens(path: Path, samples: int | None, length: int) -> tuple[Tensor, dict[str, Any]]:
    """Read the tokens that `write_tokens` saved, and their provenance; None takes as many samples as there are.

    Raises:
        CalibrationError: if the file is no such file, or holds another number of samples or tokens.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tokens: Tensor = file.get_tensor("tokens")
            record = dict(json.loads((file.metadata() or {}).get("record", "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CalibrationError(
            f"{path}: expected a safetensors file with a tensor `tokens` and a record of them ({error})."
        ) from error
    if tokens.ndim == 2 and samples is None:
        samples = len(tokens)
    if tokens.dtype != torch.int64 or tuple(tokens.shape) != (samples, length):
        raise CalibrationError(
            f"{path}: tensor tokens: expected int64 [{samples}, {length}] as --samples and --length say, found "
            f"{tokens.dtype} {list(tokens.shape)}."
        )
    if tokens.numel() and int(tokens.min()) < 0:
        raise CalibrationError(
            f"{path}: tensor tokens: expected ids of 0 or more, found {int(tokens.min())}."
        )
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return tokens, {**record, "tokens_file": path.name, "tokens_sha256": digest}
