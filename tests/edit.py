"""Spoiled copies of checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def copy_edited(
    source: Path,
    target: Path,
    *,
    tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
    config: Callable[[dict[str, Any]], object] = lambda _: None,
) -> Path:
    """Copy a single-shard model directory and let two functions change its tensors and config.json in place."""
    shutil.copytree(source, target)
    shard = target / "model.safetensors"
    held = load_file(shard)
    tensors(held)
    save_file(held, shard, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(held, shard.name)})
    )
    path = target / "config.json"
    settings = json.loads(path.read_text())
    config(settings)
    path.write_text(json.dumps(settings))
    return target
